"""Causal attention in blocks of queries. Each block attends to the keys up to its own end only.

torch's kernels compute the whole (T, T) table under a mask and throw half of it away. At 400 tokens attention
is a tenth (OPT-125m) to a quarter (the mini model) of a step, and blocks take a fifth to a quarter less time
for it. FlexAttention could also skip what completions do not see of each other, but has no backward pass on
CPUs (torch 2.13).

On a GPU one call is faster: on an H200 blocks took 12.0 ms against 4.2 ms at 1,500 tokens in float32, forward
and backward, and 5.5 ms against 1.7 ms in bfloat16.
"""

import math
from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.models.branches import branch_mask

CAUSAL_BLOCKS = "causal_blocks"  # the `attn_implementation` of every model in this repository
_BLOCK = 128  # queries of a block. Smaller blocks cost more in calls than they save.


def causal_blocks(module, query, key, value, attention_mask, **more):
    """transformers' SDPA attention, on a CPU in blocks when T queries attend to T keys.

    Other calls, such as a decoding step with few queries and many keys, are passed on in one piece.

    Args:
        query, key, value: (B, H, T, D).
        attention_mask: (B, 1, T, T), True = attends; must be causal, which is not checked.

    Returns:
        (B, T, H, D), and None in place of the attention weights.
    """
    if more.get("softcap") is not None:
        return _capped(query, key, value, attention_mask, more["softcap"], more["scaling"]), None
    length = query.shape[2]
    count = length // _BLOCK
    if attention_mask is None or key.shape[2] != length or count < 2 or query.is_cuda:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    parts = [
        sdpa_attention_forward(module, query[:, :, first:end], key[:, :, :end], value[:, :, :end],
                               attention_mask[:, :, first:end, :end], **more)[0]
        for first, end in pairwise(length * block // count for block in range(count + 1))
    ]
    return torch.cat(parts, 1), None


def _capped(query, key, value, attention_mask, softcap: float, scaling: float) -> torch.Tensor:
    """Attention whose scores are softcap * tanh(score / softcap) (Gemma 2), (B, T, H, D). No kernel of torch
    has it on a CPU with a mask.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    weights = scores.masked_fill(~attention_mask, -math.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous()


AttentionInterface.register(CAUSAL_BLOCKS, causal_blocks)
AttentionMaskInterface.register(CAUSAL_BLOCKS, branch_mask)
