"""The reward stage's own functions: its loss with margin and centring, and its figures."""

import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import softplus

import train_reward
from families import random_groups, scalar_model
from loops import epoch_loop, step_by_sgd
from utils.config import UserError
from utils.data.report import DataReport
from utils.data.rows import load_examples, load_rankings
from utils.judge.gold import labeller_figures
from utils.judge.metrics import rank_correlation
from utils.judge.rankings import accuracy_by_note, longest_accuracy, reliability_by_confidence
from utils.models.loading import without_dropout
from utils.models.parents import Parent

PROMPTS, COMPLETIONS = random_groups([4, 6, 2, 5], [[3, 1, 5], [2, 4], [4, 2], [1, 3, 2]])
# (better, worse) of each prompt's completions
PAIRS = [[(0, 1), (2, 0), (2, 1)], [(1, 0)], [(0, 1)], [(2, 0)]]
ROWS = [{"prompt": p, "completions": c, "pairs": pairs, "length": len(p) + sum(map(len, c))}
        for p, c, pairs in zip(PROMPTS, COMPLETIONS, PAIRS, strict=True)]
OPTIONS = [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 0.3)]


def reward_loop(folder, model=None, **keys):
    """A loop of the reward stage on `ROWS`, all four of them in a step; nothing is clipped."""
    keys = {"max_grad_norm": 0.0, "logging_steps": 1, **keys}
    config = train_reward.RewardStageConfig(output_dir=str(folder), **keys)
    return epoch_loop(config, without_dropout(scalar_model("opt") if model is None else model), len(ROWS))


def stock_score(model, prompt, completion):
    """The score of one plain row, by the stock model."""
    return model(input_ids=torch.tensor([prompt + completion])).logits[0, 0]


@pytest.mark.parametrize(("margin", "centring_coef"), OPTIONS)
def test_the_loss_by_its_definition(margin, centring_coef):
    """In float64, a pair at a time."""
    better, worse = [0.3, -1.2, 40.0, -40.0], [0.1, 1.5, -40.0, 40.0]
    losses = train_reward.pairwise_loss(torch.tensor(better), torch.tensor(worse), margin, centring_coef)
    expected = [math.log1p(math.exp(-(b - w - margin))) + centring_coef * (b + w) ** 2
                for b, w in zip(better, worse, strict=True)]
    assert losses.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-12)


MARGINS = [[0.5, 2.0, 0.25], [1.0], [0.0], [3.5]]  # of PAIRS


@pytest.mark.parametrize("weighting", ["pair", "post"])
def test_margins_of_the_data_are_scaled_and_added_to_the_margin(weighting, tmp_path, monkeypatch):
    """Posts in other batches than those before them; the loss by hand, in float64."""
    monkeypatch.setattr(train_reward, "evaluate", lambda *_: None)
    loop = reward_loop(tmp_path, per_device_batch_size=2, gradient_accumulation_steps=2, margin=0.3,
                       margin_scale=0.5, pair_weighting=weighting)
    rows = [row | {"margins": margins} for row, margins in zip(ROWS, MARGINS, strict=True)]
    oracle, posts = scalar_model("opt"), []
    for row in rows:
        score = [stock_score(oracle, row["prompt"], answer).item() for answer in row["completions"]]
        posts.append([math.log1p(math.exp(score[w] - score[b] + 0.3 + 0.5 * margin))
                      for (b, w), margin in zip(row["pairs"], row["margins"], strict=True)])
    train_reward.train(loop, Dataset.from_list(rows), None)
    [logged] = [row["reward/loss"] for row in loop.run.read_metrics() if "reward/loss" in row]
    expected = sum(map(sum, posts)) / 6 if weighting == "pair" else np.mean([np.mean(post) for post in posts])
    assert logged == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("batch_size", "accumulation", "max_tokens"),
                         [(4, 1, None), (1, 4, None), (2, 2, 25)])
@pytest.mark.parametrize(("margin", "centring_coef"), OPTIONS)
@pytest.mark.parametrize("weighting", ["pair", "post"])
def test_a_step_follows_the_mean_over_all_its_pairs(
        weighting, batch_size, accumulation, max_tokens, margin, centring_coef, tmp_path, monkeypatch):
    """Detail 12: posts of 3, 1, 1 and 1 pairs, or the mean of their means. The oracle scores plain rows with
    the stock model.
    """
    monkeypatch.setattr(train_reward, "evaluate", lambda *_: None)
    loop = reward_loop(tmp_path, per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation,
                       micro_batch_tokens=max_tokens, margin=margin, centring_coef=centring_coef,
                       pair_weighting=weighting)
    step_by_sgd(loop, 0.1)
    train_reward.train(loop, Dataset.from_list(ROWS), None)
    oracle = scalar_model("opt")
    posts = [[[stock_score(oracle, row["prompt"], row["completions"][i]) for i in pair]
              for pair in row["pairs"]] for row in ROWS]
    losses = [[softplus(w + margin - b) + centring_coef * (b + w) ** 2 for b, w in pairs] for pairs in posts]
    loss = sum(map(sum, losses)) / 6 if weighting == "pair" else sum(sum(p) / len(p) for p in losses) / 4
    loss.backward()
    assert loop.step == 1
    for ours, theirs in zip(loop.module.model.parameters(), oracle.parameters(), strict=True):
        expected = theirs if theirs.grad is None else theirs - 0.1 * theirs.grad
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    [logged] = [row["reward/loss"] for row in loop.run.read_metrics() if "reward/loss" in row]
    assert logged == pytest.approx(loss.item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------- figures


def test_figures_of_the_reward_model_by_hand(tmp_path, monkeypatch):
    """Three pairs of one post are right by 2, right by 1 and wrong by 1; the pair of the other is a tie."""
    rows = {"prompt": [[5], [6]], "completions": [[[1, 1], [1], [1, 1, 1]], [[1, 1], [1]]],
            "pairs": [[(0, 1), (0, 2), (1, 2)], [(1, 0)]], "label_scores": [None, None]}
    monkeypatch.setattr(train_reward, "score_groups", lambda *_: [[3.0, 1.0, 2.0], [0.5, 0.5]])
    figures, _ = train_reward.accuracy_of(reward_loop(tmp_path), rows, "")
    assert (figures["accuracy"], figures["pairs"]) == (2.5 / 4, 4)
    # the two posts are drawn again: the first twice, say, or the second
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx((0.5, 2 / 3))
    # groups of one post are one post: more answers than a group holds, or two rows in the file
    again = {name: values * 30 for name, values in rows.items()}
    monkeypatch.setattr(train_reward, "score_groups", lambda *_: [[3.0, 1.0, 2.0], [0.5, 0.5]] * 30)
    same, _ = train_reward.accuracy_of(reward_loop(tmp_path), again, "")
    assert same == pytest.approx({**figures, "pairs": 120})
    # .88 and .73; the second is right once of two, the tie half of .5
    sure = {gap: sigmoid(gap) for gap in (2, 1)}
    assert figures["ece"] == pytest.approx(((1 - sure[2]) + 2 * (sure[1] - 0.5) + 0.0) / 4)
    # the longer one wins in (0, 1) only
    assert longest_accuracy(rows) == 1 / 4 and labeller_figures(rows, SCORES) == ({}, {})


def test_scores_that_are_not_finite_have_no_order(tmp_path, monkeypatch):
    monkeypatch.setattr(train_reward, "score_groups", lambda *_: [[3.0, math.nan]])
    with pytest.raises(UserError, match="^test: a score is not finite"):
        train_reward.accuracy_of(reward_loop(tmp_path), {"prompt": [[5]], "completions": [[[1], [1]]],
                                                         "pairs": [[(0, 1)]]}, "test")


@torch.no_grad()
def test_centring_puts_reference_summaries_at_0_on_average(tmp_path):
    model = scalar_model("opt")
    references = SimpleNamespace(prompts=PROMPTS, completions=[group[0] for group in COMPLETIONS])
    rows = list(zip(PROMPTS, references.completions, strict=True))
    before = [stock_score(model, *row).item() for row in rows]
    loop = reward_loop(tmp_path, model)
    train_reward.centre(loop, references)
    after = [stock_score(model, *row).item() for row in rows]
    assert after == pytest.approx([score - np.mean(before) for score in before], abs=1e-4)
    assert f"shifted the scores by {-np.mean(before):+.3f}" in (loop.run.folder / "train.log").read_text()


SCORES = [[2.0, 0.0, 0.0], [0.0, 3.0]]
RANKINGS = {"pairs": [[(0, 1), (1, 2)], [(0, 1)]], "label_scores": [[0.0, 0.0, 0.5], [2.0, 0.0]]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_confidence_against_accuracy_by_hand():
    """Gaps 2 (right), 0 (a tie, one half), -3 (wrong); the labeller's are 0, .5 and 2."""
    assert reliability_by_confidence(SCORES, RANKINGS["pairs"]) == [
        (0.5, 0.5, 1), (pytest.approx(sigmoid(2)), 1.0, 1), (pytest.approx(sigmoid(3)), 0.0, 1)]
    figures, curves = labeller_figures(RANKINGS, SCORES)
    assert curves == {"labeller's confidence": [(0.5, 1.0, 1), (pytest.approx(sigmoid(0.5)), 0.5, 1),
                                                (pytest.approx(sigmoid(2)), 0.0, 1)]}
    assert figures == {"label_ceiling": pytest.approx((0.5 + sigmoid(0.5) + sigmoid(2)) / 3)}


def test_accuracy_by_what_the_set_says_of_each_pair():
    rows = {**RANKINGS, "notes": [[{"batch": "1", "worker": None}, {"batch": "2", "worker": "x"}], None]}
    assert accuracy_by_note(SCORES, rows) == {"batch": [("1", 1.0, 1), ("2", 0.5, 1)],
                                              "worker": [("x", 0.5, 1)]}
    assert accuracy_by_note(SCORES, {**RANKINGS, "notes": [None, None]}) == {}


def test_an_unknown_labeller_has_no_curve():
    assert labeller_figures({**RANKINGS, "label_scores": [None, [2.0, 0.0]]}, SCORES) == ({}, {})


def naive_rank(values):
    """The mean of the places that a number and its equals would take in the sorted list."""
    places = list(enumerate(sorted(values), start=1))
    return [sum(place for place, other in places if other == value) / values.count(value) for value in values]


def test_rank_correlation_by_its_definition():
    draw = random.Random(0)
    for size in (2, 3, 10, 50):
        first = [draw.randint(0, 6) for _ in range(size)] + [0, 7]
        second = [draw.random() + 0.1 * value for value in first]
        expected = np.corrcoef(naive_rank(first), naive_rank(second))[0, 1]
        assert rank_correlation(first, second) == pytest.approx(expected)
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
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
    tokenizer = Parent("model", "assets/opt-mini").tokenizer
    return train_reward.load_splits(config, tokenizer, report)[-1], report


def test_ratings_of_a_post_are_one_group_and_those_of_one_answer_their_mean(tmp_path):
    rows = [rating("p", "One.", 7), rating("q", "Two.", 1), rating("p", "Three.", 2),
            rating("p", " One. ", 4), rating("p", "Four.", None), rating("r", "word " * 200, 3)]
    table, report = load_ratings(tmp_path, rows, max_dropped_share=0.5)
    assert table["label_scores"] == [[5.5, 2], [1]] and list(map(len, table["completions"])) == [2, 1]
    assert any("(16.7%): 1 no overall rating" in note for note in report.notes)
    assert any(note.startswith("rating_data: dropped 1 of the 3 groups") for note in report.notes)


@pytest.mark.parametrize(("found", "agreement"), [([[0.1, 0.3], [0.2, 0.9]], "1.000"),
                                                  ([[0.9, 0.2], [0.3, 0.1]], "-1.000")])
def test_scores_are_held_against_the_ratings(found, agreement, tmp_path, monkeypatch):
    table, *_ = load_ratings(tmp_path, [rating(post, text, n) for n, (post, text) in enumerate(
        [("p", "a"), ("q", "b"), ("p", "c"), ("q", "d")])])
    monkeypatch.setattr(train_reward, "score_groups", lambda *_: found)
    loop = reward_loop(tmp_path)
    train_reward.log_rating_agreement(loop, table)
    logged = (loop.run.folder / "train.log").read_text()
    assert f"rank correlation of scores and overall ratings: {agreement} (4 answers)" in logged


BROKEN_RATINGS = {
    "400 digits": (rating("p", "a", 10**400),
                   f"column 'summary': the overall rating is {10**400}; a number is needed"),
    "a text": (rating("p", "a", 1, summary="a"), "column 'summary' must be an object with 'text' and 'axes'"),
    "no axes": (rating("p", "a", 1, summary={"text": "a"}),
                "column 'summary' must be an object with 'text' and 'axes'"),
    "rated by a word": (rating("p", "a", "good"), "the overall rating is 'good'; a number is needed"),
    "no text": (rating("p", None, 1), "column 'summary': text is empty; text is needed"),
    "no post": (rating("", "a", 1), "column 'info': post is empty; text is needed"),
    "no info": (rating("p", "a", 1, info=None), "column 'info' is empty; an object with subreddit, title"),
    "a comparison": ({"prompt": "P", "chosen": "a", "rejected": "b"},
                     "the nearest layout is 'info, summary (ratings)', which lacks info, summary"),
}


@pytest.mark.parametrize("case", BROKEN_RATINGS)
def test_a_broken_rating_is_named(case, tmp_path):
    row, said = BROKEN_RATINGS[case]
    with pytest.raises(UserError) as caught:
        load_ratings(tmp_path, [rating("p", "a", 1), row])
    assert str(caught.value).startswith(f"{tmp_path / 'ratings.jsonl'}:2: ") and said in str(caught.value)


def test_rated_posts_that_were_trained_on_are_refused(tmp_path):
    said = "^the same prompt stands in reward_training_data and in rating_data: "
    with pytest.raises(UserError, match=said):
        load_ratings(tmp_path, [rating("p", "a", 1, info={"article": f"P{n}"}) for n in range(9)])


def test_ratings_compare_nothing_but_give_their_prompts_to_ppo(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(rating("p", text, 1)) + "\n" for text in "ab"))
    [example] = load_examples(str(path), "x", False)
    assert example.prompt == "SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    for load in (lambda: load_examples(str(path), "x"), lambda: load_rankings(str(path), "x", 9, print)):
        with pytest.raises(UserError, match=r"the layout .info, summary \(ratings\)., for rating_data"):
            load()
