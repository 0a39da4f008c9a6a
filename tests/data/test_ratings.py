"""A database of ratings as a data set: what counts, by content, and errors of one line."""

import json
import os
import shutil
import sqlite3

import datasets
import pytest

from rated import TALK, database, next_task, rank_all, rate
from utils.data.ratings import example_rows, pair_rows
from utils.data.rows import load_examples, load_rankings, split_off
from utils.errors import UserError

POST = "SUBREDDIT: r/tea\n\nTITLE: Cups\n\nPOST: Which one?\n\nTL;DR:"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def rankings(value):
    return list(load_rankings(value, "reward_training_data", 9, print))


def pairs(value):
    return sorted((group.prompt, group.completions[better], group.completions[worse])
                  for group in rankings(value) for better, worse in group.pairs)


def test_a_ranking_with_a_tie_is_its_pairs_with_rater_policies_confidence_and_day(tmp_path):
    ratings = database(tmp_path / "r.db", [POST], ("old", "new"))
    levels = [[" new 0"], [" old 0", " old 1"], [" new 1"]]
    rate(ratings, "Ann", next_task(ratings, "Ann"), levels, confidence=2)
    [group] = rankings(str(tmp_path / "r.db"))
    assert group.prompt == POST
    expected = {(" new 0", " old 0"): "new and old", (" new 0", " old 1"): "new and old",
                (" new 0", " new 1"): "new and new", (" old 0", " new 1"): "new and old",
                (" old 1", " new 1"): "new and old"}
    found = {(group.completions[a], group.completions[b]): note["policies"]
             for (a, b), note in zip(group.pairs, group.notes, strict=True)}
    assert found == expected
    with sqlite3.connect(tmp_path / "r.db") as db:
        [[day]] = db.execute("SELECT date(created, 'unixepoch') FROM ratings")
    assert all((note["worker"], note["confidence"], note["batch"]) == ("Ann", "2", day)
               for note in group.notes)


def test_skip_all_bad_and_undone_compare_nothing(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b", "c", "d"])
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="skip")
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="all_bad")
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 0"], [" old 1", " old 2", " old 3"]])
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 3"], [" old 0", " old 1", " old 2"]])
    ratings.undo(ratings.rater("Ann"))
    assert pairs(str(tmp_path / "r.db")) == [("c", " old 0", f" old {n}") for n in (1, 2, 3)]


def test_several_ratings_of_a_prompt_are_one_group_with_both_labels(tmp_path):
    ratings = database(tmp_path / "r.db", k=2)
    for rater, levels in (("Ann", [[" old 0"], [" old 1"]]), ("Bob", [[" old 1"], [" old 0"]])):
        rate(ratings, rater, next_task(ratings, rater, overlap_share=1.0), levels)
    [group] = rankings(str(tmp_path / "r.db"))
    assert [note["worker"] for note in group.notes] == ["Ann", "Bob"]
    assert sorted(group.pairs) == [(0, 1), (1, 0)] and len(group.completions) == 2


def test_conversations_are_those_that_were_rated(tmp_path):
    ratings = database(tmp_path / "r.db", [TALK], k=2)
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 1"], [" old 0"]], better="Ferns.")
    [group] = rankings(str(tmp_path / "r.db"))
    assert group.prompt == "System: Be brief.\n\nHuman: Shade?\n\nAssistant:"
    [example] = load_examples(str(tmp_path / "r.db"), "actor_training_data")
    assert example[:2] == (group.prompt, " Ferns.")


def test_tools_of_a_conversation_are_kept(tmp_path):
    path = tmp_path / "t.jsonl"
    tools = [{"type": "function", "function": {"name": "shade", "parameters": {}}}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Shade?"}], "tools": tools}) + "\n")
    [expected] = load_examples(str(path), "rlhf_training_data", False)
    talk = "\x1e" + json.dumps([{"role": "tools", "content": json.dumps(tools)},
                                {"role": "user", "content": "Shade?"}])
    ratings = database(tmp_path / "r.db", [talk], k=2)
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 1"], [" old 0"]], better="Ferns.")
    assert rankings(str(tmp_path / "r.db"))[0].prompt == expected.prompt
    assert load_examples(str(tmp_path / "r.db"), "actor_training_data")[0].prompt == expected.prompt
    assert load_examples(str(tmp_path / "r.db"), "rlhf_training_data", False)[0].prompt == expected.prompt


def test_edited_answers_are_examples_and_prompts_are_prompts(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b", "c"])
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="all_bad", better="So it is better.\n")
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="skip", better="  ")
    examples = load_examples(str(tmp_path / "r.db"), "actor_training_data")
    assert [tuple(example)[:2] for example in examples] == [("a", " So it is better.")]
    prompts = load_examples(str(tmp_path / "r.db"), "rlhf_training_data", False)
    assert [tuple(prompt)[:2] for prompt in prompts] == [("a", None), ("b", None), ("c", None)]


def test_the_best_answers_are_examples_unless_a_better_one_was_written(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b", "c", "d"], k=3)
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 2"], [" old 0", " old 1"]])
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 2"], [" old 0", " old 1"]], better="Better.")
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 0", " old 1"], [" old 2"]])  # the first shown
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 0", " old 1", " old 2"]])
    shown = next(row for row in ratings.rated() if row["prompt"] == "c")
    first = next(text for text in shown["completions"] if text != " old 2")
    examples = load_examples(str(tmp_path / "r.db"), "actor_training_data")
    assert [tuple(example)[:2] for example in examples] == [("a", " old 2"), ("b", " Better."), ("c", first)]
    assert [tuple(example)[:2] for example in load_examples(str(tmp_path / "r.db"), "centring_data")] == [
        ("b", " Better.")]


@pytest.mark.parametrize(("completions", "ranks", "found"), [
    ([" ", "x"], [1, 2], []), (["", "x", "y"], [1, 1, 2], ["x"]), (["x", ""], [1, 2], ["x"]),
])
def test_an_empty_answer_is_no_example(completions, ranks, found):
    rating = {"prompt": "a", "better": None, "completions": completions, "ranks": ranks}
    assert [row["completion"] for row in example_rows(rating)] == found


def test_an_empty_answer_makes_no_pair():
    """Else a round on a model that often says nothing would be refused for what its reward stage drops."""
    rating = {"prompt": "a", "completions": ["x", " ", "y", ""], "ranks": [2, 1, 1, 3], "rater": "Ann",
              "policies": ["old"] * 4, "time": 0.0, "confidence": None}
    assert [(row["chosen"], row["rejected"]) for row in pair_rows(rating)] == [("y", "x")]


def test_rows_are_those_of_now_and_equal_content_is_read_once(tmp_path):
    """The rating stands in the log beside the file, whose own bytes are the same; the cache must see it."""
    path = tmp_path / "r.db"
    ratings = database(path, ["a", "b"], k=2)
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 1"], [" old 0"]])
    before = path.read_bytes()
    assert pairs(str(path)) == [("a", " old 1", " old 0")]
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 0"], [" old 1"]])
    assert path.read_bytes() == before
    assert pairs(str(path)) == [("a", " old 1", " old 0"), ("b", " old 0", " old 1")]
    built = len(list((tmp_path / "cache/opt-rlhf").iterdir()))
    ratings.copy_to(tmp_path / "copy.db")  # other bytes, the same ratings
    assert pairs(str(tmp_path / "copy.db")) == pairs(str(path))
    assert len(list((tmp_path / "cache/opt-rlhf").iterdir())) == built


def test_databases_and_files_mix_and_are_held_out_by_prompt(tmp_path):
    for name, prompts in (("one", [f"one {n}" for n in range(8)]), ("two", [f"two {n}" for n in range(8)])):
        rank_all(database(tmp_path / f"{name}.db", prompts, k=3), name)
    (tmp_path / "f.jsonl").write_text(json.dumps({"prompt": "f", "completions": ["a", "b"]}) + "\n")
    mixed = [str(tmp_path / "one.db"), {"name": str(tmp_path / "two.db"), "weight": 2},
             str(tmp_path / "f.jsonl")]
    rows = load_rankings(mixed, "reward_training_data", 9, print)
    assert len(rows) == 17 and len(rows.weighed(0)) == 25
    stay, held = split_off(rows, 0.3, 0)
    assert len(stay) + len(held) == 17 and not {row.prompt for row in stay} & {row.prompt for row in held}


def message(value, field="reward_training_data"):
    with pytest.raises(UserError) as caught:
        if field.startswith("reward"):
            load_rankings(value, field, 9, print)
        else:
            load_examples(value, field, not field.startswith("rlhf"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_database_that_holds_nothing_for_the_key_says_what_it_holds(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", "b"])
    path = str(tmp_path / "r.db")
    assert "holds no ranking with a better and a worse answer; rate more with" in message(path)
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="skip")
    assert "holds no ranking with a better and a worse answer (its ratings: 1 skip); rate" in message(path)
    assert "holds no best or edited answer (its ratings: 1 skip)" in message(path, "actor_training_data")
    assert "holds no edited answer (its ratings: 1 skip)" in message(path, "centring_data")


def test_columns_and_the_like_are_refused(tmp_path):
    database(tmp_path / "r.db")
    name = str(tmp_path / "r.db")
    assert "leave columns and only_wanted out" in message({"name": name, "columns": {"prompt": "question"}})
    assert "leave columns and only_wanted out" in message({"name": name, "only_wanted": True})
    assert "has no split; leave that out" in message({"name": name, "split": "train"})
    assert "'mine/ratings.db' does not exist" in message("mine/ratings.db")


def test_broken_foreign_newer_and_unreadable_databases_are_one_line(tmp_path):
    path = tmp_path / "r.db"
    ratings = database(path, [f"a {n}" for n in range(30)])
    rank_all(ratings, "Ann")
    ratings.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    assert "is damaged" in message(str(path))
    path.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    assert "is damaged" in message(str(path))
    path.write_bytes(whole)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    assert "was written by newer code (schema 99; this code knows 1); update this code" in message(str(path))
    with sqlite3.connect(tmp_path / "other.db") as db:
        db.execute("CREATE TABLE ratings (id)")
    db.close()
    assert "is a database of another program" in message(str(tmp_path / "other.db"))


def test_a_database_in_a_folder_that_cannot_be_written_to_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "frozen"
    ratings = database(folder / "r.db", k=2)
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" old 1"], [" old 0"]])
    ratings.close()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)  # root may write everywhere
    before = sorted(path.name for path in folder.iterdir())
    assert pairs(str(folder / "r.db")) == [("a post", " old 1", " old 0")]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_ranking_that_is_too_large_is_a_bad_row_of_that_rating(tmp_path):
    from utils.data.sources import Source, open_source

    ratings = database(tmp_path / "r.db", ["a", "b" * 5000], k=2)
    rank_all(ratings, "Ann")
    rows = list(open_source(Source(str(tmp_path / "r.db")), "reward_training_data", 1000).rows)
    assert [(number, isinstance(row, dict)) for number, row in rows] == [(1, True), (2, False)]
    assert "has more than 1000 bytes" in rows[1][1].reason


def test_a_copy_without_its_log_is_read_as_it_is(tmp_path):
    """Who copies the file alone loses what stands in the log, and nothing breaks."""
    ratings = database(tmp_path / "r.db", k=2)
    ratings.close()  # the log is written back
    shutil.copy(tmp_path / "r.db", tmp_path / "copy.db")
    again = database(tmp_path / "r.db", k=2)
    rate(again, "Ann", next_task(again, "Ann"), [[" old 1"], [" old 0"]])
    assert "holds no ranking" in message(str(tmp_path / "copy.db"))
    assert pairs(str(tmp_path / "r.db"))
