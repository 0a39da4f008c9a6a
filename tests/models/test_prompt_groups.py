"""Prompt groups: the layout by its definition, the mask by brute force in Python loops."""

import math

import pytest
import torch

from families import PAD, random_groups
from utils.models.prompt_groups import (
    branches,
    end_states,
    micro_batches,
    pack,
    response_states,
    share_rows,
    spread,
    unpack,
)

SIZES = [4, 1, 6], [[3, 1, 5], [2], [1, 1]]  # groups of 13, 3 and 8 tokens: the last two share a row


@pytest.fixture
def batch():
    prompts, completions = random_groups(*SIZES)
    return prompts, completions, pack(prompts, completions, PAD)


def columns(groups, owner, segment):
    """The row that a group stands in, and the columns of its prompt (0) or k-th completion."""
    places = ((groups.owners == owner) & (groups.segments == segment)).nonzero().tolist()
    assert len({row for row, _ in places}) == 1
    return places[0][0], [column for _, column in places]


def test_groups_stand_whole_and_padding_fills_the_rest(batch):
    prompts, completions, groups = batch
    assert groups.input_ids.shape == (2, 13)
    for owner, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        row, own = columns(groups, owner, 0)
        first, flat = own[0], prompt + [token for completion in group for token in completion]
        assert groups.input_ids[row, first : first + len(flat)].tolist() == flat
        segments = [0] * len(prompt) + [k for k, c in enumerate(group, 1) for _ in c]
        assert groups.segments[row, first : first + len(flat)].tolist() == segments
        assert (groups.owners == owner).sum() == len(flat)
    padding = groups.owners == -1
    assert padding.sum() == 2 * 13 - 13 - 3 - 8
    assert torch.equal(padding, groups.segments == -1) and (groups.input_ids[padding] == PAD).all()


def test_position_ids_restart_at_the_prompts_end(batch):
    prompts, completions, groups = batch
    for owner, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        row, own = columns(groups, owner, 0)
        assert groups.position_ids[row, own].tolist() == list(range(len(prompt)))
        for k, completion in enumerate(group, start=1):
            row, own = columns(groups, owner, k)
            assert groups.position_ids[row, own].tolist() == [len(prompt) + i for i in range(len(completion))]


def test_states_stand_before_their_tokens_and_ends_on_the_last(batch):
    prompts, completions, groups = batch
    n = 0
    for owner, group in enumerate(completions):
        _, prompt_columns = columns(groups, owner, 0)
        for k, completion in enumerate(group, start=1):
            row, own = columns(groups, owner, k)
            assert groups.row_index[n] == row
            assert groups.end_columns[n] == own[-1]
            assert groups.responses[n][groups.response_mask[n]].tolist() == completion
            before = [prompt_columns[-1]] + own[:-1]  # the prompt's last token predicts every first token
            assert groups.state_columns[n][groups.response_mask[n]].tolist() == before
            assert (groups.response_mask[n].tolist() == [i < len(completion)
                                                         for i in range(groups.state_columns.shape[1])])
            n += 1
    assert n == len(groups.row_index)
    assert (groups.responses[~groups.response_mask] == PAD).all()


def test_mask_by_brute_force(batch):
    *_, groups = batch
    mask = branches(groups).dense
    rows, width = groups.segments.shape
    assert mask.shape == (rows, 1, width, width) and mask.dtype == torch.bool
    for row in range(rows):
        owner, segment = groups.owners[row].tolist(), groups.segments[row].tolist()
        for query in range(width):
            sees = {key for key in range(width) if mask[row, 0, query, key]}
            if owner[query] == -1:
                assert query in sees and all(owner[key] == -1 for key in sees)
            else:
                assert sees == {key for key in range(query + 1)
                                if owner[key] == owner[query] and segment[key] in (0, segment[query])}


@pytest.mark.parametrize("sizes", [[5], [5, 5], [9, 4, 5], [3, 9, 3, 3], [7, 6, 5, 4, 3, 2, 1], [1] * 6])
def test_groups_share_rows_without_overlap(sizes):
    places, height, width = share_rows(sizes)
    assert width == max(sizes)
    taken = [(row, column) for (row, first), size in zip(places, sizes, strict=True)
             for column in range(first, first + size)]
    assert len(taken) == len(set(taken)) == sum(sizes)
    assert {row for row, _ in taken} == set(range(height)) and all(column < width for _, column in taken)


def test_a_group_goes_where_there_is_room():
    assert share_rows([3, 9, 3, 3]) == ([(1, 0), (0, 0), (1, 3), (1, 6)], 2, 9)
    assert share_rows([9, 4, 5])[1] == 2 and share_rows([9, 5, 5])[1] == 3


def test_one_completion_is_an_ordinary_causal_row():
    prompts, completions = random_groups([3], [[4]])
    groups = pack(prompts, completions, PAD)
    assert torch.equal(branches(groups).dense[0, 0], torch.ones(7, 7, dtype=torch.bool).tril())
    assert groups.position_ids[0].tolist() == list(range(7))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_groups", [1, 5, 23])
@pytest.mark.parametrize("max_tokens", [1, 64, 1000, None])
def test_micro_batches_stay_within_their_limits_and_lose_nothing(seed, max_groups, max_tokens):
    sizes = torch.randint(1, 60, (23,), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = micro_batches(sizes, max_groups, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(23))
    most = math.inf if max_tokens is None else max_tokens
    longest = [max(sizes[i] for i in batch) for batch in batches]
    assert all(len(batch) <= max_groups for batch in batches)
    assert all(len(batch) == 1 or len(batch) * longest[n] <= most for n, batch in enumerate(batches))
    # of like size together: no group of a later batch is larger than one of an earlier
    assert [sizes[i] for batch in batches for i in batch] == sorted(sizes, reverse=True)
    ordered, fewest = sorted(sizes, reverse=True), [0]  # the fewest batches of the first groups
    for end in range(1, 24):
        fewest.append(1 + min(fewest[first] for first in range(max(0, end - max_groups), end)
                              if end - first == 1 or (end - first) * ordered[first] <= most))
    assert len(batches) == fewest[-1]


@pytest.mark.parametrize(("sizes", "max_groups", "counts"), [
    ([350] * 48, 99, [24, 24]),  # 16,384 tokens are 46 rows: not 46 and 2
    ([350] * 48, 20, [16, 16, 16]),
    ([16384, *[100] * 99], 99, [1, 99]),  # 50 and 50 do not fit into two passes
])
def test_micro_batches_are_as_few_as_they_can_be_and_of_like_numbers(sizes, max_groups, counts):
    assert list(map(len, micro_batches(sizes, max_groups, 16384))) == counts


def test_no_groups_make_no_micro_batches():
    """A rank may have no row of the last step of a pass."""
    assert micro_batches([], 4, 100) == []


def test_states_are_read_at_their_row_and_column(batch):
    *_, groups = batch
    rows, width = groups.segments.shape
    # (row, column)
    hidden = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(width), indexing="ij"), -1)
    found = response_states(hidden, groups).tolist()
    real = groups.response_mask.nonzero().tolist()
    assert found == [[groups.row_index[n].item(), groups.state_columns[n, r].item()] for n, r in real]
    ends = end_states(hidden, groups).tolist()
    assert (ends == [list(pair) for pair in zip(groups.row_index.tolist(), groups.end_columns.tolist(),
                                                strict=True)])


def test_spread_puts_values_back_in_order():
    groups = pack([[5], [6]], [[[7, 8, 9]], [[4, 3]]], PAD, [[[7, -100, 9]], [[-100, 3]]])
    assert spread(torch.tensor([1.0, 2.0, 3.0]), groups).tolist() == [[1, 0, 2], [0, 3, 0]]
    assert groups.tokens.tolist() == groups.responses[groups.response_mask].tolist() == [7, 9, 3]


@pytest.mark.parametrize(
    ("prompts", "completions"), [([[]], [[[5]]]), ([[5]], [[[]]]), ([[5]], [[]]), ([[5]], [[[5], []]])]
)
def test_empty_prompts_and_completions_are_refused(prompts, completions):
    with pytest.raises(ValueError, match="at least one token"):
        pack(prompts, completions, PAD)


def test_unpack_gives_back_what_was_packed():
    """Also where groups share a row."""
    prompts, completions = random_groups([9, 1, 2, 5], [[3, 1], [2], [1, 2, 4], [6]])
    assert unpack(pack(prompts, completions, PAD)) == list(zip(prompts, completions, strict=True))


def test_places_without_a_label_take_no_part():
    groups = pack([[5, 6]], [[[7, 8, 9], [4]]], 1, [[[7, -100, 2], [4]]])
    assert groups.responses.tolist() == [[7, 1, 2], [4, 1, 1]]
    assert groups.response_mask.tolist() == [[True, False, True], [True, False, False]]
    assert groups.input_ids.tolist() == [[5, 6, 7, 8, 9, 4]]
