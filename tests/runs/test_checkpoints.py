"""Which weights a run keeps, and what a run that goes on finds again."""

import itertools
import json
import math
import os
import shutil
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_ppo
from families import FAMILIES, policy, scalar_model
from loops import bare_loop
from utils import zero
from utils.config import UserError
from utils.judge.held_out import evaluate, outcome_weights
from utils.loop import Schedule
from utils.models.lora import add_adapter
from utils.models.policy_value import Models, PolicyAndValue, averaged
from utils.rewards.rewards import Scores
from utils.runs.checkpoints import CheckpointFolder, damage, load_weights, save_weights, trainable_weights
from utils.runs.resume import find_point


class FakeRun:
    """What a checkpoint needs of a run: its folder and lines for people."""

    def __init__(self, folder):
        self.folder, self.lines = folder, []
        self.log = self.lines.append


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
    written, posts = SimpleNamespace(tokens=[[5]], ended=[True], texts=[""]), SimpleNamespace(examples=[])
    scored = Scores([score], {}), Scores([0.0], {})
    judge = SimpleNamespace(summaries=lambda *_: written, scores=lambda *_: scored,
                            kls=lambda *_: [kl], rouge=lambda *_: None,
                            opinions=lambda *_: ([], {}))
    models = Models(SimpleNamespace(policy=loop.module), None, None)
    evaluate(loop, models, posts, judge, None, update)


def save(loop, update):
    loop.step = update
    loop.save()


def restored(loop) -> float:
    """The weight after the best one was put back, which must be that of the step that it is said to be."""
    step = loop.best.restore(loop.weights["trained"], last=loop.step)
    assert loop.module.weight.item() == step
    return step


def kept(run):
    """The names in a run's folder of checkpoints."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def said(loop) -> str:
    return (loop.run.folder / "train.log").read_text()


# ------------------------------------------------------------------------------------------- the best weights


def test_the_best_score_within_the_budget_is_restored(tmp_path):
    loop = loop_of(tmp_path)
    for update, score, kl in [(0, 1.0, 0.0), (1, 3.0, 5.0), (2, 9.0, 5.1), (3, 2.0, 1.0), (4, 3.0, 0.0)]:
        offer(loop, update, score, kl)
    assert loop.best.found == {"step": 4, "score": 3.0, "kl": 0.0}, "of equal scores the later one"
    assert restored(loop) == 4
    assert said(loop).endswith(" best weights: those of update 4, held-out score 3.000, kl 0.000\n")


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
    log = said(loop)
    for place, (step, score, _) in enumerate(offers):
        equal = any(earlier == score for _, earlier, _ in offers[:place])
        assert (f"update {step} scores {score:.3f} as" in log) == equal


@pytest.mark.parametrize(("score", "kl"), [(math.nan, 0.0), (9.0, math.nan)])
def test_nan_is_never_the_best(score, kl, tmp_path):
    loop = loop_of(tmp_path)
    offer(loop, 0, score, kl)
    assert loop.best.found is None and restored(loop) == 0, "without a best one the weights stay"
    assert said(loop).endswith(" no best weights to go back to: the last ones are kept, those of update 0\n")
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
    again.step = 7
    assert restored(again) == 3


def put(path, kind):
    """Something of the user's, under a name that a run wants."""
    path.parent.mkdir(exist_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "best-00002.safetensors").write_text("mine")
    elif kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("gone")


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_what_has_the_name_already_is_set_aside(kind, tmp_path):
    """A run leaves nothing under such a name, so somebody has put it there."""
    loop = loop_of(tmp_path)
    best = loop.run.folder / "checkpoints" / "best-3"
    put(best, kind)
    put(best.with_name("best-3.aside-1"), kind)
    offer(loop, 3, 1.0)
    become(loop, 0)
    assert restored(loop) == 3
    assert kept(loop.run.folder) == ["best-3", "best-3.aside-1", "best-3.aside-2"]
    aside = best.with_name("best-3.aside-2")
    assert {"folder": aside.is_dir(), "file": aside.is_file(), "dangling link": aside.is_symlink()}[kind]
    assert f"'{best}' is in the way and now called 'best-3.aside-2'" in said(loop)


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
    with pytest.raises(UserError, match="lacks 1 weights of this model .scale"):
        load_weights({**weights, "scale": nn.Parameter(torch.ones(1))}, tmp_path, "best")
    with pytest.raises(UserError, match=r"holds bias \[2\], which this model has not"):
        load_weights({"weight": weights["weight"]}, tmp_path, "best")
    with pytest.raises(UserError, match=r"holds bias \[2\], which this model has not"):
        load_weights({**weights, "bias": nn.Parameter(torch.ones(2, 2))}, tmp_path, "best")


def test_the_kept_weights_are_those_of_the_averaged_policy(tmp_path):
    """Detail 35; and with adapters, which have other names than the stock weights, no others."""
    model = policy("opt")
    add_adapter(model, SimpleNamespace(lora_rank=2, lora_alpha=4))
    models = Models(PolicyAndValue(model, None), None, None, averaged(model, 0.5))
    with torch.no_grad():
        for weight in trainable_weights(model).values():
            weight += 1.0
    models.average.update_parameters(model)
    found = outcome_weights(models)
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


def written(folder, steps):
    """A folder with a checkpoint for each step, without best weights."""
    ours = CheckpointFolder(FakeRun(folder))
    for step in steps:
        def write(aside, step=step):
            (aside / "engine").mkdir()
            (aside / "engine" / "weights").write_text(f"of step {step}")
            (aside / "progress.json").write_text(json.dumps({"step": step, "best": None, "processes": 1}))

        ours.write(f"step-{step}", write)
    return ours


def newest(ours) -> str | None:
    point = find_point(ours, "step")
    return point and point.path.name


# what is done to a checkpoint or to best weights, and what is said of them; None: it does not matter
DAMAGE = {
    "flipped": (lambda path: flip(path / "progress.json"), "progress.json has changed"),
    "emptied": (lambda path: (path / "progress.json").write_text(""), "progress.json has changed"),
    "cut": (lambda path: os.truncate(path / "progress.json", 9), "progress.json has changed"),
    "longer": (lambda path: (path / "progress.json").open("a").write(" "), "progress.json has changed"),
    "a file less": (lambda path: (path / "progress.json").unlink(), "progress.json is missing"),
    "a folder less": (lambda path: shutil.rmtree(path / "engine"), "engine/weights is missing"),
    "renamed": (lambda path: (path / "progress.json").rename(path / "progress"), "progress.json is missing"),
    "a pipe": (lambda path: pipe(path / "progress.json"), "progress.json is missing"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "half a manifest": (lambda path: os.truncate(path / "manifest.json", 20), "manifest.json has changed"),
    "no text": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json has changed"),
    "another manifest": (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json has changed"),
    "manifest of lists": (lambda path: (path / "manifest.json").write_text('{"name": 1, "sha256": [1]}'),
                          "manifest.json has changed"),
    "manifest is a pipe": (lambda path: pipe(path / "manifest.json"), "it has no manifest.json"),
    "manifest is a folder": (lambda path: folder(path / "manifest.json"), "it has no manifest.json"),
    "emptied folder": (lambda path: [shutil.rmtree(path), path.mkdir()], "it has no manifest.json"),
    "a file": (lambda path: [shutil.rmtree(path), path.write_text("")], "it is not there"),
    "of another step": (lambda path: [shutil.rmtree(path), shutil.copytree(path.with_name("step-8"), path)],
                        "it is a copy of 'step-8'"),
    "gone": (shutil.rmtree, None),
    "called otherwise": (lambda path: path.rename(path.with_name("step-old")), None),
}
HARMLESS = {
    "a desktop's file": lambda path: (path / ".DS_Store").write_bytes(b"\0" * 9),
    "Windows' file": lambda path: (path / "engine" / "Thumbs.db").write_text(""),
    "a file more": lambda path: (path / "trained-00002.safetensors").write_text(""),
    "a folder more": lambda path: (path / "notes").mkdir(),
    "a link to it": lambda path: [path.rename(path.parents[1] / "elsewhere"), path.mkdir(),
                                  path.rmdir(), path.symlink_to(path.parents[1] / "elsewhere")],
    "other times": lambda path: [os.utime(file, (1, 1)) for file in path.iterdir()],
}


def flip(path):
    """One bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_the_newest_checkpoint_whose_checksums_hold_is_taken(kind, tmp_path):
    ours = written(tmp_path, [8, 10, 9])
    assert newest(ours) == "step-10" and ours.run.lines == []
    do, reason = DAMAGE[kind]
    broken = tmp_path / "checkpoints" / "step-10"
    do(broken)
    assert newest(ours) == "step-9"
    lines = [f"'{broken}' is damaged ({reason}); going back to the one before"]
    assert ours.run.lines == (lines if reason else [])


@pytest.mark.parametrize("more", list(HARMLESS))
def test_what_others_put_beside_the_files_of_a_checkpoint_does_not_damage_it(more, tmp_path):
    ours = written(tmp_path, [9, 10])
    HARMLESS[more](tmp_path / "checkpoints" / "step-10")
    assert newest(ours) == "step-10" and ours.run.lines == []


def test_a_hidden_file_that_goes_again_does_not_damage_a_checkpoint(tmp_path):
    ours = CheckpointFolder(FakeRun(tmp_path))
    progress = json.dumps({"step": 3, "best": None, "processes": 1})
    ours.write("step-3", lambda aside: [(aside / "progress.json").write_text(progress),
                                        (aside / ".DS_Store").write_text("")])
    (tmp_path / "checkpoints" / "step-3" / ".DS_Store").unlink()
    assert newest(ours) == "step-3"


STRANGE = ["step-old", "step-", "step-3 copy", "step-12.aside-1", "step--1", "step-007", "step-1_0",
           "step-\u0663", "step-1e3", "step-4.tmp.bak", "best-old", "best-", "Step-9", "step-9.old"]


@pytest.mark.parametrize("name", STRANGE)
def test_other_names_are_not_looked_at_and_stay(name, tmp_path):
    ours = written(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoints" / name).mkdir()
    assert newest(ours) == "step-3" and ours.run.lines == []
    ours.keep("step", 1, 3)
    ours.go_on_after("step", 3)
    assert kept(tmp_path) == sorted([name, "step-3"])


def test_one_that_is_killed_while_writing_is_never_taken(tmp_path):
    ours = written(tmp_path, [1])

    def killed(aside):
        (aside / "weights").write_text("of st")
        (aside / "optimizer").write_text("of st")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ours.write("step-2", killed)
    assert kept(tmp_path) == ["step-1", "step-2.tmp"]
    assert newest(ours) == "step-1"
    written(tmp_path, [2])  # the run that goes on comes here again
    path = find_point(ours, "step").path
    assert (path / "engine" / "weights").read_text() == "of step 2"
    assert sorted(file.name for file in path.iterdir()) == ["engine", "manifest.json", "progress.json"]
    assert kept(tmp_path) == ["step-1", "step-2"]


def dying(monkeypatch, last):
    """From now on a process that changes so many names, and is killed before the next one."""
    left = itertools.count(last, -1)

    def dies(real):
        def call(*args, **options):
            if next(left) <= 0:
                raise KeyboardInterrupt
            return real(*args, **options)
        return call

    for name in ("replace", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, dies(getattr(os, name)))


def test_a_kill_while_one_is_removed_leaves_it_whole_or_not_there(tmp_path, monkeypatch):
    """At each moment of the removal."""
    for last in itertools.count():
        (tmp_path / str(last)).mkdir()
        ours, killed = written(tmp_path / str(last), [1, 2]), True
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            dying(patched, last)
            ours.keep("step", 1, 2)
            killed = False
        if "step-1" in kept(tmp_path / str(last)):
            assert damage(tmp_path / str(last) / "checkpoints" / "step-1") is None
        ours.go_on_after("step", 2)
        assert kept(tmp_path / str(last)) in (["step-1", "step-2"], ["step-2"]) and newest(ours) == "step-2"
        if not killed:
            break
    assert last > 5, "a rename, three files and two folders"


def test_what_cannot_be_deleted_is_out_of_the_way(tmp_path, monkeypatch):
    """As a file on NFS that somebody reads."""
    ours = written(tmp_path, [1, 2])
    with monkeypatch.context() as patched:
        patched.setattr(os, "rmdir", lambda *_, **__: (_ for _ in ()).throw(OSError(39, "not empty")))
        ours.keep("step", 1, 2)
    assert kept(tmp_path) == ["step-1.old.tmp", "step-2"]
    written(tmp_path, [1])
    ours.keep("step", 1, 2)
    assert kept(tmp_path) == ["step-2"]


def test_a_link_to_a_checkpoint_is_removed_and_not_what_it_leads_to(tmp_path):
    ours = written(tmp_path, [1, 2])
    one = tmp_path / "checkpoints" / "step-1"
    one.rename(tmp_path / "elsewhere")
    one.symlink_to(tmp_path / "elsewhere")
    ours.keep("step", 1, 2)
    assert kept(tmp_path) == ["step-2"] and (tmp_path / "elsewhere" / "manifest.json").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    ours = written(tmp_path, range(1, 13))
    ours.write("best-3", lambda aside: None)
    ours.keep("step", 2, 12)
    assert kept(tmp_path) == ["best-3", "step-11", "step-12"]


def test_a_later_one_that_somebody_has_put_there_does_not_push_out_a_new_one(tmp_path):
    ours = written(tmp_path, [1, 2, 3])
    shutil.copytree(tmp_path / "checkpoints" / "step-3", tmp_path / "checkpoints" / "step-99")
    ours.keep("step", 2, 3)
    assert kept(tmp_path) == ["step-2", "step-3", "step-99"]


def test_with_all_checkpoints_damaged_a_resumed_run_starts_over_and_keeps_its_new_ones(tmp_path):
    first = loop_of(tmp_path)
    for update in (6, 8):
        offer(first, update, float(update))
        save(first, update)
    checkpoints = first.run.folder / "checkpoints"
    for path in checkpoints.glob("update-*"):
        flip(path / "progress.json")
    again = loop_of(first.run.folder, resume=True)
    assert said(again).count(" is damaged (progress.json has changed); going back to the one before") == 2
    assert kept(first.run.folder) == ["best-6", "best-8", "update-6", "update-8"], "nothing is changed yet"
    again.resume()
    assert again.step == 0 and "no complete checkpoint: starting from the beginning" in said(again)
    aside = [f"{name}.aside-1" for name in ("best-6", "best-8", "update-6", "update-8")]
    assert kept(first.run.folder) == aside
    for update in (2, 4, 6):
        offer(again, update, float(update))
        save(again, update)
    assert kept(first.run.folder) == sorted([*aside, "best-4", "best-6", "update-4", "update-6"])
    third = loop_of(first.run.folder, resume=True)
    third.resume()
    assert third.step == 6 and restored(third) == 6


def test_a_resumed_run_leaves_nothing_half(tmp_path):
    first = loop_of(tmp_path)
    offer(first, 1, 1.0)
    save(first, 2)
    checkpoints = first.run.folder / "checkpoints"
    ours = ["update-3.tmp", "update-1.old.tmp", "best-2.tmp", "best-0.old.tmp"]
    theirs = ["notes.tmp", "update-x.tmp"]
    for name in [*ours, *theirs]:
        (checkpoints / name).mkdir()
        (checkpoints / name / "weights").write_text("")
    again = loop_of(first.run.folder, resume=True)
    again.resume()
    assert kept(first.run.folder) == sorted(["best-1", "update-2", *theirs])


def test_a_run_that_was_killed_before_it_removed_old_ones_removes_them_when_it_goes_on(tmp_path, monkeypatch):
    first = loop_of(tmp_path)
    for update in (7, 8):
        save(first, update)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(CheckpointFolder, "keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save(first, 9)
    again = loop_of(first.run.folder, resume=True)
    again.resume()
    assert kept(first.run.folder) == ["update-8", "update-9"] and again.step == 9


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_something_else_in_place_of_the_folder_is_named(kind, tmp_path):
    put(tmp_path / "checkpoints", kind)
    with pytest.raises(UserError, match="^output_dir: '.*checkpoints' is no folder; move it away"):
        CheckpointFolder(FakeRun(tmp_path))


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    loop = loop_of(tmp_path)
    save(loop, 1)
    monkeypatch.setattr("utils.runs.resume.world",
                        lambda: SimpleNamespace(is_main_process=True, num_processes=4))
    with pytest.raises(UserError, match="^resume: .*update-1' was written by 1 processes, here are 4; start"):
        find_point(loop.checkpoints, "update")


def test_without_checkpoints_to_resume_from_only_the_best_policy_stays(tmp_path, monkeypatch):
    """As with an optimizer on NVMe."""
    monkeypatch.setattr("utils.loop.resumable", lambda: False)
    loop = loop_of(tmp_path)
    for update in (1, 2, 3):
        offer(loop, update, score=float(update))
        save(loop, update)
    assert kept(loop.run.folder) == ["best-3"]


# ------------------------------------------------------------------------- damage between stop and resume

SCORES = [0.0, 1.0, 3.0, 2.0, 5.0, 7.0, 6.0, 4.0, 1.0, 0.0]  # of updates 0 to 9: best-5 is in final/
STOPS = {"the best is among the last steps": 6, "before the best is found": 4, "all know one best": 9}


def small_run(folder, resume=False, stop=9):
    """A run whose weight is a function of its steps; (the loop, its weight in the end)."""
    loop = loop_of(folder, resume)
    loop.resume()
    if loop.step == 0:
        become(loop, 0)
        small_offer(loop, 0)
    for step in range(loop.step + 1, stop + 1):
        nn.init.constant_(loop.module.weight, loop.module.weight.item() / 2 + step)
        loop.run.metrics(step, {"objective/kl": float(step)})
        small_offer(loop, step)
        if step % 2 == 0 or step == 9:
            save(loop, step)
    if stop == 9:
        loop.best.restore(loop.weights["trained"], last=9)
    return loop, loop.module.weight.item()


def small_offer(loop, step):
    loop.best.offer(step, SCORES[step], loop.weights["trained"], kl=0.0)


def damaged(path, how):
    """Do it to a file."""
    {"flipped": lambda: flip(path), "emptied": lambda: path.write_bytes(b""), "removed": path.unlink,
     "halved": lambda: os.truncate(path, path.stat().st_size // 2),
     "twice": lambda: path.write_bytes(path.read_bytes() * 2), "a folder": lambda: folder(path)}[how]()


HOW = ["flipped", "emptied", "removed", "halved", "twice", "a folder"]


@pytest.mark.parametrize("how", ["any", *(pytest.param(how, marks=pytest.mark.slow) for how in HOW)])
@pytest.mark.parametrize("stop", list(STOPS))
def test_whatever_file_is_damaged_the_run_ends_alike_or_says_what_is_lost(stop, how, tmp_path):
    """Of each file in `checkpoints`, in one way or (slow) in every way; the folder has moved meanwhile."""
    (tmp_path / "whole").mkdir()
    whole, weight = small_run(tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    stopped, _ = small_run(tmp_path / "stopped", stop=STOPS[stop])
    files = [path.relative_to(stopped.run.folder) for path in stopped.run.folder.glob("checkpoints/*/*")]
    assert len(files) == 4 * len(list(stopped.run.folder.glob("checkpoints/update-*"))) + 3 * len(
        list(stopped.run.folder.glob("checkpoints/best-*")))
    for number, file in enumerate(files):
        moved = tmp_path / f"{number}"
        shutil.copytree(stopped.run.folder, moved)
        damaged(moved / file, HOW[number % len(HOW)] if how == "any" else how)
        again, ends = small_run(moved, resume=True)
        assert again.run.read_metrics() == whole.run.read_metrics()
        if "no checkpoint has all of its best weights; going on from" in said(again):
            assert str(file.parent).startswith("checkpoints/best-") and stop == "all know one best"
            assert ends != weight
        else:
            assert ends == weight, file
            assert "best weights: those of update 5, held-out score 7.000" in said(again)


@pytest.mark.parametrize(("lost", "taken", "line"), [
    (["best-5"], 4, "best weights: those of update 4, held-out score 5.000"),
    (["best-5", "best-4"], 6, "no best weights to go back to: the last ones are kept, those of update 6"),
])
@pytest.mark.parametrize("how", ["flipped", "emptied folder", "gone"])
def test_best_weights_that_are_damaged_during_the_run_are_not_taken(how, lost, taken, line, tmp_path):
    loop, _ = small_run(tmp_path, stop=6)
    assert {"best-4", "best-5"} <= set(kept(loop.run.folder))
    for name in lost:
        path = loop.run.folder / "checkpoints" / name
        {"flipped": lambda path: flip(path / "best-00001.safetensors"), "gone": shutil.rmtree,
         "emptied folder": lambda path: [shutil.rmtree(path), path.mkdir()]}[how](path)
    before = loop.module.weight.item()
    assert loop.best.restore(loop.weights["trained"], last=6) == taken
    assert line in said(loop) and "the best weights, of update 5, are damaged: " in said(loop)
    assert (loop.module.weight.item() == before) == (taken == 6)


def test_with_no_whole_best_weights_the_next_best_are_taken_and_said(tmp_path):
    """Update-6 is damaged, which is all that knew of them; best-4 is whole."""
    loop, _ = small_run(tmp_path, stop=6)
    checkpoints = loop.run.folder / "checkpoints"
    flip(checkpoints / "update-4" / "progress.json")
    flip(checkpoints / "best-5" / "best-00001.safetensors")
    again, _ = small_run(loop.run.folder, resume=True)
    line = f"going on from '{checkpoints / 'update-6'}' with the next best weights, of update 4"
    assert line in said(again) and again.best.found["step"] == 4
    assert "best weights: those of update 4, held-out score 5" in said(again)
