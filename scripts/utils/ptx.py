"""PPO-ptx: the SFT loss beside PPO's objective, so that the policy keeps what it has learnt from examples
(detail 34).
"""

import random

import torch
from torch import Tensor

from utils.data.rows import Tokenised
from utils.loop import Loop
from utils.models.prompt_groups import PromptGroups, micro_batches, pack


def add_supervised_gradients(loop: Loop, supervised: Tokenised, count: int) -> Tensor:
    """Add ptx_coef x the SFT loss on `count` examples to the gradients of this optimizer step; returns that
    loss.
    """
    config = loop.config
    draw = random.Random(f"{config.seed}-supervised-{loop.scheduler.last_epoch}")
    rows = draw.choices(range(len(supervised.prompts)), k=count)

    def packed(part) -> PromptGroups:
        groups = pack([supervised.prompts[i] for i in part], [[supervised.completions[i]] for i in part],
                      loop.tokenizer.pad_token_id)
        return groups.to(loop.device)

    mine = loop.share(rows)
    sizes = [len(supervised.prompts[i]) + len(supervised.completions[i]) for i in mine]
    parts = [packed([mine[i] for i in part]) for part in micro_batches(sizes, config.per_device_batch_size)]
    tokens = loop.total(sum(groups.response_mask.sum() for groups in parts))
    loss = torch.zeros((), device=loop.device)
    for groups in loop.parts(parts, spare=lambda: packed(rows[:1]), exchange=False):
        nll = -loop.model(groups, 1.0, supervised=True).sum() / tokens
        loop.backward(config.ptx_coef * nll, groups)
        loss += nll.detach() * loop.part_counts
    return loop.total(loss)
