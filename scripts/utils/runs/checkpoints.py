"""Checkpoints: written aside and renamed when whole, with checksums, so that a kill at any moment leaves one to go on from."""

import hashlib
import json
import math
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file

from utils.config import UserError
from utils.distributed import world
from utils.runs.run import Run
from utils.zero import resumable, save_pretrained, whole

_MANIFEST = "manifest.json"


class CheckpointFolder:
    """The folder `checkpoints` of a run. All ranks write there, so on several nodes it must be one that they share."""

    def __init__(self, run: Run):
        self.run, self.folder = run, run.folder / "checkpoints"

    def write(self, name: str, write) -> None:
        """`write(folder)`, called on all ranks, fills a checkpoint, which has this name when it is whole."""
        aside = self.folder / f"{name}.tmp"
        if world().is_main_process:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        world().wait_for_everyone()
        write(aside)
        world().wait_for_everyone()
        if world().is_main_process:
            manifest = {"processes": world().num_processes, "metrics_bytes": self.run.metrics_bytes(), "sha256": checksums(aside)}
            (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1))
            shutil.rmtree(self.folder / name, ignore_errors=True)  # one of a run that was killed and has come here again
            aside.rename(self.folder / name)
        world().wait_for_everyone()  # the others may read it at once

    def found(self, kind: str) -> list[Path]:
        """Checkpoints of a kind, oldest first."""
        named = [path for path in self.folder.glob(f"{kind}-*") if path.suffix != ".tmp"]
        return sorted(named, key=lambda path: int(path.name.split("-")[1]))

    def keep(self, kind: str, count: int, besides: Path | None = None) -> None:
        """Remove all of a kind but the newest `count` and one besides."""
        if world().is_main_process:
            for old in self.found(kind)[:-count]:
                if old != besides:
                    shutil.rmtree(old)

    def newest(self, kind: str) -> Path | None:
        """The newest checkpoint whose checksums hold, None without one; the run's metrics go back to it, or to their start.

        Raises:
            UserError: when other than this many processes wrote it: their random states and data are no others'.
        """
        # read by one process: a large checkpoint takes minutes
        found = broadcast_object_list([self._newest_whole(kind) if world().is_main_process else None])[0]
        if found is None:
            self.run.say("no whole checkpoint: starting from the beginning")
            self.run.rewind(0)
            return None
        path, manifest = found
        if manifest["processes"] != world().num_processes:
            raise UserError(f"resume: '{path}' was written by {manifest['processes']} processes, here are "
                            f"{world().num_processes}; start as many, or a new run in another --output_dir")
        self.run.rewind(manifest["metrics_bytes"])
        return path

    def _newest_whole(self, kind):
        for path in reversed(self.found(kind)):
            if (manifest := _whole_manifest(path)) is not None:
                return path, manifest
            self.run.say(f"'{path}' is not what was written there; going back to the one before")
        return None


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, by its path from there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _MANIFEST:
            with path.open("rb") as file:
                found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _whole_manifest(path: Path) -> dict | None:
    try:
        manifest = json.loads((path / _MANIFEST).read_text())
        return manifest if manifest["sha256"] == checksums(path) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def load_weights(model, folder: Path) -> None:
    """Put the weights that `save_pretrained` wrote into a model, in place."""
    with whole(model, change=True):
        for path in sorted(folder.glob("*.safetensors")):
            # not strict: of tied weights the file has one. safetensors' own way knows no weights in flat buffers
            model.load_state_dict(load_file(path), strict=False)


class Keeper:
    """Checkpoints of the loop, and the best policy by held-out score within the KL budget (detail 33)."""

    def __init__(self, run: Run, config, accelerator, policy):
        self.run, self.config, self.accelerator, self.policy = run, config, accelerator, policy
        self.folder = CheckpointFolder(run)
        self.best = {"update": -1, "score": -math.inf, "kl": 0.0}

    def offer(self, update: int, score: float, kl: float) -> None:
        """Keep the policy as the best one when it scores higher and its KL is within the budget."""
        if not (score > self.best["score"] and kl <= self.config.kl_budget):  # so written, NaN is never the best
            return
        self.best = {"update": update, "score": score, "kl": kl}

        self.folder.write(f"best-{update}", lambda folder: save_pretrained(self.policy, folder))

    def save(self, update: int, carried: dict) -> None:
        """Everything needed to go on after `update` updates; the newest `save_total_limit` are kept.

        Args:
            carried: what the loop itself goes on with, for JSON.
        """
        def write(folder):
            frozen = {"exclude_frozen_parameters": True} if self.config.deepspeed else {}
            self.accelerator.save_state(str(folder), **frozen)
            if self.accelerator.is_main_process:
                (folder / "progress.json").write_text(json.dumps({"update": update, "best": self.best, "carried": carried}))

        if resumable():
            self.folder.write(f"update-{update}", write)
        self.folder.keep("update", self.config.save_total_limit)
        if self.accelerator.is_main_process:
            self._drop_forgotten()

    def load(self) -> tuple[int, dict]:
        """Go back to the newest whole checkpoint; returns the number of updates done and what `save` was given, or 0 and {}.

        Best policies that were found after it are dropped: the run is going to find them again, or others.
        """
        newest = self.folder.newest("update")
        progress = {"update": 0, "best": self.best, "carried": {}}
        if newest is not None:
            frozen = {"load_module_strict": False} if self.config.deepspeed else {}
            self.accelerator.load_state(str(newest), **frozen)
            progress = json.loads((newest / "progress.json").read_text())
        self.best = progress["best"]
        if self.accelerator.is_main_process:
            self._drop_forgotten()
        return progress["update"], progress["carried"]

    def restore_best(self) -> None:
        """Put the best policy's weights into the policy."""
        if self.best["update"] >= 0:
            load_weights(self.policy, self.folder.folder / f"best-{self.best['update']}")
            self.run.say(f"best policy: update {self.best['update']}, held-out score {self.best['score']:.3f}, "
                         f"KL {self.best['kl']:.2f}")

    def _drop_forgotten(self):
        """Remove the best policies that neither this run nor a checkpoint that is kept would go back to."""
        kept = [json.loads((path / "progress.json").read_text())["best"] for path in self.folder.found("update")]
        names = {f"best-{best['update']}" for best in [self.best, *kept]}
        for old in self.folder.found("best"):
            if old.name not in names:
                shutil.rmtree(old)
