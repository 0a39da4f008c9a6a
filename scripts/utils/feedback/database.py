"""The database of the rating page: prompts, answers, who rated what, and rounds of training.

Each rating is one transaction, and its caller gets an id only after the transaction is on the disk: a kill or
a loss of power at any moment loses no rating that was confirmed. Ids and names here are inside the server;
what a rater sees is a `Task`, which names no policy. `utils/feedback/tasks.py` chooses it.
"""

import random
import sqlite3
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.data.ratings import database_errors, rated_rows, shown_of
from utils.errors import UserError, quoted
from utils.feedback.schema import connect, transaction
from utils.feedback.tasks import (
    LIVE,
    Task,
    asking,
    next_task,
    prompts_left,
    ready_prompts,
    task_of,
    to_sample,
)

KINDS = ("ranking", "all_bad", "skip")
_RECENT = 20  # ratings from which the time that is left is estimated
_LONGEST_NAME = 100  # characters of a rater's or policy's name, or of a rating's key


class Refused(UserError):
    """What a rater sent cannot be taken: it is wrong in itself, or names what is not there."""


class Conflict(Refused):
    """What a rater sent came too late: its task has been rated already."""


class Ratings:
    """The database in a file, which is made if it is not there. Its methods may be called from several
    threads.

    Args:
        path: the file.
        seed: of the order in which answers are shown, and of which tasks are repeated; None: by chance.

    Raises:
        UserError: when the file is not such a database or belongs to newer code. Every method raises it when
            the disk is full, or the file cannot be read or written; then nothing of the call is stored.
    """

    def __init__(self, path, seed: int | None = None):
        self.path = Path(path)
        self._lock, self._random = threading.RLock(), random.Random(seed)
        self._connection = connect(self.path)

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """One transaction. It is on the disk when the body has ended, or nothing of it is stored."""
        with self._lock, database_errors(self.path), transaction(self._connection):
            yield self._connection

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock, database_errors(self.path):
            yield self._connection

    # ------------------------------------------------------------------------------------ prompts and answers

    def add_prompts(self, texts, source: str) -> int:
        """Add prompts that are not there yet, and return how many were new.

        Args:
            texts: as `utils/data/conversations.py` stores them. Empty ones are left out.
            source: where they are from; those of CHAT are rated first.
        """
        rows = [(_stored(text), source, time.time()) for text in texts if text.strip()]
        with self._transaction() as db:
            before = db.total_changes
            db.executemany("INSERT OR IGNORE INTO prompts (text, source, created) VALUES (?, ?, ?)", rows)
            return db.total_changes - before

    def add_policy(self, name: str, path) -> int:
        """The id of a policy; of one that is there already, with another path, the path is replaced."""
        with self._transaction() as db:
            db.execute("INSERT INTO policies (name, path, created) VALUES (?, ?, ?) "
                       "ON CONFLICT (name) DO UPDATE SET path = excluded.path",
                       (_stored(name), str(path), time.time()))
            return db.execute("SELECT id FROM policies WHERE name = ?", (_stored(name),)).fetchone()[0]

    def policies(self) -> list[tuple[int, str, str]]:
        """(id, name, path) of each policy, oldest first."""
        with self._reading() as db:
            return db.execute("SELECT id, name, path FROM policies ORDER BY id").fetchall()

    def add_answers(self, prompt_id: int, policy_id: int, answers: list[tuple[str, bool]],
                    temperature: float) -> None:
        """Add answers of a policy: (text, whether it ended by itself)."""
        rows = [(prompt_id, policy_id, _stored(text), bool(ended), temperature, time.time())
                for text, ended in answers]
        with self._transaction() as db:
            db.executemany("INSERT INTO answers (prompt_id, policy_id, text, ended, temperature, created) "
                           "VALUES (?, ?, ?, ?, ?, ?)", rows)

    def to_sample(self, policies: list[int], k: int, limit: int) -> list[tuple[int, str, dict[int, int]]]:
        """What to sample now, so that the next prompts can be rated.

        Args:
            policies: ids of those that answer.
            k: answers of a prompt.
            limit: how many prompts of those that nobody has rated or is rating are to have answers.

        Returns:
            (prompt's id, its text, policy -> answers that are missing), those that come first in the queue
            first; after all others, prompts that were rated before the newest policy came. Prompts that have
            all their answers are left out.
        """
        with self._reading() as db:
            return to_sample(db, policies, k, limit)

    def queue(self, policies: list[int], k: int) -> dict[str, int]:
        """How many `prompts` there are, how many of them are `rated`, and how many others are `ready`."""
        with self._reading() as db:
            prompts, rated = db.execute("SELECT count(*), count(nullif(rated, 0)) FROM prompts").fetchone()
            return {"prompts": prompts, "ready": ready_prompts(db, policies, k), "rated": rated}

    def learnable(self) -> tuple[int, int]:
        """What a round of training can learn from: how many prompts have a best or a written answer, and how
        many of them a ranking in which one answer is better than another. "All bad" and "skip" alone say
        nothing.
        """
        with self._reading() as db:
            return db.execute(f"""SELECT count(DISTINCT prompt_id),
                                         count(DISTINCT iif(ordered, prompt_id, NULL))
                                  FROM (SELECT prompt_id, edits.id AS edit, {_ORDERED} AS ordered
                                        FROM ratings JOIN tasks ON tasks.id = task_id
                                        LEFT JOIN edits ON rating_id = ratings.id WHERE undone IS NULL)
                                  WHERE ordered OR edit IS NOT NULL""").fetchone()

    # -------------------------------------------------------------------------------------------------- tasks

    def rater(self, name: str) -> int:
        """The id of the rater of that name.

        Raises:
            Refused: when the name is empty or too long.
        """
        name = _stored(" ".join(name.split()))
        if not name or len(name) > _LONGEST_NAME:
            raise Refused(f"a rater's name must have 1 to {_LONGEST_NAME} characters")
        with self._transaction() as db:
            db.execute("INSERT OR IGNORE INTO raters (name, created) VALUES (?, ?)", (name, time.time()))
            return db.execute("SELECT id FROM raters WHERE name = ?", (name,)).fetchone()[0]

    def task(self, rater: int, k: int, policies: list[int], repeat_share: float, overlap_share: float
             ) -> Task | None:
        """What a rater is to rank now: the task that is open, else a new one, or one that is repeated.

        Args:
            k: answers of a new task.
            policies: ids of those whose answers a new task has.
            repeat_share: how often an earlier task of this rater comes again, to see how consistent they are.
            overlap_share: share of the prompts that all raters get, with the same answers.

        Returns:
            None when no prompt with all its answers is left for this rater.
        """
        asked = asking(rater, overlap_share)
        with self._transaction() as db:
            return next_task(db, self._random, asked, k, policies, repeat_share)

    # ------------------------------------------------------------------------------------------------ ratings

    def rate(self, key: str, task: int, rater: int, kind: str, order: list[list[int]] | None = None,
             confidence: int | None = None, seconds: float | None = None, better: str | None = None) -> int:
        """Store a rating. When the call returns, it is on the disk.

        Args:
            key: a name that the sender made for this rating. The same key again stores nothing.
            kind: one of KINDS.
            order: for "ranking" only: the places of the shown answers, best first, ties together.
            confidence: 1 to 3.
            seconds: what the rater took for it.
            better: an answer that the rater wrote.

        Returns:
            The id of the rating; of a key that is there already, of that rating.

        Raises:
            Refused: when a value is wrong, or there is no such task of this rater.
            Conflict: when the task has been rated with another key.
        """
        if not isinstance(key, str) or not 0 < len(key) <= _LONGEST_NAME:
            raise Refused(f"key must be text of 1 to {_LONGEST_NAME} characters")
        if type(task) is not int or not 0 < task < 2**63:
            raise Refused(f"task is {quoted(task)}; the number of a task is needed")
        with self._transaction() as db:
            row = db.execute("SELECT ratings.id, task_id, rater_id FROM ratings JOIN tasks "
                             "ON tasks.id = task_id WHERE key = ?", (key,)).fetchone()
            if row:
                if row[1:] != (task, rater):
                    raise Refused("this key belongs to another rating")
                return row[0]
            row = db.execute(f"SELECT shown, {LIVE} FROM tasks WHERE id = ? AND rater_id = ?",
                             (task, rater)).fetchone()
            if row is None:
                raise Refused(f"there is no task {task} of this rater")
            if row[1]:
                raise Conflict("this task has been rated already")
            shown = shown_of(row[0])
            ranks = _checked(kind, order, confidence, seconds, better, len(shown))
            number = db.execute("INSERT INTO ratings (task_id, key, kind, confidence, seconds, created) "
                                "VALUES (?, ?, ?, ?, ?, ?)",
                                (task, key, kind, confidence, seconds, time.time())).lastrowid
            db.execute(_COUNT, {"by": 1, "task": task})
            db.executemany("INSERT INTO ranks VALUES (?, ?, ?)",
                           [(number, shown[place], rank) for place, rank in ranks.items()])
            if better and better.strip():
                db.execute("INSERT INTO edits (rating_id, text) VALUES (?, ?)", (number, _stored(better)))
            return number

    def undo(self, rater: int) -> tuple[Task, dict] | None:
        """Take back the last rating of a rater, whose task is open again.

        Returns:
            The task and what was said: `kind`, `order`, `confidence`, `better`, as `rate` takes them. None
            when nothing is left to take back.
        """
        with self._transaction() as db:
            row = db.execute("""SELECT ratings.id, task_id, kind, confidence, text FROM ratings
                                JOIN tasks ON tasks.id = task_id
                                LEFT JOIN edits ON rating_id = ratings.id
                                WHERE rater_id = ? AND undone IS NULL ORDER BY ratings.id DESC LIMIT 1""",
                             (rater,)).fetchone()
            if row is None:
                return None
            number, task, kind, confidence, better = row
            db.execute("UPDATE ratings SET undone = ? WHERE id = ?", (time.time(), number))
            db.execute("UPDATE tasks SET claimed = ? WHERE id = ?", (time.time(), task))
            db.execute(_COUNT, {"by": -1, "task": task})
            places = db.execute("""SELECT json_each.key, rank FROM tasks JOIN json_each(shown)
                                   JOIN ranks ON answer_id = value AND rating_id = ?
                                   WHERE tasks.id = ? ORDER BY rank, json_each.key""",
                                (number, task)).fetchall()
            levels: dict[int, list[int]] = {}
            for place, rank in places:
                levels.setdefault(rank, []).append(place)
            order = list(levels.values()) if kind == "ranking" else None
            return task_of(db, task), {"kind": kind, "order": order, "confidence": confidence,
                                       "better": better}

    def progress(self, rater: int, overlap_share: float = 0.0, policies: list[int] = ()) -> dict:
        """How far a rater has come.

        Args:
            policies: those of `task`; without them, no prompt comes again.

        Returns:
            `rated`: ratings of this rater. `total`: these and the prompts that are left for them.
            `seconds_left`: for those at the speed of the last ratings; None before the first one.
        """
        asked = asking(rater, overlap_share)
        with self._reading() as db:
            rated = db.execute(f"SELECT count(*) FROM tasks WHERE rater_id = ? AND {LIVE}",
                               (rater,)).fetchone()[0]
            left = prompts_left(db, asked, policies)
            seconds = db.execute("""SELECT seconds FROM ratings JOIN tasks ON tasks.id = task_id
                                    WHERE rater_id = ? AND undone IS NULL AND seconds IS NOT NULL
                                    ORDER BY ratings.id DESC LIMIT ?""", (rater, _RECENT)).fetchall()
        each = statistics.median(value for value, in seconds) if seconds else None
        return {"rated": rated, "total": rated + left,
                "seconds_left": None if each is None else round(each * left)}

    def rated(self, rater: int | None = None, before: int | None = None, most: int | None = None
              ) -> list[dict]:
        """The ratings that count, oldest first: see `utils.data.ratings.rated_rows`."""
        with self._reading() as db:
            return list(rated_rows(db, rater, before, most))

    # ------------------------------------------------------------------------------------- rounds of training

    def add_round(self, name: str, folder) -> int:
        """A round of training that begins now, with the ratings that there are."""
        with self._transaction() as db:
            count = db.execute("SELECT count(*) FROM ratings WHERE undone IS NULL").fetchone()[0]
            return db.execute("INSERT INTO rounds (name, folder, state, ratings, created) "
                              "VALUES (?, ?, 'running', ?, ?)",
                              (name, str(folder), count, time.time())).lastrowid

    def end_round(self, number: int, state: str) -> None:
        """Say how a round has ended: "finished", "failed" or "cancelled"."""
        with self._transaction() as db:
            db.execute("UPDATE rounds SET state = ?, ended = ? WHERE id = ?", (state, time.time(), number))

    def rounds(self) -> list[dict]:
        """All rounds, oldest first: `id`, `name`, `folder`, `state`, `ratings`, `created`, `ended`."""
        names = ("id", "name", "folder", "state", "ratings", "created", "ended")
        with self._reading() as db:
            rows = db.execute(f"SELECT {', '.join(names)} FROM rounds ORDER BY id").fetchall()
        return [dict(zip(names, row, strict=True)) for row in rows]

    def copy_to(self, path) -> None:
        """Write a copy of the database, as it is now, into a new file."""
        with self._reading() as db:
            db.execute("VACUUM INTO ?", (str(path),))


# a rating in which not all answers are tied
_ORDERED = "EXISTS (SELECT 1 FROM ranks WHERE rating_id = ratings.id AND rank > 1)"
# `prompts.rated`: the ratings of a prompt that count, repetitions left out, so that nobody has to count them
_COUNT = """UPDATE prompts SET rated = rated + :by
            WHERE id = (SELECT prompt_id FROM tasks WHERE id = :task AND repeat_of IS NULL)"""


def _checked(kind, order, confidence, seconds, better, count: int) -> dict[int, int]:
    """Place of a shown answer -> its rank; empty unless the kind is "ranking".

    Raises:
        Refused: naming the value that is wrong.
    """
    if kind not in KINDS:
        raise Refused(f"kind is {quoted(kind)}; it must be one of {', '.join(KINDS)}")
    if confidence is not None and (type(confidence) is not int or not 1 <= confidence <= 3):
        raise Refused(f"confidence is {quoted(confidence)}; it must be 1, 2 or 3, or null")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if seconds is not None and not (number and 0 <= seconds <= 1e9):
        raise Refused(f"seconds is {quoted(seconds)}; a number that is not negative is needed, or null")
    if better is not None and not isinstance(better, str):
        raise Refused("better must be text or null")
    if kind != "ranking":
        if order is not None:
            raise Refused(f"order has no meaning for the kind {kind}; it must be null")
        return {}
    levels = order if isinstance(order, list) and all(isinstance(level, list) for level in order) else []
    places = [place for level in levels for place in level]
    if not all(levels) or any(type(place) is not int for place in places) \
            or sorted(places) != list(range(count)):
        raise Refused(f"order is {quoted(order)}; it must be lists of places, best first, with each of 0 to "
                      f"{count - 1} once")
    ranks, better_ones = {}, 0
    for level in levels:
        ranks |= dict.fromkeys(level, better_ones + 1)
        better_ones += len(level)
    return ranks


def _stored(text: str) -> str:
    """The text without lone surrogates, which are no characters, and which SQLite does not store."""
    return text.encode("utf-8", "replace").decode()
