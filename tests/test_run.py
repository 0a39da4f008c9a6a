"""The run directory: what is refused, what is written, and what a later stage can rely on."""

import hashlib
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from families import policy

from utils.config import StageConfig, UserError, read_yaml
from utils.models import load_policy, load_tokenizer
from utils.run import Run, check_task, refuse_used_folder, stage_summaries


@dataclass
class Toy(StageConfig):
    """A stage's configuration."""


def start(folder, resume=False, stage="sft", notes=()):
    config = Toy(output_dir=str(folder), resume=resume, seed=7)
    refuse_used_folder(config)
    return Run(config, stage, list(notes))


@pytest.fixture
def tokenizer():
    return load_tokenizer("assets/opt-mini")


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------- opening a folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_opened_and_holds_the_configuration(exists, tmp_path):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    run = start(folder)
    assert contents(folder) == ["config.yaml", "plots", "train.log"]
    assert read_yaml(folder / "config.yaml")[0] == {**Toy().__dict__, "output_dir": str(folder), "seed": 7}
    assert run.folder == folder


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="output_dir: .* is in use; go on with --resume"):
        start(tmp_path)
    assert contents(tmp_path) == ["mine.txt"] and (tmp_path / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="is in use"):
        start(tmp_path / "mine.txt")


@pytest.mark.parametrize("stray", [None, "mine.txt"])
def test_resume_needs_a_run(stray, tmp_path):
    if stray:
        (tmp_path / stray).write_text("keep")
    with pytest.raises(UserError, match="nothing to resume"):
        start(tmp_path, resume=True)
    with pytest.raises(UserError, match="nothing to resume"):
        start(tmp_path / "missing", resume=True)
    assert contents(tmp_path) == ([stray] if stray else [])


def test_resume_goes_on_with_what_is_there(tmp_path):
    first = start(tmp_path)
    first.metrics(1, {"a": 1.0})
    first.say("before")
    second = start(tmp_path, resume=True, notes=["dropped"])
    second.metrics(2, {"a": 2.0})
    second.say("after")
    assert second.read_metrics() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    notes = ["before", "dropped", "after"]
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == notes


def test_a_finished_run_is_not_resumed(tmp_path):
    start(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match=r"is finished \(it has final/\)"):
        start(tmp_path, resume=True)


def test_other_ranks_write_nothing(tmp_path, tokenizer, monkeypatch):
    start(tmp_path)
    monkeypatch.setattr("utils.run.world", lambda: SimpleNamespace(is_main_process=False))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = Run(Toy(output_dir=str(tmp_path)), "sft", ["a note"])
    other.say("hello")
    other.metrics(1, {"a": 1})
    other.samples([{"a": 1}])
    other.finish({"a": 1})
    other.save_final(policy("opt"), tokenizer, {}, {})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ------------------------------------------------------------------------------------------------- records


def test_metrics_and_samples_append_one_json_object_a_line(tmp_path):
    run = start(tmp_path)
    assert run.read_metrics() == []
    sent = []
    run.use_tracker(type("Tracker", (), {"log": lambda self, values, step: sent.append((step, values))})())
    run.metrics(1, {"loss": 0.5, "note": "é"})
    run.metrics(2, {"loss": 0.25})
    run.samples([{"prompt": "a\nb"}])
    run.samples([{"prompt": "c"}, {"prompt": "☕"}])
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "loss": 0.5, "note": "é"}', '{"step": 2, "loss": 0.25}'
    ]
    samples = [json.loads(line)["prompt"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert samples == ["a\nb", "c", "☕"]
    assert sent == [(1, {"loss": 0.5}), (2, {"loss": 0.25})], "a tracker takes numbers only"


def test_summary_is_flat_and_found_by_its_neighbours(tmp_path):
    for stage in ("sft", "ppo"):
        start(tmp_path / stage, stage=stage).finish({"score": 1 / 3, "note": None, "rows": 5})
    found = stage_summaries(tmp_path)
    assert list(found) == ["sft", "ppo"]
    assert set(found["sft"]) == {"score", "note", "rows", "peak_memory_mb", "seed"}
    assert found["sft"]["score"] == 0.333333 and found["sft"]["rows"] == 5 and found["sft"]["seed"] == 7
    assert found["sft"]["peak_memory_mb"] > 1
    assert not list((tmp_path / "sft").glob("*.tmp"))


# --------------------------------------------------------------------------------------------------- final


def test_final_holds_model_tokenizer_and_where_they_come_from(tmp_path, tokenizer):
    parent, model = policy("opt", seed=1), policy("opt", seed=2)
    parent.save_pretrained(tmp_path / "parent")
    run = start(tmp_path / "run")
    run.save_final(model, tokenizer, {"model": str(tmp_path / "parent"), "hub": "facebook/opt-125m"}, {"score": 0.5})
    final = tmp_path / "run" / "final"
    stage = json.loads((final / "stage.json").read_text())
    digest = hashlib.sha256((tmp_path / "parent" / "model.safetensors").read_bytes()).hexdigest()
    assert stage["parents"] == {
        "model": {"name": str(tmp_path / "parent"), "sha256": {"model.safetensors": digest}},
        "hub": {"name": "facebook/opt-125m"},
    }
    assert (stage["stage"], stage["seed"], stage["score"]) == ("sft", 7, 0.5)
    assert (stage["eos_token_id"], stage["pad_token_id"]) == (2, 1)
    assert stage["prompt_template"].endswith("TL;DR:") and len(stage["tokenizer_sha256"]) == 64 and stage["commit"]
    assert load_tokenizer(str(final)).get_vocab() == tokenizer.get_vocab()
    for name, weight in load_policy(str(final)).named_parameters():
        assert torch.equal(weight, model.get_parameter(name))


def test_a_machine_without_git_has_an_unknown_commit(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    start(tmp_path / "run").save_final(policy("opt"), tokenizer, {}, {})
    assert json.loads((tmp_path / "run" / "final" / "stage.json").read_text())["commit"] == "unknown"


def test_final_appears_whole_or_not_at_all(tmp_path, tokenizer):
    run, model = start(tmp_path), policy("opt")

    class Interrupted(Exception):
        pass

    class Fails:
        def save_pretrained(self, folder):
            assert folder.name != "final" and not (tmp_path / "final").exists()
            raise Interrupted

    with pytest.raises(Interrupted):
        run.save_final(model, Fails(), {}, {})
    assert not (tmp_path / "final").exists()
    (tmp_path / "final.tmp" / "leftover").write_text("of the killed run")
    run.save_final(model, tokenizer, {}, {})
    assert not (tmp_path / "final.tmp").exists() and not (tmp_path / "final" / "leftover").exists()


@pytest.mark.parametrize("item", ["tokenizer_sha256", "eos_token_id", "pad_token_id", "prompt_template"])
def test_parents_of_another_task_are_refused(item, tmp_path, tokenizer):
    start(tmp_path).save_final(policy("opt"), tokenizer, {}, {})
    final = tmp_path / "final"
    check_task(tokenizer, {"model": str(final), "reward_model": str(final)})
    stage = json.loads((final / "stage.json").read_text())
    (final / "stage.json").write_text(json.dumps({**stage, item: "other"}))
    with pytest.raises(UserError, match=f"^reward_model: .* another {item.replace('_', ' ')} .'other' there"):
        check_task(tokenizer, {"reward_model": str(final)})


def test_another_vocabulary_is_another_task_and_hub_models_are_not_known(tmp_path, tokenizer):
    start(tmp_path).save_final(policy("opt"), tokenizer, {}, {})
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="^model: .* another tokenizer sha256"):
        check_task(tokenizer, {"model": str(tmp_path / "final")})
    check_task(tokenizer, {"model": "facebook/opt-125m"})
