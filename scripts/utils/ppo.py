"""The mathematics of PPO as pure functions of tensors: no model, no config, no logging, no communication.

Shapes: N episodes, R response length, right-padded, so that the real tokens of a row come first. Every `*_mask`
is boolean, True = real. Where a function takes a mask, padding never changes its result, not even a NaN there.

A state carries the index of the token that is chosen in it: `values[:, t]` is the value of the state *before*
response token t is emitted, and the score is paid for emitting the last real token, the EOS. One mask therefore
serves tokens and states. (Detail 28 keeps two because N+ places the score one position later.)

Sources: "N+" is arXiv 2403.17031 with its detail numbers as in our notes; "PPO" is arXiv 1707.06347; "GAE" is
arXiv 1506.02438; "LMHP" is arXiv 1909.08593; "RLOO" is arXiv 2402.14740; "GRPO" is arXiv 2402.03300; k1, k2 and k3
are the estimators of http://joschu.net/blog/kl-approx.html.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """What one PPO update is trained on, gathered under the behaviour policy. (N, R) where no shape is given."""

    response_mask: Tensor  # bool; the EOS is its last real token
    logprobs: Tensor  # behaviour policy, at the sampling temperature (detail 25)
    ref_logprobs: Tensor
    values: Tensor | None  # of the state before each token; None without a value model
    scores: Tensor  # (N,) from the reward model, after the penalty for a missing EOS
    # the last three are known when all responses of the update are
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None  # what the values are trained on; None without a value model


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """KL(policy || reference) per token, of tokens that the policy sampled; any shape (detail 24).

    With d = logprobs - ref_logprobs: k1 = d, unbiased; k2 = d^2 / 2, biased, never negative; k3 = exp(-d) - 1 + d,
    unbiased and never negative. Raises ValueError for another estimator.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d  # expm1: exp(-d) - 1 loses all its digits where the two policies nearly agree
    raise ValueError(f"no KL estimator {estimator!r}; there are k1, k2 and k3")


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The KL coefficient after an update of `episodes` responses whose KL was `kl` nats each (LMHP section 2.2; detail 23).

    Proportional control: kl_coef * (1 + error * episodes / horizon), error = kl / target - 1 clipped to +-.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def shape_scores(scores: Tensor, scale: float, clip: float | None) -> Tensor:
    """Scores (N,) divided by `scale`, then clipped to +-`clip` (None: not clipped), as they enter the rewards."""
    scaled = scores / scale
    return scaled if clip is None else scaled.clamp(-clip, clip)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (N, R): -kl_coef * kl at every token, plus the score at the last real one (detail 23).

    Takes scores (N,), kl (N, R), response_mask (N, R). Padding is 0.
    Raises ValueError when an episode has no real token: its score would have no place.
    """
    if not response_mask.any(dim=1).all():
        raise ValueError("an episode has no real token; even an empty response has its EOS")
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last = response_mask.sum(dim=1, keepdim=True) - 1  # (N, 1)
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates and returns, all (N, R) (GAE eq. 16; detail 29).

    `values[:, t]` belongs to the state before token t, see the module docstring; the state after the last real
    token is terminal and worth 0. Returns are advantages + values, before any whitening. Padding is 0.
    """
    rewards = torch.where(response_mask, rewards, 0.0)
    values = torch.where(response_mask, values, 0.0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])  # (N,)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        advantages[:, t] = advantage
        next_value = values[:, t]
    return advantages, advantages + values


def rloo_advantages(episode_rewards: Tensor, k: int) -> Tensor:
    """Reward of an episode minus the mean of its prompt's other K - 1 episodes, (N,) (RLOO eq. 8).

    Takes (N,) rewards, the K episodes of a prompt one after the other. Raises ValueError for K = 1, which has no others.
    """
    rewards = _by_prompt(episode_rewards, k)
    others = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return (rewards - others).flatten()


def grpo_advantages(episode_rewards: Tensor, k: int) -> Tensor:
    """(reward - mean) / (standard deviation + 1e-4) over the K episodes of a prompt, (N,) (GRPO section 4.1.2).

    Takes what `rloo_advantages` takes. The deviation is the sample's, as in trl; 1e-4 keeps equal rewards at 0.
    """
    rewards = _by_prompt(episode_rewards, k)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def _by_prompt(episode_rewards, k):
    if k < 2:
        raise ValueError("a prompt with one response has no others to be compared with")
    return episode_rewards.view(-1, k)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of `x` where `mask` is True: float64 (3,).

    They add up over micro-batches and ranks, so a caller may all-reduce them and pass the total to `mean_var`.
    """
    x = torch.where(mask, x, 0.0).double()
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, both scalars, from the (3,) of `masked_moments` (NaN if the count is 0)."""
    count, total, squares = moments
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def whiten(
    x: Tensor, mask: Tensor, mean: Tensor | None = None, var: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """`x` (N, R) scaled to masked variance 1 and, with `shift_mean`, moved to masked mean 0 (detail 30).

    `mean` and `var` default to those of `x`; with several ranks give those of all of them (`masked_moments`).
    Variance is the population's, eps 1e-8. Padding is 0. Raises ValueError when only one of the two is given.
    """
    if (mean is None) != (var is None):
        raise ValueError("give both mean and var or neither")
    if mean is None:
        mean, var = mean_var(masked_moments(x, mask))
    whitened = (x - mean) / (var + 1e-8) ** 0.5
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss per token and whether clipping set it (bool), all (N, R) (PPO eq. 7; detail 31).

    Not reduced: the caller sums over real tokens and divides by those of the whole optimizer step (detail 12).
    Padding is the caller's to drop, with torch.where; all arguments must be moderate numbers there, zeros for
    instance, because a backward pass makes 0 * inf and 0 * NaN a NaN.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss per state, 0.5 * max of the two squares, and whether clipping set it (bool), all (N, R).

    Source: detail 31, from LMHP (arXiv 1909.08593). Not reduced and not masked, as `policy_loss`.
    """
    near = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    unclipped = (new_values - returns).square()
    clipped = (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


@torch.no_grad()
def policy_statistics(
    new_logprobs: Tensor, logprobs: Tensor, entropy: Tensor, clipped: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """How far the policy has moved from the behaviour policy (details 27, 32); all arguments (N, R).

    Scalars. `ratio`, `approx_kl` (k3), `clipfrac`, `entropy` and `tokens` are SUMS over real tokens: add them over
    micro-batches and ranks, then divide by `tokens`. `ratio_max` is a maximum, to be combined by maximum.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    per_token = {
        "ratio": ratio,
        "approx_kl": kl_estimate(logprobs, new_logprobs, "k3"),  # (ratio - 1) - logratio: the samples are the behaviour policy's
        "clipfrac": clipped.float(),
        "entropy": entropy,
        "tokens": torch.ones_like(ratio),
    }
    sums = {name: torch.where(response_mask, x, 0.0).sum() for name, x in per_token.items()}
    return {**sums, "ratio_max": torch.where(response_mask, ratio, 0.0).max()}


def explained_variance(residual_moments: Tensor, return_moments: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar (detail 32), from the `masked_moments` of the two.

    1 is perfect up to a constant, 0 no better than a constant; NaN or -inf when the returns do not vary.
    """
    return 1 - mean_var(residual_moments)[1] / mean_var(return_moments)[1]


def missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """Scores (N,) with the fixed score `penalty` in place of those whose response has no EOS (detail 26).

    `ended` (N,) is boolean, True = the response contains an EOS.
    """
    return torch.where(ended, scores, penalty)
