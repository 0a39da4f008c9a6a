"""The reward stage's own functions: its loss with margin and centring, and who is how sure of an order."""

import json
import math
import random

import numpy as np
import pytest
import torch
from test_models import each_row, stock_scores

import train_reward
from families import PAD, random_groups, scalar_model
from utils.config import UserError
from utils.data.report import DataReport
from utils.data.rows import load_examples, load_rankings
from utils.judge.metrics import rank_correlation
from utils.models.loading import load_tokenizer
from utils.models.prompt_groups import pack

PROMPTS, COMPLETIONS = random_groups([4, 6], [[3, 1, 5], [2, 4]])
PAIRS = [(0, 1), (2, 0), (2, 1), (4, 3)]  # (better, worse) of the five completions


@pytest.mark.parametrize(("margin", "centring_coef"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 0.3)])
def test_the_loss_by_its_definition(margin, centring_coef):
    """In float64 from the stock model's scores of plain rows, a pair at a time."""
    model = scalar_model("opt")
    better, worse = torch.tensor(PAIRS).T
    found = train_reward.pairwise_loss_sum(model, pack(PROMPTS, COMPLETIONS, PAD), better, worse, margin, centring_coef)
    score = stock_scores(model, [p + c for p, c in each_row(PROMPTS, COMPLETIONS)]).double().tolist()
    expected = sum(-math.log(1 / (1 + math.exp(-(score[b] - score[w] - margin)))) + centring_coef * (score[b] + score[w]) ** 2
                   for b, w in PAIRS)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_trainer_takes_margin_and_centring_from_the_configuration(monkeypatch):
    taken = {}
    monkeypatch.setattr(train_reward, "GroupLossMixin", object)
    monkeypatch.setattr("utils.trainer.GroupLossMixin.__init__", lambda self, *_, loss_sum, **__: taken.update(loss_sum.keywords))
    config = train_reward.RewardStageConfig(margin=0.5, centring_coef=0.25)
    train_reward.RewardStageTrainer(config=config, validation=None)
    assert taken == {"margin": 0.5, "centring_coef": 0.25}


SCORES = [[2.0, 0.0, 0.0], [0.0, 3.0]]
ROWS = {"pairs": [[(0, 1), (1, 2)], [(0, 1)]], "label_scores": [[0.0, 0.0, 0.5], [2.0, 0.0]]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_confidence_against_accuracy_by_hand():
    """Gaps 2 (right), 0 (a tie, one half), -3 (wrong); the labeller's 0, .5 and 2: his second and third bin."""
    curves = train_reward.reliabilities(SCORES, ROWS)
    assert curves["reward model's confidence"] == [(0.5, 0.5, 1), (pytest.approx(sigmoid(2)), 1.0, 1),
                                                   (pytest.approx(sigmoid(3)), 0.0, 1)]
    assert curves["labeller's confidence"] == [(0.5, 1.0, 1), (pytest.approx(sigmoid(0.5)), 0.5, 1),
                                               (pytest.approx(sigmoid(2)), 0.0, 1)]


def test_accuracy_by_what_the_set_says_of_each_pair():
    rows = {**ROWS, "notes": [[{"batch": "1", "worker": None}, {"batch": "2", "worker": "x"}], None]}
    assert train_reward.accuracy_by_note(SCORES, rows) == {"batch": [("1", 1.0, 1), ("2", 0.5, 1)], "worker": [("x", 0.5, 1)]}
    assert train_reward.accuracy_by_note(SCORES, {**ROWS, "notes": [None, None]}) == {}


def test_an_unknown_labeller_has_no_curve():
    assert list(train_reward.reliabilities(SCORES, {**ROWS, "label_scores": [None, [2.0, 0.0]]})) == ["reward model's confidence"]


def naive_rank(values):
    """The mean of the places that a number and its equals would take in the sorted list."""
    return [sum(place for place, other in enumerate(sorted(values), start=1) if other == value) / values.count(value)
            for value in values]


def test_rank_correlation_by_its_definition():
    draw = random.Random(0)
    for size in (2, 3, 10, 50):
        first = [draw.randint(0, 6) for _ in range(size)] + [0, 7]
        second = [draw.random() + 0.1 * value for value in first]
        expected = np.corrcoef(naive_rank(first), naive_rank(second))[0, 1]
        assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1) == -rank_correlation([1, 2, 3], [3, 2, 1])
    assert math.isnan(rank_correlation([1, 1], [1, 2]))


def rating(post, text, overall, **more):
    info = {"subreddit": "tea", "title": "t", "post": post, "article": None}
    summary = {"text": text, "policy": "ref", "note": "", "axes": {"overall": overall, "accuracy": 7}}
    return {"info": info, "summary": summary, "worker": "w", "batch": "b", "split": "test", **more}


def load_ratings(tmp_path, rows, **more):
    train = [{"prompt": f"P{n}\n\nTL;DR:", "chosen": "a", "rejected": "b"} for n in range(9)]
    for name, part in (("train", train), ("ratings", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = train_reward.RewardStageConfig(reward_training_data=str(tmp_path / "train.jsonl"),
                                            rating_data=str(tmp_path / "ratings.jsonl"), **more)
    report = DataReport()
    return train_reward.load_splits(config, load_tokenizer("assets/opt-mini"), report)[-1], report, config


def test_ratings_of_a_post_are_one_group_and_those_of_one_answer_their_mean(tmp_path):
    rows = [rating("p", "One.", 7), rating("q", "Two.", 1), rating("p", "Three.", 2), rating("p", " One. ", 4),
            rating("p", "Four.", None), rating("r", "word " * 200, 3)]
    table, report, config = load_ratings(tmp_path, rows)
    assert table["label_scores"] == [[5.5, 2], [1]] and list(map(len, table["completions"])) == [2, 1]
    assert any("dropped 1 rows (1 no overall rating)" in note for note in report.notes)
    assert any(note.startswith("rating_data: dropped 1 of 3 groups") for note in report.notes)


def test_scores_are_held_against_the_ratings(tmp_path, monkeypatch):
    table, _, config = load_ratings(tmp_path, [rating(post, text, n) for n, (post, text) in enumerate(
        [("p", "a"), ("q", "b"), ("p", "c"), ("q", "d")])])
    for found, expected in (([[0.1, 0.3], [0.2, 0.9]], 1.0), ([[0.9, 0.2], [0.3, 0.1]], -1.0)):
        monkeypatch.setattr(train_reward, "score_groups", lambda *args, found=found: found)
        assert train_reward.rating_agreement(None, None, table, config) == (pytest.approx(expected), 4)


BROKEN_RATINGS = {
    "400 digits": (rating("p", "a", 10**400), f"column 'summary': the overall rating is {10**400}; a number is needed"),
    "a text": (rating("p", "a", 1, summary="a"), "column 'summary' must be an object with 'text' and 'axes'"),
    "no axes": (rating("p", "a", 1, summary={"text": "a"}), "column 'summary' must be an object with 'text' and 'axes'"),
    "rated by a word": (rating("p", "a", "good"), "the overall rating is 'good'; a number is needed"),
    "no text": (rating("p", None, 1), "column 'summary': text is empty; text is needed"),
    "no post": (rating("", "a", 1), "column 'info': post is empty; text is needed"),
    "no info": (rating("p", "a", 1, info=None), "column 'info' is empty; an object with subreddit, title"),
    "a comparison": ({"prompt": "P", "chosen": "a", "rejected": "b"}, "needed are info, and summary with text and axes"),
}


@pytest.mark.parametrize("case", BROKEN_RATINGS)
def test_a_broken_rating_is_named(case, tmp_path):
    row, said = BROKEN_RATINGS[case]
    with pytest.raises(UserError) as caught:
        load_ratings(tmp_path, [rating("p", "a", 1), row])
    assert str(caught.value).startswith(f"{tmp_path / 'ratings.jsonl'}:2: ") and said in str(caught.value)


def test_rated_posts_that_were_trained_on_are_refused(tmp_path):
    with pytest.raises(UserError, match="^the same prompt stands in reward_training_data and in rating_data: "):
        load_ratings(tmp_path, [rating("p", "a", 1, info={"article": f"P{n}"}) for n in range(9)])


def test_ratings_compare_nothing_but_give_their_prompts_to_ppo(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(rating("p", text, 1)) + "\n" for text in "ab"))
    assert [e.prompt for e in load_examples(str(path), "x", False)] == ["SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"]
    for load in (lambda: load_examples(str(path), "x"), lambda: load_rankings(str(path), "x", 9, print)):
        with pytest.raises(UserError, match="a.jsonl:1: rates one summary .*name such a set as rating_data"):
            load()
