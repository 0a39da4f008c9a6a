"""Prompt groups: a prompt is computed once for all of its completions.

A prompt with K completions is one row

    [ prompt | completion 1 | completion 2 | ... | completion K | padding ]

A completion sees the prompt and itself only, and its position ids restart at the prompt's end. So every
number equals that of K separate rows. K = 1 is an ordinary row; there is no other code path.

Short groups share a row if they fit into the width of the longest group, so that less padding is computed.
They do not see each other.

Shapes: B rows, T tokens in the longest group, N completions in all rows, R tokens in the longest completion.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from utils.distributed import on_device
from utils.models.branches import Branches


class PromptGroups(NamedTuple):
    """A batch of prompt groups. Completions are in order: those of group 0, then those of group 1, ..."""

    input_ids: torch.Tensor  # (B, T)
    position_ids: torch.Tensor  # (B, T)
    owners: torch.Tensor  # (B, T) number of the token's group, -1 = padding
    segments: torch.Tensor  # (B, T) 0 = prompt, k = k-th completion of the group, -1 = padding
    row_index: torch.Tensor  # (N,) row of each completion
    # (N, R) column of the token *before* each response token: the prompt's last for the first
    state_columns: torch.Tensor
    responses: torch.Tensor  # (N, R) response tokens
    # (N, R) True = a real response token that takes part
    response_mask: torch.Tensor
    end_columns: torch.Tensor  # (N,) column of each completion's last token
    # Of the M real response tokens: their places in the flattened `responses`, and those of the states that
    # predict them in a flattened (B, T). On a GPU the host would have to wait for `x[response_mask]`.
    token_places: torch.Tensor
    state_places: torch.Tensor

    def to(self, device) -> "PromptGroups":
        """The same batch on another device."""
        return PromptGroups(*(on_device(tensor, device) for tensor in self))

    @property
    def tokens(self) -> torch.Tensor:
        """The real response tokens, (M,)."""
        return self.responses.flatten()[self.token_places]


def pack(
    prompts: Sequence[list[int]], completions: Sequence[Sequence[list[int]]], pad_id: int,
    labels: Sequence[Sequence[list[int]]] | None = None
) -> PromptGroups:
    """Lay out prompts and their completions in rows.

    Args:
        prompts: token ids.
        completions: token ids of the completions of each prompt.
        labels: for each token of the completions, the response token in its place; a negative number: none,
            and the place takes no part. None: the tokens themselves.

    Raises:
        ValueError: for an empty prompt, because its completions' first tokens would be predicted from
            nothing; and for an empty completion.
    """
    if not all(prompts) or not all(all(group) and group for group in completions):
        raise ValueError("a prompt group needs a prompt and completions of at least one token each")
    sizes = [len(p) + sum(map(len, group)) for p, group in zip(prompts, completions, strict=True)]
    places, height, width = share_rows(sizes)
    longest = max(len(completion) for group in completions for completion in group)
    count = sum(map(len, completions))
    input_ids = np.full((height, width), pad_id)
    position_ids = np.zeros((height, width), dtype=np.int64)
    owners = np.full((height, width), -1)
    segments = np.full((height, width), -1)
    state_columns = np.zeros((count, longest), dtype=np.int64)
    responses = np.full((count, longest), pad_id)
    response_mask = np.zeros((count, longest), dtype=bool)
    row_index, end_columns = [], []
    for owner, (prompt, group, (row, first)) in enumerate(zip(prompts, completions, places, strict=True)):
        column = first + len(prompt)
        input_ids[row, first:column] = prompt
        position_ids[row, first:column] = np.arange(len(prompt))
        segments[row, first:column] = 0
        owners[row, first : first + sizes[owner]] = owner
        for k, completion in enumerate(group, start=1):
            n, size = len(row_index), len(completion)
            tokens = np.asarray(completion)
            input_ids[row, column : column + size] = tokens
            position_ids[row, column : column + size] = np.arange(len(prompt), len(prompt) + size)
            segments[row, column : column + size] = k
            state_columns[n, :size] = np.arange(column - 1, column - 1 + size)
            # the token before a completion in its row is another completion's, except for the first
            state_columns[n, 0] = first + len(prompt) - 1
            targets = tokens if labels is None else np.asarray(labels[owner][k - 1])
            response_mask[n, :size] = targets >= 0
            responses[n, :size] = np.where(targets >= 0, targets, pad_id)
            row_index.append(row)
            end_columns.append(column + size - 1)
            column += size
    row_index, token_places = np.array(row_index), np.flatnonzero(response_mask)
    state_places = (row_index[:, None] * width + state_columns).ravel()[token_places]
    return PromptGroups(*map(torch.from_numpy, (
        input_ids, position_ids, owners, segments, row_index, state_columns, responses, response_mask,
        np.array(end_columns), token_places, state_places)))


def unpack(groups: PromptGroups) -> list[tuple[list[int], list[list[int]]]]:
    """Prompt and completions of each group, the inverse of `pack`."""
    result = []
    for owner in range(int(groups.owners.max()) + 1):
        own = groups.owners == owner
        count = int(groups.segments[own].max())
        prompt, *completions = (groups.input_ids[own & (groups.segments == k)].tolist()
                                for k in range(count + 1))
        result.append((prompt, completions))
    return result


def share_rows(sizes: Sequence[int]) -> tuple[list[tuple[int, int]], int, int]:
    """Assign groups to rows by first-fit decreasing: largest first, each to the first row with room for it.

    Args:
        sizes: tokens of each group.

    Returns:
        (row, first column) of each group, the number of rows, and their width, which is the size of the
            largest group.
    """
    width, used, places = max(sizes), [], {}
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r, filled in enumerate(used) if filled + sizes[index] <= width), len(used))
        if row == len(used):
            used.append(0)
        places[index] = (row, used[row])
        used[row] += sizes[index]
    return [places[index] for index in range(len(sizes))], len(used), width


def micro_batches(sizes: Sequence[int], max_groups: int, max_tokens: int | None = None) -> list[list[int]]:
    """Split groups into forward passes: as few as possible, of like numbers of groups, since the largest pass
    decides the memory. Groups of similar size go together: less padding is computed.

    Args:
        sizes: tokens of each group.
        max_groups: most groups of a pass.
        max_tokens: limit for the number of groups of a pass * the size of the largest. A group beyond the
            limit has a pass of its own. None: no limit.

    Returns:
        Indices of the groups of each pass.
    """
    filled = _filled(sizes, max_groups, max_tokens)
    even = _filled(sizes, math.ceil(len(sizes) / max(1, len(filled))), max_tokens)
    return even if len(even) == len(filled) else filled


def _filled(sizes, max_groups, max_tokens):
    """Passes that are filled one after the other, up to the limits."""
    batches = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        count = len(batches[-1]) + 1 if batches else math.inf
        if count <= max_groups and (max_tokens is None or count * sizes[batches[-1][0]] <= max_tokens):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def branches(groups: PromptGroups) -> Branches:
    """What each token sees: itself, and the earlier tokens of its prompt and of its completion.

    A padding token sees itself and the padding before it, because a softmax over nothing would be NaN.
    """
    owner, segment = groups.owners, groups.segments
    column = torch.arange(owner.shape[1], dtype=torch.int32, device=owner.device)
    new_group = torch.ones_like(owner, dtype=torch.bool)
    new_group[:, 1:] = owner[:, 1:] != owner[:, :-1]
    new_branch = new_group.clone()
    new_branch[:, 1:] |= segment[:, 1:] != segment[:, :-1]

    def latest(begins):  # (B, T) the last column up to the own one where something begins
        return torch.where(begins, column, 0).cummax(1).values

    # a row has one completion only where it has one group with one completion
    return Branches(latest(new_group), latest(new_branch & (segment == 1)), latest(new_branch),
                    plain=len(groups.row_index) == len(owner))


def response_states(hidden: torch.Tensor, groups: PromptGroups) -> torch.Tensor:
    """Hidden states that predict the real response tokens.

    Args:
        hidden: (B, T, D).

    Returns:
        (M, D), M = number of True in `response_mask`.
    """
    return hidden.flatten(0, 1)[groups.state_places]


def end_states(hidden: torch.Tensor, groups: PromptGroups) -> torch.Tensor:
    """Hidden states at each completion's last token: (N, D) from (B, T, D)."""
    return hidden[groups.row_index, groups.end_columns]


def spread(values: torch.Tensor, groups: PromptGroups) -> torch.Tensor:
    """(N, R) with `values` (M,) at the real response tokens, and 0 elsewhere."""
    shape = groups.responses.shape
    return values.new_zeros(shape.numel()).index_copy(0, groups.token_places, values).view(shape)
