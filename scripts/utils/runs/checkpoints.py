"""Checkpoints: a kill or a loss of power at any moment leaves one to resume, and damage is noticed.

A checkpoint is written under another name and renamed when it is complete; it is renamed before it is
removed. Its manifest has a checksum of each file. Files that others put beside them do not matter.
"""

import hashlib
import itertools
import json
import math
import os
import re
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from utils import durable
from utils.config import UserError
from utils.distributed import world
from utils.runs.folder import refuse_lost
from utils.runs.run import Run
from utils.zero import full_shape, gathered, gathered_copy, in_files

_MANIFEST = "manifest.json"
_FOUND = "best.json"  # of best weights: what is known of them
# what a kill leaves of a checkpoint that was being written or removed
_HALF = re.compile(r"(step|update|best)-[0-9]+(\.old)?\.tmp")
Weights = dict[str, torch.nn.Parameter]


def trainable_weights(module: torch.nn.Module) -> Weights:
    """Everything of a module that training changes, each tied weight once. The rest is the parents'."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def save_weights(weights: Weights, folder: Path, name: str) -> None:
    """Write the weights to `folder/name-*.safetensors` on the main process; all ranks must call it under
    ZeRO-3.
    """
    folder.mkdir(exist_ok=True)
    for number, part in enumerate(in_files(weights), start=1):
        state = gathered_copy(part)
        if world().is_main_process:
            save_file(state, _weights_file(folder, name, number))


def load_weights(weights: Weights, folder: Path, name: str) -> None:
    """Put back what `save_weights` wrote under the same names, in place.

    Raises:
        UserError: when the files hold other weights than these.
    """
    missing = dict(weights)
    for number in itertools.count(1):
        path = _weights_file(folder, name, number)
        if not missing:
            return
        if not path.exists():
            raise UserError(f"'{folder}' lacks {len(missing)} weights of this model ({next(iter(missing))}, "
                            "...): another version of the code or of transformers wrote it")
        state = load_file(path)
        for key, value in state.items():
            if key not in missing or value.shape != full_shape(missing[key]):
                raise UserError(f"'{path}' holds {key} {list(value.shape)}, which this model has not")
        here = {key: missing.pop(key) for key in state}
        with torch.no_grad(), gathered(list(here.values()), change=True):
            for key, weight in here.items():
                weight.copy_(state[key])


def _weights_file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:05}.safetensors"


class CheckpointFolder:
    """The folder `checkpoints` of a run. All ranks write there, so several nodes must share it.

    Raises:
        UserError: when something else has its name.
    """

    def __init__(self, run: Run):
        self.run, self.folder = run, run.folder / "checkpoints"
        if os.path.lexists(self.folder) and not self.folder.is_dir():
            raise UserError(f"output_dir: '{self.folder}' is no folder; move it away")

    def write(self, name: str, write) -> None:
        """`write(folder)`, called on all ranks, fills a checkpoint; it gets its name when it is complete."""
        aside = self.folder / f"{name}.tmp"
        if world().is_main_process:
            refuse_lost(self.run.folder)
            durable.delete(aside)
            self.folder.mkdir(exist_ok=True)  # not its parents: a run's folder that is gone stays gone
            aside.mkdir()
        world().wait_for_everyone()
        write(aside)
        world().wait_for_everyone()
        if world().is_main_process:
            manifest = {"name": name, "sha256": checksums(aside)}
            (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            if os.path.lexists(self.folder / name):
                self.set_aside(self.folder / name)
            durable.move(aside, self.folder / name)
        world().wait_for_everyone()  # the others may read it at once

    def paths(self, kind: str) -> list[Path]:
        """Checkpoints of a kind, oldest first. Other names (update-2.aside, best-old) are not ours."""
        named = [path for path in self.folder.glob(f"{kind}-*")
                 if re.fullmatch(rf"{kind}-(0|[1-9][0-9]*)", path.name)]
        return sorted(named, key=number_of)

    def keep(self, kind: str, count: int, newest: int) -> None:
        """Remove all of a kind but the newest `count` up to number `newest`; later ones are not this run's.
        """
        if world().is_main_process:
            ours = [path for path in self.paths(kind) if number_of(path) <= newest]
            for old in ours[:-count]:
                durable.remove(old)

    def go_on_after(self, kind: str, step: int) -> None:
        """Leave nothing of what came after a step, or half of anything: the run is going to make it again.

        Checkpoints there could not be resumed from. They get another name, and so do their best weights.
        """
        if not world().is_main_process or not self.folder.exists():
            return
        for path in self.folder.iterdir():
            if _HALF.fullmatch(path.name):
                durable.delete(path)
        later = [path for path in self.paths(kind) if number_of(path) > step]
        for path in [*later, *(best for best in self.paths("best") if number_of(best) > step)]:
            if later:
                self.set_aside(path)
            else:
                durable.remove(path)

    def set_aside(self, path: Path) -> None:
        """Give a checkpoint a name that nobody reads, and say so."""
        names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        self.run.log(f"'{path}' is in the way and now called '{aside.name}'; nobody reads it any more")


def number_of(checkpoint: Path) -> int:
    """The step or update that a checkpoint was written after."""
    return int(checkpoint.name.split("-")[1])


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path from there; hidden files are the system's."""
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != _MANIFEST and not path.name.startswith(".")}


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files; None: it has all that was written there."""
    try:
        if not (checkpoint / _MANIFEST).is_file():
            return f"it has no {_MANIFEST}" if checkpoint.is_dir() else "it is not there"
        manifest = json.loads((checkpoint / _MANIFEST).read_text(encoding="utf-8"))
        name, sums = manifest["name"], dict(manifest["sha256"])
        if name != checkpoint.name:
            return f"it is a copy of {name!r:.40}"
        for file, sha256 in sums.items():
            if not (checkpoint / file).is_file():
                return f"{file} is missing"
            if _sha256(checkpoint / file) != sha256:
                return f"{file} has changed"
    except OSError as error:
        return f"{error.filename or 'it'} cannot be read: {error.strerror}"
    except (ValueError, LookupError, TypeError):
        return f"{_MANIFEST} has changed"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Best:
    """The best weights so far, in `checkpoints/best-N`, N being the step they were offered at (details 14,
    33).
    """

    def __init__(self, checkpoints: CheckpointFolder):
        self.checkpoints, self.found = checkpoints, None  # found: {"step", "score", ...} or None

    def offer(self, step: int, score: float, weights: Weights, **figures: float) -> None:
        """Keep the weights unless the best so far score higher: of equal scores the later one is kept.

        Args:
            figures: what else is known of them, for the log. A `loss` among them decides between equal
                scores.
        """
        if not (score > -math.inf and (self.found is None or self._as_good(step, score, figures))):
            return  # also for NaN
        self.found = {"step": step, "score": score, **figures}

        def write(folder: Path) -> None:
            save_weights(weights, folder, "best")
            if world().is_main_process:
                (folder / _FOUND).write_text(json.dumps(self.found))

        self.checkpoints.write(f"best-{step}", write)

    def _as_good(self, step: int, score: float, figures: dict) -> bool:
        """Whether what is offered is at least as good as the best so far."""
        if score != self.found["score"] or "loss" not in figures:
            return score >= self.found["score"]
        run = self.checkpoints.run
        run.log(f"{run.unit} {step} scores {score:.3f} as {run.unit} {self.found['step']} did, so the loss "
                f"decides: {figures['loss']:.4f} against {self.found['loss']:.4f}")
        return figures["loss"] <= self.found["loss"] or math.isnan(self.found["loss"])

    def restore(self, weights: Weights, last: int) -> int:
        """Put the best weights back: the best ones that are whole. Without any the weights stay.

        Args:
            last: the step that the weights are of now.

        Returns:
            The step that they are of then.
        """
        log, unit = self.checkpoints.run.log, self.checkpoints.run.unit
        best, lost = broadcast_object_list([self._whole() if world().is_main_process else None])[0]
        if lost:
            log(f"the best weights, of {unit} {self.found['step']}, are damaged: {lost}")
        if best is None:
            log(f"no best weights to go back to: the last ones are kept, those of {unit} {last}")
            return last
        load_weights(weights, self.checkpoints.folder / f"best-{best['step']}", "best")
        others = "".join(f", {name} {value:.3f}" for name, value in best.items()
                         if name not in ("step", "score"))
        log(f"best weights: those of {unit} {best['step']}, held-out score {best['score']:.3f}{others}")
        return best["step"]

    def _whole(self) -> tuple[dict | None, str | None]:
        """(the best weights that are whole, what is wrong with the best ones)."""
        if self.found is None:
            return None, None
        lost = damage(self.checkpoints.folder / f"best-{self.found['step']}")
        return (next_best(self.checkpoints, self.found["step"] - 1), lost) if lost else (self.found, None)

    def drop_forgotten(self, kept: list[dict | None]) -> None:
        """Remove the best weights that neither this run nor a checkpoint (its best: `kept`) would go back to.
        """
        names = {f"best-{best['step']}" for best in [self.found, *kept] if best}
        for old in self.checkpoints.paths("best"):
            if old.name not in names:
                durable.remove(old)


def next_best(checkpoints: CheckpointFolder, last: int) -> dict | None:
    """What is known of the best of all whole best weights up to a step; None without any."""
    whole = [path for path in checkpoints.paths("best") if number_of(path) <= last and damage(path) is None]
    found = [json.loads((path / _FOUND).read_text(encoding="utf-8")) for path in whole]
    # of equal scores the later one was kept
    return max(found, key=lambda best: (best["score"], best["step"]), default=None)
