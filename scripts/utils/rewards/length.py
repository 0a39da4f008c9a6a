"""How much of a score is length: the slope of a score on the length of the answer.

Reward models pay for length, and a policy finds that first (Singhal et al., 2310.03716). What is done here,
to take a regression on length off the scores of a finished reward, is the idea of Huang et al. (2409.17407);
to judge at equal length is that of Dubois et al. (2404.04475). Ours is the straight line within prompts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class LengthFit(NamedTuple):
    """The line that is taken off the scores of a reward: `slope` x (length - `centre`)."""

    slope: float  # score a token
    centre: float  # tokens: answers of this length keep their score


def length_slope(scores, lengths, groups: Sequence[int]) -> float:
    """How much more an answer scores for each token that it is longer than other answers to its prompt.

    Least squares of the score on the length, with an intercept for each group. Prompts differ in how long
    their right answer is and in how high all of their answers score; that says nothing of what length earns.

    Args:
        scores: (N,); NaN: not scored, left out.
        lengths: (N,) tokens.
        groups: (N,): answers to one prompt have the same number.

    Returns:
        Score a token; 0 where no group has scored answers of two lengths.
    """
    scores = np.asarray(scores, float)
    known = ~np.isnan(scores)
    x, y = (_centred(np.asarray(values, float)[known], np.asarray(groups)[known])
            for values in (lengths, scores))
    return float(x @ y / (x @ x)) if x.any() else 0.0


def _centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Values (N,) less the mean of their group."""
    _, places = np.unique(groups, return_inverse=True)
    return values - (np.bincount(places, values) / np.bincount(places))[places]


def length_fit(scores, lengths, ended) -> LengthFit:
    """What a reward pays for length, by K answers to each of P prompts.

    Answers that were cut off at the limit are left out: their length is not their own.

    Args:
        scores, lengths, ended: (K, P) each; a score is NaN where there is none.
    """
    scores = np.where(ended, scores, np.nan)
    prompts, known = np.broadcast_to(np.arange(scores.shape[1]), scores.shape), ~np.isnan(scores)
    slope = length_slope(scores.ravel(), np.ravel(lengths), prompts.ravel())
    return LengthFit(slope, float(np.asarray(lengths)[known].mean()) if known.any() else 0.0)


def slope_between(before, after, lengths_before, lengths_after, ended) -> float:
    """What a score pays for length, by two policies' answers to the same prompts.

    It is the slope of the difference of the scores on that of the lengths, with an intercept. The intercept
    is what the policies differ by at equal length.

    Args:
        before, after, lengths_before, lengths_after: (P,) each.
        ended: (P,): whether both answers have an end; the others are left out.
    """
    difference = np.where(ended, np.subtract(after, before), np.nan)
    return length_slope(difference, np.subtract(lengths_after, lengths_before), np.zeros(len(difference)))
