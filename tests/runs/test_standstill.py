"""Whether a run has learnt is said by what it logged."""

import random
import re

import pytest

from utils.runs.standstill import standstill

METRIC = {"sft": "sft/loss", "reward": "reward/loss", "ppo": "objective/score"}


def said(stage, values):
    rows = [{"step": 0, "eval/rouge_avg": 0.1}, *({METRIC[stage]: value} for value in values)]
    return standstill(rows, stage, 3e-6)


@pytest.mark.parametrize("stage", METRIC)
def test_a_run_that_only_scatters_has_not_moved(stage):
    for seed in range(20):
        draw = random.Random(seed)
        message = said(stage, [draw.gauss(2.0, 0.01) for _ in range(30)])
        if message is None:  # two standard errors: one time in forty
            continue
        assert re.search("hardly improved: (1.99|2.00).* (1.99|2.00). in the last; try", message)
    runs = [[draw.gauss(2.0, 0.01) for _ in range(30)] for draw in map(random.Random, range(100))]
    assert sum(said(stage, values) is None for values in runs) < 10


@pytest.mark.parametrize(("stage", "values"), [
    ("sft", [4.9, 4.0, 3.0, 2.0, 1.5, 1.2, 1.0]), ("reward", [0.74, 0.7, 0.66, 0.6, 0.55, 0.52]),
    ("ppo", [0.0, 0.1, 0.3, 0.5, 0.7, 0.8]), ("ppo", [-1.0, -0.9, -0.5, -0.2, 0.0, 0.1]),
])
def test_a_run_that_learns_is_not_warned_of(stage, values):
    assert said(stage, values) is None
    assert said(stage, values[::-1]).endswith("try a learning_rate lower than 3e-06"), "it got worse"


def test_the_issues_run_is_warned_of():
    """SFT of the mini model at 3e-6, measured: the rate of a model 400 times its size."""
    losses = [4.943, 4.874, 4.969, 4.600, 4.632, 4.559, 5.251]
    assert "the loss has hardly improved: 4.909" in said("sft", losses)
    assert said("sft", losses).endswith("try a learning_rate higher than 3e-06, or more steps")


@pytest.mark.parametrize("values", [[], [4.0], [4.0] * 5, [None] * 9])
def test_too_few_values_say_nothing(values):
    assert said("sft", values) is None
