"""Scores of rankings, pair by pair. tests/stages/test_reward.py has what the reward stage makes of them."""

import math
import random

import numpy as np
import pytest

from utils.judge.rankings import (
    accuracy_by_note,
    confidence,
    gaps_of,
    longest_accuracy,
    reliability_by_confidence,
)

SCORES = [[2.0, 0.0, 0.5], [1.0, 1.0]]
PAIRS = [[(0, 1), (1, 2)], [(1, 0)]]


def test_gaps_are_better_minus_worse_and_a_tie_is_half_right():
    gaps, right = gaps_of(SCORES, PAIRS)
    assert gaps.tolist() == [2.0, -0.5, 0.0] and right.tolist() == [1.0, 0.0, 0.5]


def test_confidence_is_that_of_the_order_whichever_is_ahead():
    found = confidence(np.array([0.0, math.log(3), -math.log(3), 1000.0]))
    assert found.tolist() == pytest.approx([0.5, 0.75, 0.75, 1.0])


def test_reliability_by_its_definition():
    """Ten bins of confidence; of each its mean confidence, its accuracy and its pairs."""
    draw = random.Random(0)
    scores = [[draw.gauss(0, 1) for _ in range(3)] for _ in range(200)]
    pairs = [draw.sample([(0, 1), (2, 1), (0, 2)], 2) for _ in scores]
    bins = {}
    for group, order in zip(scores, pairs, strict=True):
        for better, worse in order:
            gap = group[better] - group[worse]
            sure = 1 / (1 + math.exp(-abs(gap)))
            bins.setdefault(int(10 * sure), []).append((sure, gap > 0))
    expected = [tuple(np.mean(bins[place], axis=0)) + (len(bins[place]),) for place in sorted(bins)]
    np.testing.assert_allclose(reliability_by_confidence(scores, pairs), expected)


def test_the_most_frequent_values_of_a_note_are_shown():
    """Of 4 batches the 2 with the most pairs, in the order of their names."""
    batches = ["d"] * 4 + ["a"] * 2 + ["b"] * 3 + ["c"]
    rows = {"pairs": [[(0, 1)]] * 10, "notes": [[{"batch": batch}] for batch in batches]}
    scores = [[1.0, 0.0]] * 2 + [[0.0, 1.0]] * 8
    frequent = [("b", 0.0, 3), ("d", 0.5, 4)]
    assert accuracy_by_note(scores, rows, most=2) == {"batch": frequent}


def test_the_longest_one_wins_by_hand():
    """Lengths 1, 2, 2 and 3, 1: right, a tie, wrong, right."""
    rows = {"completions": [[[5], [5, 5], [6, 6]], [[5, 5, 5], [5]]],
            "pairs": [[(1, 0), (1, 2), (0, 2)], [(0, 1)]]}
    assert longest_accuracy(rows) == (1 + 0.5 + 0 + 1) / 4
