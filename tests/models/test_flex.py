"""Attention as a GPU computes it: against separate rows; tiles, compilations, and what is refused.

Without a GPU the same code runs here: FlexAttention without a backward pass, and as a rule uncompiled.
"""

import logging
import re
from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import sliding_window_causal_mask_function

from families import FAMILIES, PAD, policy, random_groups
from many_families import tiny
from utils.models import attention, flex
from utils.models.attention import causal_blocks
from utils.models.flex import GroupMask
from utils.models.loading import in_blocks, without_dropout
from utils.models.outputs import response_logprobs
from utils.models.prompt_groups import branches, pack

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = [70, 5, 150, 40], [[30, 1, 45], [20], [9, 130], [60]]  # rows of 289 tokens: three tiles
PLAIN = [70, 150, 290], [[30], [130], [9]]  # no two share a row
HEADS, KEY_HEADS, WIDTH = 4, 2, 8
MODULE = torch.nn.Module()
MODULE.num_key_value_groups = HEADS // KEY_HEADS


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """The kernels of a GPU, in rows of any length, without compiling them."""
    monkeypatch.setattr(flex, "DEVICE", DEVICE.type)
    monkeypatch.setattr(flex, "FEWEST", 1)
    monkeypatch.setattr(flex, "_kernels", {})
    if DEVICE.type == "cpu":
        monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend="eager"))


def groups_of(prompts, completions):
    return pack(*random_groups(prompts, completions), PAD).to(DEVICE)


def random_inputs(groups):
    """Query, key and value, and the generator that they are from."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*groups.owners.shape, heads, WIDTH, generator=generator).to(DEVICE).transpose(1, 2)
              for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return inputs, generator


def mask_of(groups, rule=None):
    return GroupMask(branches(groups), groups.position_ids, rule)


def separate_rows(query, key, value, groups, scaling, softcap, window):
    """By definition: each prompt, and each completion behind its prompt, is a row. Padding is 0."""
    found = torch.zeros_like(query)
    key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
    for owner in range(int(groups.owners.max()) + 1):
        row = int((groups.owners == owner).any(1).nonzero()[0])
        own = [
            ((groups.owners[row] == owner) & (groups.segments[row] == k)).nonzero()[:, 0]
            for k in range(int(groups.segments[groups.owners == owner].max()) + 1)
        ]
        for k, new in enumerate(own):
            columns = new if k == 0 else torch.cat([own[0], new])
            q, k_, v = (x[row, :, columns] for x in (query, key, value))
            scores = q @ k_.transpose(1, 2) * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            ago = torch.arange(len(columns), device=DEVICE)
            ago = ago[:, None] - ago
            scores = scores.masked_fill((ago < 0) | (ago >= (window or 10**6)), -torch.inf)
            found[row, :, new] = (scores.softmax(-1) @ v)[:, -len(new) :]
    return found


def dense(mask):
    return mask.dense


def as_it_is(mask):
    return mask


# implementation -> (what layers are given, tokens of a block, shortest row for FlexAttention, its backend)
IMPLEMENTATIONS = {
    "blocks of queries": (dense, 16, 1, None),
    "one call under the mask": (dense, 10**6, 1, None),
    "one call, the mask made by a GPU's path": (as_it_is, 10**6, 10**6, None),
    "FlexAttention": (as_it_is, 10**6, 1, "eager"),
    "causal attention without a mask": (as_it_is, 10**6, 10**6, None),
}


@pytest.mark.parametrize(("softcap", "window"), [(None, None), (2.0, 50)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_implementation_equals_separate_rows(implementation, softcap, window, monkeypatch):
    """Outputs, and gradients where the device has a backward pass."""
    given, block, fewest, backend = IMPLEMENTATIONS[implementation]
    plain = implementation == "causal attention without a mask"
    if plain:  # layers with a window or a cap need more than causal attention
        softcap = window = None
    monkeypatch.setattr(attention, "_BLOCK", block)
    monkeypatch.setattr(flex, "FEWEST", fewest)
    groups = groups_of(*(PLAIN if plain else SIZES))
    rule = sliding_window_causal_mask_function(window) if window else None
    mask = mask_of(groups, rule)
    assert mask.causal == plain
    inputs, generator = random_inputs(groups)
    real = (groups.owners >= 0)[:, :, None, None]
    weights = torch.randn(real.shape[:2] + (HEADS, WIDTH), generator=generator).to(DEVICE) * real
    backward = backend is None or DEVICE.type == "cuda"

    def measured(attend, dtype):
        own = [x.to(dtype, copy=True).requires_grad_(backward) for x in inputs]
        found = attend(*own) * real
        return [found, *(torch.autograd.grad((found * weights).sum(), own) if backward else ())]

    with torch.set_grad_enabled(backward):
        expected = measured(lambda *x: separate_rows(*x, groups, 0.3, softcap, window).transpose(1, 2),
                            torch.float64)
        found = measured(lambda *x: causal_blocks(MODULE, *x, given(mask), scaling=0.3, softcap=softcap)[0],
                         torch.float32)
    assert len(flex._kernels) == (backend is not None) and None not in flex._kernels.values()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("entries", [1, 2**24])
def test_tiles_by_brute_force(entries, window, monkeypatch):
    """The tiles that are computed, and those without a mask, are what a look at each pair of tokens gives."""
    monkeypatch.setattr(flex, "_ENTRIES", entries)
    groups = groups_of(*SIZES)
    rule = sliding_window_causal_mask_function(window) if window else None
    mask = mask_of(groups, rule)
    height, width = groups.owners.shape
    owner, segment, position = (x.tolist() for x in (groups.owners, groups.segments, groups.position_ids))
    pairs = [[[0] * 3 for _ in range(3)] for _ in range(height)]
    for row in range(height):
        for query in range(width):
            for key in range(query + 1):
                seen = owner[row][key] == owner[row][query] and segment[row][key] in (0, segment[row][query])
                # transformers' mask functions look at padding, too
                ago = position[row][query] - position[row][key]
                inside = segment[row][query] < 0 or not window or ago < window
                pairs[row][query // 128][key // 128] += (seen or owner[row][query] == owner[row][key] == -1
                                                         ) and inside
    blocks = mask.blocks
    for row in range(height):
        for query in range(3):
            for key in range(3):
                count = pairs[row][query][key]
                partly = blocks.kv_indices[row, 0, query, : blocks.kv_num_blocks[row, 0, query]].tolist()
                full = blocks.full_kv_indices[row, 0, query,
                                              : blocks.full_kv_num_blocks[row, 0, query]].tolist()
                assert (key in partly) == (0 < count < 128**2) and (key in full) == (count == 128**2)
    stock = create_block_mask(mask.sees(), height, None, width, width, device=DEVICE)
    assert torch.equal(blocks.to_dense(), stock.to_dense()) and blocks.sparsity() == stock.sparsity()


@torch.no_grad()
def test_one_kernel_serves_all_shapes(monkeypatch):
    """One more for a single row: the compiler takes a size of 1 for a constant."""
    compiled = []

    def counting(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=counting))
    for sizes, expected in [
        (([140, 130, 150], [[9, 8], [7, 6], [5]]), 1),
        (([140, 130, 150, 60], [[9, 8], [7, 6], [5], [3]]), 1),
        (([200, 30, 300, 170, 180], [[9, 80], [7], [50, 60], [4, 5], [2]]), 1),
        (([500, 460], [[90, 40], [100, 30]]), 1),
        (([140], [[9, 8, 7]]), 2),
        (([700], [[9] * 12]), 2),
        (([600, 590, 610, 3], [[9, 8], [7, 6], [5, 4], [8, 8]]), 2),
    ]:
        groups = groups_of(*sizes)
        inputs, _ = random_inputs(groups)
        causal_blocks(MODULE, *inputs, mask_of(groups))
        assert len(compiled) == expected, sizes


@torch.no_grad()
@pytest.mark.parametrize(("backend", "reason"), [
    (lambda graph, inputs: lambda *x: [1.1 * y for y in graph(*x)], "its kernel is 10% off"),
    (lambda graph, inputs: 1 / 0, "BackendCompilerFailed: .* ZeroDivisionError: division by zero"),
])
def test_a_kernel_that_fails_or_is_wrong_is_said_once_and_not_used(backend, reason, monkeypatch, caplog):
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=backend))
    groups = groups_of(*SIZES)
    inputs, _ = random_inputs(groups)
    flex.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found, _ = causal_blocks(MODULE, *inputs, mask_of(groups))
    expected, _ = causal_blocks(MODULE, *inputs, mask_of(groups).dense)
    torch.testing.assert_close(found, expected)
    (line,) = caplog.messages
    said = rf"FlexAttention is not used \({reason}.*\); attention with a mask takes its place"
    assert re.fullmatch(said, line)


@torch.no_grad()
def test_inputs_of_several_kinds_are_those_of_autocast():
    """Some models' norms give float32 queries and keys beside bfloat16 values."""
    groups = groups_of(*SIZES)
    (query, key, value), _ = random_inputs(groups)
    expected, _ = causal_blocks(MODULE, query, key, value, mask_of(groups))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found, _ = causal_blocks(MODULE, query, key, value.bfloat16(), mask_of(groups))
    assert found.dtype == torch.bfloat16
    assert 1e-5 < (found - expected).norm() / expected.norm() < 2e-2


def test_nothing_has_an_entry_for_each_pair_of_tokens(monkeypatch):
    """A prompt with many completions: at most an entry for each pair of a token and 128 others."""
    largest = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = function(*args, **(kwargs or {}))
            tensors = found if isinstance(found, (tuple, list)) else [found]
            largest.extend(x.numel() for x in tensors if torch.is_tensor(x))
            return found

    monkeypatch.setattr(flex, "_ENTRIES", 1)
    groups = groups_of([1000], [[60] * 30])
    with Sizes():
        assert mask_of(groups).blocks.shape == (1, 1, 2800, 2800)
    assert 2800 * 22 < max(largest) <= 22 * 128 * 128


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("sizes", [([30, 9, 20], [[3, 1, 5], [2], [4, 4]]), ([30, 33], [[3], [2]])])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_learn_the_same_as_on_a_cpu(family, sizes, checkpointing, monkeypatch):
    """With branches and without; here without FlexAttention, which has no backward pass on a CPU."""
    monkeypatch.setattr(flex, "FEWEST", 10**6)
    groups, found = groups_of(*sizes), []
    for device in ("none", DEVICE.type):
        monkeypatch.setattr(flex, "DEVICE", device)
        model = in_blocks(policy(family)).to(DEVICE)
        if checkpointing:
            without_dropout(model).train().gradient_checkpointing_enable()
        response_logprobs(model, groups, 1.0).square().sum().backward()
        found.append([weight.grad for weight in model.parameters()])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-neox", "doge", "gemma3", "llama4", "deepseek-v3"])
@torch.no_grad()
def test_families_say_the_same_as_on_a_cpu(family, monkeypatch):
    """Windows, chunks, values that are narrower than keys, and a model that changes its mask."""
    groups, found = groups_of([140, 3, 150], [[5, 1, 9], [10, 4], [2]]), []
    model = in_blocks(policy(family)) if family in FAMILIES else tiny(family)
    for device in ("none", DEVICE.type):
        monkeypatch.setattr(flex, "DEVICE", device)
        found.append(response_logprobs(model.to(DEVICE), groups, 1.0))
    assert bool(flex._kernels) == (family != "doge") and None not in flex._kernels.values()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_kernel_is_found_right(monkeypatch):
    """By the example that each kernel must pass. torch 2.13 compiles it on a CPU for constant shapes only."""
    torch.compiler.reset()  # what other tests have compiled with another backend
    if DEVICE.type == "cpu":
        real = torch.compile.func  # with the compiler that the other tests leave out
        monkeypatch.setattr(flex.torch, "compile", lambda kernel, **more: real(kernel, fullgraph=True))
    mask = mask_of(groups_of(*SIZES))
    call = flex._Call(DEVICE, torch.float32, HEADS, KEY_HEADS, WIDTH, WIDTH, "0.3", None, False, True, False)
    assert flex._kernel(call, mask) is not None
