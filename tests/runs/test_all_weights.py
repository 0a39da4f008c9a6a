"""Every weight of every family comes back bit for bit: from a checkpoint, and from final/ by stock loaders.

transformers saves some weights under other names than the model's own: GPT-NeoX's head, the experts of
Mixtral, Qwen-MoE, OLMoE, Phi-MoE and DeepSeek, which it also splits. Numbers of a step before would stay
in silence when one of these is not found again.
"""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import families
from many_families import TRAINED, tiny
from utils import zero
from utils.runs.checkpoints import load_weights, save_weights, trainable_weights

KINDS = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}
# those whose weights have other names in files, or are split there, or that have buffers
TRICKY = ["gpt-neox", "mixtral", "qwen3-moe", "deepseek-v3", "gemma4"]
every_family = pytest.mark.parametrize("family", [*TRICKY, *(
    pytest.param(family, marks=pytest.mark.slow)
    for family in [*families.FAMILIES, *TRAINED] if family not in TRICKY)])
both_kinds = pytest.mark.parametrize("kind", list(KINDS))


def random_model(family, kind, seed):
    """Each weight of it random, biases and norms too."""
    if family in families.CONFIGS:
        model = families.policy(family, seed) if kind == "policy" else families.scalar_model(family, seed)
    else:
        model = tiny(family, KINDS[kind])
    if model is None:
        pytest.skip("transformers has no such class")
    return changed(model, seed)


def changed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        nn.init.normal_(weight.data, generator=generator)
    return model


def copies(model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def assert_same(model, expected):
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@both_kinds
@every_family
def test_a_checkpoint_brings_back_every_weight(family, kind, tmp_path, monkeypatch):
    """In a file for each weight, and changed in between; weights that are tied stay tied."""
    monkeypatch.setattr(zero, "FILE_BYTES", 1)
    model = random_model(family, kind, 1)
    expected = copies(model)
    save_weights(trainable_weights(model), tmp_path / "kept", "best")
    changed(model, 2)
    assert not any(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    load_weights(trainable_weights(model), tmp_path / "kept", "best")
    assert_same(model, expected)


def assert_final(folder, kind, expected):
    """What anybody's `from_pretrained` finds there."""
    model, loaded = KINDS[kind].from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(loaded[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same(model, expected)


@both_kinds
@every_family
def test_final_brings_back_every_weight(family, kind, tmp_path):
    model = random_model(family, kind, 1)
    zero.save_pretrained(model, tmp_path)
    assert_final(tmp_path, kind, copies(model))


@both_kinds
@every_family
def test_final_in_several_files_brings_back_every_weight(family, kind, tmp_path, monkeypatch):
    """As under ZeRO-3, which gathers some weights at a time; here they are complete already."""
    @contextmanager
    def complete(weights, change=False):
        yield

    monkeypatch.setattr(zero, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(zero, "gathered", complete)
    monkeypatch.setattr(zero, "FILE_BYTES", 3000)
    model = random_model(family, kind, 1)
    zero.save_pretrained(model, tmp_path)
    files = {path.name: load_file(path) for path in tmp_path.glob("*.safetensors")}
    assert len(files) > 1 and not (tmp_path / "part").exists()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert index == {key: name for name, weights in files.items() for key in weights}
    assert_final(tmp_path, kind, copies(model))
