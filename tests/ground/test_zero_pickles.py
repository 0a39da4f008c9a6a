"""Planted files of a checkpoint run no code on --resume."""

import json
import os
import pickle
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from families import policy
from loops import epoch_loop, ppo_loop, save_parents
from train_sft import SFTStageConfig
from utils import zero
from utils.errors import UserError
from utils.runs.checkpoints import checksums
from zero_cases import launch, make_models, words_of


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant(path, marker, plain):
    """In place of a file: what `torch.save` makes of it, or a pickle alone."""
    if plain:
        path.write_bytes(pickle.dumps(Planted(marker)))
    else:
        torch.save({"module": Planted(marker)}, path)


def make_manifest_fit(checkpoint):
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"sha256": checksums(checkpoint)}))


@pytest.mark.parametrize("plain", [False, True])
def test_a_pickle_that_acts_is_a_pickle_that_acts(plain, tmp_path):
    plant(tmp_path / "file", tmp_path / "ran", plain)
    torch.load(tmp_path / "file", weights_only=False) if not plain else pickle.loads(
        (tmp_path / "file").read_bytes())
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("switch", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
                                    "TORCH_FORCE_WEIGHTS_ONLY_LOAD"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_an_engine_that_loads_anything_loads_weights_only(switch, plain, tmp_path, monkeypatch):
    """As DeepSpeed asks for it, and whatever the environment says."""
    if switch:
        monkeypatch.setenv(switch, "1")
    monkeypatch.setitem(zero._active, "settings", {})
    with zero.weights_only(tmp_path):  # it imports DeepSpeed, which sets a variable of its own
        pass
    environment = dict(os.environ)
    file = tmp_path / "file"
    engine = SimpleNamespace(load_checkpoint=lambda *_, **__: torch.load(file, weights_only=False))
    plant(file, tmp_path / "ran", plain)
    with pytest.raises(UserError, match="^resume: a file in .* holds something else than weights"):
        zero.load_engine(engine, tmp_path)
    torch.save({"weight": torch.ones(2), "step": 3}, file)
    zero.load_engine(engine, tmp_path)
    assert not (tmp_path / "ran").exists() and dict(os.environ) == environment


def sft(folder, **keys):
    config = SFTStageConfig(output_dir=str(folder), max_steps=4, **keys)
    return epoch_loop(config, policy("opt"), 8)


def ppo(folder, **keys):
    """The parents lie beside the run's folder."""
    parents = save_parents(folder) if not keys else {
        key: str(folder.parent / key) for key in ("model", "reward_model")}
    config = train_ppo.PPOStageConfig(
        **parents, output_dir=str(folder), max_prompt_tokens=16, max_new_tokens=2, prompts_per_update=2,
        responses_per_prompt=1, total_episodes=4, **keys)
    return ppo_loop(config)[0]


@pytest.mark.parametrize("make", [sft, ppo])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_file_of_a_checkpoint_runs_code(make, tmp_path):
    loop = make(tmp_path)
    out = loop.run.folder
    loop.step = 1
    loop.best.offer(1, 0.5, loop.weights["trained"])
    loop.save()
    files = {path: path.read_bytes() for path in (out / "checkpoints").rglob("*")
             if path.is_file()}
    assert len(files) >= 5 and any(path.suffix == ".pt" for path in files)
    make(out, resume=True).resume()  # as it is, it is loaded
    for path in files:
        for plain in (False, True):
            plant(path, tmp_path / "ran", plain)
            if path.name != "manifest.json":
                make_manifest_fit(path.parent)
            with pytest.raises(UserError) if path.suffix == ".pt" else suppress(Exception):
                make(out, resume=True).resume()
            assert not (tmp_path / "ran").exists(), path
            for other, there in files.items():
                other.parent.mkdir(exist_ok=True)
                other.write_bytes(there)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "engine", "more"), [
    ("sft", "zero1", []), ("reward", "zero2_offload", []), ("ppo", "zero3_offload", []),
    ("sft", "zero3", ["--mixed_precision", "bf16"])])
def test_no_file_of_an_engine_runs_code(stage, engine, more, tmp_path):
    make_models(tmp_path)
    words = [*words_of(tmp_path, stage, 8, 1, engine, 8), *more]
    out = tmp_path / "run"
    launch(tmp_path, 1, [(stage, out, words, 1 if stage == "ppo" else 3)])
    [checkpoint] = [path for path in (out / "checkpoints").iterdir() if not path.name.startswith("best")]
    files = sorted(checkpoint.rglob("*.pt"))
    assert len(files) >= 2
    for path in files:
        content = path.read_bytes()
        plant(path, tmp_path / "ran", plain=False)
        make_manifest_fit(checkpoint)
        launch(tmp_path, 1, [(stage, out, [*words, "--resume"], None)])
        assert not (tmp_path / "ran").exists() and not (out / "final").exists(), path
        path.write_bytes(content)
    make_manifest_fit(checkpoint)
    launch(tmp_path, 1, [(stage, out, [*words, "--resume"], None)])
    assert (out / "final").exists(), "what DeepSpeed needs is loaded"
