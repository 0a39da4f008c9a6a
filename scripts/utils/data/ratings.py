"""The database of the rating page (`scripts/feedback.py`): how it is opened, and the ratings in it.

It is SQLite with a write-ahead log, so the newest ratings may stand in the file beside it (`-wal`): only
SQLite can tell what the database holds. `utils/feedback/database.py` writes it.
"""

import itertools
import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError
from utils.input_files import open_input

APPLICATION = 0x52414E4B  # "RANK", SQLite's mark of the program that a file belongs to
SCHEMA = 1  # the version that this code reads and writes
PATIENCE = 5.0  # seconds to wait for another program that writes

_MAGIC = b"SQLite format 3\0"
# what SQLite's codes mean for a user
_REASONS = {
    sqlite3.SQLITE_FULL: "the disk is full; make room (what was confirmed is kept)",
    sqlite3.SQLITE_READONLY: "cannot be written to; the file or its folder is read-only",
    sqlite3.SQLITE_BUSY: "is in use by another program that does not let go of it; end that program",
    sqlite3.SQLITE_LOCKED: "is in use by another program that does not let go of it; end that program",
    sqlite3.SQLITE_CORRUPT: "is damaged; put back a copy of it",
    sqlite3.SQLITE_NOTADB: "is no SQLite database; name another file",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; its folder must exist, and must be ours to write to",
    sqlite3.SQLITE_IOERR: "cannot be read or written; the disk may be full or broken",
    sqlite3.SQLITE_PERM: "is not ours to read or write",
}


@contextmanager
def database_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite in the body into a UserError of one line that names the file."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF  # the low byte is the kind, the rest the place
        raise UserError(f"{path}: {_REASONS.get(code, f'SQLite says: {error}')}") from None


def is_database(path: Path) -> bool:
    """Whether a file is an SQLite database, by its first bytes."""
    with open_input(path) as file:
        return file.read(len(_MAGIC)) == _MAGIC


def refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """Raise UserError for a database of another program, of newer code, or with damage."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise UserError(f"{path}: is a database of another program; name one that scripts/feedback.py made")
    if version > SCHEMA:
        raise UserError(f"{path}: was written by newer code (schema {version}; this code knows {SCHEMA}); "
                        "update this code")
    problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if problem != "ok":
        raise UserError(f"{path}: is damaged ({problem}); put back a copy of it")


_RATED = """
    SELECT rating.id, rating.kind, rating.confidence, rating.created, task.id, task.repeat_of, prompt.text,
           rater.name, edit.text, answer.text, policy.name, ranked.rank
    FROM ratings AS rating
    JOIN tasks AS task ON task.id = rating.task_id
    JOIN prompts AS prompt ON prompt.id = task.prompt_id
    JOIN raters AS rater ON rater.id = task.rater_id
    LEFT JOIN edits AS edit ON edit.rating_id = rating.id
    JOIN json_each(task.shown) AS place
    JOIN answers AS answer ON answer.id = place.value
    JOIN policies AS policy ON policy.id = answer.policy_id
    LEFT JOIN ranks AS ranked ON ranked.rating_id = rating.id AND ranked.answer_id = answer.id
    WHERE rating.id IN (SELECT ratings.id FROM ratings JOIN tasks ON tasks.id = task_id
                        WHERE undone IS NULL AND rater_id = coalesce(:rater, rater_id)
                              AND ratings.id < coalesce(:before, ratings.id + 1)
                        ORDER BY ratings.id DESC LIMIT :most)
    ORDER BY rating.id, place.key"""


def rated_rows(connection: sqlite3.Connection, rater: int | None = None, before: int | None = None,
               most: int | None = None) -> Iterator[dict]:
    """The ratings that count, oldest first.

    Args:
        rater: only those of this rater.
        before: only those with a smaller id.
        most: only the newest of these, so many.

    Yields:
        A dict for each: `id`, `kind`, `confidence`, `time` (Unix time), `task`, `repeat_of` (the task that
        this one repeats, or None), `prompt` (as `utils/data/conversations.py` stores it), `rater` (name),
        `better` (an edited answer, or None), and in the order that was shown `completions`, `policies`
        (names) and `ranks` (1 is the best; None unless the kind is "ranking").
    """
    given = {"rater": rater, "before": before, "most": -1 if most is None else most}
    answers = connection.execute(_RATED, given)
    for of_rating, group in itertools.groupby(answers, key=lambda row: row[:9]):
        shown = list(group)
        number, kind, confidence, time, task, repeat_of, prompt, name, better = of_rating
        yield {"id": number, "kind": kind, "confidence": confidence, "time": time, "task": task,
               "repeat_of": repeat_of, "prompt": prompt, "rater": name, "better": better,
               "completions": [row[9] for row in shown], "policies": [row[10] for row in shown],
               "ranks": [row[11] for row in shown] if kind == "ranking" else None}


def shown_of(text: str) -> list[int]:
    """The ids of a task's answers in the order in which they are shown."""
    return json.loads(text)
