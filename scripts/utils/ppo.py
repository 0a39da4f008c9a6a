"""The mathematics of PPO as pure functions of tensors: no model, no config, no logging, no communication.

Shapes: N episodes, R tokens in the longest response. Responses are right-padded: the real tokens of a row
come first. Every `*_mask` is boolean, True = real. Where a function takes a mask, padding never changes its
result, not even if it is NaN.

A state has the index of the token that is chosen in it. `values[:, t]` is the value of the state *before*
response token t, and the score is paid for the last real token, the EOS. So one mask serves tokens and
states. (N+ needs two, because it pays the score one position later; detail 28.)

"Detail" numbers are those of docs/details.md. "N+" is arXiv 2403.17031, "PPO" arXiv 1707.06347, "GAE" arXiv
1506.02438, "LMHP" arXiv 1909.08593, "RLOO" arXiv 2402.14740, "GRPO" arXiv 2402.03300. k1, k2 and k3 are the
estimators of http://joschu.net/blog/kl-approx.html.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rollout(NamedTuple):
    """The data of one PPO update, sampled from the behaviour policy."""

    response_mask: Tensor  # (N, R) bool; the EOS is the last real token
    logprobs: Tensor  # (N, R) of the behaviour policy at the sampling temperature (detail 25)
    ref_logprobs: Tensor  # (N, R)
    values: Tensor | None  # (N, R) of the state before each token; None: no value model
    scores: Tensor  # (N,) of the reward model; a missing EOS is penalised already
    # these three need all responses of the update, so they are filled in later
    rewards: Tensor | None = None  # (N, R)
    advantages: Tensor | None = None  # (N, R)
    returns: Tensor | None = None  # (N, R) targets of the values; None: no value model
    weights: Tensor | None = None  # (N, R) of the policy loss, `importance_weights`; None: 1


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimates of KL(policy || reference) at tokens that the policy sampled (detail 24).

    With d = logprobs - ref_logprobs: k1 = d is unbiased. k2 = d^2 / 2 is biased and never negative. k3 =
    exp(-d) - 1 + d is unbiased and never negative.

    Args:
        logprobs, ref_logprobs: of the same shape, which is also that of the result.
        estimator: k1, k2 or k3.

    Raises:
        ValueError: for another estimator.
    """
    d = logprobs - ref_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        # for small d, exp(-d) - 1 loses all its digits to rounding, expm1 does not
        return torch.expm1(-d) + d
    raise ValueError(f"no KL estimator {estimator!r}; there are k1, k2 and k3")


def adapted_kl_coef(kl_coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """The next KL coefficient, by proportional control (LMHP section 2.2; detail 23).

    It is kl_coef * (1 + error * episodes / horizon) with error = kl / target - 1, clipped to +-.2.

    Args:
        kl: mean KL of a response in the last update [nats].
        target: of `kl`.
        episodes: responses of the last update.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards: -kl_coef * kl at every real token, plus the score at the last one (detail 23).

    Args:
        scores: (N,).
        kl, response_mask: (N, R).

    Returns:
        (N, R). Padding is 0.

    Raises:
        ValueError: when an episode has no real token, because its score would be lost.
    """
    if not response_mask.any(dim=1).all():
        raise ValueError("an episode has no real token; even an empty response has its EOS")
    rewards = torch.where(response_mask, -kl_coef * kl, 0.0)
    last = response_mask.sum(dim=1, keepdim=True) - 1  # (N, 1) position of the EOS
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (GAE eq. 16; detail 29).

    The state after the last real token is terminal, its value is 0.

    Args:
        rewards, values, response_mask: (N, R). `values[:, t]` is the value of the state before token t.

    Returns:
        Advantages and returns, (N, R) each. Returns are advantages + values, before any whitening. Padding is
            0.
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
    """Reward of an episode minus the mean reward of its prompt's other K - 1 episodes (RLOO eq. 8).

    Args:
        episode_rewards: (N,), the K episodes of a prompt next to each other.

    Returns:
        (N,).

    Raises:
        ValueError: for K = 1.
    """
    rewards = _by_prompt(episode_rewards, k)
    others = (rewards.sum(1, keepdim=True) - rewards) / (k - 1)
    return (rewards - others).flatten()


def grpo_advantages(episode_rewards: Tensor, k: int) -> Tensor:
    """(reward - mean) / (standard deviation + 1e-4) over the K episodes of a prompt (GRPO section 4.1.2).

    It is the sample standard deviation (K - 1), as in trl. The 1e-4 makes equal rewards 0 instead of 0 / 0.

    Args, returns and raises as `rloo_advantages`.
    """
    rewards = _by_prompt(episode_rewards, k)
    centred = rewards - rewards.mean(1, keepdim=True)
    return (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten()


def _by_prompt(episode_rewards, k):
    """(N / K, K): a row for each prompt."""
    if k < 2:
        raise ValueError("a prompt with one response has no others to be compared with")
    return episode_rewards.view(-1, k)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of `x` where `mask` is True.

    They can be added up over micro-batches and ranks. `mean_var` takes the total.

    Returns:
        (3,) float64.
    """
    x = torch.where(mask, x, 0.0).double()
    return torch.stack([mask.sum().double(), x.sum(), x.square().sum()])


def mean_var(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, scalars, from the (3,) of `masked_moments`.

    Both are NaN if the count is 0.
    """
    count, total, squares = moments
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def whiten(
    x: Tensor, mask: Tensor, mean: Tensor | None = None, var: Tensor | None = None, shift_mean: bool = True
) -> Tensor:
    """Scale `x` to masked variance 1 and shift it to masked mean 0 (detail 30).

    Args:
        x, mask: (N, R).
        mean, var: by default those of `x`. With several micro-batches or ranks give those of all
            (`masked_moments`).
        shift_mean: False keeps the mean.

    Returns:
        (N, R). Padding is 0.

    Raises:
        ValueError: when only one of `mean` and `var` is given.
    """
    if (mean is None) != (var is None):
        raise ValueError("give both mean and var, or neither")
    if mean is None:
        mean, var = mean_var(masked_moments(x, mask))
    whitened = (x - mean) / (var + 1e-8) ** 0.5
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0.0)


def policy_loss(
    new_logprobs: Tensor, logprobs: Tensor, advantages: Tensor, cliprange: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate loss of each token (PPO eq. 7; detail 31).

    It is not reduced: the caller sums over the real tokens and divides by those of the whole optimizer step
    (detail 12). It is not masked: the caller drops padding with torch.where. Padding must be finite in all
    arguments, zeros for instance, because in the backward pass 0 * inf and 0 * NaN are NaN.

    Args:
        new_logprobs, logprobs, advantages: (N, R).

    Returns:
        Loss, and whether clipping changed it (bool); (N, R) each.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def importance_weights(logprobs: Tensor, sampled_logprobs: Tensor, limit: float) -> Tensor:
    """Truncated importance weights of tokens that another engine sampled (TIS; Yao et al. 2025), (N, R).

    Args:
        logprobs: (N, R) of the policy's own forward pass, before the update.
        sampled_logprobs: (N, R) as the engine computed them.
        limit: the largest weight.
    """
    return torch.exp(logprobs - sampled_logprobs).clamp(max=limit)


def value_loss(
    new_values: Tensor, values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Clipped value loss of each state: 0.5 * the larger of the two squared errors (LMHP; detail 31).

    It is neither reduced nor masked, like `policy_loss`.

    Args:
        new_values, values, returns: (N, R).

    Returns:
        Loss, and whether clipping changed it (bool); (N, R) each.
    """
    near = torch.clamp(new_values, values - cliprange_value, values + cliprange_value)
    unclipped = (new_values - returns).square()
    clipped = (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


@torch.no_grad()
def policy_statistics(
    new_logprobs: Tensor, logprobs: Tensor, entropy: Tensor, clipped: Tensor, response_mask: Tensor
) -> dict[str, Tensor]:
    """How far the policy has moved from the behaviour policy (details 27 and 32).

    Args:
        new_logprobs, logprobs, entropy, clipped, response_mask: (N, R).

    Returns:
        Scalars. `ratio`, `approx_kl` (k3), `clipfrac`, `entropy` and `tokens` are SUMS over real tokens: add
        them up over micro-batches and ranks, then divide by `tokens`. `ratio_max` is a maximum: take the
        maximum over these.
    """
    ratio = torch.exp(new_logprobs - logprobs)
    per_token = {
        "ratio": ratio,
        # (ratio - 1) - log ratio: the behaviour policy sampled, so it is the first argument
        "approx_kl": kl_estimate(logprobs, new_logprobs, "k3"),
        "clipfrac": clipped.float(),
        "entropy": entropy,
        "tokens": torch.ones_like(ratio),
    }
    sums = {name: torch.where(response_mask, x, 0.0).sum() for name, x in per_token.items()}
    return {**sums, "ratio_max": torch.where(response_mask, ratio, 0.0).max()}


def explained_variance(residual_moments: Tensor, return_moments: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns), a scalar (detail 32).

    1: the values are perfect up to a constant. 0: they are no better than a constant. NaN or -inf: the
    returns do not vary.

    Args:
        residual_moments, return_moments: `masked_moments` of returns - values, and of the returns.
    """
    return 1 - mean_var(residual_moments)[1] / mean_var(return_moments)[1]


def missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """Scores (N,) in which responses without EOS get the fixed score `penalty` (detail 26); None: their own.

    Args:
        ended: (N,) bool, True = the response has an EOS.
    """
    return scores if penalty is None else torch.where(ended, scores, penalty)


def clipped_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores (N,) clipped to +-limit as they enter the rewards; None: as they are (DSC clips at 5)."""
    return scores if limit is None else scores.clamp(-limit, limit)
