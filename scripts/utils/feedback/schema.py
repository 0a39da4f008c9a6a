"""The tables of the rating page's database, and how a file is brought to them."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.data.ratings import APPLICATION, PATIENCE, SCHEMA, database_errors, is_database, refuse_foreign
from utils.errors import UserError

# Step n makes schema n + 1 out of schema n. Steps are only ever added: files of all versions are out there.
STEPS = ((
    """CREATE TABLE prompts (id INTEGER PRIMARY KEY, text TEXT NOT NULL UNIQUE, source TEXT NOT NULL,
                             rated INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL) STRICT""",
    "CREATE INDEX prompts_by_rated ON prompts (rated)",
    """CREATE TABLE policies (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, path TEXT NOT NULL,
                              created REAL NOT NULL) STRICT""",
    """CREATE TABLE answers (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts,
                             policy_id INTEGER NOT NULL REFERENCES policies, text TEXT NOT NULL,
                             ended INTEGER NOT NULL, temperature REAL NOT NULL,
                             created REAL NOT NULL) STRICT""",
    "CREATE INDEX answers_of_prompt ON answers (prompt_id)",
    """CREATE TABLE raters (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
                            created REAL NOT NULL) STRICT""",
    """CREATE TABLE tasks (id INTEGER PRIMARY KEY, prompt_id INTEGER NOT NULL REFERENCES prompts,
                           rater_id INTEGER NOT NULL REFERENCES raters, shown TEXT NOT NULL,
                           repeat_of INTEGER REFERENCES tasks, created REAL NOT NULL,
                           claimed REAL NOT NULL) STRICT""",
    "CREATE INDEX tasks_of_prompt ON tasks (prompt_id, rater_id)",
    "CREATE INDEX tasks_of_rater ON tasks (rater_id)",
    """CREATE TABLE ratings (id INTEGER PRIMARY KEY, task_id INTEGER NOT NULL REFERENCES tasks,
                             key TEXT NOT NULL UNIQUE,
                             kind TEXT NOT NULL CHECK (kind IN ('ranking', 'all_bad', 'skip')),
                             confidence INTEGER, seconds REAL, created REAL NOT NULL, undone REAL) STRICT""",
    "CREATE UNIQUE INDEX rating_of_task ON ratings (task_id) WHERE undone IS NULL",
    """CREATE TABLE ranks (rating_id INTEGER NOT NULL REFERENCES ratings,
                           answer_id INTEGER NOT NULL REFERENCES answers, rank INTEGER NOT NULL,
                           PRIMARY KEY (rating_id, answer_id)) STRICT, WITHOUT ROWID""",
    """CREATE TABLE edits (id INTEGER PRIMARY KEY, rating_id INTEGER NOT NULL UNIQUE REFERENCES ratings,
                           text TEXT NOT NULL) STRICT""",
    """CREATE TABLE rounds (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, folder TEXT NOT NULL,
                            state TEXT NOT NULL
                                CHECK (state IN ('running', 'finished', 'failed', 'cancelled')),
                            ratings INTEGER NOT NULL, created REAL NOT NULL, ended REAL) STRICT""",
),)
assert len(STEPS) == SCHEMA


def connect(path: Path) -> sqlite3.Connection:
    """Open a database for reading and writing. It is made if it is not there, and brought up to date.

    Raises:
        UserError: when the file is not such a database, belongs to newer code, or cannot be written to.
    """
    _make_folder(path.parent)
    if path.exists() and not is_database(path) and path.stat().st_size:
        raise UserError(f"{path}: is no SQLite database; name another file")
    with database_errors(path):
        connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Set the connection up, and bring the file to the newest schema."""
    run = connection.execute
    # a file of another program must not be changed, not even its journal
    if run("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        refuse_foreign(connection, path)
    run("PRAGMA journal_mode = WAL")
    run("PRAGMA synchronous = FULL")  # WAL's usual NORMAL may lose the last transactions with the power
    run("PRAGMA foreign_keys = ON")
    with transaction(connection):
        version = run("PRAGMA user_version").fetchone()[0]  # again: another process may have been faster
        for step in STEPS[version:]:
            for statement in step:
                run(statement)
        run(f"PRAGMA application_id = {APPLICATION}")
        run(f"PRAGMA user_version = {len(STEPS)}")  # fails at once where nothing can be written


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """What the body does is on the disk when it has ended, or nothing of it is stored."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite itself rolls back when the disk is full
            connection.execute("ROLLBACK")
        raise


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another place for the ratings"
                        ) from None
