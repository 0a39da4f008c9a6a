"""The database of the rating page: who gets what, what is stored, and that nothing confirmed is lost."""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rated import database, ids_of, next_task, rank_all, rate
from utils.data.ratings import APPLICATION
from utils.errors import UserError
from utils.feedback import database as module
from utils.feedback import schema
from utils.feedback.database import Conflict, Ratings, Refused
from utils.feedback.tasks import CHAT, CLAIM, LIVE, RANKED, REPEAT_AFTER

FOUR = [" old 0", " old 1", " old 2", " old 3"]
ORDER = [[text] for text in FOUR]


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0]` is the time."""
    now = [1e9]
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    return now


# ------------------------------------------------------------------------------------- sampling and the queue


def test_answers_are_spread_evenly_over_policies_and_missing_ones_are_named(tmp_path):
    ratings = Ratings(tmp_path / "r.db")
    assert ratings.add_prompts(["a", "b", "a", "  ", "c"], "file") == 3
    assert ratings.add_prompts(["b"], "x") == 0
    old, new, third = (ratings.add_policy(name, "/m") for name in ("old", "new", "third"))
    assert ratings.add_policy("old", "/other") == old
    wanted = ratings.to_sample([old, new], 4, 2)
    assert [row[1:] for row in wanted] == [("a", {old: 2, new: 2}), ("b", {old: 2, new: 2})]
    extra = [next(p for p, n in missing.items() if n == 2)
             for _, _, missing in ratings.to_sample([old, new, third], 4, 3)]
    assert sorted(extra) == [old, new, third]  # who has one more changes from prompt to prompt
    assert all(sum(missing.values()) == 2 and set(missing.values()) == {1}
               for _, _, missing in ratings.to_sample([old, new, third], 2, 3))
    ratings.add_answers(wanted[0][0], old, [(" x", True)], 1.0)
    assert ratings.to_sample([old, new], 4, 1)[0][2] == {old: 1, new: 2}


def test_equal_answers_are_shown_once_and_sampling_them_ends(tmp_path):
    ratings = Ratings(tmp_path / "r.db")
    ratings.add_prompts(["a"], "file")
    old, new = ratings.add_policy("old", ""), ratings.add_policy("new", "")
    asked = 0
    while wanted := ratings.to_sample([old, new], 4, 1):
        [(prompt, _, missing)] = wanted
        for policy, count in missing.items():
            asked += count
            ratings.add_answers(prompt, policy, [("same" if policy == old else " same ", True)] * count, 0.0)
        assert asked < 50
    task = ratings.task(ratings.rater("Ann"), 4, [old, new], 0, 0)
    assert [text.strip() for text in task.answers] == ["same"]


def test_a_prompt_is_shown_only_with_all_its_answers(tmp_path):
    ratings = database(tmp_path / "r.db", ["a"], k=3)
    assert ratings.task(ratings.rater("Ann"), 4, ids_of(ratings), 0, 0) is None
    assert ratings.queue(ids_of(ratings), 4) == {"prompts": 1, "ready": 0, "rated": 0}
    assert ratings.queue(ids_of(ratings), 3) == {"prompts": 1, "ready": 1, "rated": 0}
    assert ratings.task(ratings.rater("Ann"), 3, ids_of(ratings), 0, 0) is not None


def test_sampling_looks_ahead_of_the_raters(tmp_path):
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(3)])
    ratings.add_prompts([f"q{n}" for n in range(5)], "file")
    assert ratings.to_sample(ids_of(ratings), 4, 3) == []
    rate(ratings, "Ann", next_task(ratings, "Ann"), ORDER)
    next_task(ratings, "Bob")  # in work
    assert [text for _, text, _ in ratings.to_sample(ids_of(ratings), 4, 3)] == ["q0", "q1"]


def test_prompts_of_the_chat_come_first(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    ratings.add_prompts(["from the chat"], CHAT)
    [(prompt, text, missing)] = ratings.to_sample(ids_of(ratings), 4, 1)
    assert text == "from the chat"
    for policy, count in missing.items():
        ratings.add_answers(prompt, policy, [(f" {n}", True) for n in range(count)], 1.0)
    assert next_task(ratings, "Ann").prompt == "from the chat"


# ------------------------------------------------------------------------------------------------------ tasks


def test_the_open_task_comes_again_and_answers_are_shuffled(tmp_path):
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(25)])
    orders = set()
    for n in range(25):
        task = next_task(ratings, "Ann")
        assert task == next_task(ratings, "Ann") and task.prompt == f"p{n}" and sorted(task.answers) == FOUR
        orders.add(tuple(task.answers))
        rate(ratings, "Ann", task, ORDER)
    assert next_task(ratings, "Ann") is None and len(orders) > 10  # of 24


def test_two_raters_never_hold_the_same_prompt_and_a_claim_ends(tmp_path, clock):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    of_ann, of_bob = next_task(ratings, "Ann"), next_task(ratings, "Bob")
    assert (of_ann.prompt, of_bob.prompt) == ("a", "b") and next_task(ratings, "Cem") is None
    clock[0] += CLAIM + 1
    assert next_task(ratings, "Bob") == of_bob  # nobody has taken it meanwhile; his again
    assert next_task(ratings, "Cem").prompt == "a"
    assert next_task(ratings, "Ann") is None  # hers is Cem's now
    rate(ratings, "Ann", of_ann, ORDER)  # but what she says all the same is kept
    assert [row["rater"] for row in ratings.rated()] == ["Ann"]


def test_shared_prompts_go_to_everyone_with_the_same_answers(tmp_path):
    count = 150
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(count)], k=2)
    done = {rater: rank_all(ratings, rater, overlap_share=0.2) for rater in ("Ann", "Bob", "Cem")}
    by_prompt: dict = {}
    for row in ratings.rated():
        by_prompt.setdefault(row["prompt"], []).append(row)
    shared = [rows for rows in by_prompt.values() if len(rows) == 3]
    assert len(by_prompt) == count and 0.1 < len(shared) / count < 0.3
    assert all(len(rows) in (1, 3) for rows in by_prompt.values())
    assert done == {"Ann": count, "Bob": len(shared), "Cem": len(shared)}
    assert all(len({tuple(sorted(row["completions"])) for row in rows}) == 1 for rows in shared)
    assert ratings.progress(ratings.rater("Bob"), 0.2)["total"] == len(shared)


def test_shared_prompts_go_to_everyone_after_another_policy_has_answered(tmp_path):
    """The answers of a later policy are not compared with those that the first rater saw."""
    ratings = database(tmp_path / "r.db", ["a"], k=2)
    rank_all(ratings, "Ann", overlap_share=1.0)
    new, ann = ratings.add_policy("new", "/new"), ratings.rated()[0]
    ratings.add_answers(1, new, [(" new 0", True), (" new 1", True)], 1.0)
    task = ratings.task(ratings.rater("Bob"), 2, [new], 0.0, 1.0)
    assert sorted(task.answers) == sorted(ann["completions"])


def test_a_new_policy_brings_rated_prompts_again_after_all_others(tmp_path):
    """Each once, and those for all raters once for each of them, with the same answers."""
    count, shares = 40, {"overlap_share": 0.3}
    prompts = [f"p{n}" for n in range(count)]
    ratings = database(tmp_path / "r.db", prompts[1:])
    earlier = {rater: rank_all(ratings, rater, **shares) for rater in ("Ann", "Bob")}
    ratings = database(tmp_path / "r.db", prompts[1:])  # a restart with the same policies changes nothing
    assert next_task(ratings, "Ann", **shares) is None
    ratings = database(tmp_path / "r.db", prompts, ["old", "new"])  # p0 has not been rated
    ann, ids = ratings.rater("Ann"), ids_of(ratings)
    assert ratings.progress(ann, 0.3, ids)["total"] == earlier["Ann"] + count
    tasks = [next_task(ratings, rater, **shares) for rater in ("Ann", "Bob")]
    assert tasks[0].prompt == "p0" != tasks[1].prompt
    for rater in ("Ann", "Bob"):
        rank_all(ratings, rater, **shares)
    fresh = ratings.rated()[sum(earlier.values()):]
    assert all(sorted(row["policies"]) == ["new", "new", "old", "old"] for row in fresh)
    by_prompt: dict = {}
    for row in fresh:
        by_prompt.setdefault(row["prompt"], []).append(row)
    assert sorted(by_prompt) == sorted(prompts)
    assert len(by_prompt) < len(fresh) < 2 * len(by_prompt)
    for rows in by_prompt.values():
        assert len({row["rater"] for row in rows}) == len(rows)
        assert len({tuple(sorted(row["completions"])) for row in rows}) == 1
    assert ratings.progress(ann, 0.3, ids)["total"] == ratings.progress(ann, 0.3, ids)["rated"]


def test_a_share_of_the_tasks_is_repeated_later_and_once(tmp_path):
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(150)], k=2)
    rank_all(ratings, "Ann", repeat_share=0.2)
    rows = ratings.rated()
    order = {row["task"]: place for place, row in enumerate(rows)}
    repeats = [row for row in rows if row["repeat_of"]]
    assert len(rows) - len(repeats) == 150 and 0.1 < len(repeats) / len(rows) < 0.3
    assert all(order[row["task"]] - order[row["repeat_of"]] > REPEAT_AFTER for row in repeats)
    first = {row["task"]: row for row in rows}
    for row in repeats:
        assert row["prompt"] == first[row["repeat_of"]]["prompt"]
        assert sorted(row["completions"]) == sorted(first[row["repeat_of"]]["completions"])
    assert len({row["repeat_of"] for row in repeats}) == len(repeats)
    assert ratings.progress(ratings.rater("Ann"))["rated"] == len(rows)


def test_progress_estimates_the_time_from_the_last_ratings(tmp_path):
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(10)])
    ann = ratings.rater("Ann")
    assert ratings.progress(ann) == {"rated": 0, "total": 10, "seconds_left": None}
    for seconds in (10, 1000, 20):
        rate(ratings, "Ann", next_task(ratings, "Ann"), ORDER, seconds=seconds)
    assert ratings.progress(ann) == {"rated": 3, "total": 10, "seconds_left": 140}  # the median is 20
    assert ratings.progress(ratings.rater("Bob")) == {"rated": 0, "total": 7, "seconds_left": None}


# ---------------------------------------------------------------------------------------------------- ratings


def test_a_rating_is_what_was_said(tmp_path, clock):
    ratings = database(tmp_path / "r.db", ["a"])
    task = next_task(ratings, "Ann")
    levels = [[" old 2"], [" old 0", " old 3"], [" old 1"]]
    number = rate(ratings, "Ann", task, levels, confidence=3, seconds=2.5, better=" mine\ud83d ")
    [row] = ratings.rated()
    assert row == {"id": number, "kind": "ranking", "confidence": 3, "time": 1e9, "task": task.id,
                   "repeat_of": None, "prompt": "a", "rater": "Ann", "better": " mine? ",
                   "completions": task.answers, "policies": ["old"] * 4, "ranks": row["ranks"]}
    assert dict(zip(task.answers, row["ranks"], strict=True)) == {
        " old 2": 1, " old 0": 2, " old 3": 2, " old 1": 4}


def test_the_same_key_is_one_rating(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    ann, task = ratings.rater("Ann"), next_task(ratings, "Ann")
    said = ("key", task.id, ann, "ranking", [[0], [1], [2], [3]])
    assert ratings.rate(*said) == ratings.rate(*said) == ratings.rated()[0]["id"]
    assert len(ratings.rated()) == 1
    with pytest.raises(Conflict, match="has been rated already"):
        ratings.rate("another key", *said[1:])
    other = next_task(ratings, "Ann")
    with pytest.raises(Refused, match="this key belongs to another rating"):
        ratings.rate("key", other.id, ann, "skip")
    ratings.undo(ann)
    assert ratings.rate(*said) and not ratings.rated()  # a late repetition does not bring it back


@pytest.mark.parametrize(("wrong", "says"), [
    ({"order": None}, "order is None; it must be lists of places"), ({"order": [[0], [1], [2]]}, "order is"),
    ({"order": [[0], [1], [2], [4]]}, "with each of 0 to 3 once"), ({"order": [[0, 0], [1], [2]]}, "once"),
    ({"order": [[0], [], [1], [2], [3]]}, "order is"), ({"order": [0, 1, 2, 3]}, "order is"),
    ({"order": [[0], [True], [2], [3]]}, "order is"), ({"order": [[0], ["1"], [2], [3]]}, "order is"),
    ({"order": "0123"}, "order is"), ({"order": [[0.0], [1], [2], [3]]}, "order is"),
    ({"kind": "best"}, "kind is 'best'; it must be one of ranking, all_bad, skip"),
    ({"kind": None}, "kind is"), ({"kind": []}, "kind is"),
    ({"kind": "skip"}, "order has no meaning for the kind skip"),
    ({"confidence": 0}, "confidence is 0; it must be 1, 2 or 3"), ({"confidence": 2.0}, "confidence is"),
    ({"confidence": True}, "confidence is"), ({"confidence": "2"}, "confidence is"),
    ({"seconds": -1}, "seconds is -1"), ({"seconds": float("nan")}, "seconds is"),
    ({"seconds": 10**400}, "seconds is"), ({"seconds": "3"}, "seconds is"), ({"seconds": False}, "seconds"),
    ({"better": 3}, "better must be"), ({"better": ["x"]}, "better must be"),
    ({"key": ""}, "key must be text"), ({"key": 7}, "key must be text"), ({"key": "k" * 101}, "key must be"),
    ({"task": 99}, "there is no task 99 of this rater"), ({"task": "1"}, "the number of a task"),
    ({"task": None}, "the number of a task"), ({"task": 2**70}, "the number of a task"),
    ({"rater": 99}, "of this rater"),
])
def test_what_is_wrong_is_refused_and_nothing_is_stored(wrong, says, tmp_path):
    ratings = database(tmp_path / "r.db", ["a"])
    given = {"key": "k", "task": next_task(ratings, "Ann").id, "rater": ratings.rater("Ann"),
             "kind": "ranking", "order": [[0], [1], [2], [3]], "confidence": 1, "seconds": 1.0,
             "better": None}
    with pytest.raises(Refused, match=says) as caught:
        ratings.rate(**given | wrong)
    assert "\n" not in str(caught.value) and not ratings.rated()
    assert ratings.rate(**given)  # and the right one is taken


def test_raters_have_names_of_one_spelling(tmp_path):
    ratings = Ratings(tmp_path / "r.db")
    assert ratings.rater("Ann Lee") == ratings.rater("  Ann\t Lee\n") != ratings.rater("ann lee")
    for name in ("", "  ", "x" * 101):
        with pytest.raises(Refused, match="1 to 100 characters"):
            ratings.rater(name)


def test_undo_goes_back_step_by_step(tmp_path, clock):
    ratings = database(tmp_path / "r.db", ["a", "b", "c"])
    ann = ratings.rater("Ann")
    levels = [[" old 1", " old 2"], [" old 3"], [" old 0"]]
    first = next_task(ratings, "Ann")
    rate(ratings, "Ann", first, levels, confidence=2, better="Mine.")
    second = next_task(ratings, "Ann")
    rate(ratings, "Ann", second, kind="all_bad")
    next_task(ratings, "Ann")
    clock[0] += CLAIM + 1  # long after: the tasks are still hers
    assert ratings.undo(ann) == (second, {"kind": "all_bad", "order": None, "confidence": None,
                                          "better": None})
    task, said = ratings.undo(ann)
    assert task == first and said | {"order": 0} == {"kind": "ranking", "order": 0, "confidence": 2,
                                                     "better": "Mine."}
    assert [{task.answers[place] for place in level} for level in said["order"]] == list(map(set, levels))
    assert ratings.undo(ann) is None and ratings.rated() == []
    assert next_task(ratings, "Bob").prompt == "c"  # which Ann has had for too long
    assert next_task(ratings, "Ann") == first
    ratings.rate("again", first.id, ann, **said)
    assert next_task(ratings, "Ann") == second and len(ratings.rated()) == 1


def test_ratings_of_a_prompt_are_counted_whatever_happens(tmp_path, clock):
    ratings, rng = database(tmp_path / "r.db", [f"p{n}" for n in range(12)], k=2), random.Random(0)
    for _ in range(150):
        clock[0] += rng.choice([1, CLAIM])
        rater = rng.choice("ABC")
        task = next_task(ratings, rater, repeat_share=0.3, overlap_share=0.5)
        if task is None or rng.random() < 0.4:
            ratings.undo(ratings.rater(rater))
        else:
            rate(ratings, rater, task, kind=rng.choice(["all_bad", "skip"]))
        assert ratings._connection.execute(MISCOUNTED).fetchall() == []


def test_only_my_own_rating_is_undone(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    rate(ratings, "Ann", next_task(ratings, "Ann"), ORDER)
    rate(ratings, "Bob", next_task(ratings, "Bob"), ORDER)
    ratings.undo(ratings.rater("Ann"))
    assert [row["rater"] for row in ratings.rated()] == ["Bob"]
    assert ratings.undo(ratings.rater("Ann")) is None


def test_rows_of_a_rater_and_pages_of_rows(tmp_path):
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(7)], k=2)
    for n in range(7):
        rater = "Ann" if n % 2 else "Bob"
        rate(ratings, rater, next_task(ratings, rater), kind="skip")
    whole = ratings.rated()
    assert [row["id"] for row in ratings.rated(most=3)] == [5, 6, 7]
    assert [row["id"] for row in ratings.rated(before=5, most=3)] == [2, 3, 4]
    assert ratings.rated(ratings.rater("Ann")) == [row for row in whole if row["rater"] == "Ann"]
    assert all(row["ranks"] is None and len(row["completions"]) == 2 for row in whole)


def test_rounds_and_copies(tmp_path):
    ratings = database(tmp_path / "r.db", ["a"])
    rate(ratings, "Ann", next_task(ratings, "Ann"), ORDER)
    number = ratings.add_round("round-1", tmp_path)
    ratings.end_round(number, "cancelled")
    [only] = ratings.rounds()
    assert (only["name"], only["state"], only["ratings"]) == ("round-1", "cancelled", 1) and only["ended"]
    ratings.copy_to(tmp_path / "copy.db")
    assert Ratings(tmp_path / "copy.db").rated() == ratings.rated()
    with pytest.raises(UserError, match="SQLite says: output file already exists"):
        ratings.copy_to(tmp_path / "copy.db")


# ----------------------------------------------------------------------------------------- the file, the disk


def test_the_file_is_a_log_that_is_written_through(tmp_path):
    ratings = database(tmp_path / "new" / "folder" / "r.db")
    run = ratings._connection.execute
    assert run("PRAGMA journal_mode").fetchone() == ("wal",) and run("PRAGMA synchronous").fetchone() == (2,)
    assert run("PRAGMA foreign_keys").fetchone() == (1,)
    with sqlite3.connect(tmp_path / "new/folder/r.db") as other:
        assert other.execute("PRAGMA application_id").fetchone() == (APPLICATION,)
        with pytest.raises(sqlite3.IntegrityError):
            other.execute("PRAGMA foreign_keys = ON")
            other.execute("INSERT INTO edits (rating_id, text) VALUES (77, '')")


def test_threads_and_processes_write_at_once(tmp_path):
    """Three threads of one process, and a second connection as another process has it."""
    here = database(tmp_path / "r.db", [f"p{n}" for n in range(45)], k=2)
    there = Ratings(tmp_path / "r.db")
    there.k, failures = here.k, []

    def work(ratings, name):
        try:
            rank_all(ratings, name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(ratings, f"{n}")) for n, ratings in
               enumerate([here, here, here, there])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rows = here.rated()
    assert not failures and sorted(row["prompt"] for row in rows) == sorted(f"p{n}" for n in range(45))


@pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 3\0" + b"x" * 5000])
def test_a_file_that_is_no_database_is_one_line_and_stays(content, tmp_path):
    path = tmp_path / "r.db"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no SQLite database|is damaged") as caught:
        Ratings(path)
    assert "\n" not in str(caught.value) and path.read_bytes() == content


def test_another_programs_and_a_newer_database_are_not_touched(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE ratings (id)")
    db.close()
    before = path.read_bytes()
    with pytest.raises(UserError, match="is a database of another program"):
        Ratings(path)
    assert path.read_bytes() == before
    Ratings(tmp_path / "r.db").close()
    with sqlite3.connect(tmp_path / "r.db") as db:
        db.execute("PRAGMA user_version = 2")
    with pytest.raises(UserError, match=r"written by newer code \(schema 2; this code knows 1\)"):
        Ratings(tmp_path / "r.db")
    with pytest.raises(UserError, match="is a folder; a regular file is needed"):
        Ratings(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Ratings(tmp_path / "file" / "r.db")


def test_an_older_database_is_brought_up_to_date_with_all_it_holds(tmp_path, monkeypatch):
    """A step is added to the real ones; the file of today is the older one."""
    old = database(tmp_path / "r.db", ["a"])
    rate(old, "Ann", next_task(old, "Ann"), ORDER)
    rows = old.rated()
    old.close()
    step = ("ALTER TABLE ratings ADD COLUMN mood TEXT", "CREATE TABLE moods (id INTEGER PRIMARY KEY) STRICT")
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    monkeypatch.setattr("utils.data.ratings.SCHEMA", 2)
    new = Ratings(tmp_path / "r.db")
    assert new.rated() == rows
    assert new._connection.execute("SELECT mood FROM ratings").fetchall() == [(None,)]
    assert new._connection.execute("PRAGMA user_version").fetchone() == (2,)
    new.close()
    Ratings(tmp_path / "r.db").close()  # and only once


def test_a_step_that_fails_changes_nothing(tmp_path, monkeypatch):
    database(tmp_path / "r.db").close()
    step = ("ALTER TABLE ratings ADD COLUMN mood TEXT", "CREATE TABLE ratings (id)")
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, step))
    monkeypatch.setattr("utils.data.ratings.SCHEMA", 2)
    with pytest.raises(UserError, match="table ratings already exists"):
        Ratings(tmp_path / "r.db")
    monkeypatch.undo()
    ratings = Ratings(tmp_path / "r.db")
    assert "mood" not in [row[1] for row in ratings._connection.execute("PRAGMA table_info(ratings)")]
    assert len(schema.STEPS) == schema.SCHEMA


def test_a_full_disk_is_one_line_and_the_next_rating_is_taken(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    task = next_task(ratings, "Ann")
    pages = ratings._connection.execute("PRAGMA page_count").fetchone()[0]
    ratings._connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(UserError, match="r.db: the disk is full; make room") as caught:
        rate(ratings, "Ann", task, ORDER, better="x" * 100_000)
    assert "\n" not in str(caught.value) and ratings.rated() == []
    ratings._connection.execute("PRAGMA max_page_count = 1000000")
    assert next_task(ratings, "Ann") == task and rate(ratings, "Ann", task, ORDER, better="x" * 100_000)
    assert len(ratings.rated()) == 1


def test_a_locked_database_is_one_line_after_some_patience(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "PATIENCE", 0.05)
    ratings = database(tmp_path / "r.db", ["a"])
    task = next_task(ratings, "Ann")
    other = sqlite3.connect(tmp_path / "r.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(UserError, match="is in use by another program"):
        rate(ratings, "Ann", task, ORDER)
    assert ratings.rated() == []  # reading goes on
    other.execute("COMMIT")
    assert rate(ratings, "Ann", task, ORDER)


def test_a_database_that_is_read_only_is_one_line(tmp_path):
    ratings = database(tmp_path / "r.db", ["a"])
    task = next_task(ratings, "Ann")
    ratings._connection.execute("PRAGMA query_only = ON")  # root may write to every file
    with pytest.raises(UserError, match="cannot be written to; the file or its folder is read-only"):
        rate(ratings, "Ann", task, ORDER)


def test_thousands_of_ratings_do_not_slow_a_task_down(tmp_path):
    """The plan of the queries, not the clock: no scan of all answers or all ratings for each prompt."""
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(30)], k=2)
    rank_all(ratings, "Ann")
    values = {"rater": 1, "now": time.time(), "overlap": 0, "limit": 5}
    for condition in (LIVE, RANKED):
        plan = ratings._connection.execute(
            f"EXPLAIN QUERY PLAN SELECT 1 FROM tasks WHERE {condition}", values).fetchall()
        assert not any("SCAN ratings" in row[3] for row in plan), plan


def test_the_shuffle_hides_who_wrote_what(tmp_path):
    """Each policy stands at each place about equally often."""
    ratings = database(tmp_path / "r.db", [f"p{n}" for n in range(100)], ("old", "new"), seed=3)
    rank_all(ratings, "Ann", key=lambda text: random.random())
    first = [row["policies"][0] for row in ratings.rated()]
    assert 30 < first.count("new") < 70


# ------------------------------------------------------------------------------------------------------ kills

MISCOUNTED = """SELECT id FROM prompts WHERE rated <> (
                    SELECT count(*) FROM tasks JOIN ratings ON task_id = tasks.id
                    WHERE prompt_id = prompts.id AND repeat_of IS NULL AND undone IS NULL)"""
# rates as fast as it can; names each rating once it is confirmed
WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{scripts!r}, {helpers!r}]
from rated import ids_of
from utils.feedback.database import Ratings
ratings = Ratings({path!r})
rater = ratings.rater("Ann")
while task := ratings.task(rater, 4, ids_of(ratings), 0.2, 0.0):
    key = f"{run} {{task.id}}"
    ratings.rate(key, task.id, rater, "ranking", [[0], [1, 2], [3]], better="an answer of mine " * 50)
    print(key, flush=True)
    if task.id % 5 == 0:
        ratings.undo(rater)
        print("undone", key, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_loses_no_confirmed_rating(tmp_path):
    path, rng = tmp_path / "r.db", random.Random(0)
    database(path, [f"p{n}" for n in range(400)]).close()
    confirmed, undone, scripts = set(), set(), Path(module.__file__).resolve().parents[2]
    for run in range(15):
        source = WRITER.format(scripts=str(scripts), helpers=str(Path(__file__).parents[1] / "helpers"),
                               path=str(path), run=run)
        with subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True) as child:
            first = child.stdout.readline()  # it is at work
            time.sleep(rng.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
            lines = (first + child.stdout.read()).splitlines()
        undone |= {line.removeprefix("undone ") for line in lines if line.startswith("undone ")}
        confirmed |= {line for line in lines if not line.startswith("undone ")}
        assert child.returncode == -signal.SIGKILL and lines
        with sqlite3.connect(path) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []
            stored = dict(db.execute("SELECT key, undone IS NOT NULL FROM ratings"))
            halves = db.execute("""SELECT ratings.id FROM ratings LEFT JOIN ranks ON rating_id = ratings.id
                                   GROUP BY ratings.id HAVING count(answer_id) <> 4""").fetchall()
            without = db.execute("SELECT id FROM ratings WHERE id NOT IN (SELECT rating_id FROM edits)")
            assert db.execute(MISCOUNTED).fetchall() == []
        assert confirmed <= set(stored) and all(stored[key] for key in undone)
        assert not halves and not without.fetchall()
        assert len(stored) - len(confirmed) <= run + 1  # at most the one that was under way at each kill
        db.close()


def test_only_what_says_which_answer_is_better_counts_for_training(tmp_path):
    ratings = database(tmp_path / "r.db", [f"post {n}" for n in range(8)])
    assert ratings.learnable() == (0, 0)

    def add(levels=None, kind="ranking", **more):
        task = next_task(ratings, "Ann")
        order = levels and [[task.answers[place] for place in level] for level in levels]
        return rate(ratings, "Ann", task, order, kind, **more)

    add(kind="skip")
    add(kind="all_bad")
    add([[0, 1, 2, 3]])  # all alike
    assert ratings.learnable() == (0, 0)
    add(kind="all_bad", better="mine")
    assert ratings.learnable() == (1, 0)
    add([[0], [1, 2, 3]])
    add([[3], [2], [1], [0]], better="mine")
    assert ratings.learnable() == (3, 2)
    ratings.undo(ratings.rater("Ann"))
    assert ratings.learnable() == (2, 1)
