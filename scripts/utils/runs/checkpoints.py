"""Checkpoints: written aside and renamed when complete, with checksums, so that a kill at any moment leaves
one to resume.
"""

import hashlib
import json
import math
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from utils.config import UserError
from utils.distributed import world
from utils.runs.run import Run
from utils.zero import gathered, gathered_copy, in_files

_MANIFEST = "manifest.json"
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
            save_file(state, folder / f"{name}-{number:05}.safetensors")


def load_weights(weights: Weights, folder: Path, name: str) -> None:
    """Put back what `save_weights` wrote under the same names, in place.

    Raises:
        KeyError: when the files hold other weights than these.
    """
    missing = dict(weights)
    for path in sorted(folder.glob(f"{name}-*.safetensors")):
        state = load_file(path)
        here = {key: missing.pop(key) for key in state}
        with torch.no_grad(), gathered(list(here.values()), change=True):
            for key, weight in here.items():
                weight.copy_(state[key])
    if missing:
        raise KeyError(f"'{folder}' lacks {len(missing)} weights ({next(iter(missing))}, ...)")


class CheckpointFolder:
    """The folder `checkpoints` of a run. All ranks write there, so several nodes must share it."""

    def __init__(self, run: Run):
        self.run, self.folder = run, run.folder / "checkpoints"

    def write(self, name: str, write) -> None:
        """`write(folder)`, called on all ranks, fills a checkpoint; it gets its name when it is complete."""
        aside = self.folder / f"{name}.tmp"
        if world().is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        world().wait_for_everyone()
        write(aside)
        world().wait_for_everyone()
        if world().is_main_process:
            manifest = {"processes": world().num_processes, "metrics_bytes": self.run.metrics_bytes(),
                        "sha256": checksums(aside)}
            (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            # leftover of a killed run that reached this step before
            shutil.rmtree(self.folder / name, ignore_errors=True)
            aside.rename(self.folder / name)
        world().wait_for_everyone()  # the others may read it at once

    def paths(self, kind: str) -> list[Path]:
        """Checkpoints of a kind, oldest first."""
        named = [path for path in self.folder.glob(f"{kind}-*") if path.suffix != ".tmp"]
        return sorted(named, key=lambda path: int(path.name.split("-")[1]))

    def keep(self, kind: str, count: int) -> None:
        """Remove all of a kind but the newest `count`."""
        if world().is_main_process:
            for old in self.paths(kind)[:-count]:
                shutil.rmtree(old)

    def newest(self, kind: str) -> Path | None:
        """The newest checkpoint whose checksums hold, None without one; the run's metrics go back to it.

        Raises:
            UserError: when another number of processes wrote it: their data is shared out otherwise.
        """
        # read by one process: a large checkpoint takes minutes
        newest = broadcast_object_list([self._newest_complete(kind) if world().is_main_process else None])[0]
        if newest is None:
            self.run.log("no complete checkpoint: starting from the beginning")
            self.run.rewind(0)
            return None
        path, manifest = newest
        if manifest["processes"] != world().num_processes:
            raise UserError(f"resume: '{path}' was written by {manifest['processes']} processes, here are "
                            f"{world().num_processes}; start as many, or a new run in another --output_dir")
        self.run.rewind(manifest["metrics_bytes"])
        return path

    def _newest_complete(self, kind):
        for path in reversed(self.paths(kind)):
            if (manifest := _checked_manifest(path)) is not None:
                return path, manifest
            self.run.log(f"'{path}' is not what was written there; going back to the one before")
        return None


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path from there."""
    sums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                sums[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _checked_manifest(path: Path) -> dict | None:
    """The manifest of a checkpoint whose files are those that were written; else None."""
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        return manifest if manifest["sha256"] == checksums(path) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


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
        self.checkpoints.write(f"best-{step}", lambda folder: save_weights(weights, folder, "best"))

    def _as_good(self, step: int, score: float, figures: dict) -> bool:
        """Whether what is offered is at least as good as the best so far."""
        if score != self.found["score"] or "loss" not in figures:
            return score >= self.found["score"]
        run = self.checkpoints.run
        run.log(f"{run.unit} {step} scores {score:.3f} as {run.unit} {self.found['step']} did, so the loss "
                f"decides: {figures['loss']:.4f} against {self.found['loss']:.4f}")
        return figures["loss"] <= self.found["loss"] or math.isnan(self.found["loss"])

    def restore(self, weights: Weights) -> None:
        """Put the best weights back; without one offered the weights stay."""
        if self.found is None:
            return
        load_weights(weights, self.checkpoints.folder / f"best-{self.found['step']}", "best")
        others = "".join(f", {name} {value:.3f}" for name, value in self.found.items()
                         if name not in ("step", "score"))
        self.checkpoints.run.log(f"best weights: those of {self.checkpoints.run.unit} "
                                 f"{self.found['step']}, held-out score {self.found['score']:.3f}{others}")

    def drop_forgotten(self, kept: list[dict | None]) -> None:
        """Remove the best weights that neither this run nor a checkpoint (its best: `kept`) would go back to.
        """
        names = {f"best-{best['step']}" for best in [self.found, *kept] if best}
        for old in self.checkpoints.paths("best"):
            if old.name not in names:
                shutil.rmtree(old)
