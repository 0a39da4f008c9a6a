"""Runs that are killed without warning, and go on as if nothing had been; what the kill test would notice."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

import kill_test
from utils.config import UserError


@pytest.mark.slow
def test_killed_runs_end_like_the_undisturbed_one(tmp_path):
    """One kill of each stage, in the second half of its time. A process of its own: forks want no threads."""
    words = ["--kills", "1", "--seed", "26507", "--output", str(tmp_path / "kills.json")]
    done = subprocess.run([sys.executable, kill_test.__file__, *words], capture_output=True, text=True,
                          check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "kills.json").read_text())
    assert list(report) == list(kill_test.STAGES)
    for stage, rows in report.items():
        assert [row["differs"] for row in rows] == [[]]
        assert all(row["lost"] <= kill_test.SAVE_STEPS[stage] for row in rows)


def left_by_a_run(folder, loss=1.0, seconds=1.0, weights="abc"):
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "model.safetensors").write_text(weights)
    row = {"step": 1, "loss": loss, "time/update": seconds}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "samples.jsonl").write_text("")


@pytest.mark.parametrize(("left", "differs"), [
    ({}, []),
    ({"seconds": 2.0}, []),
    ({"loss": 1.0000000000000002}, ["metrics.jsonl"]),
    ({"weights": "abd"}, ["final"]),
])
def test_a_difference_is_noticed(left, differs, tmp_path, monkeypatch):
    """The run is killed before its first file, and the one that is started again leaves `left`."""
    left_by_a_run(tmp_path / "undisturbed")
    asked = []

    def started(stage, models, out, *more):
        asked.append(more)
        if len(asked) == 2:
            left_by_a_run(out, **left)
        return SimpleNamespace(join=lambda *_: None, kill=lambda: None, exitcode=0)

    monkeypatch.setattr(kill_test, "started", started)
    row = kill_test.killed("sft", None, tmp_path / "run", 0.0, kill_test.outcome(tmp_path / "undisturbed"))
    assert row["differs"] == differs and asked == [(), ()]


@pytest.mark.parametrize(("stage", "best", "refused"), [
    ("ppo", 0, True), ("ppo", 6, False), ("ppo", 10, True), ("sft", 2, True), ("sft", 4, False),
    ("reward", None, False),
])
def test_runs_whose_best_weights_need_not_be_brought_back_are_refused(stage, best, refused, tmp_path):
    """Those of the first look, or the last ones."""
    for step in (8, 10):
        folder = tmp_path / "checkpoints" / f"{'update' if stage == 'ppo' else 'step'}-{step}"
        folder.mkdir(parents=True)
        progress = {"step": step, "best": best if best is None else {"step": min(best, step)}}
        (folder / "progress.json").write_text(json.dumps(progress))
    raises = pytest.raises(UserError, match=f"^{stage}: the best .* step {best} of 10")
    with raises if refused else nullcontext():
        kill_test.refuse_one_best(stage, tmp_path)
