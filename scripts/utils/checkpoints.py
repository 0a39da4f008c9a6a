"""Checkpoints of the PPO loop. (The stages on transformers' `Trainer` use its own.)"""

import json
import math
import shutil

from safetensors.torch import load_file

from utils.config import UserError
from utils.run import Run
from utils.zero import state_dict, whole


class Keeper:
    """Checkpoints of the loop, and the best policy by held-out score within the KL budget (detail 33)."""

    def __init__(self, run: Run, config, accelerator, policy):
        self.run, self.config, self.accelerator, self.policy = run, config, accelerator, policy
        self.folder = run.folder / "checkpoints"
        self.best = {"update": -1, "score": -math.inf, "kl": 0.0}

    def offer(self, update: int, score: float, kl: float) -> None:
        """Keep the policy as the best one when it scores higher and its KL is within the budget."""
        if not (score > self.best["score"] and kl <= self.config.kl_budget):  # so written, NaN is never the best
            return
        self.best = {"update": update, "score": score, "kl": kl}

        def write(folder):
            weights = state_dict(self.policy)
            if self.accelerator.is_main_process:
                self.policy.save_pretrained(folder, state_dict=weights)

        self._write(f"best-{update}", write)

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

        self._write(f"update-{update}", write)
        if self.accelerator.is_main_process:
            for old in self._found("update")[: -self.config.save_total_limit]:
                shutil.rmtree(old)
            self._drop_forgotten()

    def load(self) -> tuple[int, dict]:
        """Go back to the newest checkpoint; returns the number of updates done and what `save` was given.

        Best policies that were found after it are dropped: the run is going to find them again, or others.

        Raises:
            UserError: when there is no checkpoint.
        """
        found = self._found("update")
        if not found:
            raise UserError(f"resume: '{self.run.folder}' has no checkpoint yet; remove the folder and start again "
                            "without --resume")
        frozen = {"load_module_strict": False} if self.config.deepspeed else {}
        self.accelerator.load_state(str(found[-1]), **frozen)
        progress = json.loads((found[-1] / "progress.json").read_text())
        self.best = progress["best"]
        if self.accelerator.is_main_process:
            self._drop_forgotten()
        return progress["update"], progress.get("carried", {})  # a run of an earlier version has none

    def restore_best(self) -> None:
        """Put the best policy's weights into the policy."""
        if self.best["update"] >= 0:
            with whole(self.policy, change=True):
                # not strict: of tied weights the file has one. Not safetensors' own way, which knows no weights in flat buffers
                self.policy.load_state_dict(load_file(self.folder / f"best-{self.best['update']}" / "model.safetensors"), strict=False)
            self.run.say(f"best policy: update {self.best['update']}, held-out score {self.best['score']:.3f}, "
                         f"KL {self.best['kl']:.2f}")

    def _drop_forgotten(self):
        """Remove the best policies that neither this run nor a checkpoint that is kept would go back to."""
        kept = [json.loads((whole / "progress.json").read_text())["best"] for whole in self._found("update")]
        names = {f"best-{best['update']}" for best in [self.best, *kept]}
        for old in self._found("best"):
            if old.name not in names:
                shutil.rmtree(old)

    def _found(self, kind):
        whole = [p for p in self.folder.glob(f"{kind}-*") if p.suffix != ".tmp"]
        return sorted(whole, key=lambda p: int(p.name.split("-")[1]))

    def _write(self, name, write):
        """Under another name first: a killed run leaves no half-written checkpoint that looks whole."""
        temporary = self.folder / f"{name}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        write(temporary)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / name, ignore_errors=True)  # one of a run that was killed and has come here again
            temporary.rename(self.folder / name)
        self.accelerator.wait_for_everyone()  # the others may read it at once
