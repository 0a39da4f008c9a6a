"""The episodes of one PPO update: sampled responses in micro-batches, and the prompts of each optimizer step.

Shapes: N episodes (responses) of this rank, the K of a prompt one after the other; R tokens in the longest
response.
"""

import random
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from utils.distributed import on_device
from utils.loop import Loop
from utils.models.generation import sample
from utils.models.outputs import response_logprobs
from utils.models.prompt_groups import PromptGroups, micro_batches, pack
from utils.ppo import Rollout
from utils.rollouts.continuous import sample_continuously
from utils.rollouts.vllm_engine import sample_by_vllm


class Pass(NamedTuple):
    """Prompt groups of one forward pass, and which episodes they hold: (n,)."""

    groups: PromptGroups
    episodes: Tensor


class Episodes(NamedTuple):
    """What the behaviour policy sampled on this rank."""

    queries: list[list[int]]
    responses: list[list[int]]
    response_mask: Tensor  # (N, R)
    logprobs: Tensor  # (N, R) at the sampling temperature (detail 25)
    ended: Tensor  # (N,) whether the response has an EOS
    passes: list[Pass]  # all of them, in micro-batches
    # (N, R) as another engine computed them, then `logprobs` are those of a forward pass here; None: ours
    engine_logprobs: Tensor | None = None

    def measure(self, model) -> Tensor | None:
        """What `model(groups)` says of each episode, (N,) or (N, R); None when it says nothing."""
        measured = None
        for groups, episodes in self.passes:
            values = model(groups)
            if values is None:
                return None
            if measured is None:
                measured = values.new_zeros(self.ended.shape if values.dim() == 1
                                            else self.response_mask.shape)
            measured[(episodes, *(slice(size) for size in values.shape[1:]))] = values
        return measured


def own_prompts(loop: Loop) -> slice:
    """Which of an update's prompts are this rank's."""
    size = loop.config.prompts_per_update // loop.accelerator.num_processes
    return slice(loop.accelerator.process_index * size, (loop.accelerator.process_index + 1) * size)


def sample_episodes(loop: Loop, policy, queries: list[list[int]], update: int) -> Episodes:
    """K responses to each prompt of this rank. A response's seed depends on the update and its place in it
    only.
    """
    config, tokenizer, k = loop.config, loop.tokenizer, loop.config.responses_per_prompt
    first = ((update - 1) * config.prompts_per_update + own_prompts(loop).start) * k
    settings = {"k": k, "max_new_tokens": config.max_new_tokens, "temperature": config.temperature,
                "eos_id": tokenizer.eos_token_id}
    seed = config.seed * 1_000_003 + first
    if config.rollout_engine == "transformers":
        samples = sample_continuously(policy, queries, seed=seed, pad_id=tokenizer.pad_token_id, **settings)
    elif config.rollout_engine == "vllm":
        samples = sample_by_vllm(policy, queries, seed=seed, longest_prompt=config.max_prompt_tokens,
                                 batch_size=config.eval_batch_size, **settings)
    else:
        samples = sample(policy, queries, seeds=[seed + i for i in range(len(queries) * k)],
                         batch_size=config.eval_batch_size, pad_id=tokenizer.pad_token_id, **settings)
    logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in samples.logprobs],
                                               batch_first=True)
    lengths = torch.tensor([len(response) for response in samples.responses])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    episodes = Episodes(queries, samples.responses, mask.to(loop.device), logprobs.to(loop.device),
                        torch.tensor(samples.ended, device=loop.device), [])
    episodes = episodes._replace(passes=micro_batched(loop, episodes, range(len(queries))))
    if config.rollout_engine == "own":  # what it says of its tokens is what a forward pass says (detail 27)
        return episodes
    own = partial(response_logprobs, policy, temperature=config.temperature)
    return episodes._replace(logprobs=episodes.measure(own), engine_logprobs=episodes.logprobs)


def micro_batched(loop: Loop, episodes: Episodes, prompts) -> list[Pass]:
    """Some prompts of this rank with all their responses, in micro-batches of `per_device_batch_size` groups.
    """
    prompts, k = list(prompts), loop.config.responses_per_prompt
    groups = [(episodes.queries[i], episodes.responses[i * k : (i + 1) * k]) for i in prompts]
    sizes = [len(query) + sum(map(len, responses)) for query, responses in groups]
    passes = []
    for part in micro_batches(sizes, loop.config.per_device_batch_size):
        packed = pack(*zip(*(groups[i] for i in part), strict=True), loop.tokenizer.pad_token_id)
        members = torch.tensor([prompts[i] * k + j for i in part for j in range(k)])
        passes.append(Pass(packed.to(loop.device), on_device(members, loop.device)))
    return passes


def minibatches(loop: Loop, epoch: int) -> list[list[int]]:
    """The prompts of each optimizer step of a pass: numbers within the update, the same on every rank."""
    config = loop.config
    order = random.Random(f"{config.seed}-{loop.step}-{epoch}").sample(range(config.prompts_per_update),
                                                                       config.prompts_per_update)
    return [order[first :: config.steps_per_pass] for first in range(config.steps_per_pass)]


def passes_of(loop: Loop, episodes: Episodes, prompts: list[int]) -> list[Pass]:
    """This rank's micro-batches of a minibatch."""
    if len(prompts) == loop.config.prompts_per_update:
        return episodes.passes
    own = range(loop.config.prompts_per_update)[own_prompts(loop)]
    return micro_batched(loop, episodes, [number - own.start for number in sorted(prompts) if number in own])


def rollout_of(rollout: Rollout, members: Tensor, width: int) -> Rollout:
    """Some episodes of a rollout, cut to the longest of their responses."""
    rows = [x if x is None else x[members] for x in rollout]
    return Rollout(*(x if x is None or x.dim() == 1 else x[:, :width] for x in rows))
