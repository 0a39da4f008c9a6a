"""The study of a few ratings: the simulated people, what each arm learns from, and all of it, shrunken."""

import gzip
import json
import math
import threading
import time
from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from studies import personalise, rating_people
from studies.tastes import TASTES, Person, dislikes
from tiny_models import save_opt
from utils.config import PROJECT, UserError, parse_config
from utils.judge.gold import load_rules
from utils.judge.metrics import label_ceiling

GOLD = load_rules(str(PROJECT / "data" / "tldr_mini" / "gold.json"))
FACTS = {"relation": "nephew", "name": "Kevin", "age": "30", "action": "ripped", "object": "shirt",
         "place": "cinema", "when": "three weeks ago", "feeling": "nervous",
         "question": "Am I making too much of it?"}
SHORT, QUESTION, FEELING = TASTES


@pytest.mark.parametrize(("taste", "summary", "score"), [
    # a thirtieth off for each word
    (SHORT, "Ripped in the cinema.", 26 / 30),
    (SHORT, "My nephew Kevin (30) ripped my shirt in the cinema.", 20 / 30),
    (SHORT, "My nephew ripped my shirt.", 0.0),
    (SHORT, "cinema " + "a b c d e f g h i j k l m n o p q r s t u v w x y z aa bb cc dd.", 0.0),
    # for each word that is not the question's
    (QUESTION, "Am I making too much of it?", 1.0),
    (QUESTION, "My nephew ripped my shirt. I feel nervous. Am I making too much of it?", 22 / 30),
    (QUESTION, "My nephew ripped my shirt. Is it?", 0.0),
    # for each word before it
    (FEELING, "Nervous.", 1.0), (FEELING, "I feel nervous because my nephew ripped my shirt.", 1 - 2 / 30),
    (FEELING, "My nephew ripped my shirt. I feel nervous.", 1 - 7 / 30), (FEELING, "My nephew.", 0.0),
])
def test_what_each_person_likes(taste, summary, score):
    assert Person(taste, GOLD).score(summary, FACTS) == pytest.approx(score)


@pytest.mark.parametrize(("summary", "off"), [
    ("My nephew ripped my shirt.", 0.0), ("", 0.25), ("My nephew ripped my shirt", 0.25),
    ("My niece ripped my shirt in the kitchen.", 0.10 + 0.12),  # relation and place
    ("I feel nervous. I feel nervous. I feel nervous.", 4 * 0.05),  # of seven trigrams three are new
])
def test_what_everybody_dislikes(summary, off):
    assert dislikes(summary, FACTS, GOLD) == pytest.approx(off)


def test_a_person_orders_a_pair_as_the_labellers_do():
    """Bradley-Terry on score / temperature: of 4,000 rankings four standard errors are .03."""
    person, pair = Person(FEELING, GOLD), ["My nephew ripped my shirt. I feel nervous.", "I feel nervous."]
    first = Counter(person.ranking(pair, FACTS)[0] for _ in range(4000))
    gap = ((1 - 2 / 30) - (1 - 7 / 30)) / 0.14
    assert first[1] / 4000 == pytest.approx(1 / (1 + math.exp(-gap)), abs=0.03)


@pytest.mark.parametrize("taste", TASTES)
def test_the_noise_is_that_of_the_labellers(taste):
    """On the mini data's answers; its own labels have a ceiling of .825 (data card)."""
    person = Person(taste, GOLD)
    with gzip.open(PROJECT / "data" / "tldr_mini" / "reward_validation.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines]
    scores = [[person.score(text, row["facts"]) / GOLD["temperature"] for text in row["completions"]]
              for row in rows]
    pairs = [[(i, j) for i in range(4) for j in range(i)]] * len(rows)
    assert 0.78 < label_ceiling(scores, pairs) < 0.86


def test_what_each_arm_learns_from():
    row = {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 3, 1], "rater": "x"}
    rows = {arm: personalise.training_rows(arm, [row]) for arm in personalise.ARMS}
    assert rows == {"rankings": [{"prompt": "p", "completions": ["a", "b", "c"], "ranks": [2, 3, 1]}],
                    "pairs": [{"prompt": "p", "chosen": "c", "rejected": "b"}],
                    "best": [{"prompt": "p", "completion": "c"}]}


def test_averages_over_runs_by_hand():
    """Of rates .6, .7 and .8: mean .7, standard error .1 / sqrt(3), Student's quantile 4.303."""
    done = {str(seed): {"cell": [SHORT, "pairs", 100, "random", seed], "win_rate": rate, "low": 0.0,
                        "high": 1.0} for seed, rate in ((1, 0.6), (2, 0.7), (3, 0.8))}
    half = 4.303 * 0.1 / math.sqrt(3)
    for taste in (SHORT, "all three"):
        assert personalise.averages(done)[taste, "pairs", 100, "random"] == pytest.approx(
            (0.7, 0.7 - half, 0.7 + half, 3))
    assert personalise.averages({"1": done["1"]})[SHORT, "pairs", 100, "random"] == (0.6, 0.0, 1.0, 1)


@pytest.mark.parametrize(("words", "message"), [
    ("--tastes short", "tastes: 'short' is none of short with the place"),
    ("--ways dpo/100", "ways: 'dpo/100' is none"), ("--ways best", "ways: 'best' is none"),
    ("--ways best/x", "ways: 'best/x' is none"), ("--ways best/9/sure", "ways: 'best/9/sure' is none"),
    ("--ways best/9/unsure/x", "ways: 'best/9/unsure/x' is none"), ("--ways best/3", "a round needs 4"),
])
def test_mistakes_are_said(words, message):
    with pytest.raises(UserError, match=message):
        parse_config(personalise.PersonaliseConfig, None, words.split())


def shrunken(folder, *words):
    """The study on tiny models: one person, six posts, through the real page and the real stages."""
    return parse_config(personalise.PersonaliseConfig, None, [
        "--model", str(folder / "policy"), "--other_model", "none", "--reward_model", str(folder / "reward"),
        "--tastes", FEELING, "--seeds", "1", "--test_rows", "8",
        "--folder", str(folder / "runs"), "--results", str(folder / "found.jsonl"),
        "--figure", str(folder / "found.png"), *words])


def test_the_order_of_the_cells(tmp_path):
    """A way comes after the other, with all its seeds and people."""
    config = shrunken(tmp_path, "--ways", "best/6", "rankings/4/unsure", "--seeds", "1", "2",
                      "--tastes", SHORT, FEELING)
    assert [cell.name for cell in personalise.cells_of(config)] == [
        f"{taste}/{way}/{seed}" for way in ("best/6/random", "rankings/4/unsure") for seed in (1, 2)
        for taste in (SHORT, FEELING)]


def test_the_minutes_end_a_cell(tmp_path, monkeypatch):
    """Whatever the worker is doing then."""
    monkeypatch.setattr(personalise, "session", lambda *_: time.sleep(60))
    config, began = shrunken(tmp_path, "--ways", "best/6"), time.monotonic()
    for left in (0.3, -1.0):
        with pytest.raises(personalise.OutOfTime):
            personalise.measure(config, personalise.cells_of(config)[0], time.monotonic() + left)
    assert time.monotonic() - began < 30


def test_a_session_goes_on_at_the_address_of_its_new_page(tmp_path, monkeypatch):
    """The log of the page of an earlier call is still there; that page is not."""
    @contextmanager
    def started_later(script, words, log):
        writer = threading.Timer(0.3, log.write_text, ["open http://127.0.0.1:2/ in a browser"])
        writer.start()
        yield SimpleNamespace(is_alive=lambda: True), None
        writer.join()

    monkeypatch.setattr(rating_people, "process", started_later)
    (tmp_path / "page.log").write_text("open http://127.0.0.1:1/ in a browser")
    with rating_people.rating_page(["m"], tmp_path / "posts", 4, 0, tmp_path) as address:
        assert address == "http://127.0.0.1:2"
    with pytest.raises(UserError, match="^http://127.0.0.1:2: the rating page does not answer"):
        rating_people.Visitor(address, "somebody")


@pytest.mark.slow
def test_the_whole_study_shrunken_and_continued(tmp_path):
    """A second call measures only what is missing, on the ratings that there are."""
    save_opt(tmp_path / "policy", eos_logit=2.0)
    save_opt(tmp_path / "reward", "reward", head_scale=20.0)
    (tmp_path / "ppo.yaml").write_text((PROJECT / "configs" / "personal" / "ppo.yaml").read_text()
                                       .replace("total_episodes: ", "total_episodes: 8 #"))
    results = tmp_path / "found.jsonl"
    personalise.main(shrunken(tmp_path, "--ways", "rankings/6", "--ppo_config", str(tmp_path / "ppo.yaml")))
    first = results.read_text()
    results.write_text(first + '{"cell": ["cut off by a ki')
    personalise.main(shrunken(tmp_path, "--ways", "rankings/6", "best/6", "rankings/0", "--workers", "2"))
    assert results.read_text().startswith(first)
    done = personalise.finished_cells(results)
    names = [f"{FEELING}/{cell}/random/1" for cell in ("rankings/6", "rankings/0", "best/6")]
    assert sorted(done) == sorted(names)
    assert all(0 <= cell["low"] <= cell["win_rate"] <= cell["high"] <= 1 for cell in done.values())
    rows = personalise.rated(tmp_path / "runs" / "random-1" / "ratings.db", FEELING)
    assert len(rows) == 6 and all(sorted(row["ranks"]) == [1, 2, 3, 4] for row in rows)
    assert (tmp_path / "found.png").exists()
