"""One side of a comparison, in its own process, started by `benchmark.py`:

    python -m studies.benchmarks.side ours|peers TASK.json
"""

import importlib
import logging
import os
import sys
import warnings
from pathlib import Path

import torch
import transformers

from studies.benchmarks.clock import Clock
from studies.benchmarks.tasks import Task
from studies.benchmarks.turns import Turns


def take_cores() -> None:
    """Of several ranks each gets its share of the cores, and as many threads."""
    rank, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))[rank::size]
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))


def main(side: str, path: str) -> None:
    if "LOCAL_RANK" in os.environ:
        take_cores()
    turns = Turns()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    task = Task.load(Path(path))
    if task.profile:
        turns.clock = Clock()
    if side == "ours":  # as the scripts do; trl's environment lacks what this file needs
        importlib.import_module("utils.launch").keep_freed_memory()
    getattr(importlib.import_module(f"studies.benchmarks.{side}"), task.stage)(task, turns)


if __name__ == "__main__":
    main(*sys.argv[1:])
