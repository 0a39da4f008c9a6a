"""One update's rollout: responses are sampled, judged by the frozen models, and given rewards and advantages.

Shapes as in `utils/ppo.py`: N episodes, R response length. The N episodes of a micro-batch are whole prompt groups:
the K responses of a prompt stand one after the other.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from utils.models.generation import sample
from utils.models.loading import response_logprobs, scores
from utils.models.ppo_models import Models
from utils.models.prompt_groups import PromptGroups, pack
from utils.ppo import (
    Rollout,
    explained_variance,
    gae,
    grpo_advantages,
    kl_estimate,
    masked_moments,
    mean_var,
    missing_eos_penalty,
    rloo_advantages,
    shape_scores,
    token_rewards,
    whiten,
)


class MicroBatch(NamedTuple):
    """Prompt groups of one forward pass with what is known of their responses."""

    groups: PromptGroups
    rollout: Rollout
    ended: torch.Tensor  # (N,)


@dataclass
class Carried:
    """What goes from update to update besides weights; a checkpoint holds it."""

    kl_coef: float
    score_moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])  # count, sum, sum of squares


def collect_rollout(models: Models, tokenizer, prompts, config, update: int, accelerator, carried: Carried) -> list[MicroBatch]:
    """Sample K responses for each prompt and judge them: scores, reference log-probs, values, rewards, advantages."""
    k, size = config.responses_per_prompt, config.per_device_batch_size
    first = (update * config.prompts_per_update + accelerator.process_index * len(prompts)) * k
    samples = sample(
        models.policy, prompts, k=k, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        seeds=[config.seed * 1_000_003 + first + i for i in range(len(prompts) * k)],
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, batch_size=config.eval_batch_size,
    )
    total = [len(p) + sum(map(len, samples.responses[i * k : (i + 1) * k])) for i, p in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: total[i])
    batches = []
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        members = [i * k + j for i in part for j in range(k)]
        groups = pack([prompts[i] for i in part], [samples.responses[i * k : (i + 1) * k] for i in part], tokenizer.pad_token_id)
        logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(samples.logprobs[n]) for n in members], batch_first=True)
        ended = torch.tensor([samples.ended[n] for n in members])
        batches.append(judged(models, groups.to(accelerator.device), logprobs.to(accelerator.device),
                              ended.to(accelerator.device), config))
    return with_advantages(batches, config, accelerator, carried)


@torch.no_grad()
def judged(models: Models, groups: PromptGroups, logprobs, ended, config) -> MicroBatch:
    """Reference log-probs, values and scores of one batch of responses."""
    ref_logprobs = response_logprobs(models.ref_policy, groups, config.temperature)
    score = missing_eos_penalty(scores(models.reward_model, groups), ended, config.missing_eos_score)
    return MicroBatch(groups, Rollout(groups.response_mask, logprobs, ref_logprobs, models.inside.values(groups), score), ended)


def with_advantages(batches: list[MicroBatch], config, accelerator, carried: Carried) -> list[MicroBatch]:
    """Rewards from scores and KL, then advantages: over the whole update, never one micro-batch at a time (detail 30)."""
    rollouts = [batch.rollout for batch in batches]
    masks = [r.response_mask for r in rollouts]
    scale = score_scale(rollouts, accelerator, carried) if config.scale_scores else 1.0
    rewards = [
        token_rewards(shape_scores(r.scores, scale, config.score_clip),
                      kl_estimate(r.logprobs, r.ref_logprobs, config.kl_estimator), r.response_mask, carried.kl_coef)
        for r in rollouts
    ]
    if config.whiten_rewards:
        rewards = whitened(rewards, masks, accelerator, shift_mean=False)
    if config.advantage == "gae":
        found = [gae(x, r.values, r.response_mask, config.gamma, config.lam) for x, r in zip(rewards, rollouts, strict=True)]
        advantages, returns = map(list, zip(*found, strict=True))
        advantages = whitened(advantages, masks, accelerator)
    else:
        compare = {"rloo": rloo_advantages, "grpo": grpo_advantages}[config.advantage]
        advantages = [torch.where(mask, compare(x.sum(1), config.responses_per_prompt)[:, None], 0.0)
                      for x, mask in zip(rewards, masks, strict=True)]
        returns = [None] * len(batches)
    return [batch._replace(rollout=batch.rollout._replace(rewards=x, advantages=a, returns=r))
            for batch, x, a, r in zip(batches, rewards, advantages, returns, strict=True)]


def score_scale(rollouts: list[Rollout], accelerator, carried: Carried) -> float:
    """Standard deviation of all scores so far, this update's among them; 1 while they do not differ."""
    device = rollouts[0].scores.device
    moments = sum(masked_moments(r.scores, torch.ones_like(r.scores, dtype=torch.bool)) for r in rollouts)
    moments = accelerator.reduce(moments, "sum") + torch.tensor(carried.score_moments, dtype=torch.float64, device=device)
    carried.score_moments = moments.tolist()
    mean, var = (moment.item() for moment in mean_var(moments))
    # equal scores leave a variance of rounding alone, and dividing by that would blow them up
    return var**0.5 if var > 1e-12 * max(1.0, mean**2) else 1.0


def whitened(tensors: list[torch.Tensor], masks: list[torch.Tensor], accelerator, shift_mean: bool = True) -> list[torch.Tensor]:
    """Whiten (N, R) tensors with the moments of all of them and of all ranks."""
    moments = sum(masked_moments(x, mask) for x, mask in zip(tensors, masks, strict=True))
    mean, var = mean_var(accelerator.reduce(moments, "sum"))
    return [whiten(x, mask, mean, var, shift_mean) for x, mask in zip(tensors, masks, strict=True)]


def rollout_metrics(batches: list[MicroBatch], accelerator) -> dict:
    """What the episodes of an update say: means over all episodes of all ranks (detail 32)."""
    def total(value):
        return accelerator.reduce(sum(value(b) for b in batches).double(), "sum").item()

    def masked(x, b):
        return torch.where(b.rollout.response_mask, x, 0.0).sum()

    def kl(estimator):
        return total(lambda b: masked(kl_estimate(b.rollout.logprobs, b.rollout.ref_logprobs, estimator), b)) / episodes

    def moments(x):
        return accelerator.reduce(sum(masked_moments(x(b.rollout), b.rollout.response_mask) for b in batches), "sum")

    episodes = total(lambda b: torch.ones_like(b.ended).sum())
    figures = {
        "objective/kl": kl("k1"),
        "objective/kl_k3": kl("k3"),
        "objective/score": total(lambda b: b.rollout.scores.sum()) / episodes,
        "objective/rlhf_reward": total(lambda b: b.rollout.rewards.sum()) / episodes,
        "objective/length": total(lambda b: b.rollout.response_mask.sum()) / episodes,
        "objective/ended": total(lambda b: b.ended.sum()) / episodes,
    }
    if batches[0].rollout.values is not None:
        figures["value/explained_variance"] = explained_variance(
            moments(lambda r: r.returns - r.values), moments(lambda r: r.returns)
        ).item()
    return figures
