"""What a score pays for length, against numpy's least squares with a column for each prompt."""

import math

import numpy as np
import pytest
import torch

from utils.rewards.entries import FormatEntry, parse_rewards
from utils.rewards.length import LengthFit, length_fit, length_slope, slope_between
from utils.rewards.rewards import Rewards
from utils.rewards.rules import RuleReward


def answers(seed=0, prompts=9, k=4):
    """Scores and lengths (K, P) of prompts that differ in both, with some answers unscored or cut off."""
    drawn = np.random.default_rng(seed)
    level = drawn.normal(size=prompts)
    # prompts with long answers score high
    lengths = drawn.integers(3, 30, (k, prompts)) + np.round(20 * level + 40)
    scores = 3 * level + 0.05 * lengths + drawn.normal(size=(k, prompts))
    scores[0, 2] = scores[3, 5] = math.nan
    ended = np.ones((k, prompts), bool)
    ended[1, 1] = ended[2, 7] = ended[0, 0] = False
    ended[1:, 8] = False  # one answer is left, which says nothing
    return scores, lengths, ended


def by_lstsq(scores, lengths, groups):
    """The slope of a least-squares fit with an intercept for each group."""
    dummies = np.asarray(groups)[:, None] == np.unique(groups)
    return np.linalg.lstsq(np.column_stack([lengths, dummies]), scores, rcond=None)[0][0]


def test_the_slope_is_that_of_least_squares_with_an_intercept_for_each_prompt():
    scores, lengths, ended = answers()
    known = ended & ~np.isnan(scores)
    prompts = np.broadcast_to(np.arange(scores.shape[1]), scores.shape)
    expected = by_lstsq(scores[known], lengths[known], prompts[known])
    assert length_fit(scores, lengths, ended) == pytest.approx((expected, lengths[known].mean()))
    without_prompts = by_lstsq(scores[known], lengths[known], np.zeros(known.sum()))
    assert abs(without_prompts - expected) > 0.02, "the test wants prompts that matter"


def test_between_two_policies_the_slope_has_an_intercept_for_each_prompt_and_each_policy():
    scores, lengths, ended = (table[:2] for table in answers(1, prompts=20))
    scores[1] += 4  # what the second policy is better by at equal length
    kept = ended.all(0) & ~np.isnan(scores).any(0)
    prompts, second = np.tile(np.flatnonzero(kept), 2), np.repeat([0, 1], kept.sum())
    columns = [lengths[:, kept].ravel(), second, *(prompts == prompt for prompt in np.flatnonzero(kept))]
    expected = np.linalg.lstsq(np.column_stack(columns), scores[:, kept].ravel(), rcond=None)[0]
    slope = slope_between(*scores, *lengths, ended.all(0))
    assert slope == pytest.approx(expected[0])
    gain = np.diff(scores[:, kept].mean(1)) - slope * np.diff(lengths[:, kept].mean(1))
    assert gain == pytest.approx(expected[1]), "what is left of the gain is the second policy's own"


@pytest.mark.parametrize("table", [
    ([[1.0, 2.0], [3.0, 5.0]], [[4, 9], [4, 9]], [[True, True]] * 2),  # the same length in each prompt
    ([[1.0, 2.0], [math.nan, 5.0]], [[4, 9], [6, 9]], [[True, True]] * 2),
    ([[1.0, 2.0], [3.0, 5.0]], [[4, 9], [6, 3]], [[True, True], [False, False]]),  # one answer of each ended
    ([[1.0], [3.0]], [[4], [6]], [[False], [False]]),
])
def test_without_answers_of_two_lengths_to_one_prompt_the_slope_is_0(table):
    assert length_fit(*map(np.array, table)).slope == 0
    assert length_slope([], [], []) == 0


def rewards(**keys):
    return Rewards([RuleReward(FormatEntry(name="x", format="x", length_control=True, **keys), "rewards.x")])


@pytest.mark.parametrize("price", [0.0, 0.3, -2.0])
def test_a_price_of_length_in_a_reward_changes_no_difference_of_controlled_scores(price):
    """And the mean of the answers of the fit stays what it was without the price, up to a constant."""
    scores, lengths, ended = answers(2)
    made, priced = rewards(clip=1e5), rewards(clip=1e5)
    made.length_fits["x"] = length_fit(scores, lengths, ended)
    priced.length_fits["x"] = length_fit(scores + price * lengths, lengths, ended)
    assert priced.length_fits["x"].slope == pytest.approx(made.length_fits["x"].slope + price)
    others, tokens = torch.randn(50), torch.randint(1, 60, (50,))
    plain = made._summed(others[:, None], tokens, [1.0])
    summed = priced._summed((others + price * tokens)[:, None], tokens, [1.0])
    assert (summed - summed[0]).numpy() == pytest.approx((plain - plain[0]).numpy(), abs=1e-4)
    slope, centre = made.length_fits["x"]
    assert plain.numpy() == pytest.approx((others - slope * (tokens - centre)).numpy(), abs=1e-5)


def test_length_is_taken_off_before_scale_and_clip_and_an_unscored_answer_adds_nothing():
    made = rewards(scale=2.0, clip=1.0, weight=3.0)
    made.length_fits["x"] = LengthFit(0.5, 10.0)
    columns = torch.tensor([[4.0], [4.0], [math.nan], [0.0]])
    lengths = torch.tensor([16, 10, 30, 11])
    assert made._summed(columns, lengths, [1.0]).tolist() == [3 * 0.5, 3.0, 0.0, 3 * -0.25]


@pytest.mark.parametrize("kind", ["length_target", "length_limit", "length_price"])
def test_a_reward_of_length_itself_is_refused(kind):
    with pytest.raises(ValueError, match=rf"^entry 1 \('{kind}'\): 'length_control' would take back what it"):
        parse_rewards([{kind: 3, "length_control": True}])
