"""Which policies the PPO loop keeps, and what a run that goes on finds again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from utils.config import UserError
from utils.runs.checkpoints import CheckpointFolder, Keeper


class Policy(torch.nn.Linear):
    """One weight, saved as a model is."""

    def __init__(self, value=0.0):
        super().__init__(1, 1, bias=False)
        self.become(value)

    def become(self, value):
        torch.nn.init.constant_(self.weight, value)

    def save_pretrained(self, folder, state_dict=None):
        from safetensors.torch import save_model

        folder.mkdir(exist_ok=True)
        save_model(self, folder / "model.safetensors")


class FakeRun:
    """What a checkpoint needs of a run: its folder, lines for people, and metrics of a size that it can go back to."""

    def __init__(self, folder):
        self.folder, self.said, self.size = folder, [], 0
        self.say = self.said.append

    def metrics_bytes(self):
        return self.size

    def rewind(self, size):
        self.size = size


def keeper(folder, policy=None, kl_budget=5.0, save_total_limit=2):
    accelerator = Accelerator(cpu=True)
    policy = policy or Policy()
    accelerator.prepare(policy)
    config = SimpleNamespace(kl_budget=kl_budget, save_total_limit=save_total_limit, deepspeed=None)
    run = FakeRun(folder)
    return Keeper(run, config, accelerator, policy)


def offer(keeper, update, score, kl=0.0):
    keeper.policy.become(float(update))
    keeper.offer(update, score, kl)


def kept(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_best_score_within_the_budget_is_restored(tmp_path):
    ours = keeper(tmp_path)
    for update, score, kl in [(0, 1.0, 0.0), (1, 3.0, 5.0), (2, 9.0, 5.1), (3, 2.0, 1.0), (4, 3.0, 0.0)]:
        offer(ours, update, score, kl)
    assert ours.best == {"update": 1, "score": 3.0, "kl": 5.0}
    ours.restore_best()
    assert ours.policy.weight.item() == 1


@pytest.mark.parametrize(("score", "kl"), [(math.nan, 0.0), (9.0, math.nan)])
def test_nan_is_never_the_best(score, kl, tmp_path):
    ours = keeper(tmp_path)
    offer(ours, 0, score, kl)
    assert ours.best["update"] == -1
    offer(ours, 1, 1.0)
    assert ours.best["update"] == 1


def test_the_best_outlives_later_checkpoints(tmp_path):
    """Later candidates of a checkpoint that is kept are worth keeping too; those nobody would go back to are not."""
    ours = keeper(tmp_path)
    for update in range(6):
        offer(ours, update, score=float(update) if update < 3 else 0.0)
        ours.save(update + 1, {})
    assert kept(tmp_path) == ["best-2", "update-5", "update-6"]
    ours.restore_best()
    assert ours.policy.weight.item() == 2


def test_a_kept_checkpoints_best_is_kept_too(tmp_path):
    ours = keeper(tmp_path)
    for update in range(4):
        offer(ours, update, score=float(update))
        ours.save(update + 1, {})
    assert kept(tmp_path) == ["best-2", "best-3", "update-3", "update-4"]


def test_a_killed_runs_later_best_is_dropped_and_replaced(tmp_path):
    first = keeper(tmp_path)
    offer(first, 0, 1.0)
    first.save(1, {"kl_coef": 0.25})
    offer(first, 1, 5.0)  # and killed before its checkpoint
    again = keeper(tmp_path)
    assert again.load() == (1, {"kl_coef": 0.25})
    assert again.best == {"update": 0, "score": 1.0, "kl": 0.0}
    assert kept(tmp_path) == ["best-0", "update-1"]
    again.policy.become(7.0)
    again.offer(1, 2.0, 0.0)
    again.restore_best()
    assert again.policy.weight.item() == 7


def test_an_old_folder_of_the_same_name_is_replaced(tmp_path):
    ours = keeper(tmp_path)
    (tmp_path / "checkpoints" / "best-3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "best-3" / "model.safetensors").write_text("of the run that was killed")
    offer(ours, 3, 1.0)
    assert kept(tmp_path) == ["best-3"]
    ours.policy.become(0.0)
    ours.restore_best()
    assert ours.policy.weight.item() == 3


def test_progress_names_the_best(tmp_path):
    ours = keeper(tmp_path)
    offer(ours, 4, 1.5, 0.25)
    ours.save(5, {"kl_coef": 0.5})
    progress = json.loads((tmp_path / "checkpoints" / "update-5" / "progress.json").read_text())
    assert progress == {"update": 5, "best": {"update": 4, "score": 1.5, "kl": 0.25}, "carried": {"kl_coef": 0.5}}


def test_a_run_without_a_checkpoint_starts_from_its_beginning(tmp_path):
    ours = keeper(tmp_path)
    ours.run.size = 7
    assert ours.load() == (0, {}) and ours.run.size == 0
    assert ours.run.said == ["no whole checkpoint: starting from the beginning"]


def written(folder, steps, run=None):
    """A folder with a checkpoint for each step, and the run whose metrics were ten bytes a step then."""
    ours = CheckpointFolder(run or FakeRun(folder))
    for step in steps:
        ours.run.size = 10 * step
        ours.write(f"checkpoint-{step}", lambda aside, step=step: (aside / "weights").write_text(f"of step {step}"))
    return ours


DAMAGE = {
    "other bytes": lambda path: (path / "weights").write_text("of step 9"),
    "a file less": lambda path: (path / "weights").unlink(),
    "a file more": lambda path: (path / "optimizer").write_text(""),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"processes": 1'),
    "another manifest": lambda path: (path / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_the_newest_checkpoint_whose_checksums_hold_is_taken(damage, tmp_path):
    ours = written(tmp_path, [8, 10, 9])
    assert ours.newest("checkpoint").name == "checkpoint-10" and ours.run.size == 100
    broken = tmp_path / "checkpoints" / "checkpoint-10"
    DAMAGE[damage](broken)
    assert ours.newest("checkpoint").name == "checkpoint-9" and ours.run.size == 90
    assert ours.run.said == [f"'{broken}' is not what was written there; going back to the one before"]


def test_one_that_is_killed_while_writing_is_never_taken(tmp_path):
    ours = written(tmp_path, [1])

    def killed(aside):
        (aside / "weights").write_text("of st")
        (aside / "optimizer").write_text("of st")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.write("checkpoint-2", killed)
    assert kept(tmp_path) == ["checkpoint-1", "checkpoint-2.tmp"]
    assert ours.newest("checkpoint").name == "checkpoint-1"
    written(tmp_path, [2])  # the run that goes on comes here again
    assert (ours.newest("checkpoint") / "weights").read_text() == "of step 2"
    assert sorted(path.name for path in ours.newest("checkpoint").iterdir()) == ["manifest.json", "weights"]
    assert kept(tmp_path) == ["checkpoint-1", "checkpoint-2"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    ours = written(tmp_path, range(1, 13))
    ours.keep("checkpoint", 2, besides=tmp_path / "checkpoints" / "checkpoint-3")
    assert kept(tmp_path) == ["checkpoint-11", "checkpoint-12", "checkpoint-3"]


def test_another_number_of_processes_is_refused(tmp_path):
    ours = written(tmp_path, [1])
    manifest = tmp_path / "checkpoints" / "checkpoint-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(UserError, match="^resume: .*checkpoint-1' was written by 4 processes, here are 1; start as many"):
        ours.newest("checkpoint")


def test_without_checkpoints_to_resume_from_only_the_best_policy_stays(tmp_path, monkeypatch):
    """As with an optimizer on NVMe."""
    monkeypatch.setattr("utils.runs.checkpoints.resumable", lambda: False)
    ours = keeper(tmp_path)
    for update in (1, 2, 3):
        offer(ours, update, score=float(update))
        ours.save(update, {})
    assert kept(tmp_path) == ["best-3"]
