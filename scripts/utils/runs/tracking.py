"""Experiment trackers: one project for all stages, the run's settings, and one W&B run for all its starts.

A tracker that fails is left out, and training goes on: metrics.jsonl has everything.
"""

import os
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

PROJECT = "opt-rlhf"
_WANDB_ID = "wandb_id"  # file in the run's folder


class Trackers:
    """The trackers of an accelerator, opened for a run.

    Args:
        log: takes lines for people.
    """

    def __init__(self, accelerator: Accelerator, config, folder: Path, log: Callable[[str], None]):
        start_trackers(accelerator, config, folder)
        self.accelerator, self.say = accelerator, log

    def log(self, values: dict, step: int) -> None:
        self._each(lambda tracker: tracker.log(values, step=step))

    def end(self) -> None:
        """Let them write what they hold back, and leave the group of processes."""
        self._each(lambda tracker: tracker.finish())
        self.accelerator.trackers.clear()
        self.accelerator.end_training()

    def _each(self, call) -> None:
        for tracker in list(self.accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:  # a disk, a network, whatever the tracker's library raises
                self.accelerator.trackers.remove(tracker)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"{tracker.name} stopped ({reason:.200}); training goes on, and metrics.jsonl has "
                         "everything")


def start_trackers(accelerator: Accelerator, config, folder: Path) -> None:
    """Open the trackers of `report_to`, which the accelerator was made with.

    The project is WANDB_PROJECT or `opt-rlhf`. With `resume` the W&B run of the first start goes on.
    """
    if not accelerator.log_with:
        return
    settings = {name: value if isinstance(value, bool | int | float | str) else str(value)
                for name, value in asdict(config).items()}
    accelerator.init_trackers(os.environ.get("WANDB_PROJECT") or PROJECT,
                              config=None if config.resume else settings,  # the first start has sent them
                              init_kwargs={"wandb": _wandb_run(accelerator, config, folder)})


def _wandb_run(accelerator: Accelerator, config, folder: Path) -> dict[str, str]:
    """Arguments of `wandb.init` besides the project: those that the user's environment does not name."""
    if "wandb" not in config.report_to or not accelerator.is_main_process:
        return {}
    path = folder / _WANDB_ID
    if not (config.resume and path.exists()):
        path.write_text(os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8], encoding="utf-8")
    run = {"id": path.read_text(encoding="utf-8").strip(), "resume": "allow", "dir": str(folder)}
    return run if os.environ.get("WANDB_NAME") else {**run, "name": "-".join(folder.resolve().parts[-2:])}
