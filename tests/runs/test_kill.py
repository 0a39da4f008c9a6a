"""Runs that are killed without warning, and go on as if nothing had been; what the kill test would notice."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import kill_test
from file_operations import HOW, KILLED, POWER, TORN, Operation
from kill_test import Kill

KILLS = 32  # of each stage
# what is left to go on from must be all of this at least once
STATES = {"no configuration", "no checkpoint", "a checkpoint", "a checkpoint that is being written",
          "a checkpoint that is being removed", "metrics of later steps", "final/ in part", "final/",
          "then a checkpoint"}
BEST = {"best weights of earlier steps", "best weights of later steps"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", list(kill_test.STAGES))
def test_killed_runs_end_like_the_undisturbed_one(stage, tmp_path):
    """At operations spread over the whole run. A process of its own: forks want no threads."""
    words = ["--stage", stage, "--kills", str(KILLS), "--output", str(tmp_path / "kills.json")]
    done = subprocess.run([sys.executable, kill_test.__file__, *words], capture_output=True, text=True,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "kills.json").read_text())[stage]
    assert [row["differs"] for row in rows] == [[]] * KILLS
    passed = {state for row in rows for state in row["left"]}
    assert passed >= STATES | (BEST if stage != "reward" else set()), "branches that no kill has tried"
    assert {row["how"] for row in rows} == set(HOW)


# ------------------------------------------------------------------------------ would it notice a difference?


def left_by_a_run(folder, loss=1.0, seconds=1.0, weights="abc", best=3, name="update-4", said=""):
    for below in ("final", f"checkpoints/{name}"):
        (folder / below).mkdir(parents=True)
    (folder / "final" / "model.safetensors").write_text(weights)
    row = {"step": 1, "loss": loss, "time/update": seconds}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("")
    summary = {"best_step": best} | dict.fromkeys(["seconds", "peak_memory_mb", "tokens_per_second"], seconds)
    (folder / "summary.json").write_text(json.dumps(summary))
    folder.with_name(f"{folder.name}.log").write_text(said)


@pytest.mark.parametrize(("left", "differs"), [
    ({}, []),
    ({"seconds": 2.0}, []),
    ({"loss": 1.0000000000000002}, ["metrics.jsonl"]),
    ({"weights": "abd"}, ["final"]),
    ({"best": 2}, ["summary.json"]),
    ({"name": "update-4.old.tmp"}, ["names"]),
    ({"said": "Traceback (most recent call last)"}, ["traceback"]),
])
def test_a_difference_is_noticed(left, differs, tmp_path, monkeypatch):
    """The run is killed before its first file, and the one that is started again leaves `left`."""
    left_by_a_run(tmp_path / "undisturbed")
    asked = []

    def run(stage, inputs, out, more=(), dies_at=None, how=KILLED):
        asked.append((list(more), dies_at, how))
        out.mkdir(exist_ok=True)
        if len(asked) == 1:
            return -9
        out.rmdir()
        left_by_a_run(out, **left)
        return 0

    monkeypatch.setattr(kill_test, "run", run)
    expected = kill_test.outcome(tmp_path / "undisturbed")
    row = kill_test.killed("sft", None, tmp_path / "run", Kill(7, POWER, -1), expected)
    assert row["differs"] == differs and row["left"] == ["no configuration"]
    assert asked == [([], 7, POWER), ([], None, KILLED)]


def test_a_run_that_never_ends_is_noticed(tmp_path, monkeypatch):
    left_by_a_run(tmp_path / "undisturbed")
    expected = kill_test.outcome(tmp_path / "undisturbed")

    def run(stage, inputs, out, more=(), dies_at=None, how=KILLED):
        out.mkdir(exist_ok=True)
        (out / "config.yaml").write_text("")
        (tmp_path / "run.log").write_text("error: nothing goes")
        return 2

    monkeypatch.setattr(kill_test, "run", run)
    row = kill_test.killed("sft", None, tmp_path / "run", Kill(7, TORN, 3), expected)
    assert row["differs"] == list(expected) and row["said"] == "error: nothing goes"


def ppo_run(folder, scores, ended, best):
    folder.mkdir()
    rows = [{"step": step, "eval/score": score, "eval/ended": share, "objective/kl_coef": step / 8}
            for step, (score, share) in enumerate(zip(scores, ended, strict=True))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"best_step": best}))
    removed = ["best-0", "best-1", "update-1", "update-2"]
    return [Operation("os.rename", f"checkpoints/{name}", False) for name in removed]


@pytest.mark.parametrize(("scores", "ended", "best", "still"), [
    ([0, 1, 2, 1, 0], [0, 0, 0.5, 1, 1], 2, []),
    ([0, 1, 2, 3, 4], [0, 0, 0.5, 1, 1], 4, ["the best weights are neither the first nor the last"]),
    ([9, 1, 2, 1, 0], [0, 0, 0.5, 1, 1], 0, ["the best weights are neither the first nor the last"]),
    ([-1] * 5, [0] * 5, 2, ["some summaries end and some do not", "scores differ"]),
])
def test_runs_in_which_something_does_not_move_are_noticed(scores, ended, best, still, tmp_path):
    operations = ppo_run(tmp_path / "run", scores, ended, best)
    found = kill_test.moves("ppo", tmp_path / "run", operations)
    assert [name for name, moved in found.items() if not moved] == still
    found = kill_test.moves("ppo", tmp_path / "run", operations[1:3])
    assert not found["old checkpoints are removed"]
    assert not found["best weights give way to better ones, twice"]


# --------------------------------------------------------------------------------------- the operations

CHANGES = """
import os, shutil, sys
from pathlib import Path
from file_operations import Operations
folder = Path(sys.argv[1])
Operations(folder, *([int(sys.argv[2]), sys.argv[3]] if len(sys.argv) > 2 else [None]))
(folder / "a").mkdir()
with open(folder / "a" / "lines", "w") as file:
    file.write("x" * 100)
os.fsync(os.open(folder / "a" / "lines", os.O_RDONLY))
with open(folder / "a" / "lines", "a") as file:
    file.write("y" * 60)
(folder / "a" / "b").write_text("of 10 byte")
open(folder / "a" / "b").close()
os.replace(folder / "a", folder / "c")
shutil.rmtree(folder / "c")
"""
LINES = "x" * 100


def after(folder, *words):
    """The files that a process has left, by name, and its exit status."""
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(kill_test.__file__)}
    status = subprocess.run([sys.executable, "-c", CHANGES, str(folder), *words], check=False,
                            env=environment).returncode
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*")
             if path.is_file()}
    shutil.rmtree(folder)
    return status, files


def test_a_process_dies_before_each_of_its_operations_and_leaves_what_it_should(tmp_path):
    left = [after(tmp_path / "run", str(place), KILLED) for place in range(9)]
    whole = LINES + "y" * 60
    inside = {"a/lines": whole, "a/b": "of 10 byte"}
    assert left[:5] == [(-9, {}), (-9, {}), (-9, {"a/lines": LINES}), (-9, {"a/lines": whole}), (-9, inside)]
    moved = {f"c/{name[2:]}": text for name, text in inside.items()}
    assert left[5] == (-9, moved), "before the first file is removed"
    assert all(files.items() <= moved.items() and len(files) < 2 for _, files in left[6:])
    assert left[8] == (0, {}), "there are eight operations"


@pytest.mark.parametrize(("place", "how", "files"), [
    (2, TORN, {"a/lines": "x" * 50}),
    (3, TORN, {"a/lines": LINES + "y" * 30}),
    (4, TORN, {"a/lines": LINES + "y" * 60, "a/b": "of 10"}),
    (2, POWER, {"a/lines": LINES}),
    (3, POWER, {"a/lines": LINES}),
    (4, POWER, {"a/lines": LINES, "a/b": ""}),
    (5, POWER, {"c/lines": LINES, "c/b": ""}),
])
def test_what_was_being_written_is_torn_and_what_was_not_synced_is_lost(place, how, files, tmp_path):
    assert after(tmp_path / "run", str(place), how) == (-9, files)


def test_kills_are_spread_over_all_operations_in_each_way():
    operations = [Operation("open", str(place), place % 2 == 0) for place in range(100)]
    every = kill_test.kills_of(operations, None, 0)
    assert [kill.operation for kill in every] == list(range(100))
    assert not any(kill.how == TORN and kill.operation % 2 for kill in every)
    some = kill_test.kills_of([operations[0]] * 100, 24, 1)
    assert [some[0].operation, some[-1].operation, len(some)] == [0, 99, 24]
    assert {kill.how for kill in some} == set(HOW) and [kill.again >= 0 for kill in some].count(True) == 6
    assert {kill.how for kill in some if kill.again >= 0} == set(HOW)
    assert len(kill_test.kills_of(operations, 500, 0)) == 100
