"""The database of the rating page (`scripts/feedback.py`) as a data set: rankings, best answers or prompts.

It is SQLite with a write-ahead log, so the newest ratings may stand in the file beside it (`-wal`): only
SQLite can tell what the database holds. A digest is therefore one of the rows, not of the file.
`utils/feedback/database.py` writes it.

What counts: of a ranking each pair of answers that are not tied; "all bad" and "skip" compare nothing. Where
a prompt was rated several times (by several raters, or again by the same one), every rating counts, as labels
that may contradict each other: all pairs of a prompt are one prompt group, so its answers are computed once.
"""

import hashlib
import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from utils.data.conversations import messages_of
from utils.data.json_rows import BadRow, too_long
from utils.errors import UserError
from utils.input_files import open_input

DATABASE_ENDINGS = (".db", ".sqlite", ".sqlite3")  # usual ones; any name will do

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


# ---------------------------------------------------------------------------------------------- as a data set


def all_rated(path: Path) -> list[dict]:
    """`rated_rows` of a database that is only read: it is neither made nor brought up to date.

    Raises:
        UserError: when it is missing or cannot be read.
    """
    if not is_database(path):
        raise UserError(f"{path}: is no SQLite database; name another file")
    with database_errors(path), _read_only(path) as connection:
        refuse_foreign(connection, path)
        return list(rated_rows(connection))


def read_database(path: Path, field: str, most: int) -> tuple[str, Iterator[tuple[int, dict | BadRow]]]:
    """The rows of a database that a data key takes, as they are now.

    Args:
        field: the data key. The reward stage's take pairs, the SFT stage's the edited or best answers,
            `centring_data` the edited ones, PPO's and `prompts` (chat.py, feedback.py) the prompts, rated or
            not. `data` (prepare_data.py) takes pairs.
        most: bytes of a row (`max_row_bytes`).

    Returns:
        A digest of the rows; and (number, row) of each, where the number is the id of the rating, or of the
        prompt.

    Raises:
        UserError: when the file cannot be read, or holds no such rows.
    """
    if field == "rating_data":
        raise UserError(f"{field}: '{path}' holds rankings and no rated answers; name it as "
                        "reward_training_data")
    with database_errors(path), _read_only(path) as connection:
        refuse_foreign(connection, path)
        if field == "prompts" or field.startswith("rlhf_"):
            rows = [(number, prompt_row(text)) for number, text in
                    connection.execute("SELECT id, text FROM prompts ORDER BY id")]
            what = "prompt"
        else:
            of_rating, what = pair_rows, "ranking with a better and a worse answer"
            if field == "centring_data":
                of_rating, what = edit_rows, "edited answer"
            elif field.startswith("actor_"):
                of_rating, what = example_rows, "best or edited answer"
            rated = list(rated_rows(connection))
            rows = [(rating["id"], row) for rating in rated for row in of_rating(rating)]
    if not rows:
        kinds = "" if what == "prompt" else _kinds(rated)
        raise UserError(f"{field}: '{path}' holds no {what}{kinds}; rate more with scripts/feedback.py")
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    numbered = ((number, BadRow(too_long(most), row)) if len(line.encode()) > most else (number, row)
                for (number, row), line in zip(rows, lines, strict=True))
    return digest, numbered


@contextmanager
def _read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that writes nothing, within one transaction."""
    path = path.resolve()
    log = path.with_name(f"{path.name}-wal")
    # SQLite makes files beside a database with a log, unless it is told that nobody writes to it
    alone = not os.access(path.parent, os.W_OK) and not (log.exists() and log.stat().st_size)
    connection = sqlite3.connect(f"{path.as_uri()}?mode=ro{'&immutable=1' * alone}", uri=True,
                                 timeout=PATIENCE, isolation_level=None)
    try:
        connection.execute("BEGIN")
        yield connection
    finally:
        connection.close()


def _kinds(rated: list[dict]) -> str:
    """What ratings there are instead, for a message."""
    kinds = Counter(rating["kind"] for rating in rated)
    return f" (its ratings: {', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else ""


def pair_rows(rating: dict) -> Iterator[dict]:
    """The pairs of a ranking as rows with the columns of NOTES; `worker` is the rater, `batch` the day.

    An empty answer makes none: the stages drop such pairs, and would refuse a database with many.
    """
    if rating["ranks"] is None:
        return
    asked = _question(rating["prompt"], "conversations")
    known = {"worker": rating["rater"], "batch": day_of(rating["time"])}
    if rating["confidence"] is not None:
        known["confidence"] = str(rating["confidence"])
    answers = list(zip(rating["ranks"], rating["completions"], rating["policies"], strict=True))
    for (rank, chosen, policy), (other_rank, rejected, other) in itertools.product(answers, repeat=2):
        if rank < other_rank and chosen.strip() and rejected.strip():
            yield asked | {"chosen": chosen, "rejected": rejected,
                           "policies": " and ".join(sorted([policy, other]))} | known


def edit_rows(rating: dict) -> Iterator[dict]:
    """The answer that a rater wrote, as an example."""
    if rating["better"] is not None:
        yield _example(rating["prompt"], rating["better"])


def example_rows(rating: dict) -> Iterator[dict]:
    """The answer that a rater wrote, else the one that the ranking says is the best, as an example.

    Where several answers share the first place it is the first of them; where all do, none is better. An
    empty answer is no example: there is nothing in it to learn.
    """
    ranks = rating["ranks"]
    if rating["better"] is None and ranks is not None and min(ranks) < max(ranks):
        best = [text for text, rank in zip(rating["completions"], ranks, strict=True)
                if rank == min(ranks) and text.strip()]
        for text in best[:1]:
            yield _example(rating["prompt"], text)
    yield from edit_rows(rating)


def _example(prompt: str, answer: str) -> dict:
    """A stored prompt with an answer as a row."""
    asked = _question(prompt, "messages")
    if "messages" in asked:
        return asked | {"messages": [*asked["messages"], {"role": "assistant", "content": answer}]}
    return asked | {"completion": answer}


def prompt_row(text: str) -> dict:
    """A prompt as a row."""
    return _question(text, "messages")


def _question(text: str, column: str) -> dict:
    """A stored prompt as columns: `prompt`, or a conversation in `column` and perhaps its `tools`."""
    messages = messages_of(text)
    if messages is None:
        return {"prompt": text}
    if messages[0]["role"] == "tools":
        return {column: messages[1:], "tools": messages[0]["content"]}
    return {column: messages}


def day_of(time: float) -> str:
    """The day of a Unix time, UTC."""
    return datetime.fromtimestamp(time, UTC).date().isoformat()
