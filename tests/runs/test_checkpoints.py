"""Which weights a run keeps, and what a run that goes on finds again."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_ppo
from families import FAMILIES, policy, scalar_model
from loops import bare_loop
from utils import zero
from utils.config import UserError
from utils.loop import Schedule
from utils.models.lora import add_adapter
from utils.models.policy_value import Models, PolicyAndValue, averaged
from utils.runs.checkpoints import CheckpointFolder, load_weights, save_weights, trainable_weights


class FakeRun:
    """What a checkpoint needs of a run: its folder, lines for people, and metrics that it can cut off."""

    def __init__(self, folder):
        self.folder, self.lines, self.size = folder, [], 0
        self.log = self.lines.append

    def metrics_bytes(self):
        return self.size

    def rewind(self, size):
        self.size = size


def loop_of(folder, resume=False):
    """A loop of PPO around one weight, which keeps two checkpoints."""
    config = train_ppo.PPOStageConfig(output_dir=str(folder), save_total_limit=2, resume=resume,
                                      kl_budget=5.0)
    return bare_loop(config, nn.Linear(1, 1, bias=False), Schedule(9, 9, "linear"))


def become(loop, value):
    nn.init.constant_(loop.module.weight, float(value))


def offer(loop, update, score, kl=0.0):
    """Offer the weights of an update, which are its number, by the stage's own evaluation."""
    become(loop, update)
    written = SimpleNamespace(tokens=[[5]], ended=[True])
    judge = SimpleNamespace(summaries=lambda *_: written, scores=lambda *_: ([score], [0.0]),
                            kls=lambda *_: [kl], rouge=lambda *_: None)
    models = Models(SimpleNamespace(policy=loop.module), None, None)
    train_ppo.evaluate(loop, models, None, judge, None, update)


def save(loop, update):
    loop.step = update
    loop.save()


def restored(loop) -> float:
    """The weight after the best one was put back."""
    loop.best.restore(loop.weights["trained"])
    return loop.module.weight.item()


def kept(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------- the best weights


def test_the_best_score_within_the_budget_is_restored(tmp_path):
    loop = loop_of(tmp_path)
    for update, score, kl in [(0, 1.0, 0.0), (1, 3.0, 5.0), (2, 9.0, 5.1), (3, 2.0, 1.0), (4, 3.0, 0.0)]:
        offer(loop, update, score, kl)
    assert loop.best.found == {"step": 4, "score": 3.0, "kl": 0.0}, "of equal scores the later one"
    assert restored(loop) == 4
    assert (loop.run.folder / "train.log").read_text().endswith(
        " best weights: those of update 4, held-out score 3.000, kl 0.000\n")


@pytest.mark.parametrize(("offers", "best"), [
    ([(1, 0.0, 2.5), (2, 0.0, 2.0), (3, 0.0, 2.25)], 2),  # ROUGE says nothing
    ([(1, 0.0, 2.5), (2, 0.0, 2.5)], 2),  # nor does the loss
    ([(1, 0.5, 2.0), (2, 0.25, 1.0), (3, 0.5, 2.5)], 1),  # the loss decides between equal ones alone
    ([(1, 0.0, 2.0), (2, 0.0, math.nan)], 1),
    ([(1, 0.0, math.nan), (2, 0.0, 2.0)], 2),
])
def test_the_loss_decides_between_equal_scores_and_says_so(offers, best, tmp_path):
    loop = loop_of(tmp_path)
    for step, score, loss in offers:
        become(loop, step)
        loop.best.offer(step, score, loop.weights["trained"], loss=loss)
    assert restored(loop) == best
    said = (loop.run.folder / "train.log").read_text()
    for place, (step, score, _) in enumerate(offers):
        equal = any(earlier == score for _, earlier, _ in offers[:place])
        assert (f"update {step} scores {score:.3f} as" in said) == equal


@pytest.mark.parametrize(("score", "kl"), [(math.nan, 0.0), (9.0, math.nan)])
def test_nan_is_never_the_best(score, kl, tmp_path):
    loop = loop_of(tmp_path)
    offer(loop, 0, score, kl)
    assert loop.best.found is None and restored(loop) == 0, "without a best one the weights stay"
    offer(loop, 1, 1.0)
    assert loop.best.found["step"] == 1


def test_the_best_outlives_later_checkpoints(tmp_path):
    """Best weights that neither the run nor a checkpoint that is kept would go back to are removed."""
    loop = loop_of(tmp_path)
    for update in range(1, 7):
        offer(loop, update, score=float(update) if update < 4 else 0.0)
        save(loop, update)
    assert kept(loop.run.folder) == ["best-3", "update-5", "update-6"]
    assert restored(loop) == 3


def test_a_kept_checkpoints_best_is_kept_too(tmp_path):
    loop = loop_of(tmp_path)
    for update in range(1, 5):
        offer(loop, update, score=float(update))
        save(loop, update)
    assert kept(loop.run.folder) == ["best-3", "best-4", "update-3", "update-4"]


def test_a_killed_runs_later_best_is_dropped_and_replaced(tmp_path):
    first = loop_of(tmp_path)
    offer(first, 1, 1.0)
    first.carried = {"kl_coef": 0.25}
    save(first, 2)
    offer(first, 3, 5.0)  # and killed before its checkpoint
    again = loop_of(first.run.folder, resume=True)
    again.resume()
    assert (again.step, again.carried, again.module.weight.item()) == (2, {"kl_coef": 0.25}, 1)
    assert again.best.found == {"step": 1, "score": 1.0, "kl": 0.0}
    assert kept(first.run.folder) == ["best-1", "update-2"]
    offer(again, 3, 2.0)
    become(again, 7)
    assert restored(again) == 3


def test_an_old_folder_of_the_same_name_is_replaced(tmp_path):
    loop = loop_of(tmp_path)
    old = loop.run.folder / "checkpoints" / "best-3"
    old.mkdir(parents=True)
    (old / "best-00002.safetensors").write_text("of the run that was killed")
    offer(loop, 3, 1.0)
    assert kept(loop.run.folder) == ["best-3"]
    become(loop, 0)
    assert restored(loop) == 3


@pytest.mark.parametrize("file_bytes", [1, 2**30])
@pytest.mark.parametrize("kind", ["whole", "adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_weights_are_each_others_inverse(family, kind, file_bytes, tmp_path, monkeypatch):
    """Bit for bit, in one file or one for each weight, whatever stock checkpoints call the weights."""
    monkeypatch.setattr(zero, "FILE_BYTES", file_bytes)
    models = [PolicyAndValue(policy(family, seed), scalar_model(family, seed + 1)) for seed in (0, 5)]
    if kind == "adapters":
        for model in models:
            add_adapter(model.policy, SimpleNamespace(lora_rank=2, lora_alpha=4))
            add_adapter(model.value_model, SimpleNamespace(lora_rank=2, lora_alpha=4))
            for weight in trainable_weights(model).values():
                nn.init.normal_(weight)
    ours, others = map(trainable_weights, models)
    before = {name: weight.detach().clone() for name, weight in ours.items()}
    untouched = {name: weight.clone() for name, weight in models[1].state_dict().items()
                 if name not in others}
    assert not any(weight.equal(others[name]) for name, weight in ours.items())
    save_weights(ours, tmp_path / "kept", "best")
    assert len(list((tmp_path / "kept").iterdir())) == (len(ours) if file_bytes == 1 else 1)
    load_weights(others, tmp_path / "kept", "best")
    for name, weight in before.items():
        assert weight.equal(others[name]) and weight.equal(ours[name]), name
    tied = {name for name in untouched if not untouched[name].equal(models[1].state_dict()[name])}
    assert all(kind == "whole" and "lm_head" in name for name in tied), "a head tied to the embeddings"


def test_other_weights_than_those_saved_are_refused(tmp_path):
    weights = trainable_weights(nn.Linear(2, 2))
    save_weights(weights, tmp_path, "best")
    with pytest.raises(KeyError, match="lacks 1 weights .scale"):
        load_weights({**weights, "scale": nn.Parameter(torch.ones(1))}, tmp_path, "best")
    with pytest.raises(KeyError, match="bias"):
        load_weights({"weight": weights["weight"]}, tmp_path, "best")


def test_the_kept_weights_are_those_of_the_averaged_policy(tmp_path):
    """Detail 35; and with adapters, which have other names than the stock weights, no others."""
    model = policy("opt")
    add_adapter(model, SimpleNamespace(lora_rank=2, lora_alpha=4))
    models = Models(PolicyAndValue(model, None), None, None, averaged(model, 0.5))
    with torch.no_grad():
        for weight in trainable_weights(model).values():
            weight += 1.0
    models.average.update_parameters(model)
    found = train_ppo.outcome_weights(models)
    assert found.keys() == trainable_weights(model).keys() and all("lora" in name for name in found)
    for name, weight in trainable_weights(model).items():
        torch.testing.assert_close(found[name], weight - 0.5)


# -------------------------------------------------------------------------------------------- the checkpoints


def test_progress_names_the_best(tmp_path):
    loop = loop_of(tmp_path)
    offer(loop, 4, 1.5, 0.25)
    loop.carried = {"kl_coef": 0.5}
    save(loop, 5)
    progress = json.loads((loop.run.folder / "checkpoints" / "update-5" / "progress.json").read_text())
    assert progress.items() >= {"step": 5, "best": {"step": 4, "score": 1.5, "kl": 0.25},
                                "carried": {"kl_coef": 0.5}, "scaler": None}.items()


def test_the_losses_since_the_last_log_are_part_of_the_next(tmp_path):
    first = loop_of(tmp_path)

    def steps(loop, *losses):
        for loss in losses:
            for _ in loop.parts([None], spare=None):
                loop.backward(loop.module.weight.sum() * 0 + loss, None)
            loop.optimizer_step()

    first.divergence.watch = lambda *_: None
    steps(first, 1.0, 2.0)
    assert first.mean_loss() == 1.5
    steps(first, 4.0)
    save(first, 3)
    again = loop_of(first.run.folder, resume=True)
    again.resume()
    again.divergence.watch = lambda *_: None
    steps(again, 7.0, 10.0)
    assert again.mean_loss() == 7.0


def test_a_run_without_a_checkpoint_starts_from_its_beginning(tmp_path):
    run = loop_of(tmp_path).run
    run.metrics(1, {"objective/kl": 1.0})
    loop = loop_of(run.folder, resume=True)
    loop.resume()
    assert loop.step == 0 and run.read_metrics() == []
    assert "no complete checkpoint: starting from the beginning" in (run.folder / "train.log").read_text()


def written(folder, steps, run=None):
    """A folder with a checkpoint for each step, and the run whose metrics were ten bytes a step then."""
    ours = CheckpointFolder(run or FakeRun(folder))
    for step in steps:
        ours.run.size = 10 * step
        ours.write(f"step-{step}", lambda aside, step=step: (aside / "weights").write_text(f"of step {step}"))
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
    assert ours.newest("step").name == "step-10" and ours.run.size == 100
    broken = tmp_path / "checkpoints" / "step-10"
    DAMAGE[damage](broken)
    assert ours.newest("step").name == "step-9" and ours.run.size == 90
    assert ours.run.lines == [f"'{broken}' is not what was written there; going back to the one before"]


def test_one_that_is_killed_while_writing_is_never_taken(tmp_path):
    ours = written(tmp_path, [1])

    def killed(aside):
        (aside / "weights").write_text("of st")
        (aside / "optimizer").write_text("of st")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.write("step-2", killed)
    assert kept(tmp_path) == ["step-1", "step-2.tmp"]
    assert ours.newest("step").name == "step-1"
    written(tmp_path, [2])  # the run that goes on comes here again
    assert (ours.newest("step") / "weights").read_text() == "of step 2"
    assert sorted(path.name for path in ours.newest("step").iterdir()) == ["manifest.json", "weights"]
    assert kept(tmp_path) == ["step-1", "step-2"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    ours = written(tmp_path, range(1, 13))
    ours.write("best-3", lambda aside: None)
    ours.keep("step", 2)
    assert kept(tmp_path) == ["best-3", "step-11", "step-12"]


def test_another_number_of_processes_is_refused(tmp_path):
    ours = written(tmp_path, [1])
    manifest = tmp_path / "checkpoints" / "step-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"processes": 1', '"processes": 4'))
    with pytest.raises(UserError, match="^resume: .*step-1' was written by 4 processes, here are 1; start"):
        ours.newest("step")


def test_without_checkpoints_to_resume_from_only_the_best_policy_stays(tmp_path, monkeypatch):
    """As with an optimizer on NVMe."""
    monkeypatch.setattr("utils.loop.resumable", lambda: False)
    loop = loop_of(tmp_path)
    for update in (1, 2, 3):
        offer(loop, update, score=float(update))
        save(loop, update)
    assert kept(loop.run.folder) == ["best-3"]
