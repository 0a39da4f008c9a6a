"""The run directory: what is refused, what is written, and what a later stage can rely on."""

import hashlib
import json
import math
import os
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from families import policy, scalar_model
from tiny_models import mini_tokenizer, save_opt
from toy_runs import Toy, contents, report_of, start
from utils.config import UserError, save_config
from utils.models.loading import load_policy
from utils.models.parents import Parent, check_task
from utils.runs.ending import print_stages, stage_folders
from utils.runs.run import Run, refuse_impossible, refuse_used_folder
from utils.yaml_files import read_yaml


@pytest.fixture
def tokenizer():
    return mini_tokenizer()


# ----------------------------------------------------------------------------------------- opening a folder


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_folder_is_opened_and_holds_the_configuration(exists, tmp_path):
    folder = tmp_path / "deep" / "run"
    if exists:
        folder.mkdir(parents=True)
    run = start(folder)
    assert contents(folder) == ["config.yaml", "data.json", "plots", "run.lock", "train.log"]
    assert read_yaml(folder / "config.yaml")[0] == {**Toy().__dict__, "output_dir": str(folder), "seed": 7}
    assert run.folder == folder


def test_a_folder_in_use_is_refused_and_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="output_dir: .* is in use; it holds no run to go on with; name"):
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
    with pytest.raises(UserError, match="leave --resume out" if stray is None else "name a new --output_dir"):
        start(tmp_path, resume=True)
    assert contents(tmp_path) == ([stray] if stray else [])


def test_resume_goes_on_with_what_is_there(tmp_path):
    first = start(tmp_path)
    first.metrics(1, {"a": 1.0})
    first.log("before")
    second = start(tmp_path, resume=True, notes=["dropped"])
    second.metrics(2, {"a": 2.0})
    second.log("after")
    assert second.read_metrics() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    notes = ["before", "dropped", "after"]
    assert [line.split()[-1] for line in (tmp_path / "train.log").read_text().splitlines()] == notes


def test_another_configuration_is_not_resumed(tmp_path):
    start(tmp_path)
    with pytest.raises(UserError, match="^resume: 'learning_rate' is 0.5 here, but None in '.*config.yaml'"):
        refuse_used_folder(Toy(output_dir=str(tmp_path), resume=True, seed=7, learning_rate=0.5))
    elsewhere = f"{tmp_path}/../{tmp_path.name}"
    refuse_used_folder(Toy(output_dir=elsewhere, resume=True, seed=7, report_to=["none"], save_total_limit=9))


def test_the_saved_configuration_starts_a_run(tmp_path):
    """`--config run/config.yaml --output_dir new` must not ask to resume."""
    save_config(Toy(resume=True), tmp_path / "config.yaml")
    assert read_yaml(tmp_path / "config.yaml")[0]["resume"] is False


def test_a_run_that_ended_before_its_first_step_does_not_block_the_next(tmp_path):
    start(tmp_path).metrics(0, {"eval/score": 1.0})
    (tmp_path / "checkpoints" / "best-0").mkdir(parents=True)
    start(tmp_path)
    (tmp_path / "checkpoints" / "update-2").mkdir()
    with pytest.raises(UserError, match="is in use"):
        start(tmp_path)
    (tmp_path / "checkpoints" / "update-2").rmdir()
    start(tmp_path).metrics(1, {"loss": 1.0})
    with pytest.raises(UserError, match="is in use"):
        start(tmp_path)


def test_a_run_that_starts_over_does_not_repeat_rows_of_the_one_before(tmp_path):
    start(tmp_path).metrics(0, {"eval/score": 1.0})
    run = start(tmp_path)
    run.metrics(0, {"eval/score": 2.0})
    assert run.read_metrics() == [{"step": 0, "eval/score": 2.0}]


@pytest.mark.parametrize("stray", ["checkpoints/update-2/progress.json", "metrics.jsonl"])
def test_the_advice_for_a_lost_configuration_is_no_circle(stray, tmp_path):
    """Neither with nor without --resume is the other one advised."""
    start(tmp_path)
    path = tmp_path / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    (tmp_path / "config.yaml").unlink()
    for resume in (False, True):
        with pytest.raises(UserError, match="name a new --output_dir$") as refused:
            start(tmp_path, resume=resume)
        assert "--resume" not in str(refused.value)


@pytest.mark.parametrize("moment", ["config.tmp", "config.yaml", "data.tmp"])
def test_a_run_that_was_killed_while_it_opened_its_folder_does_not_block_the_next(
        moment, tmp_path, monkeypatch):
    """The folder is either as good as new or can be resumed, whichever file is being written."""
    replace = os.replace

    def killed(source, target):
        if moment.endswith(".yaml"):
            replace(source, target)
        if moment in (Path(source).name, Path(target).name):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "replace", killed)
        start(tmp_path)
    assert moment in contents(tmp_path)
    start(tmp_path, resume=moment != "config.tmp")
    assert "plots" in contents(tmp_path)


@pytest.mark.parametrize("stray", ["mine.txt", "final", "summary.json"])
def test_what_a_run_does_not_open_with_is_in_use(stray, tmp_path):
    start(tmp_path)
    (tmp_path / stray).mkdir()
    with pytest.raises(UserError, match="is in use"):
        start(tmp_path)


def test_a_home_of_nobody_is_refused():
    with pytest.raises(UserError, match="^output_dir: '~no-such-user/run' cannot be used"):
        start("~no-such-user/run")


@pytest.mark.parametrize("place", ["file.txt/below", "n" * 300])
def test_an_output_folder_that_cannot_be_is_refused(place, tmp_path):
    (tmp_path / "file.txt").touch()
    with pytest.raises(UserError, match="^output_dir: .* cannot be"):
        start(tmp_path / place)
    with pytest.raises(UserError, match="^output_dir: '/proc/no/such' cannot be written to"):
        start("/proc/no/such")


@pytest.mark.parametrize("tracker", ["foo", "Tensorboard", ""])
def test_a_tracker_that_is_not_there_is_refused(tracker, tmp_path):
    message = f"^report_to: '{tracker}' is not installed, or no tracker; here are: .*tensorboard"
    with pytest.raises(UserError, match=message):
        refuse_impossible(Toy(output_dir=str(tmp_path / "run"), report_to=["tensorboard", tracker]))
    refuse_impossible(Toy(output_dir=str(tmp_path / "run"), report_to=["tensorboard", "none"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_half_precision_needs_a_gpu(tmp_path):
    with pytest.raises(UserError, match="^mixed_precision: fp16 needs a GPU"):
        refuse_impossible(Toy(output_dir=str(tmp_path / "run"), mixed_precision="fp16"))
    refuse_impossible(Toy(output_dir=str(tmp_path / "run"), mixed_precision="bf16"))


def test_the_line_that_says_how_to_go_on_can_be_pasted(tmp_path, monkeypatch, capsys):
    run = start(tmp_path / "my run")
    run.stop_signal = 2
    words = ["scripts/train_sft.py", "--output_dir", str(tmp_path / "my run")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        run.stopped()
    said = capsys.readouterr().out.strip().split("go on with: ")[1]
    assert shlex.split(said) == [sys.executable, *words, "--resume"]


@pytest.mark.parametrize(("environment", "nvme", "message"), [
    ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, False,
     "go on with: .* -m torch.distributed.run --nproc_per_node 2 train.py --resume"),
    ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False,
     "go on with the same command on each node, and --resume"),
    ({}, True, "optimizer on NVMe cannot go on .*: start a new one"),
])
def test_what_a_stopped_run_says_is_true(environment, nvme, message, tmp_path, monkeypatch, capsys):
    run = start(tmp_path)
    run.stop_signal = 15
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("utils.runs.run.resumable", lambda: not nvme)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        run.stopped()
    assert stopped.value.code == 143 and re.search(f"stopped; .*{message}$", capsys.readouterr().out.strip())


def test_a_clock_that_jumps_back_makes_no_negative_seconds(tmp_path, monkeypatch):
    run = start(tmp_path)
    monkeypatch.setattr("time.time", lambda: 0.0)
    run.write_summary({})
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] >= 0


def test_a_finished_run_is_not_resumed(tmp_path):
    start(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(UserError, match=r"is finished \(it has final/\)"):
        start(tmp_path, resume=True)


def test_other_ranks_write_nothing(tmp_path, tokenizer, monkeypatch):
    start(tmp_path)
    for module in ("utils.runs.run", "utils.distributed", "utils.zero"):
        monkeypatch.setattr(f"{module}.world", lambda: SimpleNamespace(is_main_process=False))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    other = Run(Toy(output_dir=str(tmp_path)), "sft", report_of("a note"))
    other.log("hello")
    other.metrics(1, {"a": 1})
    other.samples(1, "test", [{"a": 1}])
    other.rewind_samples(0)
    other.write_summary({"a": 1})
    other.save_final(policy("opt"), tokenizer, [], {}, "card")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ------------------------------------------------------------------------------------------------- records


class Tracker:
    """An accelerator with one tracker, which keeps what it is sent."""

    name = "tracker"

    def __init__(self):
        self.trackers, self.log_with, self.sent = [self], [], []

    def log(self, values, step):
        self.sent.append((step, values))

    def finish(self):
        self.sent.append("end")

    def end_training(self):
        assert not self.trackers


class Broken(Tracker):
    """A tracker that cannot write."""

    name = "broken"

    def log(self, values, step):
        raise OSError(27, "File too large")

    finish = log


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path, capsys):
    run, tracker = start(tmp_path), Tracker()
    tracker.trackers.append(Broken())
    run.use_trackers(tracker)
    run.metrics(1, {"a": 1.0})
    run.metrics(2, {"a": 1.0})
    run.end_tracking()
    [said] = [line for line in capsys.readouterr().out.splitlines() if "stopped" in line]
    assert said.startswith("broken stopped ([Errno 27] File too large); training goes on")
    assert len(run.read_metrics()) == 2 and tracker.sent == [(1, {"a": 1.0}), (2, {"a": 1.0}), "end"]


def test_metrics_and_samples_append_one_json_object_a_line(tmp_path):
    run, tracker = start(tmp_path), Tracker()
    assert run.read_metrics() == []
    run.use_trackers(tracker)
    run.metrics(1, {"loss": 0.5, "note": "é"})
    run.metrics(2, {"loss": 0.25})
    run.samples(2, "validation", [{"prompt": "a\nb"}, {"prompt": "☕"}])
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "loss": 0.5, "note": "é"}', '{"step": 2, "loss": 0.25}'
    ]
    assert samples_of(tmp_path) == [{"step": 2, "posts": "validation", "prompt": "a\nb"},
                                    {"step": 2, "posts": "validation", "prompt": "☕"}]
    *numbers, (step, text) = tracker.sent
    assert numbers == [(1, {"loss": 0.5}), (2, {"loss": 0.25})], "of metrics a tracker takes numbers only"
    assert step == 2 and re.fullmatch(r"(?s)\*\*prompt\*\*: a\nb\n\n---\n\n\*\*prompt\*\*: ☕",
                                      text["samples/validation"])


def samples_of(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_samples_after_the_checkpoint_are_written_again(tmp_path):
    """By a resumed run, which also ends again; a run that starts anew has none of those before."""
    run = start(tmp_path)
    for step, posts in ((0, "validation"), (2, "validation"), (4, "validation"), (4, "test")):
        run.samples(step, posts, [{"prompt": f"{step}"}])
    run.rewind_samples(4)
    assert [row["step"] for row in samples_of(tmp_path)] == [0, 2, 4]
    run.rewind_samples(2)
    assert [row["step"] for row in samples_of(tmp_path)] == [0, 2]
    start(tmp_path, resume=True).rewind_samples(-1)
    assert not (tmp_path / "samples.jsonl").exists()
    run.samples(0, "validation", [{"prompt": "of a run that ended before its first step"}])
    start(tmp_path)
    assert not (tmp_path / "samples.jsonl").exists()


def test_summary_is_flat(tmp_path):
    start(tmp_path).write_summary({"score": 1 / 3, "note": None, "rows": 5})
    found = json.loads((tmp_path / "summary.json").read_text())
    assert set(found) == {"score", "note", "rows", "seconds", "peak_memory_mb", "seed"}
    assert found["score"] == 0.333333 and found["rows"] == 5 and found["seed"] == 7
    assert found["peak_memory_mb"] > 1
    assert not list(tmp_path.glob("*.tmp"))


def finished(folder, stage, tokenizer):
    run = start(folder, stage=stage)
    run.write_summary({})
    run.save_final(policy("opt"), tokenizer, [], {}, "card")
    return run


def test_the_table_shows_the_parents_and_the_run_itself_wherever_they_lie(tmp_path, tokenizer):
    """Not the neighbours: `--output_dir .../ppo_seed1` would print the figures of `.../ppo`."""
    finished(tmp_path / "mine" / "reward", "reward", tokenizer)
    finished(tmp_path / "mine" / "sft", "sft", tokenizer)
    finished(tmp_path / "else" / "sft_wide", "sft", tokenizer)
    finished(tmp_path / "mine" / "ppo", "ppo", tokenizer)
    run = finished(tmp_path / "mine" / "ppo_seed1", "ppo", tokenizer)
    parents = [Parent("model", str(tmp_path / "else" / "sft_wide" / "final")),
               Parent("reward_model", str(tmp_path / "mine" / "reward" / "final"))]
    assert stage_folders(run, parents) == {
        "sft": tmp_path / "else" / "sft_wide", "reward": tmp_path / "mine" / "reward",
        "ppo": tmp_path / "mine" / "ppo_seed1"}
    untrained = [Parent("model", name) for name in ("facebook/opt-125m", "assets/opt-mini")]
    assert list(stage_folders(run, untrained)) == ["ppo"]


def test_the_table_prints_every_path_on_one_line(tmp_path, tokenizer, capsys):
    deep = tmp_path / ("long" * 30)
    run = start(deep, stage="sft")
    run.started -= 61.0
    run.write_summary({"base_rouge_avg": 0.25, "rouge_avg": 0.75})
    (deep / "plots" / "sft.png").touch()
    print_stages(stage_folders(run, []))
    printed = capsys.readouterr().out
    assert re.search(r" 0\.250 .* 0\.750 ", printed) and re.search("^seconds: sft 6[1-9]$", printed, re.M)
    assert printed.splitlines()[-2:] == [f"sft: {deep}", f"sft: {deep / 'plots' / 'sft.png'}"]


def test_the_table_keeps_units_in_brackets_and_is_printed_once(tmp_path, monkeypatch, capsys):
    run = start(tmp_path, stage="ppo")
    run.write_summary({"score_before": 0.0, "score_after": 1.0, "kl": 2.5})
    print_stages(stage_folders(run, []))
    assert "[nats a summary]" in capsys.readouterr().out
    monkeypatch.setattr("utils.runs.ending.world", lambda: SimpleNamespace(is_main_process=False))
    print_stages(stage_folders(run, []))
    assert capsys.readouterr().out == ""


def test_what_json_cannot_hold_becomes_null(tmp_path):
    run, tracker = start(tmp_path), Tracker()
    run.use_trackers(tracker)
    run.metrics(1, {"a": math.nan, "b": -math.inf, "c": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": null, "b": null, "c": 1.0}\n'
    assert tracker.sent == [(1, {"c": 1.0})]


def test_a_line_that_was_left_half_written_costs_no_other(tmp_path):
    start(tmp_path).metrics(1, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "a"')
    assert start(tmp_path, resume=True).read_metrics() == [{"step": 1, "a": 1.0}]
    again = start(tmp_path, resume=True)
    again.metrics(2, {"a": 2.0})
    assert again.read_metrics() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]


BROKEN_LINES = [b"3", b"[]", b"null", b'"text"', b"{", b"{}", b'{"step": "two"}', b'{"step": true}',
                b"\xff\xfe", b'{"step": 1, "a": "\xff"}', b"[" * 100_000, b"", b"\x00"]


@pytest.mark.parametrize("line", BROKEN_LINES, ids=lambda line: repr(line[:20]))
def test_a_line_that_is_no_row_is_left_out_and_said(line, tmp_path, capsys):
    start(tmp_path).metrics(1, {"a": 1.0})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    run = start(tmp_path, resume=True)
    run.rewind(run.metrics_bytes())
    run.metrics(2, {"a": 2.0})
    assert run.read_metrics() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 2.0}]
    assert "metrics.jsonl': 1 lines are no rows of metrics" in capsys.readouterr().out


@pytest.mark.parametrize("left", [0, 1, 12, None])
def test_lost_metrics_are_said_at_a_resume(left, tmp_path, capsys):
    first = start(tmp_path)
    first.metrics(1, {"a": 1.0})
    first.metrics(2, {"a": 2.0})
    size = first.metrics_bytes()
    if left is None:
        (tmp_path / "metrics.jsonl").unlink()
    else:
        os.truncate(tmp_path / "metrics.jsonl", left)
    run = start(tmp_path, resume=True)
    capsys.readouterr()
    run.rewind(size)
    said = capsys.readouterr().out
    assert f"of the {size} bytes that were logged before this checkpoint: the rest is lost" in said
    run.metrics(3, {"a": 3.0})
    assert run.read_metrics() == [{"step": 3, "a": 3.0}]


def test_metrics_that_are_all_there_are_not_mentioned(tmp_path, capsys):
    run = start(tmp_path)
    run.metrics(1, {"a": 1.0})
    size = run.metrics_bytes()
    run.metrics(2, {"a": 2.0})
    capsys.readouterr()
    run.rewind(size)
    assert run.read_metrics() == [{"step": 1, "a": 1.0}] and capsys.readouterr().out == ""


def test_a_row_that_the_rewind_cuts_is_ended(tmp_path):
    run = start(tmp_path)
    run.metrics(1, {"a": 1.0})
    run.metrics(2, {"a": 2.0})
    run.rewind(run.metrics_bytes() - 5)
    run.metrics(2, {"a": 3.0})
    assert run.read_metrics() == [{"step": 1, "a": 1.0}, {"step": 2, "a": 3.0}]


# --------------------------------------------------------------------------------------------------- final


def test_final_holds_model_tokenizer_and_where_they_come_from(tmp_path, tokenizer):
    parent, model = policy("opt", seed=1), policy("opt", seed=2)
    parent.save_pretrained(tmp_path / "parent")
    run = start(tmp_path / "run")
    parents = [Parent("model", str(tmp_path / "parent")), Parent("reward_model", "facebook/opt-125m")]
    run.save_final(model, tokenizer, parents, {"score": 0.5}, "card")
    final = tmp_path / "run" / "final"
    stage = json.loads((final / "stage.json").read_text())
    digest = hashlib.sha256((tmp_path / "parent" / "model.safetensors").read_bytes()).hexdigest()
    assert stage["parents"] == {
        "model": {"name": str(tmp_path / "parent"), "sha256": {"model.safetensors": digest}},
        "reward_model": {"name": "facebook/opt-125m"},
    }
    assert (stage["stage"], stage["seed"], stage["score"]) == ("sft", 7, 0.5)
    assert (stage["eos_token_id"], stage["pad_token_id"]) == (2, 1)
    assert stage["prompt_template"].endswith("TL;DR:") and stage["commit"]
    assert len(stage["tokenizer_sha256"]) == 64
    saved = Parent("model", str(final))
    assert saved.tokenizer.get_vocab() == tokenizer.get_vocab()
    for name, weight in load_policy(saved).named_parameters():
        assert torch.equal(weight, model.get_parameter(name))


def test_a_machine_without_git_has_an_unknown_commit(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    start(tmp_path / "run").save_final(policy("opt"), tokenizer, [], {}, "card")
    assert json.loads((tmp_path / "run" / "final" / "stage.json").read_text())["commit"] == "unknown"


def test_final_appears_whole_or_not_at_all(tmp_path, tokenizer):
    run, model = start(tmp_path), policy("opt")

    class Interrupted(Exception):
        pass

    class Fails:
        bos_token_id = eos_token_id = pad_token_id = None

        def save_pretrained(self, folder):
            assert folder.name != "final" and not (tmp_path / "final").exists()
            raise Interrupted

    with pytest.raises(Interrupted):
        run.save_final(model, Fails(), [], {}, "card")
    assert not (tmp_path / "final").exists()
    (tmp_path / "final.tmp" / "leftover").write_text("of the killed run")
    run.save_final(model, tokenizer, [], {}, "card")
    assert not (tmp_path / "final.tmp").exists() and not (tmp_path / "final" / "leftover").exists()


def base_and(key, folder, tmp_path) -> list[Parent]:
    """A base model that no stage has trained, and one of PPO's other parents."""
    return [Parent("model", str(save_opt(tmp_path / "base"))), Parent(key, str(folder))]


@pytest.mark.parametrize("item", ["tokenizer_sha256", "eos_token_id", "pad_token_id", "prompt_template"])
def test_parents_of_another_task_are_refused(item, tmp_path, tokenizer):
    start(tmp_path / "run", stage="reward").save_final(scalar_model("opt"), tokenizer, [], {}, "card")
    path = tmp_path / "run" / "final" / "stage.json"
    check_task(*base_and("reward_model", path.parent, tmp_path))
    path.write_text(json.dumps({**json.loads(path.read_text()), item: "other"}))
    with pytest.raises(UserError, match=f"^reward_model: .* another {item.replace('_', ' ')} .'other' there"):
        check_task(*base_and("reward_model", path.parent, tmp_path))


def test_another_vocabulary_is_another_task_and_other_models_are_not_known(tmp_path, tokenizer):
    start(tmp_path / "run").save_final(policy("opt"), tokenizer, [], {}, "card")
    final = tmp_path / "run" / "final"
    check_task(Parent("model", str(final)))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(final)
    with pytest.raises(UserError, match="^model: .* another tokenizer sha256"):
        check_task(Parent("model", str(final)))
    (final / "stage.json").unlink()
    check_task(Parent("model", str(final)))


@pytest.mark.parametrize(("field", "stage", "fits"), [
    ("model", "sft", True), ("model", "ppo", True), ("model", "reward", False),
    ("reward_model", "reward", True), ("reward_model", "sft", False), ("reward_model", "ppo", False),
])
def test_a_parent_must_come_from_the_right_stage(field, stage, fits, tmp_path, tokenizer):
    start(tmp_path / "run", stage=stage).save_final(policy("opt"), tokenizer, [], {}, "card")
    parents = base_and(field, tmp_path / "run" / "final", tmp_path)
    if fits:
        check_task(*parents)
    else:
        with pytest.raises(UserError, match=f"^{field}: .* comes from the stage '{stage}'; needed is"):
            check_task(*parents)


def test_a_reward_model_from_elsewhere_must_have_our_tokenizer(tmp_path, tokenizer):
    scalar_model("opt").save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    check_task(*base_and("reward_model", tmp_path / "theirs", tmp_path))
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "theirs")
    with pytest.raises(UserError, match="^reward_model: .* another tokenizer sha256"):
        check_task(*base_and("reward_model", tmp_path / "theirs", tmp_path))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"sft"'])
def test_a_broken_stage_file_is_said(text, tmp_path):
    folder = save_opt(tmp_path)
    (folder / "stage.json").write_text(text)
    with pytest.raises(UserError, match=r"^model: .*stage.json' is no JSON object"):
        check_task(Parent("model", str(folder)))
