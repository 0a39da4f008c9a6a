"""What the tokens of a prompt group see, handed to a stock model in its own terms.

A model builds the masks of its layers itself: plain causal, a sliding window, chunks, whatever its config
says of each layer. transformers lets the function be registered that turns such a rule into a tensor. Ours
applies the rule to positions along a branch instead of columns of a row, and joins it with what the branch
sees. So a window is counted from the token back through its own completion into the prompt, as in a plain
row, and no family needs to be named here.
"""

from contextlib import contextmanager
from contextvars import ContextVar

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

# Of the forward pass in progress: (seen, positions of the queries, positions of the keys). Each thread has
# its own: the rating page scores answers in one thread while models write in others.
_rows = ContextVar("rows", default=None)


@contextmanager
def branching(seen: torch.Tensor, positions: torch.Tensor, key_positions: torch.Tensor):
    """Inside, a stock model's attention follows the branches of its rows.

    The model must be given an `attention_mask` of ones (B, Tk): nothing is padding in its own terms.

    Args:
        seen: (B, 1, Tq, Tk) True = the query sees the key, as far as prompts and branches are concerned.
        positions: (B, Tq) of the queries along their branches.
        key_positions: (B, Tk) of the keys.
    """
    token = _rows.set((seen, positions[:, None, :, None], key_positions[:, None, None, :]))
    try:
        yield
    finally:
        _rows.reset(token)


def branch_mask(*args, mask_function=causal_mask_function, **more):
    """transformers' `sdpa_mask`; within `branching` the layer's rule in positions, joined with the branch."""
    if (forward := _rows.get()) is None:
        return sdpa_mask(*args, mask_function=mask_function, **more)
    seen, queries, keys = forward
    if mask_function is causal_mask_function:
        return seen  # earlier tokens of the branch are at earlier positions
    rows = torch.arange(len(seen), device=seen.device)[:, None, None, None]
    return seen & mask_function(rows, torch.zeros_like(rows), queries, keys)


AttentionMaskInterface.register("sdpa", branch_mask)
