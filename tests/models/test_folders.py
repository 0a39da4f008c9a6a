"""What a model key names: a folder, a name on the hub, or something beside what was meant."""

import json

import pytest

from utils.errors import UserError
from utils.models.folders import model_folder
from utils.models.parents import Parent


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Folders that people name in place of a model."""
    for model in ("run/final", "demo/sft/final", "demo/reward/final", "plain", "hub/snapshots/abc"):
        (tmp_path / model).mkdir(parents=True)
        (tmp_path / model / "config.json").write_text("{}")
    for folder in ("adapter", "empty", "unfinished/checkpoints/step-5"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "plain" / "model.safetensors").touch()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "unfinished/checkpoints/step-5/progress.json").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


MEANT = {
    "run": "'run' is not a model folder (did you mean 'run/final'?)",
    "run/": "'run' is not a model folder (did you mean 'run/final'?)",
    "demo": "(did you mean 'demo/sft/final'?)",
    "hub": "(did you mean 'hub/snapshots/abc'?)",
    "plain/model.safetensors": "(it is a file; did you mean 'plain'?)",
    "run/config.yaml": "(it is a file)",
    "adapter": "(it holds a LoRA adapter, adapter_config.json, and not the model; merge the two with peft,",
    "unfinished": "(it is a run that has not finished, without final/; finish it with --resume)",
    "unfinished/checkpoints/step-5": "(it is a checkpoint, from which --resume goes on; a finished run",
    "empty": "(it has no config.json)",
    "plan": "no model folder at 'plan'; did you mean 'plain'?",
    "opt-125m": "no model folder at 'opt-125m'; on the hub it is 'facebook/opt-125m'",
    "OPT-1.3B": "on the hub it is 'facebook/opt-1.3b'",
    "nothing": "no model folder at 'nothing'; train that stage first or give another folder or hub name",
}


@pytest.mark.parametrize("name", MEANT)
def test_what_was_probably_meant_is_said(name, here):
    with pytest.raises(UserError) as caught:
        model_folder("model", name)
    said = str(caught.value)
    assert said.startswith("model: ") and MEANT[name] in said and "\n" not in said
    with pytest.raises(UserError) as again:
        Parent("model", name)
    assert str(again.value) == said


def test_a_reward_model_is_looked_for_in_its_own_stage(here):
    with pytest.raises(UserError, match="did you mean 'demo/reward/final'"):
        model_folder("reward_model", "demo")


def test_models_are_found_here_and_on_the_hub(here):
    assert model_folder("model", "plain").resolve() == here / "plain"
    assert model_folder("model", str(here / "run/final")) == here / "run/final"
    assert model_folder("model", "facebook/opt-125m") is None


def test_a_sentencepiece_model_alone_is_no_tokenizer_that_is_read(here):
    (here / "plain" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (here / "plain" / "tokenizer.model").write_bytes(b"\x0a\x0b")
    with pytest.raises(UserError, match=r"^model: 'plain' has its tokenizer as tokenizer.model only, "
                                        "which is not read here; copy the tokenizer.json of the same model"):
        _ = Parent("model", "plain").tokenizer
