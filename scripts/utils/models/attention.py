"""Attention that computes nothing above the diagonal: queries in blocks, each with the keys up to its own end.

torch's kernels compute the whole (T, T) table under a mask and throw half of it away. Attention is a tenth (OPT-125m) to a
quarter (the mini model) of a step at 400 tokens, and the blocks take a fifth to a quarter less of it. FlexAttention, which also
leaves out what completions do not see of each other, has no backward pass on CPUs (torch 2.13).
"""

from itertools import pairwise

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

CAUSAL_BLOCKS = "causal_blocks"  # the `attn_implementation` of every model here
_BLOCK = 128  # queries; smaller ones cost more in calls than they save


def causal_blocks(module, query, key, value, attention_mask, **more):
    """transformers' SDPA attention of T queries on T keys, (B, H, T, D) each, with a causal mask (B, 1, T, T); (B, T, H, D).

    Anything else, such as a decoding step's few queries on many keys, is one call.
    """
    length = query.shape[2]
    count = length // _BLOCK
    if attention_mask is None or key.shape[2] != length or count < 2:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    parts = [
        sdpa_attention_forward(module, query[:, :, first:end], key[:, :, :end], value[:, :, :end],
                               attention_mask[:, :, first:end, :end], **more)[0]
        for first, end in pairwise(length * block // count for block in range(count + 1))
    ]
    return torch.cat(parts, 1), None


AttentionInterface.register(CAUSAL_BLOCKS, causal_blocks)
AttentionMaskInterface.register(CAUSAL_BLOCKS, sdpa_mask)
