"""Attention in blocks: against transformers' SDPA attention, in numbers, gradients and what is computed."""

import pytest
import torch
from families import FAMILIES, PAD, policy, random_groups
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from utils import attention
from utils.attention import CAUSAL_BLOCKS, causal_blocks
from utils.generation import sample
from utils.models import load_policy, response_logprobs
from utils.prompt_groups import pack

GROUPS = pack(*random_groups([9, 2, 17], [[3, 1, 5], [2], [4, 4]]), PAD)


@pytest.mark.parametrize("block", [1, 4, 16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_says_the_same_as_with_sdpa(family, block, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", block)
    found = []
    for name in ("sdpa", CAUSAL_BLOCKS):
        model = policy(family)
        model.set_attn_implementation(name)
        logprobs = response_logprobs(model, GROUPS, 1.0)
        logprobs.square().sum().backward()
        samples = sample(model, [[5, 6, 7, 8, 9]] * 2, k=3, max_new_tokens=4, temperature=1.0, seeds=list(range(6)), eos_id=-1,
                         pad_id=PAD)
        padded = torch.tensor([[PAD, PAD, 5, 6, 7], [4, 5, 6, 7, 8]])
        plain = model(padded, attention_mask=(padded != PAD).long())
        found.append([logprobs, plain.logits[:, -1], torch.tensor(samples.logprobs), *(p.grad for p in model.parameters())])
    for sdpa, blocks in zip(*found, strict=True):
        torch.testing.assert_close(blocks, sdpa, rtol=1e-4, atol=1e-4)


def test_nothing_above_the_diagonal_is_computed(monkeypatch):
    """Of 4 blocks by 4 the 10 on and below the diagonal."""
    length, entries = 4 * attention._BLOCK, []

    def counted(module, query, key, value, mask, **more):
        entries.append(query.shape[2] * key.shape[2])
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counted)
    query, key, value = torch.randn(3, 1, 2, length, 8)
    causal_blocks(torch.nn.Module(), query, key, value, torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    assert sum(entries) / length**2 == 10 / 16


def test_models_are_loaded_with_it():
    assert load_policy("assets/opt-mini").config._attn_implementation == CAUSAL_BLOCKS
