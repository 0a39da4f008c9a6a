"""The guard against a policy that games its reward: when a later policy may take the kept one's place.

A policy that games its reward model is better in that model's eyes, and soon only by a little more than noise
or only in some judges' eyes. So a later policy is kept only when every judge sees it above the kept one by
more than the noise of the comparison. The judges are the reward, each head of a reward model with several
heads (Coste et al., 2310.02743), and `guard_model`, a reward model of other rankings that no policy learns
from. No gold score is read.
"""

import numpy as np


def gain(new: list[list[float]], kept: list[list[float]]) -> float:
    """How far a policy is above the kept one, in standard errors: the smallest of all judges' opinions.

    The standard error is that of the mean difference on the same posts. A judge that sees the same difference
    on every post has no noise: its opinion is infinite, or 0 where there is no difference.

    Args:
        new, kept: (judges, posts) each: scores of the summaries of the same posts.
    """
    difference = np.asarray(new, float) - np.asarray(kept, float)  # (J, P)
    mean, noise = difference.mean(1), difference.std(1, ddof=1) / np.sqrt(difference.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        opinions = np.where(mean == 0, 0.0, mean / noise)
    return float(opinions.min())
