"""What changed between stop and resume is noticed; what only lies elsewhere is not a change."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import train_sft
from run_folders import furthest, metrics, weights
from tiny_models import save_opt
from utils.config import PROJECT, UserError, parse_config
from utils.runs import origins
from utils.runs.run import Run

WORDS = ("--max_steps 4 --logging_steps 1 --per_device_batch_size 4 --save_steps 2 --eval_steps 2 "
         "--eval_rows 2 --test_rows 2 --max_new_tokens 4 --report_to none --learning_rate 0.01")


class Stopped(Exception):
    """As by SIGKILL."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with base/, data, whole/ (a run) and out/ (one that has died in its third step)."""
    folder = tmp_path_factory.mktemp("stopped")
    save_opt(folder / "base", eos_logit=3.0)
    with gzip.open(PROJECT / "data" / "tldr_mini" / "actor_train.jsonl.gz", "rt") as rows:
        for name, count in (("rows", 6), ("held", 2), ("test", 2)):
            (folder / f"{name}.jsonl").write_text("".join(next(rows) for _ in range(count)))
    train_sft.main(config_of(folder, "whole"))
    log = Run.metrics

    def dies(self, step, values):
        log(self, step, values)
        if step == 3:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Run, "metrics", dies)
        train_sft.main(config_of(folder, "out"))
    return folder


def config_of(folder, out, extra="", default=PROJECT / "configs" / "tldr_mini" / "sft.yaml"):
    data = " ".join(f"--actor_{name}_data {folder}/{file}.jsonl" for name, file in
                    (("training", "rows"), ("validation", "held"), ("test", "test")))
    words = f"--model {folder}/base {data} --output_dir {folder / out} {WORDS} {extra}"
    return parse_config(train_sft.SFTStageConfig, default, words.split())


@pytest.fixture
def here(stopped, tmp_path):
    """A copy of all of it in another place."""
    shutil.copytree(stopped, tmp_path / "copy")
    return tmp_path / "copy"


def other_weights(path: Path):
    state = load_file(path)
    state = {name: weight + 1e-3 for name, weight in state.items()}
    save_file(state, path, {"format": "pt"})


def edit(path: Path, old: str, new: str):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHANGES = {
    "a row": (lambda here: edit(here / "rows.jsonl", "the", "teh"), "actor_training_data has other rows"),
    "a row less": (lambda here: (here / "rows.jsonl").write_text(
        "".join((here / "rows.jsonl").read_text().splitlines(keepends=True)[:5])),
        "actor_training_data has other rows"),
    "a row held out": (lambda here: edit(here / "held.jsonl", "the", "teh"),
                       "actor_validation_data has other rows"),
    "weights": (lambda here: other_weights(here / "base" / "model.safetensors"),
                "model: another model.safetensors"),
    "their config": (lambda here: edit(here / "base" / "config.json", '"dropout": 0.1', '"dropout": 0.2'),
                     "model: another config.json"),
    "tokenizer": (lambda here: edit(here / "base" / "tokenizer.json", '"Strip"', '"NFC"')
                  if '"Strip"' in (here / "base" / "tokenizer.json").read_text()
                  else edit(here / "base" / "tokenizer.json", '"normalizer": null',
                            '"normalizer": {"type": "NFC"}'), "model: another tokenizer"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_change_between_stop_and_resume_is_refused_and_changes_nothing(change, here):
    do, words = CHANGES[change]
    do(here)
    files = [path for path in (here / "out" / "checkpoints").rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in (*files, here / "out" / "metrics.jsonl")}
    line = f"^resume: not everything is as it was for .*step-2': .*{words}.*; put it back, .* --allow_changes"
    with pytest.raises(UserError, match=line):
        train_sft.main(config_of(here, "out", "--resume"))
    assert before == {path: path.read_bytes() for path in before} and not (here / "out" / "final").exists()


def test_changes_are_accepted_by_a_key_and_said(here):
    edit(here / "rows.jsonl", "the", "teh")
    other_weights(here / "base" / "model.safetensors")
    train_sft.main(config_of(here, "out", "--resume --allow_changes true"))
    line = ("with changes (allow_changes): actor_training_data has other rows; model: another "
            "model.safetensors")
    assert line in (here / "out" / "train.log").read_text()
    assert yaml.safe_load((here / "out" / "config.yaml").read_text())["allow_changes"] is False
    progress = json.loads((here / "out" / "checkpoints" / "step-4" / "progress.json").read_text())
    whole = json.loads((here / "whole" / "checkpoints" / "step-4" / "progress.json").read_text())
    assert progress["origins"]["data"] != whole["origins"]["data"], "the next resume is of the new rows"


def test_what_only_lies_elsewhere_is_no_change(here):
    """Data, model and run are in another folder than when the run was stopped, under other names."""
    whole = here / "whole"
    (here / "rows.jsonl").rename(here / "renamed.jsonl")
    (here / "out").rename(here / "other")
    train_sft.main(config_of(here, "other", f"--resume --actor_training_data {here}/renamed.jsonl"))
    assert metrics(here / "other") == metrics(whole)
    assert furthest(weights(here / "other" / "final"), weights(whole / "final")) == 0
    assert "allow_changes" not in (here / "other" / "train.log").read_text()


def test_a_run_without_a_checkpoint_begins_with_what_is_there(here):
    for name in ("checkpoints", "metrics.jsonl"):
        path = here / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    edit(here / "rows.jsonl", "the", "teh")
    train_sft.main(config_of(here, "out", "--resume"))
    assert (here / "out" / "final").exists()


# -------------------------------------------------------------------------------------- the configuration


def test_a_config_yaml_that_was_edited_is_refused(here):
    """By the command of the run, and by the edited file itself, which agree with each other but not with it.
    """
    config = here / "out" / "config.yaml"
    edit(config, "learning_rate: 0.01", "learning_rate: 0.02")
    with pytest.raises(UserError, match="^resume: 'learning_rate' is 0.01 here, but 0.02 in '.*config.yaml'"):
        train_sft.main(config_of(here, "out", "--resume"))
    with pytest.raises(UserError, match="^resume: 'learning_rate' is 0.02 here, but '.*step-2' was trained "
                                        "with 0.01; resume with the same configuration"):
        train_sft.main(config_of(here, "out", "--resume --learning_rate 0.02 --allow_changes true"))


def test_a_config_yaml_without_a_key_is_refused(here):
    config = here / "out" / "config.yaml"
    edit(config, "weight_decay: 0.0\n", "")
    with pytest.raises(UserError, match="^resume: 'weight_decay' is 0.5 here, but '.*step-2' was trained"):
        train_sft.main(config_of(here, "out", "--resume --weight_decay 0.5"))


def test_a_checkpoint_of_another_run_is_refused(here):
    """Another seed's, put under the same name."""
    train_sft.main(config_of(here, "other", "--seed 1"))
    shutil.rmtree(here / "out" / "checkpoints")
    shutil.copytree(here / "other" / "checkpoints", here / "out" / "checkpoints")
    with pytest.raises(UserError, match="^resume: 'seed' is 0 here, but '.*step-4' was trained with 1"):
        train_sft.main(config_of(here, "out", "--resume"))


# --------------------------------------------------------------------------------------- code and libraries

THEN = {"configuration": {"seed": 1}, "data": {"a": [["x", 1.0]]}, "models": {"model": {"m": "x"}},
        "tokenizer": "x", "files": {}, "code": {"utils/ppo.py": "x", "utils/old.py": "x"},
        "libraries": {"torch": "2.0"}}


@pytest.mark.parametrize(("now", "said"), [
    ({}, None),
    ({"code": {"utils/ppo.py": "y", "utils/old.py": "x"}}, "scripts/utils/ppo.py has changed"),
    ({"code": {"utils/ppo.py": "x", "utils/new.py": "x"}},
     "scripts/utils/new.py has changed; scripts/utils/old.py has changed"),
    ({"libraries": {"torch": "2.1"}}, "torch was 2.0, is 2.1"),
    ({"data": {"a": [["x", 2.0]]}}, "a has other rows"),
    ({"data": {}}, "a has other rows"),
    ({"data": {"a": [["x", 1.0]], "b": []}}, "b has other rows"),
    ({"files": {"gold_rules": "x"}}, "gold_rules: another file"),
    ({"models": {"model": {"name": "a/b", "commit": "c"}}},
     "model: another commit; model: another m; model: another name"),
    ({"code": {}, "tokenizer": "y", "libraries": {}, "data": {}},
     "a has other rows; model: another tokenizer; scripts/utils/old.py has changed; scripts/utils/ppo.py has "
     "changed; and 1 more"),
])
def test_what_differs_is_named(now, said):
    now = THEN | now
    line = origins.changes_accepted(THEN, now, Path("step-2"), allow=True)
    assert line == (said and f"going on from 'step-2' with changes (allow_changes): {said}")
    if said is not None:
        with pytest.raises(UserError) as refused:
            origins.changes_accepted(THEN, now, Path("step-2"), allow=False)
        assert f": {said}; put it back" in str(refused.value)


def test_a_key_that_a_later_version_has_is_not_compared():
    now = THEN | {"configuration": {"seed": 1, "new_key": 3}}
    assert origins.changes_accepted(THEN, now, Path("step-2"), allow=False) is None


def test_every_key_that_names_a_file_is_compared_by_content_and_every_other_by_value(here):
    """So that no key is in neither."""
    found = json.loads((here / "out" / "checkpoints" / "step-2" / "progress.json").read_text())["origins"]
    keys = set(yaml.safe_load((here / "out" / "config.yaml").read_text()))
    assert set(found["configuration"]) == keys - {*origins.FREE, *origins.BY_CONTENT}
    assert set(found["data"]) == keys & set(origins.DATA) and set(found["models"]) == {"model"}
    assert {"train_sft.py", "utils/ppo.py", "utils/data/rows.py"} <= set(found["code"])
    assert "train_ppo.py" not in found["code"]
