"""What the tokens of a prompt group see, handed to a stock model in its own terms.

A model builds the masks of its layers itself: plain causal, a sliding window, chunks, whatever its config
says of each layer. transformers lets the function be registered that turns such a rule into a tensor. Ours
applies the rule to positions along a branch instead of columns of a row, and joins it with what the branch
sees. So a window is counted from the token back through its own completion into the prompt, as in a plain
row, and no family needs to be named here.
"""

from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask


@dataclass(frozen=True)
class Branches:
    """The columns of a row that each of its T tokens sees: [group, prompt) and [branch, its own].

    So few numbers say it for each token; nothing of shape (T, T) is made before `dense` is asked for.
    The numbers are (B, T) int32.
    """

    group: torch.Tensor  # first column of the token's prompt group
    prompt: torch.Tensor  # the column behind the group's prompt
    branch: torch.Tensor  # first column of the token's completion; a token of the prompt: of the group
    # True = each row is one sequence with padding behind it. Then causal attention gives its tokens the same.
    plain: bool

    def sees(self):
        """A function of indices (row, head, query, key), which broadcast: True = the query sees the key.

        It is also a `mask_mod` of FlexAttention, whose compiler wants plain tensors in a closure.
        """
        group, prompt, branch = self.group, self.prompt, self.branch

        def seen(row, head, query, key):
            in_prompt = (key >= group[row, query]) & (key < prompt[row, query])
            return (key <= query) & (in_prompt | (key >= branch[row, query]))

        return seen

    @cached_property
    def dense(self) -> torch.Tensor:
        """(B, 1, T, T) bool, True = the query (third dimension) sees the key (fourth)."""
        rows, head, column = indices(self.group)
        return self.sees()(rows, head, column[:, None], column)


class Forward(NamedTuple):
    """The forward pass in progress."""

    seen: torch.Tensor | Branches
    positions: torch.Tensor  # (B, Tq) of the queries
    key_positions: torch.Tensor  # (B, Tk)


# Each thread has its own: the rating page scores answers in one thread while models write in others.
_forward = ContextVar("forward", default=None)


def indices(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a tensor (B, T): its rows (B, 1, 1, 1), a head (1,), its columns (T,); int32."""
    rows, columns = (torch.arange(size, dtype=torch.int32, device=like.device) for size in like.shape)
    return rows[:, None, None, None], torch.zeros_like(rows[:1]), columns


@contextmanager
def branching(seen: torch.Tensor | Branches, positions: torch.Tensor, key_positions: torch.Tensor):
    """Inside, a stock model's attention follows the branches of its rows.

    The model must be given an `attention_mask` of ones (B, Tk): nothing is padding in its own terms.

    Args:
        seen: (B, 1, Tq, Tk) True = the query sees the key, as far as prompts and branches are concerned. Or
            the same said by `Branches`, where Tq = Tk.
        positions: (B, Tq) of the queries along their branches.
        key_positions: (B, Tk) of the keys.
    """
    token = _forward.set(Forward(seen, positions, key_positions))
    try:
        yield
    finally:
        _forward.reset(token)


def forward_in_progress() -> Forward | None:
    """What the `branching` around this call was given; None: there is none."""
    return _forward.get()


def branch_mask(*args, mask_function=causal_mask_function, **more):
    """transformers' `sdpa_mask`; within `branching` the layer's rule in positions, joined with the branch."""
    if (forward := _forward.get()) is None:
        return sdpa_mask(*args, mask_function=mask_function, **more)
    seen, positions, key_positions = forward
    seen = seen.dense if isinstance(seen, Branches) else seen
    if mask_function is causal_mask_function:
        return seen  # earlier tokens of the branch are at earlier positions
    rows = torch.arange(len(seen), device=seen.device)[:, None, None, None]
    queries, keys = positions[:, None, :, None], key_positions[:, None, None, :]
    return seen & mask_function(rows, torch.zeros_like(rows), queries, keys)


AttentionMaskInterface.register("sdpa", branch_mask)
