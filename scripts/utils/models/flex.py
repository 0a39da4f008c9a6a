"""Attention on a GPU: FlexAttention's kernels with the mask of prompt groups.

FlexAttention (torch.nn.attention.flex_attention) leaves out the tiles of 128 queries by 128 keys in which
nothing is seen: what is above the diagonal, and what completions do not see of each other. Nothing of shape
(T, T) is made, so memory grows with the tokens.

A kernel is compiled when it is first needed. Numbers of rows and their length are left open, so it serves all
shapes of a run; a single row and several rows are two kernels, since the compiler takes a size of 1 for a
constant. Before a kernel is used, it must agree with a plain computation on a small example, in its outputs
and gradients. Where it cannot be compiled or does not agree, one line says so, and a mask takes its place.
"""

import logging
from functools import cache, cached_property
from itertools import count
from math import ceil, inf
from textwrap import shorten
from types import FunctionType
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers.masking_utils import causal_mask_function

from utils.models.branches import Branches, branch_mask, forward_in_progress, indices

DEVICE = "cuda"  # the kind of device whose kernels these are
# Tokens of a row from which on this is used. Compiling takes longer than short rows could win back.
FEWEST = 1024
_TILE = 128  # tokens; FlexAttention's own
_ENTRIES = 2**24  # of the mask that are looked at together for the tiles
_AGREES = 0.03  # ||x - reference|| / ||reference||, with the eight bits of bfloat16


class GroupMask:
    """What the tokens of a forward pass see of each other in the layers of one kind.

    To a model that reads its mask, or computes with it, this is the tensor `dense`.

    Args:
        branches: what they see of their prompts and completions.
        positions: (B, T) along the branches.
        rule: the layer's own rule in positions, as transformers' mask functions; None: nothing but causality.
    """

    def __init__(self, branches: Branches, positions: torch.Tensor, rule=None):
        self.branches, self.positions, self.rule = branches, positions, rule

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def plain(value):
            return value.dense if isinstance(value, GroupMask) else value

        return function(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})

    def __getattr__(self, name):
        if name.startswith("__"):  # of Python's own protocols, such as copying
            raise AttributeError(name)
        return getattr(self.dense, name)

    def __getitem__(self, index):
        return self.dense[index]

    @property
    def causal(self) -> bool:
        """Whether plain causal attention does the same for all tokens but padding."""
        return self.branches.plain and self.rule is None

    def sees(self):
        """FlexAttention's `mask_mod`: (row, head, query, key) -> True = the query sees the key."""
        in_branch, positions, rule = self.branches.sees(), self.positions, self.rule
        if rule is None:
            return in_branch

        def seen(row, head, query, key):
            ruled = rule(row, head, positions[row, query], positions[row, key])
            return in_branch(row, head, query, key) & ruled

        return seen

    @cached_property
    def dense(self) -> torch.Tensor:
        """(B, 1, T, T) bool, for kernels that want it."""
        if self.rule is None:
            return self.branches.dense
        rows, head, column = indices(self.positions)
        return self.sees()(rows, head, column[:, None], column)

    @cached_property
    def blocks(self) -> BlockMask:
        """The tiles that are seen in part and in full."""
        rows, head, column = indices(self.positions)
        height, length = self.positions.shape
        tiles = ceil(length / _TILE)
        seen, counts = self.sees(), []
        step = max(1, _ENTRIES // (height * length * _TILE)) * _TILE  # queries at a time
        for first in range(0, length, step):
            part = seen(rows, head, column[first : first + step, None], column)[:, 0]  # (B, queries, T)
            part = torch.nn.functional.pad(part, (0, tiles * _TILE - length, 0, -part.shape[1] % _TILE))
            part = part.unflatten(2, (tiles, _TILE)).unflatten(1, (-1, _TILE))
            counts.append(part.sum((2, 4), dtype=torch.int32))
        counts = torch.cat(counts, 1)[:, None]  # (B, 1, tiles of queries, tiles of keys) pairs seen
        full = counts == _TILE**2
        return BlockMask.from_kv_blocks(*_listed((counts > 0) & ~full), *_listed(full), BLOCK_SIZE=_TILE,
                                        mask_mod=seen, seq_lengths=(length, length))


def _listed(tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of True in each last dimension, and their places before all others; int32."""
    order = tiles.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32), order.to(torch.int32)


def group_mask(*args, mask_function=causal_mask_function, **more):
    """`branch_mask`; on a GPU a `GroupMask` where `branching` was given `Branches`."""
    forward = forward_in_progress()
    if forward is None or not isinstance(forward.seen, Branches) or forward.positions.device.type != DEVICE:
        return branch_mask(*args, mask_function=mask_function, **more)
    # a window or chunk that is longer than the row says nothing; transformers tells its size
    reach = more.get("local_size") if more.get("allow_is_causal_skip", True) else None
    longer = forward.positions.shape[1] <= (reach or -inf)
    rule = None if mask_function is causal_mask_function or longer else mask_function
    return GroupMask(forward.seen, forward.positions, rule)


def attend(query, key, value, mask: GroupMask, scaling: float, softcap: float | None) -> torch.Tensor | None:
    """Attention by FlexAttention; None where it has no kernel for it, or where that does not pay.

    Args:
        query: (B, H, T, D).
        key, value: (B, G, T, D) and (B, G, T, E), with H a multiple of G.
        scaling: of the scores.
        softcap: scores are softcap * tanh(score / softcap); None: they are not capped.

    Returns:
        (B, H, T, E).
    """
    if query.shape[2] < FEWEST or query.shape[2] != key.shape[2]:
        return None
    place = query.device.type
    if torch.is_autocast_enabled(place):  # which knows torch's own attention, but not this one
        query, key, value = (x.to(torch.get_autocast_dtype(place)) for x in (query, key, value))
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    call = _Call(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3],
                 str(scaling), None if softcap is None else str(softcap), mask.rule is not None,
                 len(query) > 1, trained)
    with torch.autocast(place, enabled=False):
        kernel = _kernel(call, mask)
        return None if kernel is None else kernel(query, key, value, mask.blocks, call.scaling, call.softcap)


class _Call(NamedTuple):
    """What a kernel is compiled for. Its numbers are text, because a float is a variable to the compiler."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int
    value_width: int
    scaling: str
    softcap: str | None
    ruled: bool  # whether layers have a rule of their own
    several: bool  # whether there are several rows
    trained: bool  # whether gradients are needed


def _attention(query, key, value, blocks, scaling, softcap):
    limit = None if softcap is None else float(softcap)

    def capped(score, row, head, query, key):
        return limit * torch.tanh(score / limit)

    return flex_attention(query, key, value, score_mod=None if softcap is None else capped, block_mask=blocks,
                          scale=float(scaling), enable_gqa=query.shape[1] != key.shape[1],
                          kernel_options={"FORCE_USE_FLEX_ATTENTION": True})


_kernels = {}  # _Call -> a compiled function; None: there is no right one


def _kernel(call: _Call, mask: GroupMask):
    if call not in _kernels:
        # torch keeps few compiled variants of a function's code; a copy of it has variants of its own
        own = FunctionType(_attention.__code__.replace(), _attention.__globals__)
        kernel = torch.compile(own, dynamic=True, fullgraph=True)
        example = _example(call, mask)
        try:
            fault = _fault(kernel, call, *example)
        except Exception as error:  # of compilers, of which there are several
            fault = shorten(f"{type(error).__name__}: {error}", 150, placeholder=" ...")
        if fault is not None:
            say_once(f"FlexAttention is not used ({fault}); attention with a mask takes its place")
        _kernels[call] = None if fault is not None else kernel
    return _kernels[call]


@cache
def say_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


def _example(call: _Call, mask: GroupMask) -> tuple[list[torch.Tensor], GroupMask]:
    """A query, key and value, and a mask under the same rule as `mask`: a prompt with two completions a row.

    The sizes differ from each other: the compiler would take equal ones to be equal always.
    """
    taken = {call.heads, call.key_heads, call.width, call.value_width}
    most = len(mask.positions)
    rows = next((n for n in range(2, most + 1) if n not in taken), most) if call.several else 1
    length = next(n for n in count(3) if n not in {rows, *taken}) * _TILE - 37
    first, second = length // 2, 3 * length // 4  # columns of the completions
    column = torch.arange(length, dtype=torch.int32, device=call.device).expand(rows, -1)
    own = first * (column >= first) + (second - first) * (column >= second)
    branches = Branches(torch.zeros_like(column), torch.full_like(column, first), own.to(torch.int32), False)
    positions = mask.positions.new_empty(column.shape).copy_(column - (second - first) * (column >= second))
    generator = torch.Generator(call.device).manual_seed(0)
    inputs = [
        torch.randn(rows, length, heads, width, generator=generator, device=call.device).to(call.dtype)
        for heads, width in ((call.heads, call.width), (call.key_heads, call.width),
                             (call.key_heads, call.value_width))
    ]
    return [x.transpose(1, 2) for x in inputs], GroupMask(branches, positions, mask.rule)


def _fault(kernel, call: _Call, inputs: list[torch.Tensor], mask: GroupMask) -> str | None:
    """What is wrong with a kernel, which is compiled here, on an example; None: nothing."""

    def results(function, dtype, *more):
        with torch.set_grad_enabled(call.trained):
            own = [x.to(dtype, copy=True).requires_grad_(call.trained) for x in inputs]
            found = function(*own, *more)
            return [found, *(torch.autograd.grad(found.square().sum(), own) if call.trained else ())]

    softcap = None if call.softcap is None else float(call.softcap)
    # where layers are recomputed in the backward pass, hooks count what is kept for it; this does not count
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        found = results(kernel, call.dtype, mask.blocks, call.scaling, call.softcap)
        expected = results(in_full, torch.float64, mask.dense, float(call.scaling), softcap)
    off = max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))
    return None if off <= _AGREES else f"its kernel is {off:.0%} off"


def in_full(query, key, value, mask, scaling: float, softcap: float | None) -> torch.Tensor:
    """Attention with the whole table of scores, (B, H, T, E); arguments as those of `attend`.

    Args:
        mask: (B, 1, T, T) bool.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(groups, 1) for one in (key, value))
    if softcap is None:
        scores = query @ key.transpose(2, 3) * scaling
    else:
        scores = softcap * torch.tanh(query @ key.transpose(2, 3) * (scaling / softcap))
    weights = scores.masked_fill(~mask, -inf).softmax(-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
