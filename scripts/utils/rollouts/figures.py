"""What an update says: the figures of its rollout and of its passes, over all ranks; and when to stop
because of them.

Shapes: N episodes (responses) of this rank; R tokens in the longest response.
"""

import math

import torch
from torch import Tensor

from utils.errors import UserError
from utils.loop import Loop
from utils.ppo import Rollout, explained_variance, kl_estimate, masked_moments, policy_statistics


def rollout_metrics(loop: Loop, rollout: Rollout, ended: Tensor) -> dict:
    """What the episodes of an update say: means over all episodes of all ranks (detail 32)."""
    mask = rollout.response_mask

    def mean(per_episode: Tensor) -> float:
        return loop.total(per_episode.double().sum()).item() / loop.config.episodes_per_update

    def kl(estimator: str) -> float:
        return mean(torch.where(mask, kl_estimate(rollout.logprobs, rollout.ref_logprobs, estimator),
                                0.0).sum(1))

    figures = {"objective/kl": kl("k1"), "objective/kl_k3": kl("k3"), "objective/score": mean(rollout.scores),
               "objective/rlhf_reward": mean(rollout.rewards.sum(1)), "objective/length": mean(mask.sum(1)),
               "objective/ended": mean(ended), "objective/kl_coef": loop.carried["kl_coef"],
               "objective/episodes": (loop.step + 1) * loop.config.episodes_per_update}
    if rollout.values is not None:
        residuals = loop.total(masked_moments(rollout.returns - rollout.values, mask))
        figures["value/explained_variance"] = explained_variance(
            residuals, loop.total(masked_moments(rollout.returns, mask))).item()
    return figures


def refuse_collapse(loop: Loop, figures: dict, update: int) -> None:
    """Stop before an update that must not be trained on (detail 33). Raises UserError."""
    kl, reason = figures["objective/kl"], None
    if not (math.isfinite(kl) and math.isfinite(figures["objective/score"])):
        reason = "the KL or the score is not finite (NaN or infinite): lower learning_rate"
    elif kl > loop.config.kl_limit:
        reason = (f"the KL to the reference is {kl:.1f} nats a summary, above kl_limit "
                  f"{loop.config.kl_limit}: lower learning_rate or raise kl_coef")
    if reason:
        loop.run.metrics(update, figures)
        raise UserError(f"{reason}; the last checkpoint is intact")


def statistics_of(new_logprobs: Tensor, old: Rollout, entropy: Tensor, clips: Tensor) -> tuple[dict, dict]:
    """Sums over the tokens of a micro-batch, and maxima, by the names they are logged under (detail 32)."""
    found = policy_statistics(new_logprobs.detach(), old.logprobs, entropy, clips, old.response_mask)
    return {"policy/ratio": found["ratio"], "policy/approx_kl": found["approx_kl"],
            "policy/clipfrac": found["clipfrac"], "objective/entropy": found["entropy"],
            "tokens": found["tokens"]}, {"policy/ratio_max": found["ratio_max"]}
