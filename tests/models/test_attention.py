"""Attention in blocks: against transformers' SDPA attention, in numbers, gradients and what is computed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPTJConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from families import FAMILIES, PAD, VOCAB, policy, random_groups
from utils.config import UserError
from utils.models import attention
from utils.models.attention import CAUSAL_BLOCKS, causal_blocks
from utils.models.branches import branching
from utils.models.generation import sample
from utils.models.loading import load_policy
from utils.models.outputs import response_logprobs
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

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
        samples = sample(model, [[5, 6, 7, 8, 9]] * 2, k=3, max_new_tokens=4, temperature=1.0,
                         seeds=list(range(6)), eos_id=-1,
                         pad_id=PAD)
        padded = torch.tensor([[PAD, PAD, 5, 6, 7], [4, 5, 6, 7, 8]])
        plain = model(padded, attention_mask=(padded != PAD).long())
        found.append([logprobs, plain.logits[:, -1], torch.tensor(samples.logprobs),
                      *(p.grad for p in model.parameters())])
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
    causal_blocks(torch.nn.Module(), query, key, value,
                  torch.ones(1, 1, length, length, dtype=torch.bool).tril())
    assert sum(entries) / length**2 == 10 / 16


def test_models_are_loaded_with_it():
    assert load_policy(Parent("model", "assets/opt-mini")).config._attn_implementation == CAUSAL_BLOCKS


def saved(config, folder) -> Parent:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return Parent("model", str(folder))


def test_a_model_whose_attention_cannot_be_chosen_keeps_sdpa(tmp_path):
    config = FalconConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                          alibi=False)
    model = load_policy(saved(config, tmp_path / "falcon")).eval()
    assert model.config._attn_implementation == "sdpa"
    prompts, completions = random_groups([5, 3], [[2, 4], [3]])
    found = response_logprobs(model, pack(prompts, completions, PAD), 1.0)
    rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    for logprobs, (prompt, completion) in zip(found, rows, strict=True):
        stock = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = stock.gather(-1, torch.tensor(completion)[:, None])[:, 0]
        torch.testing.assert_close(logprobs[: len(completion)], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("config", "reason"), [
    (BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4), "cannot be loaded: .*attention"),
    (GPTJConfig(vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, rotary_dim=4),
     "cannot be loaded: .*attention"),
])
def test_models_that_would_be_computed_wrongly_are_refused(config, reason, tmp_path):
    """Bloom and GPT-J add the mask; ours is True where it sees."""
    with pytest.raises(UserError, match=f"^model: '.*' {reason}"):
        load_policy(saved(config, tmp_path / "model"))


@torch.no_grad()
def test_a_thread_does_not_see_the_masks_of_another():
    """The rating page scores answers in one thread while a model writes in another."""
    model = policy("opt")
    ids = torch.tensor([[4, 5, 6, 7]])
    alone, positions = model(ids).logits, torch.arange(4)[None]
    itself = torch.eye(4, dtype=torch.bool)[None, None]
    with branching(itself, positions, positions), ThreadPoolExecutor(1) as other:
        assert not torch.allclose(model(ids).logits, alone, atol=1e-3)
        torch.testing.assert_close(other.submit(torch.no_grad()(model), ids).result().logits, alone)
    torch.testing.assert_close(model(ids).logits, alone)
