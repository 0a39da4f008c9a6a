"""What a run starts from: a folder or a hub name, resolved once; what is known of it, and what is wrong with
it.
"""

import hashlib
import json
import os

import pytest

from families import CONFIGS, EOS, PAD, policy
from tiny_models import mini_tokenizer, save_opt
from utils.config import PROJECT, UserError
from utils.data.layouts import TLDR_TEMPLATE
from utils.models.parents import Parent, task_of


@pytest.mark.parametrize("kind", ["relative to here", "absolute"])
def test_a_folder_goes_before_the_projects_and_before_the_hub(kind, tmp_path, monkeypatch):
    """`assets/opt-mini` could be a name on the hub, and the project has such a folder."""
    monkeypatch.chdir(tmp_path)
    assert Parent("model", "assets/opt-mini").path == str(PROJECT / "assets" / "opt-mini")
    folder = save_opt(tmp_path / "assets" / "opt-mini")
    parent = Parent("model", "assets/opt-mini" if kind == "relative to here" else str(folder))
    assert parent.folder.resolve() == folder and parent.config.hidden_size == parent.hidden_size == 32


def test_a_hub_name_is_passed_on_unchanged():
    parent = Parent("model", "facebook/opt-125m")
    assert (parent.path, parent.folder, parent.stage, parent.run) == ("facebook/opt-125m", None, None, None)
    assert parent.identity == {"name": "facebook/opt-125m"}


@pytest.mark.parametrize(("name", "message"), [
    ("outputs/nothing/final", "reward_model: no model folder at 'outputs/nothing/final'; "
                              "train that stage first"),
    ("outputs/nothing", "reward_model: no model folder at"), ("opt", "reward_model: no model folder at"),
    ("empty", "reward_model: '.*empty' is not a model folder .it has no config.json"),
])
def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"^{message}"):
        Parent("reward_model", name)


def test_parts_are_read_when_asked_for_and_once(tmp_path):
    parent = Parent("model", str(save_opt(tmp_path)))
    (tmp_path / "stage.json").write_text('{"stage": "sft"}')
    first = parent.config, parent.tokenizer, parent.stage, parent.identity
    for path in tmp_path.iterdir():
        path.unlink()
    again = parent.config, parent.tokenizer, parent.stage, parent.identity
    assert all(one is other for one, other in zip(first, again, strict=True))


def test_a_config_without_a_width_is_said(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    with pytest.raises(UserError, match="^model: the config of '.*' says no hidden_size"):
        Parent("model", str(tmp_path)).hidden_size  # noqa: B018  a property that raises
    gpt2 = CONFIGS["gpt2"]()  # which calls it n_embd
    gpt2.save_pretrained(tmp_path)
    assert Parent("model", str(tmp_path)).hidden_size == 16


@pytest.mark.parametrize("text", ["[1]", "{", "null"])
def test_a_broken_config_is_one_line(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="^model: '.*' cannot be loaded: .") as caught:
        Parent("model", str(tmp_path)).config  # noqa: B018
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    (tmp_path / "code.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(UserError, match="^model: '.*' cannot be loaded: "):
        Parent("model", str(tmp_path)).config  # noqa: B018
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------- tokenizer


def saved_tokenizer(folder, **special):
    """A model folder whose tokenizer has other special tokens."""
    tokenizer = mini_tokenizer()
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return Parent("model", str(folder))


def test_tokenizer_must_have_an_eos(tmp_path):
    with pytest.raises(UserError, match="^model: .*no EOS token, so no summary could ever end"):
        saved_tokenizer(tmp_path, eos_token=None).tokenizer  # noqa: B018


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    """transformers would make up an empty one."""
    policy("opt").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="^model: .* holds a model but no tokenizer files"):
        Parent("model", str(tmp_path)).tokenizer  # noqa: B018


# ---------------------------------------------------------------------------------------- what is known of it


def test_the_identity_is_the_checksum_of_every_weight_file(tmp_path):
    contents = {"model-00001.safetensors": b"one", "model-00002.safetensors": b"two"}
    for name, content in {**contents, "config.json": b"{}", "optimizer.pt": b"three"}.items():
        (tmp_path / name).write_bytes(content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    assert Parent("model", str(tmp_path)).identity == {"name": str(tmp_path), "sha256": sums}


def test_the_run_is_that_of_a_final_folder_whose_stage_has_finished(tmp_path):
    final = save_opt(tmp_path / "mine" / "final")
    assert Parent("model", str(final)).stage is None
    (tmp_path / "mine" / "summary.json").write_text("{}")
    assert Parent("model", str(final)).run is None  # a summary beside a folder that no stage wrote
    (final / "stage.json").write_text('{"stage": "sft"}')
    assert Parent("model", str(final)).run == ("sft", tmp_path / "mine")
    (tmp_path / "mine" / "summary.json").unlink()
    parent = Parent("model", str(final))
    assert parent.stage == {"stage": "sft"} and parent.run is None  # final/ alone was copied here


def test_the_task_is_template_vocabulary_and_ends():
    """The checksum is of the vocabulary, in whatever order it was made."""
    tokenizer = mini_tokenizer()
    task = task_of(tokenizer)
    words = json.dumps(sorted(tokenizer.get_vocab().items()))
    assert task == {"prompt_template": TLDR_TEMPLATE, "chat_template_sha256": None, "eos_token_id": EOS,
                    "pad_token_id": PAD, "tokenizer_sha256": hashlib.sha256(words.encode()).hexdigest()}
    tokenizer.add_tokens(["<new>"])
    assert task_of(tokenizer)["tokenizer_sha256"] != task["tokenizer_sha256"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "stage.json"])
@pytest.mark.parametrize("kind", ["a named pipe", "a device", "unreadable"])
def test_a_file_of_a_model_that_cannot_be_read_is_named(name, kind, tmp_path, monkeypatch):
    """safetensors calls weights without the right to read them "No such file or directory"."""
    folder = save_opt(tmp_path / "model")
    victim, opened = folder / name, os.open
    victim.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(victim)
    elif kind == "a device":
        victim.symlink_to("/dev/zero")
    else:
        victim.write_bytes(b"")

        def refuse(path, *more, **options):
            if os.fspath(path) == str(victim):
                raise PermissionError(13, "Permission denied", path)
            return opened(path, *more, **options)

        monkeypatch.setattr(os, "open", refuse)
    reason = "cannot be read (Permission denied)" if kind == "unreadable" else (
        f"is {kind}; a regular file is needed")
    with pytest.raises(UserError) as caught:
        Parent("model", str(folder))
    assert str(caught.value) == f"{victim}: {reason}"
