"""Sampling by vLLM. Here a stand-in computes for it; test_vllm_rollouts.py has the real one."""

import copy
from dataclasses import replace

import pytest
import torch

import fake_vllm
import train_ppo
from families import EOS, FAMILIES, VOCAB, policy, random_groups
from loops import save_parents, updated
from utils.contradictions import refuse_contradictions
from utils.errors import UserError
from utils.models.generation import sample
from utils.models.lora import add_adapter, merge_adapter
from utils.rollouts import vllm_engine
from utils.rollouts.vllm_engine import sample_by_vllm, stock_weights

PROMPTS = random_groups([5, 1, 8], [[1]] * 3)[0]
SIZES = {"k": 4, "max_new_tokens": 8, "temperature": 1.5, "eos_id": EOS}


@pytest.fixture(autouse=True)
def engines(monkeypatch):
    """Those of one test."""
    monkeypatch.setattr(vllm_engine, "_engines", {})
    with fake_vllm.installed():
        yield vllm_engine._engines


def by_vllm(model, **more):
    return sample_by_vllm(model, PROMPTS, seed=7, longest_prompt=8, batch_size=64, **{**SIZES, **more})


def with_adapters(family):
    """A policy whose adapters change what it says."""
    model = add_adapter(policy(family), train_ppo.PPOStageConfig(lora_rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policy_with_adapters_is_given_as_the_stock_model_that_it_becomes(family):
    model = with_adapters(family)
    given = dict(stock_weights(model, torch.float32))
    stock = dict(merge_adapter(copy.deepcopy(model)).named_parameters())
    assert given.keys() == stock.keys() == dict(policy(family).named_parameters()).keys()
    assert any(not torch.equal(given[name], weight) for name, weight in policy(family).named_parameters())
    for name, weight in stock.items():
        torch.testing.assert_close(given[name], weight.detach(), rtol=1e-5, atol=1e-6)


def test_each_response_has_the_seed_that_it_has_with_ours(engines):
    """So a resumed run samples what it would have sampled, and so do several processes."""
    model, found = policy("opt"), []
    for _ in range(2):
        ours = sample(model, PROMPTS, seeds=list(range(7, 19)), pad_id=1, **SIZES)
        theirs = by_vllm(model)
        assert theirs.responses == ours.responses and theirs.ended == ours.ended
        found.append(ours)
        with torch.no_grad():
            for weight, other in zip(model.parameters(), policy("opt", seed=1).parameters(), strict=True):
                weight.copy_(other)
    assert any(found[0].ended) and not all(found[0].ended) and found[0].responses != found[1].responses
    [engine] = engines.values()
    assert engine.resets == 2 and engine.settings["max_num_seqs"] == 12
    assert engine.settings["max_model_len"] == 16


def test_it_gets_the_number_type_of_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        by_vllm(policy("opt"))
    [engine] = vllm_engine._engines.values()
    assert engine.model.dtype == torch.bfloat16


def test_its_responses_are_trained_on_as_ours(tmp_path):
    config = train_ppo.PPOStageConfig(
        output_dir=str(tmp_path), **save_parents(tmp_path, "opt"), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=7, responses_per_prompt=3, total_episodes=42, ppo_epochs=1, learning_rate=1e-2)
    _, weights, *_ = updated(config)
    figures, found, *_ = updated(replace(config, rollout_engine="vllm"))
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(found, weights)


def test_what_it_cannot_do_is_one_line(tmp_path, monkeypatch):
    model = policy("opt")
    model.get_output_embeddings().words = VOCAB - 2
    with pytest.raises(UserError, match="2 rows behind its last word"):
        by_vllm(model)

    def unable(*_, **__):
        raise ValueError("Head size 4\nis not supported")

    monkeypatch.setattr(fake_vllm.LLM, "__init__", unable)
    with pytest.raises(UserError, match="run this model .Head size 4 is not supported.; take"):
        by_vllm(policy("opt"))


def test_without_it_the_requirements_are_named(monkeypatch):
    config = train_ppo.PPOStageConfig(rollout_engine="vllm")
    refuse_contradictions(config)
    monkeypatch.setattr("utils.contradictions.find_spec", lambda name: None)
    with pytest.raises(UserError, match="^rollout_engine: vLLM is not installed; requirements-vllm.txt"):
        refuse_contradictions(config)
