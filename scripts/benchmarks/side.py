"""One side of a comparison, in a process of its own: `python -m benchmarks.side ours|peers TASK.json`, by `benchmark.py`."""

import importlib
import logging
import sys
import warnings
from pathlib import Path

import transformers

from benchmarks.clock import Clock
from benchmarks.tasks import Task
from benchmarks.turns import Turns


def main(side: str, path: str) -> None:
    turns = Turns()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    task = Task.load(Path(path))
    if task.profile:
        turns.clock = Clock()
    getattr(importlib.import_module(f"benchmarks.{side}"), task.stage)(task, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
