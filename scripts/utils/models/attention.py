"""The attention of every model in this repository: the same numbers from the kernels that suit the device.

On a CPU: in blocks of queries, each with the keys up to its own end. torch's kernels compute the whole (T, T)
table under a mask and throw half of it away. At 400 tokens attention is a tenth (OPT-125m) to a quarter (the
mini model) of a step, and blocks take a fifth to a quarter less time for it. FlexAttention has no backward
pass on CPUs (torch 2.13).

On a GPU: where each row is one sequence, causal attention without a mask, for which torch has its flash
kernels. Long rows with branches: FlexAttention (flex.py). Else one call under the mask. On an H200 blocks
took 12.0 ms against 4.2 ms of one call at 1,500 tokens in float32, forward and backward, and 5.5 ms against
1.7 ms in bfloat16.
"""

from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils.models.flex import GroupMask, attend, group_mask, in_full

CAUSAL_BLOCKS = "causal_blocks"  # the `attn_implementation` of every model in this repository
_BLOCK = 128  # queries of a block. Smaller blocks cost more in calls than they save.


def causal_blocks(module, query, key, value, attention_mask, **more):
    """Attention as transformers' SDPA attention computes it.

    Args:
        query, key, value: (B, H, T, D); keys and values may have fewer heads.
        attention_mask: (B, 1, T, T), True = attends; must be causal, which is not checked. Or a `GroupMask`,
            on a GPU.

    Returns:
        (B, T, H, D), and None in place of the attention weights.
    """
    softcap = more.get("softcap")
    if isinstance(attention_mask, GroupMask):
        if attention_mask.causal and softcap is None:
            return sdpa_attention_forward(module, query, key, value, None, **{**more, "is_causal": True})
        if not more.get("dropout") and more.get("position_bias") is None:
            scaling = more.get("scaling") or query.shape[-1] ** -0.5
            if (found := attend(query, key, value, attention_mask, scaling, softcap)) is not None:
                return found.transpose(1, 2).contiguous(), None
        attention_mask = attention_mask.dense
    if softcap is not None:  # no kernel of torch's has it with a mask
        found = in_full(query, key, value, attention_mask, more["scaling"], softcap)
        return found.transpose(1, 2).contiguous(), None
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


# a compiler that looked into it would make a variant for each number of blocks, and none for `GroupMask`
AttentionInterface.register(CAUSAL_BLOCKS, torch.compiler.disable(causal_blocks))
AttentionMaskInterface.register(CAUSAL_BLOCKS, group_mask)
