"""Prompt groups: the layout by its definition, the mask by brute force in Python loops."""

import pytest
import torch
from families import PAD, random_groups

from utils.prompt_groups import attention_mask, end_states, pack, response_states, spread

SIZES = [4, 1, 6], [[3, 1, 5], [2], [1, 1]]


@pytest.fixture
def batch():
    prompts, completions = random_groups(*SIZES)
    return prompts, completions, pack(prompts, completions, PAD)


def columns(groups, row, segment):
    return [c for c, s in enumerate(groups.segments[row].tolist()) if s == segment]


def test_a_row_is_the_prompt_then_its_completions_then_padding(batch):
    prompts, completions, groups = batch
    width = max(len(p) + sum(map(len, group)) for p, group in zip(prompts, completions, strict=True))
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        flat = prompt + [token for completion in group for token in completion]
        assert groups.input_ids[row].tolist() == flat + [PAD] * (width - len(flat))
        segments = [0] * len(prompt) + [k for k, c in enumerate(group, 1) for _ in c]
        assert groups.segments[row].tolist() == segments + [-1] * (width - len(flat))


def test_position_ids_restart_at_the_prompts_end(batch):
    prompts, completions, groups = batch
    for row, (prompt, group) in enumerate(zip(prompts, completions, strict=True)):
        assert groups.position_ids[row, columns(groups, row, 0)].tolist() == list(range(len(prompt)))
        for k, completion in enumerate(group, start=1):
            expected = [len(prompt) + i for i in range(len(completion))]
            assert groups.position_ids[row, columns(groups, row, k)].tolist() == expected


def test_states_stand_before_their_tokens_and_ends_on_the_last(batch):
    prompts, completions, groups = batch
    n = 0
    for row, group in enumerate(completions):
        for k, completion in enumerate(group, start=1):
            own = columns(groups, row, k)
            assert groups.rows[n] == row
            assert groups.ends[n] == own[-1]
            assert groups.responses[n][groups.response_mask[n]].tolist() == completion
            before = [len(prompts[row]) - 1] + own[:-1]  # the prompt's last token predicts every first token
            assert groups.states[n][groups.response_mask[n]].tolist() == before
            assert groups.response_mask[n].tolist() == [i < len(completion) for i in range(groups.states.shape[1])]
            n += 1
    assert n == len(groups.rows)
    assert (groups.responses[~groups.response_mask] == PAD).all()


def test_mask_by_brute_force(batch):
    *_, groups = batch
    mask = attention_mask(groups.segments)
    rows, width = groups.segments.shape
    assert mask.shape == (rows, 1, width, width) and mask.dtype == torch.bool
    for row in range(rows):
        segment = groups.segments[row].tolist()
        for query in range(width):
            sees = {key for key in range(width) if mask[row, 0, query, key]}
            if segment[query] == -1:
                assert query in sees and all(segment[key] == -1 for key in sees)
            else:
                assert sees == {key for key in range(query + 1) if segment[key] in (0, segment[query])}


def test_one_completion_is_an_ordinary_causal_row():
    prompts, completions = random_groups([3], [[4]])
    groups = pack(prompts, completions, PAD)
    assert torch.equal(attention_mask(groups.segments)[0, 0], torch.ones(7, 7, dtype=torch.bool).tril())
    assert groups.position_ids[0].tolist() == list(range(7))


def test_states_are_read_at_their_row_and_column(batch):
    *_, groups = batch
    rows, width = groups.segments.shape
    hidden = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(width), indexing="ij"), -1)  # (row, column)
    found = response_states(hidden, groups).tolist()
    real = groups.response_mask.nonzero().tolist()
    assert found == [[groups.rows[n].item(), groups.states[n, r].item()] for n, r in real]
    ends = end_states(hidden, groups).tolist()
    assert ends == [list(pair) for pair in zip(groups.rows.tolist(), groups.ends.tolist(), strict=True)]


def test_spread_puts_values_back_in_order():
    mask = torch.tensor([[True, False, True], [False, True, False]])
    assert spread(torch.tensor([1.0, 2.0, 3.0]), mask).tolist() == [[1, 0, 2], [0, 3, 0]]


@pytest.mark.parametrize(
    ("prompts", "completions"), [([[]], [[[5]]]), ([[5]], [[[]]]), ([[5]], [[]]), ([[5]], [[[5], []]])]
)
def test_empty_prompts_and_completions_are_refused(prompts, completions):
    with pytest.raises(ValueError, match="at least one token"):
        pack(prompts, completions, PAD)
