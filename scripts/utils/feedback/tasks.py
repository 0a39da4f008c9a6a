"""What a rater gets next: which prompt, with which answers; and which answers have to be sampled before.

These are functions of an open connection. `utils/feedback/database.py` calls each in one transaction.
"""

import itertools
import json
import random
import time
from typing import NamedTuple

from utils.data.ratings import shown_of

CLAIM = 600  # seconds for which an open task keeps its prompt from other raters
_RENEWED = 60  # seconds after which asking for an open task renews its claim
REPEAT_AFTER = 5  # tasks between a task and its repetition
TRIES = 3  # a policy is sampled at most so often for each distinct answer that is wanted of it
CHAT = "chat"  # the source of prompts that are rated before all others

# Conditions of SQL on a row of `tasks`, or of `prompts`.
LIVE = "EXISTS (SELECT 1 FROM ratings WHERE task_id = tasks.id AND undone IS NULL)"
RANKED = "EXISTS (SELECT 1 FROM ratings WHERE task_id = tasks.id AND undone IS NULL AND kind = 'ranking')"
_CLAIMED = f"tasks.claimed > :now - {CLAIM}"
_ANSWERED = "EXISTS (SELECT 1 FROM answers WHERE prompt_id = prompts.id)"
_QUEUE = f"ORDER BY source <> '{CHAT}', id"
_HASHES = 2**32
# the prompt with this id is for all raters: Knuth's multiplicative hash, which spreads neighbours evenly
_FOR_ALL = f"({{}} * 2654435761 % {_HASHES} < :overlap)"
# a task with the policies of now, which is rated or being rated
_FRESH = f"(tasks.created >= :since AND repeat_of IS NULL AND ({LIVE} OR {_CLAIMED}))"
# a prompt that was rated before the newest policy came, and is for the rater again
_AGAIN = f"""(rated > 0 AND NOT EXISTS (
                 SELECT 1 FROM tasks WHERE prompt_id = prompts.id AND (
                     NOT {_FOR_ALL.format('prompts.id')} AND {_FRESH}
                     OR rater_id = :rater AND tasks.created >= :since AND {LIVE})))"""


class Task(NamedTuple):
    """A prompt with answers for one rater to rank."""

    id: int
    prompt_id: int
    prompt: str  # as `utils/data/conversations.py` stores it
    answers: list[str]  # in the order in which they are shown


# -------------------------------------------------------------------------------------------- what is sampled


def to_sample(db, policies: list[int], k: int, limit: int) -> list[tuple[int, str, dict[int, int]]]:
    """See `Ratings.to_sample`."""
    values = {"now": time.time(), "limit": limit, "since": _since(db, policies)}
    rows = db.execute(f"""SELECT id, text FROM prompts WHERE rated = 0 AND NOT EXISTS (
                              SELECT 1 FROM tasks WHERE prompt_id = prompts.id AND {_CLAIMED})
                          {_QUEUE} LIMIT :limit""", values).fetchall()
    if len(rows) < limit:
        rows += db.execute(f"""SELECT id, text FROM prompts WHERE rated > 0 AND NOT EXISTS (
                                   SELECT 1 FROM tasks WHERE prompt_id = prompts.id AND {_FRESH})
                               {_QUEUE} LIMIT :limit""",
                           values | {"limit": limit - len(rows)}).fetchall()
    wanted = [(number, text, _pick(db, number, policies, k)[1]) for number, text in rows]
    return [row for row in wanted if row[2]]


def ready_prompts(db, policies: list[int], k: int) -> int:
    """How many prompts that nobody has rated have all their answers."""
    answered = db.execute(f"SELECT id FROM prompts WHERE rated = 0 AND {_ANSWERED}").fetchall()
    return sum(_is_ready(*_pick(db, number, policies, k)) for number, in answered)


def _pick(db, prompt_id: int, policies: list[int], k: int) -> tuple[list[int], dict[int, int]]:
    """The answers to show for a prompt, and policy -> how many of its answers are missing.

    Equal texts are shown once. A policy that keeps repeating itself is not sampled for ever (TRIES).
    """
    rows = db.execute("SELECT id, policy_id, text FROM answers WHERE prompt_id = ? ORDER BY id",
                      (prompt_id,)).fetchall()
    picked, seen, missing = [], set(), {}
    for policy, share in _shares(prompt_id, policies, k).items():
        own = [(number, text.strip()) for number, owner, text in rows if owner == policy]
        fresh = {}
        for number, text in own:
            if text not in seen and len(fresh) < share:
                fresh.setdefault(text, number)
        seen.update(fresh)
        picked += fresh.values()
        if len(fresh) < share and len(own) < TRIES * share:
            missing[policy] = share - len(fresh)
    return picked, missing


def _is_ready(picked: list[int], missing: dict[int, int]) -> bool:
    return bool(picked) and not missing


def _shares(prompt_id: int, policies: list[int], k: int) -> dict[int, int]:
    """Policy -> how many of the k answers to a prompt are its own. Who comes first changes by prompt: the
    first has one more where k cannot be divided, and keeps an answer that another one gives, too.
    """
    start = prompt_id % max(len(policies), 1)
    turned = [*policies[start:], *policies[:start]]
    shares = {policy: k // len(policies) + (place < k % len(policies))
              for place, policy in enumerate(turned)}
    return {policy: share for policy, share in shares.items() if share}


# ----------------------------------------------------------------------------------------- what is rated next


def asking(rater: int, overlap_share: float) -> dict:
    """A rater who asks now: what the conditions of SQL are about, but for the policies."""
    return {"rater": rater, "now": time.time(), "overlap": round(overlap_share * _HASHES)}


def next_task(db, draws: random.Random, asked: dict, k: int, policies: list[int], repeat_share: float
              ) -> Task | None:
    """See `Ratings.task`. `asked` is what `asking` returns."""
    values = asked | {"since": _since(db, policies)}
    number = _open_task(db, values)
    if number is None and draws.random() < repeat_share:
        number = _repeated(db, draws, values)
    if number is None:
        number = _new(db, draws, values, policies, k)
    return None if number is None else task_of(db, number)


def _since(db, policies: list[int]) -> float:
    """When the newest of the policies came. Prompts that were rated before are asked again in the end."""
    return db.execute("SELECT coalesce(max(created), 0) FROM policies WHERE id IN "
                      "(SELECT value FROM json_each(?))", (json.dumps(policies),)).fetchone()[0]


def _open_task(db, values: dict) -> int | None:
    """The first task of the rater that is not rated, unless someone else has its prompt by now."""
    row = db.execute(f"""SELECT id, claimed FROM tasks AS mine WHERE rater_id = :rater
                         AND NOT EXISTS (SELECT 1 FROM ratings WHERE task_id = mine.id AND undone IS NULL)
                         AND (repeat_of IS NOT NULL OR {_FOR_ALL.format('prompt_id')} OR NOT EXISTS (
                             SELECT 1 FROM tasks WHERE prompt_id = mine.prompt_id
                             AND rater_id <> :rater AND ({LIVE} OR {_CLAIMED})
                             AND (tasks.created >= :since OR mine.created < :since)))
                         ORDER BY id LIMIT 1""", values).fetchone()
    if row is None:
        return None
    number, claimed = row
    if claimed < values["now"] - _RENEWED:  # not at each call: writing waits for the disk
        db.execute("UPDATE tasks SET claimed = ? WHERE id = ?", (values["now"], number))
    return number


def _repeated(db, draws, values: dict) -> int | None:
    """A new task that repeats an earlier ranking of the rater."""
    rows = db.execute(f"""SELECT id FROM tasks WHERE rater_id = :rater AND repeat_of IS NULL AND {RANKED}
                              AND id NOT IN (SELECT repeat_of FROM tasks WHERE repeat_of IS NOT NULL)
                              AND id <= (SELECT id FROM tasks WHERE rater_id = :rater
                                         ORDER BY id DESC LIMIT 1 OFFSET {REPEAT_AFTER})""",
                      values).fetchall()
    if not rows:
        return None
    first, = draws.choice(rows)
    prompt, shown = db.execute("SELECT prompt_id, shown FROM tasks WHERE id = ?", (first,)).fetchone()
    return _add_task(db, draws, values, prompt, shown_of(shown), first)


def _new(db, draws, values: dict, policies: list[int], k: int) -> int | None:
    """A new task with the first prompt in the queue that has its answers, and is for the rater."""
    for_all = _FOR_ALL.format("prompts.id")
    new = db.execute(f"""SELECT id, 0 FROM prompts WHERE (rated = 0 OR {for_all}) AND {_ANSWERED}
                         AND NOT EXISTS (
                             SELECT 1 FROM tasks WHERE prompt_id = prompts.id AND (
                                 rater_id = :rater OR NOT {for_all} AND {_CLAIMED}))
                         {_QUEUE}""", values)
    again = db.execute(f"SELECT id, :since FROM prompts WHERE {_AGAIN} {_QUEUE}", values)
    for prompt, since in itertools.chain(new, again):
        # the others have had the same answers: only then their ranking can be compared
        earlier = db.execute("SELECT shown FROM tasks WHERE prompt_id = ? AND created >= ? "
                             "ORDER BY id LIMIT 1", (prompt, since)).fetchone()
        picked, missing = (shown_of(earlier[0]), {}) if earlier else _pick(db, prompt, policies, k)
        if _is_ready(picked, missing):
            new.close()
            again.close()
            return _add_task(db, draws, values, prompt, picked, None)
    return None


def _add_task(db, draws, values: dict, prompt: int, answers: list[int], repeat_of: int | None) -> int:
    shown = draws.sample(answers, len(answers))
    return db.execute("INSERT INTO tasks (prompt_id, rater_id, shown, repeat_of, created, claimed) "
                      "VALUES (?, ?, ?, ?, ?, ?)",
                      (prompt, values["rater"], json.dumps(shown), repeat_of, values["now"],
                       values["now"])).lastrowid


def task_of(db, number: int) -> Task:
    """The task of that number."""
    prompt, text, shown = db.execute("SELECT prompt_id, text, shown FROM tasks JOIN prompts "
                                     "ON prompts.id = prompt_id WHERE tasks.id = ?", (number,)).fetchone()
    answers = db.execute("SELECT text FROM json_each(?) JOIN answers ON answers.id = value "
                         "ORDER BY json_each.key", (shown,)).fetchall()
    return Task(number, prompt, text, [answer for answer, in answers])


def prompts_left(db, asked: dict, policies: list[int]) -> int:
    """How many prompts a rater has still to rate, if nobody else rates one."""
    return db.execute(f"""SELECT (SELECT count(*) FROM prompts WHERE rated = 0) + (
                              SELECT count(*) FROM prompts
                              WHERE rated > 0 AND ({_AGAIN} OR {_FOR_ALL.format('prompts.id')}
                              AND NOT EXISTS (SELECT 1 FROM tasks WHERE prompt_id = prompts.id
                                              AND rater_id = :rater AND {LIVE})))""",
                      asked | {"since": _since(db, policies)}).fetchone()[0]
