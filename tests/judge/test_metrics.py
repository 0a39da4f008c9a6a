"""Metrics against hand-worked examples, definitions written out in plain Python, and simulations."""

import gzip
import itertools
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from rouge_score import rouge_scorer, tokenizers

from utils.config import PROJECT
from utils.judge import metrics

SCRIPTS = Path(metrics.__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------------ ROUGE


@pytest.fixture(scope="module")
def rouge():
    return metrics.SummaryRouge()


@pytest.mark.parametrize(
    "prediction, reference, rouge1, rouge2, rouge_l",
    [
        # precision 3/3 recall 3/6; bigrams 2/2 and 2/5; longest common subsequence as rouge1. "cats" stems to
        # "cat".
        ("the cats sat", "the cat sat on the mat", 2 / 3, 4 / 7, 2 / 3),
        ("sat cat the", "the cat sat", 1.0, 0.0, 1 / 3),  # right words, wrong order
        ("dogs bark", "the cat sat", 0.0, 0.0, 0.0),
        ("", "the cat sat", 0.0, 0.0, 0.0),
    ],
)
def test_rouge_by_hand(rouge, prediction, reference, rouge1, rouge2, rouge_l):
    result = rouge.compute(predictions=[prediction], references=[reference])
    expected = {"rouge1": rouge1, "rouge2": rouge2, "rougeL": rouge_l,
                "rouge_avg": (rouge1 + rouge2 + rouge_l) / 3}
    assert result == pytest.approx(expected)


def test_rouge_is_the_mean_over_examples(rouge):
    words = random.Random(0)
    vocabulary = "my friends are running away from the dog that keeps barking loudly at night".split()
    texts = [" ".join(words.choices(vocabulary, k=words.randint(1, 12))) for _ in range(40)]
    predictions, references = texts[:20], texts[20:]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    totals = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for prediction, reference in zip(predictions, references, strict=True):
        for name, score in scorer.score(reference, prediction).items():
            totals[name] += score.fmeasure / 20
    result = rouge.compute(predictions=predictions, references=references)
    assert result == pytest.approx({**totals, "rouge_avg": sum(totals.values()) / 3})


def english(rng) -> str:
    """English as people type it: words of posts, numbers, and everything that may stand between words."""
    words = ("The", "running", "RUNS", "ponies", "caresses", "cats'", "don't", "don’t", "1,000.50", "3rd",
             "x2", "foo_bar", "e.g.", "“quoted”", "AT&T", "agreed", "generalizations",
             "r/tea", "a", "sky", "50%",
             "well-known", "oscillators", "😀", "…", "£5", "m²", "Foo™", "1½")
    between = (" ", "  ", "\n", "\t", " - ", "—", ", ", "\u00a0", "\u200b")
    return "".join(rng.choice(words) + rng.choice(between) for _ in range(rng.randrange(12)))


def test_words_of_english_are_those_of_rouge_score():
    rng, theirs, ours = random.Random(3), tokenizers.DefaultTokenizer(use_stemmer=True), metrics.AnyScript()
    texts = [english(rng) for _ in range(500)]
    texts += ["".join(map(chr, rng.choices(range(1, 128), k=40))) for _ in range(500)]  # any ASCII
    with gzip.open(PROJECT / "data" / "tldr_mini" / "actor_validation.jsonl.gz", "rt") as file:
        texts += [text for row in map(json.loads, file) for text in (row["prompt"], row["completion"])]
    assert all(ours.tokenize(text) == theirs.tokenize(text) for text in texts)


@pytest.mark.parametrize(("text", "words"), [
    ("我的邻居借了abc水壶。", ["我", "的", "邻", "居", "借", "了", "abc", "水", "壶"]),
    ("ＡＢＣ１２杯，", ["abc12", "杯"]),
    ("こんにちは、カナ", ["こ", "ん", "に", "ち", "は", "カ", "ナ"]),
    ("\U00020000\U00030000 〇", ["\U00020000", "\U00030000", "〇"]),  # Han beyond 16 bits
    ("हिन्दी में लिखा है।", ["हिन्दी", "में", "लिखा", "है"]),
    ("น้ำ คุณ", ["น้", "ำ", "คุ", "ณ"]),
    ("كِتَابٌ جديد، می\u200cخواهم", ["كِتَابٌ", "جديد", "می\u200cخواهم"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("Ёлка ΟΔΟΣ été", ["ёлка", "οδος", "été"]),
    ("e\u0301te\u0301", ["été"]),  # one spelling of an accent is as good as the other
    ("१२३ ٣", ["१२३", "٣"]),
    ("😀 🎉 \N{WOMAN}\N{ZERO WIDTH JOINER}\N{PERSONAL COMPUTER}!? …", []),
    ("", []),
])
def test_words_of_other_scripts(text, words):
    assert metrics.AnyScript().tokenize(text) == words


# as many words in both texts: ROUGE-1 is the share of them that both have
@pytest.mark.parametrize(("prediction", "reference", "expected"), [
    ("我的水壶坏了", "他的水壶坏了", 5 / 6),
    ("Мой сосед сломал чайник", "Сосед сломал мой забор", 3 / 4),
    ("मेरा पड़ोसी", "मेरा भाई", 1 / 2),
    ("جاري كسر", "جاري باع", 1 / 2),
    ("친구가 왔다", "친구가 갔다", 1 / 2),
    ("น้ำ", "น้ำ", 1.0),
    ("😀", "😀", 0.0),
])
def test_rouge_of_any_script(rouge, prediction, reference, expected):
    found = rouge.compute(predictions=[prediction], references=[reference])
    assert found["rouge1"] == pytest.approx(expected)


def test_rouge_can_be_fed_in_batches_and_used_again(rouge):
    rouge.add_batch(predictions=["the cat sat"], references=["the cat sat"])
    rouge.add_batch(predictions=["a dog", "a bird"], references=["some fish", "some fish"])
    assert rouge.compute()["rouge1"] == pytest.approx(1 / 3)
    assert rouge.compute(predictions=["a dog"], references=["a dog"])["rouge1"] == 1.0  # nothing is left over


def test_rouge_refuses_no_examples_and_unequal_lists(rouge):
    with pytest.raises(ValueError, match="no examples"):
        rouge.compute(predictions=[], references=[])
    with pytest.raises(ValueError):
        metrics.SummaryRouge().compute(predictions=["a", "b"], references=["a"])


def test_rouge_needs_no_network_prints_nothing_and_leaves_no_file(tmp_path):
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from utils.judge.metrics import SummaryRouge\n"
        "rouge = SummaryRouge()\n"
        "assert rouge.compute(predictions=['a b'], references=['a b'])['rouge_avg'] == 1.0\n"
    )
    places = {name: str(tmp_path) for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "TMPDIR")}
    environment = {**os.environ, **places, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(SCRIPTS)}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True,
                         text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert list(tmp_path.rglob("*")) == []


# --------------------------------------------------------------------------------------------------- accuracy


def test_pair_accuracy_by_hand():
    scores = [[3.0, 1.0, 2.0], [0.5, 0.5], [1.0, 2.0], [4.0]]
    pairs = [[(0, 1), (0, 2), (1, 2)], [(0, 1)], [(0, 1)], []]
    correct, counts = metrics.pair_accuracy(scores, pairs)
    assert correct.tolist() == [2.0, 0.5, 0.0, 0.0]  # a tie is worth one half
    assert counts.tolist() == [3.0, 1.0, 1.0, 0.0]


def test_pair_accuracy_and_its_mirror_image_share_every_pair():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, size=(30, 5)).tolist()  # integers, so that ties occur
    pairs = [[(i, j) for i in range(5) for j in range(i)]] * 30
    mirror = [[(j, i) for i, j in group] for group in pairs]
    correct, counts = metrics.pair_accuracy(scores, pairs)
    assert (correct + metrics.pair_accuracy(scores, mirror)[0]).tolist() == counts.tolist() == [10.0] * 30


def test_groups_must_match():
    with pytest.raises(ValueError):
        metrics.pair_accuracy([[1.0, 2.0]], [])
    with pytest.raises(ValueError):
        metrics.label_ceiling([[1.0, 2.0]], [[(0, 1)], [(0, 1)]])


# -------------------------------------------------------------------------------------------------- bootstrap


def test_bootstrap_is_a_ratio_and_deterministic():
    rows = [1.0, 9.0, 0.0, 2.0], [1.0, 10.0, 2.0, 3.0], "abcd"
    mean, low, high = metrics.bootstrap_interval(*rows, seed=1)
    assert mean == 12 / 16  # not the mean of the four ratios, .64
    assert 0 <= low < mean < high <= 1
    assert metrics.bootstrap_interval(*rows, seed=1) == (mean, low, high)
    outcomes = np.random.default_rng(0).random(40)
    one, two = (metrics.bootstrap_interval(outcomes, np.ones(40), range(40), seed) for seed in (1, 2))
    assert one[0] == two[0] and one[1:] != two[1:]


def test_bootstrap_agrees_with_the_normal_interval():
    outcomes = (np.arange(1000) < 700).astype(float)
    mean, low, high = metrics.bootstrap_interval(outcomes, np.ones(1000), range(1000), seed=0)
    error = math.sqrt(0.7 * 0.3 / 1000)
    assert mean == 0.7
    assert low == pytest.approx(0.7 - 1.96 * error, abs=0.004)
    assert high == pytest.approx(0.7 + 1.96 * error, abs=0.004)
    _, low, high = metrics.bootstrap_interval(outcomes, np.ones(1000), range(1000), seed=0, level=0.5)
    assert high - low == pytest.approx(2 * 0.6745 * error, abs=0.004)


# quantiles of Student's t, from a printed table: (posts, level) -> t
STUDENT = {(10, 0.95): 2.262, (20, 0.95): 2.093, (31, 0.99): 2.750, (121, 0.95): 1.980}


@pytest.mark.parametrize(("posts", "level"), STUDENT)
def test_an_interval_over_few_posts_is_as_wide_as_students(posts, level):
    """The mean of numbers that are nearly normal: mean +- t * s / sqrt(n), s with n - 1."""
    values = np.array([NormalDist().inv_cdf((i + 0.5) / posts) for i in range(posts)])
    _, low, high = metrics.bootstrap_interval(values, np.ones(posts), range(posts), 0, 100_000, level)
    half = STUDENT[posts, level] * values.std(ddof=1) / math.sqrt(posts)
    assert (-low, high) == (pytest.approx(half, rel=0.04), pytest.approx(half, rel=0.04))


def test_rows_that_repeat_each_other_do_not_narrow_the_interval():
    """Ten times the same pair: in one row, or in ten rows of one post."""
    outcomes = np.random.default_rng(0).integers(0, 2, size=50).astype(float)
    once = metrics.bootstrap_interval(outcomes, np.ones(50), range(50), seed=0)
    in_one_row = metrics.bootstrap_interval(10 * outcomes, np.full(50, 10.0), range(50), seed=0)
    rows = np.repeat(outcomes, 10), np.ones(500), np.repeat(np.arange(50), 10)
    assert in_one_row == pytest.approx(once)
    assert metrics.bootstrap_interval(*rows, seed=0) == pytest.approx(once)
    apart = metrics.bootstrap_interval(*rows[:2], range(500), seed=0)
    assert apart[2] - apart[1] < 0.4 * (once[2] - once[1]), "500 posts would tell more"


def test_the_order_of_rows_and_the_names_of_posts_do_not_matter():
    draw = np.random.default_rng(3)
    posts, right = draw.integers(0, 12, 60), draw.integers(0, 2, 60).astype(float)
    named = [("post", int(post)) for post in posts]
    by_post = sorted(range(60), key=lambda row: list(dict.fromkeys(named)).index(named[row]))
    first = metrics.bootstrap_interval(right, np.ones(60), posts, seed=0)
    assert first == metrics.bootstrap_interval(right, np.ones(60), named, seed=0)
    assert first == metrics.bootstrap_interval(right[by_post], np.ones(60), posts[by_post], seed=0)


def answers_of_posts(rng, posts):
    """(right, rows' posts) of posts with 1 to 9 answers each; the answers of a post share its difficulty."""
    sizes = rng.integers(1, 10, size=posts)
    chances = np.where(rng.random(posts) < 0.5, 0.4, 0.9)
    return (rng.random(sizes.sum()) < np.repeat(chances, sizes)).astype(float), np.repeat(range(posts), sizes)


@pytest.mark.parametrize(("figure", "posts"), [("accuracy", 15), ("accuracy", 30), ("accuracy", 100),
                                               ("win rate", 30)])
def test_95_percent_intervals_cover_the_truth_where_posts_have_1_to_9_answers(figure, posts):
    """Truth: .5 * .4 + .5 * .9. Drawn over rows, as if each were a post, they cover about three quarters."""
    rng, covered, over_rows, trials = np.random.default_rng(posts), 0, 0, 400
    for trial in range(trials):
        right, owners = answers_of_posts(rng, posts)
        if figure == "accuracy":
            intervals = (metrics.bootstrap_interval(right, np.ones(len(right)), of, trial, 300)
                         for of in (owners, range(len(right))))
        else:
            intervals = (metrics.win_rate(right, 1 - right, of, trial) for of in (owners, range(len(right))))
        inside = [low <= 0.65 <= high for _, low, high in intervals]
        covered, over_rows = covered + inside[0], over_rows + inside[1]
    assert 0.92 <= covered / trials <= 0.98
    assert over_rows / trials < 0.85


def test_bootstrap_equals_plain_loops_over_the_same_draws():
    """Five posts in seven rows; t of 4 degrees of freedom at 90 % is 2.132."""
    numerators, denominators = [1.0, 5.0, 0.0, 2.0, 4.0, 4.0, 0.0], [1.0, 6.0, 2.0, 2.0, 4.0, 4.0, 1.0]
    sums = [(1.0, 1.0), (9.0, 10.0), (0.0, 2.0), (2.0, 3.0), (4.0, 4.0)]
    drawn = np.random.default_rng(5).integers(5, size=(41, 5)).tolist()
    ratios = sorted(sum(sums[g][0] for g in groups) / sum(sums[g][1] for g in groups) for groups in drawn)
    place = 40 * NormalDist().cdf(-2.132 * math.sqrt(5 / 4))  # between the first ratios
    expected = (16 / 20, ratios[0] + place * (ratios[1] - ratios[0]),
                ratios[-1] - place * (ratios[-1] - ratios[-2]))
    assert 0 < place < 1
    assert metrics.bootstrap_interval(numerators, denominators, "abcdebd", seed=5, resamples=41,
                                      level=0.9) == pytest.approx(expected, abs=2e-3)


def test_bootstrap_leaves_out_empty_posts():
    full = metrics.bootstrap_interval([1.0, 0.0, 2.0], [1.0, 1.0, 2.0], "abc", seed=3)
    assert metrics.bootstrap_interval([1.0, 0.0, 0.0, 2.0], [1.0, 0.0, 1.0, 2.0], "axbc", seed=3) == full
    assert metrics.bootstrap_interval([3.0], [4.0], "a", seed=0) == (0.75, 0.75, 0.75)
    with pytest.raises(ValueError, match="nothing"):
        metrics.bootstrap_interval([0.0, 0.0], [0.0, 0.0], "ab", seed=0)


# --------------------------------------------------------------------------------------- ceiling and win rate


def test_label_ceiling_by_hand():
    # differences of ln 3, ln 9 and 0: p = 3/4, 1/10, 1/2
    label_scores = [[math.log(3), 0.0, 0.0], [0.0, math.log(9)]]
    assert metrics.label_ceiling(label_scores, [[(0, 1)], []]) == pytest.approx(0.75)
    assert metrics.label_ceiling(label_scores, [[(1, 0)], []]) == pytest.approx(0.75)
    # a mean over pairs, not over groups
    assert (metrics.label_ceiling(label_scores, [[(0, 1), (1, 2)], [(0, 1)]])
            == pytest.approx((0.75 + 0.5 + 0.9) / 3))
    assert metrics.label_ceiling([[1000.0, -1000.0]], [[(1, 0)]]) == 1.0
    with pytest.raises(ValueError, match="no pairs"):
        metrics.label_ceiling([[1.0]], [[]])


def test_label_ceiling_is_what_the_labellers_own_scores_reach():
    rng = np.random.default_rng(1)
    label_scores = rng.normal(size=(20_000, 2))
    first_wins = rng.random(20_000) < 1 / (1 + np.exp(label_scores[:, 1] - label_scores[:, 0]))
    pairs = [[(0, 1)] if first else [(1, 0)] for first in first_wins]
    correct, counts = metrics.pair_accuracy(label_scores.tolist(), pairs)
    assert metrics.label_ceiling(label_scores.tolist(), pairs) == pytest.approx(correct.sum() / counts.sum(),
                                                                                abs=0.01)


def test_win_rate_counts_ties_as_one_half():
    ours, theirs = [3.0, 1.0, 2.0, 5.0, 0.0], [1.0, 1.0, 2.0, 4.0, 1.0]
    rate, low, high = metrics.win_rate(ours, theirs, range(5), seed=0)
    assert rate == 3 / 5  # two wins, two ties, one loss
    assert low <= rate <= high
    back, back_low, back_high = metrics.win_rate(theirs, ours, range(5), seed=0)
    assert (back, back_low, back_high) == pytest.approx((1 - rate, 1 - high, 1 - low))
    assert metrics.win_rate([1.0] * 9, [1.0] * 9, range(9), seed=0) == (0.5, 0.5, 0.5)


# --------------------------------------------------------------------------------- length-controlled win rate


def duels(intercept, slope, count, seed, shift=0.5):
    """Scores and lengths of `count` duels whose winner is drawn from the model that is fitted; ours are
    longer.
    """
    rng = np.random.default_rng(seed)
    our_lengths, their_lengths = np.exp(rng.normal(3 + shift, 0.5, count)), np.exp(rng.normal(3, 0.5, count))
    chance = 1 / (1 + np.exp(-intercept - slope * np.log(our_lengths / their_lengths)))
    return (rng.random(count) < chance).astype(float), np.full(count, 0.5), our_lengths, their_lengths


@pytest.mark.parametrize("intercept", [-1.0, 0.0, 0.7])
@pytest.mark.parametrize("slope", [0.0, 2.0, -1.5])
def test_length_control_recovers_a_planted_intercept(intercept, slope):
    """The standard error of the intercept is about 2.5 / sqrt(20,000) = .018, that of its sigmoid a quarter
    of it.
    """
    planted = 1 / (1 + math.exp(-intercept))
    assert (metrics.length_controlled_win_rate(*duels(intercept, slope, 20_000, seed=4))
            == pytest.approx(planted, abs=0.02))


def test_length_control_when_length_alone_decides():
    rng = np.random.default_rng(6)
    our_lengths, their_lengths = rng.integers(20, 60, 500), rng.integers(10, 40, 500)
    # separable
    rate = metrics.length_controlled_win_rate(our_lengths, their_lengths, our_lengths, their_lengths)
    assert rate == pytest.approx(0.5, abs=0.1)
    assert metrics.win_rate(our_lengths, their_lengths, range(500), seed=0)[0] > 0.8
    noisy = duels(0.0, 2.0, 5000, seed=7, shift=1.0)
    assert metrics.length_controlled_win_rate(*noisy) == pytest.approx(0.5, abs=0.05)
    assert metrics.win_rate(*noisy[:2], range(5000), seed=0)[0] > 0.75


def test_length_control_is_the_plain_rate_where_lengths_do_not_differ():
    ours, theirs, lengths = [3.0, 1.0, 2.0, 5.0, 0.0], [1.0, 1.0, 2.0, 4.0, 1.0], [4, 9, 2, 7, 30]
    rate = metrics.length_controlled_win_rate(ours, theirs, lengths, lengths)
    assert rate == pytest.approx(3 / 5, abs=1e-5)  # two wins, two ties, one loss
    assert 0.99 < metrics.length_controlled_win_rate([1.0] * 9, [0.0] * 9, [5] * 9, [5] * 9) < 1


def test_length_control_is_the_maximum_of_the_likelihood():
    """Against a search over a grid of intercepts and slopes, in plain Python."""
    ours, theirs = [1, 0, 1, 1, 0, 0, 1, 0], [0, 1, 0, 0, 1, 1, 0, 0]
    lengths, others = [9, 4, 8, 3, 7, 5, 6, 2], [5, 5, 7, 6, 6, 8, 4, 3]

    def loss(a, b):
        total = 0.0
        for x, y, m, n in zip(ours, theirs, lengths, others, strict=True):
            p = 1 / (1 + math.exp(-a - b * math.log(m / n)))
            win = 1.0 if x > y else 0.5 if x == y else 0.0
            total -= win * math.log(p) + (1 - win) * math.log(1 - p)
        return total

    a, _ = min(((a / 100, b / 100) for a in range(-200, 200) for b in range(-100, 600)),
               key=lambda ab: loss(*ab))
    rate = metrics.length_controlled_win_rate(ours, theirs, lengths, others)
    assert rate == pytest.approx(1 / (1 + math.exp(-a)), abs=0.003)


def test_length_control_turns_round_with_the_sides():
    ours, theirs, our_lengths, their_lengths = duels(0.5, 1.0, 300, seed=8)
    there = metrics.length_controlled_win_rate(ours, theirs, our_lengths, their_lengths)
    back = metrics.length_controlled_win_rate(theirs, ours, their_lengths, our_lengths)
    assert there == pytest.approx(1 - back, abs=1e-9)
    assert (there == pytest.approx(metrics.length_controlled_win_rate(ours, theirs, 10 * our_lengths,
                                                                      10 * their_lengths)))


def test_length_control_refuses_what_means_nothing():
    with pytest.raises(ValueError, match="no prompts"):
        metrics.length_controlled_win_rate([], [], [], [])
    with pytest.raises(ValueError, match="not positive"):
        metrics.length_controlled_win_rate([1.0], [0.0], [0], [5])


# ------------------------------------------------------------------------------------------------ calibration


def calibration_error_by_definition(probabilities, outcomes, bins):
    total = 0.0
    for b in range(bins):
        last = b == bins - 1
        inside = [
            (p, y)
            for p, y in zip(probabilities, outcomes, strict=True)
            if b / bins <= p < (b + 1) / bins or (last and p == 1.0)
        ]
        if inside:
            confidence = sum(p for p, _ in inside) / len(inside)
            frequency = sum(y for _, y in inside) / len(inside)
            total += len(inside) / len(probabilities) * abs(confidence - frequency)
    return total


def test_calibration_error_by_hand():
    # bin [.5, .6): confidence .55 against 1/2; last bin: .98 against 1/2
    error = metrics.expected_calibration_error([0.52, 0.58, 0.96, 1.0], [1, 0, 1, 0])
    assert error == pytest.approx(0.5 * 0.05 + 0.5 * 0.48)
    # neighbouring bins do not cancel out, and an edge belongs to the bin above it
    assert metrics.expected_calibration_error([0.85, 0.95], [0, 1]) == pytest.approx(0.5 * 0.85 + 0.5 * 0.05)
    assert metrics.expected_calibration_error([0.45, 0.5], [0, 1]) == pytest.approx(0.5 * 0.45 + 0.5 * 0.5)
    assert metrics.expected_calibration_error([0.9] * 4, [0] * 4) == pytest.approx(0.9)
    assert metrics.expected_calibration_error([0.75] * 4, [1, 0, 1, 1]) == pytest.approx(0.0)


def test_reliability_by_hand():
    probabilities, outcomes = [0.52, 0.58, 1.0, 0.96, 0.05, 0.5], [1, 0, 0, 1, 0, 1]
    table = metrics.reliability(probabilities, outcomes)  # bins that are empty are left out
    expected = [(0.05, 0.0, 1), ((0.5 + 0.52 + 0.58) / 3, 2 / 3, 3), (0.98, 0.5, 2)]
    assert [pytest.approx(row) for row in expected] == table
    halves = metrics.reliability(probabilities, outcomes, bins=2)
    assert [pytest.approx(row) for row in [(0.05, 0.0, 1), (3.56 / 5, 3 / 5, 5)]] == halves
    assert metrics.reliability([], []) == []


@pytest.mark.parametrize("bins", [1, 4, 10])
def test_calibration_error_equals_its_definition(bins):
    rng = np.random.default_rng(2)
    probabilities, outcomes = rng.random(200), rng.integers(0, 2, size=200)
    error = metrics.expected_calibration_error(probabilities, outcomes, bins)
    assert (error == pytest.approx(calibration_error_by_definition(probabilities.tolist(), outcomes.tolist(),
                                                                   bins)))
    order = rng.permutation(200)
    assert metrics.expected_calibration_error(probabilities[order], outcomes[order],
                                              bins) == pytest.approx(error)


def test_calibration_error_tells_a_calibrated_model_from_an_overconfident_one():
    rng = np.random.default_rng(3)
    probabilities = rng.uniform(0.5, 1.0, size=20_000)
    outcomes = rng.random(20_000) < probabilities
    assert metrics.expected_calibration_error(probabilities, outcomes) < 0.02
    assert metrics.expected_calibration_error(np.sqrt(probabilities), outcomes) > 0.05

# -------------------------------------------------------------------------------------------------- best of n


@pytest.mark.parametrize("scores", [
    [0.3, -1.0, 2.0, 0.5, 1.5],
    [0.3, 2.0, 0.3, 0.3, 2.0, -1.0],  # ties below, and for the best
    [-1.0] * 4,  # nothing but ties: no sample ended, say
    [7.0],
])
def test_best_of_n_is_the_mean_over_all_subsets(scores):
    """Every subset of size n by itself; where several of it share the highest score, their mean is what it is
    worth.
    """
    values = random.Random(len(scores)).choices(range(-3, 9), k=len(scores))
    for n in range(1, len(scores) + 1):
        best = [max(subset) for subset in itertools.combinations(scores, n)]
        assert metrics.best_of_n(scores, scores, n) == pytest.approx(sum(best) / len(best))
        worth = []
        for subset in itertools.combinations(range(len(scores)), n):
            highest = max(scores[i] for i in subset)
            tied = [values[i] for i in subset if scores[i] == highest]
            worth.append(sum(tied) / len(tied))
        assert metrics.best_of_n(scores, values, n) == pytest.approx(sum(worth) / len(worth))


def test_best_of_n_does_not_depend_on_the_order_of_the_samples():
    draw = random.Random(0)
    samples = [(draw.choice([-1.0, 0.2, 0.9, draw.random()]), draw.random()) for _ in range(64)]
    for n in (1, 2, 8, 64):
        expected = metrics.best_of_n(*zip(*samples, strict=True), n)
        for _ in range(3):
            draw.shuffle(samples)
            assert metrics.best_of_n(*zip(*samples, strict=True), n) == pytest.approx(expected)


@pytest.mark.parametrize("n", [0, 4])
def test_best_of_more_samples_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match=f"best of {n} samples from 3"):
        metrics.best_of_n([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], n)


@pytest.mark.parametrize("n", [1, 2, 3, 16, 64])
def test_best_of_n_kl_is_the_integral_of_its_density(n):
    """With u the share of samples that score lower, best-of-n has density n u^(n-1) where the policy has
    density 1.
    """
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    density = n * u ** (n - 1)
    integral = np.mean(np.where(density > 0, density * np.log(np.maximum(density, 1e-300)), 0.0))
    assert metrics.best_of_n_kl(n) == pytest.approx(integral, abs=1e-5)
