"""What each token of an update was worth: advantages, whitened over all ranks, and the weights of tokens that
another engine sampled.

Shapes: N episodes (responses) of this rank, the K of a prompt one after the other; R tokens in the longest
response.
"""

import torch
from torch import Tensor

from utils.errors import UserError
from utils.loop import Loop
from utils.ppo import (
    gae,
    grpo_advantages,
    importance_weights,
    masked_moments,
    mean_var,
    rloo_advantages,
    whiten,
)
from utils.rollouts.episodes import Episodes

MOST_DRIFT = 1.5  # nats a token; 16 bits make .01, weights that an engine did not take several


def estimate_advantages(loop: Loop, rewards: Tensor, values: Tensor | None,
                        mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """Advantages and, with a value model, returns: (N, R) (detail 29)."""
    config = loop.config
    if config.advantage == "gae":
        advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
        return whitened(loop, advantages, mask), returns
    compare = rloo_advantages if config.advantage == "rloo" else grpo_advantages
    return torch.where(mask, compare(rewards.sum(1), config.responses_per_prompt)[:, None], 0.0), None


def whitened(loop: Loop, x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Whiten (N, R) with the moments of the whole update on all ranks, never of a micro-batch (detail 30)."""
    mean, var = mean_var(loop.total(masked_moments(x, mask)))
    return whiten(x, mask, mean, var, shift_mean)


def correct_engine(loop: Loop, episodes: Episodes) -> tuple[Tensor | None, dict]:
    """Weights (N, R) of tokens that another engine sampled, None for our own; and how far it drifts: the mean
    |log-prob of the engine - log-prob of our forward pass| over all tokens.

    Raises:
        UserError: when it drifts so far that it computes another model.
    """
    if episodes.engine_logprobs is None:
        return None, {}
    weights = importance_weights(episodes.logprobs, episodes.engine_logprobs, loop.config.importance_limit)
    apart = (episodes.logprobs - episodes.engine_logprobs).abs()[episodes.response_mask]
    drift = (loop.total(apart.sum()) / loop.total(episodes.response_mask.sum())).item()
    if not drift < MOST_DRIFT:
        raise UserError(f"rollout_engine: the log-probs of '{loop.config.rollout_engine}' are {drift:.2f} "
                        "nats a token from those of a forward pass here, so it computes another model; take "
                        "rollout_engine 'own'")
    return weights, {"policy/sampling_drift": drift}
