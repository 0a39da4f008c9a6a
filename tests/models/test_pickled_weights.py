"""Models whose weights are .bin files, as facebook/opt-125m: they load, and what hides there does not run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from families import policy, scalar_model
from utils.config import UserError
from utils.models.loading import load_policy, load_scalar_model
from utils.models.parents import Parent

BIN = "pytorch_model.bin"
SHA = "0123456789abcdef" * 2 + "01234567"


def as_bin(folder, prefix="model.", shards=1, **how):
    """Turn a saved model into one with .bin files; the base model's names begin with `prefix`."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {name.replace("model.", prefix, 1): weight for name, weight in weights.items()}
    names = sorted(weights)
    parts = [{name: weights[name] for name in names[number::shards]} for number in range(shards)]
    if shards == 1:
        torch.save(parts[0], folder / BIN, **how)
        return
    files = [f"pytorch_model-{number:05}-of-{shards:05}.bin" for number in range(1, shards + 1)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file, **how)
    where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"{BIN}.index.json").write_text(json.dumps(index))


def equal(model, other):
    weights = model.state_dict()
    assert weights.keys() == other.state_dict().keys()
    return all(torch.equal(weights[name], weight) for name, weight in other.state_dict().items())


@pytest.mark.parametrize("layout", [
    {}, {"prefix": ""}, {"shards": 3}, {"prefix": "", "shards": 2}, {"_use_new_zipfile_serialization": False},
], ids=["one file", "names of the trunk", "sharded", "sharded names of the trunk", "before torch 1.6"])
@pytest.mark.parametrize("family", ["opt", "opt-350m"])
def test_a_clone_with_bin_files_loads(family, layout, tmp_path, capsys):
    made = policy(family)
    made.save_pretrained(tmp_path)
    as_bin(tmp_path, **layout)
    parent = Parent("model", str(tmp_path))
    assert equal(load_policy(parent), made)
    load_scalar_model(parent, new_head_seed=0)
    assert capsys.readouterr().err.count("its .bin file was read by torch's loader for weights only\n") == 1
    assert all(name.endswith(".bin") for name in parent.identity["sha256"]) and parent.identity["sha256"]


def test_safetensors_go_first_and_nothing_is_said(tmp_path, capsys):
    made = policy("opt")
    made.save_pretrained(tmp_path)
    (tmp_path / BIN).write_bytes(b"no weights")
    parent = Parent("model", str(tmp_path))
    assert equal(load_policy(parent), made) and "torch's loader" not in capsys.readouterr().err
    assert set(parent.identity["sha256"]) == {"model.safetensors"}


class Runs:
    """What an attacker pickles: reading it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def plain_pickle(value, path):
    path.write_bytes(pickle.dumps(value))


@pytest.mark.parametrize("save", [torch.save, plain_pickle], ids=["torch", "pickle"])
@pytest.mark.parametrize("where", ["alone", "beside the weights", "shard"])
@pytest.mark.parametrize(("made", "load"), [(policy, load_policy), (scalar_model, load_scalar_model)],
                         ids=["policy", "scalar"])
def test_a_hostile_bin_file_does_not_run(made, load, where, save, tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    made("opt").save_pretrained(folder)
    as_bin(folder, shards=2 if where == "shard" else 1)
    file = next(folder.glob("pytorch_model-00002*")) if where == "shard" else folder / BIN
    hidden = Runs(ran)
    save(hidden if where == "alone" else {**torch.load(file, weights_only=True), "more": hidden}, file)
    with pytest.raises(UserError, match="^model: '.*' cannot be loaded: its .bin file holds something else"):
        load(Parent("model", str(folder)))
    assert not ran.exists()


@pytest.mark.parametrize("content", [[1, 2], {"model": {"weight": torch.zeros(2)}}, {"a": 5}, 3, {}])
def test_a_bin_file_with_something_else_is_one_line(content, tmp_path):
    policy("opt").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / BIN)
    with pytest.raises(UserError, match="^model: '.*' cannot be loaded: .") as caught:
        load_policy(Parent("model", str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: os.truncate(path, 4000),
                                    lambda path: path.write_bytes(b"garbage" * 99)],
                         ids=["empty", "cut off", "garbage"])
def test_a_damaged_bin_file_is_one_line(damage, tmp_path):
    policy("opt").save_pretrained(tmp_path)
    as_bin(tmp_path)
    damage(tmp_path / BIN)
    with pytest.raises(UserError, match="^model: '.*' cannot be loaded: .") as caught:
        load_policy(Parent("model", str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--facebook--opt-125m"


def snapshot(cache, sha, ref, files):
    folder = cache / "snapshots" / sha
    folder.mkdir(parents=True)
    for file in files:
        shutil.copy(file, folder)
    path = cache / "refs" / ref
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(sha)


@pytest.mark.parametrize("cached", ["bin", "conversion", "safetensors"])
def test_a_hub_model_in_the_cache_loads_without_a_network(cached, cache, tmp_path, capsys):
    made, folder = policy("opt"), tmp_path / "made"
    made.save_pretrained(folder)
    weights = folder / "model.safetensors"
    others = [folder / "config.json", folder / "generation_config.json"]
    if cached == "bin":
        as_bin(folder)
        snapshot(cache, SHA, "main", [*others, folder / BIN])
    elif cached == "safetensors":
        snapshot(cache, SHA, "main", [*others, weights])
    else:  # weights in a pull request, everything else in main
        snapshot(cache, SHA, "main", others)
        snapshot(cache, SHA[::-1], "refs/pr/7", [weights])
    parent = Parent("model", "facebook/opt-125m")
    assert equal(load_policy(parent), made)
    assert equal(load_policy(parent).base_model, load_scalar_model(parent, new_head_seed=0).base_model)
    assert ("read by torch's loader" in capsys.readouterr().err) == (cached == "bin")


def test_a_hub_model_that_is_not_in_the_cache_is_one_line(cache):
    with pytest.raises(UserError, match="^model: 'facebook/opt-125m' cannot be loaded: .") as caught:
        load_policy(Parent("model", "facebook/opt-125m"))
    assert "\n" not in str(caught.value)
