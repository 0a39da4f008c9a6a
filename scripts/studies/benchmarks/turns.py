"""How a measured process and the one that measures talk: a line "go" on stdin, a JSON line on stdout for each
repetition. Of several ranks the first one talks.

While it waits a process sleeps in a read, so it takes nothing from the other side's repetition.
"""

import json
import os
import re
import sys
import time
from pathlib import Path

import torch.distributed as dist
from transformers import TrainerCallback


class Turns:
    """The measured process's end. Whatever else it prints goes to stderr. With a `clock` the answers say
    where the time went.
    """

    def __init__(self):
        self.clock = None
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.began = 0.0

    def wait(self) -> bool:
        """Sleep until the next repetition is asked for, and start the clock; False: there is none."""
        more = _as_rank_0(lambda: sys.stdin.readline() == "go\n")
        if self.clock:
            self.clock.take(0.0)  # what ran before is not of this repetition
        self.began = time.perf_counter()
        return more

    def report(self, counts: dict[str, int], **figures) -> None:
        """Stop the clock; `counts` and `figures` say what was done. Counts and memory add up over the ranks.
        """
        seconds = time.perf_counter() - self.began
        sums = _added({"memory": memory_mb(), **counts})
        answer = {"seconds": seconds, **sums, **figures}
        if self.clock:
            answer["parts"] = self.clock.take(seconds)
        if not dist.is_initialized() or dist.get_rank() == 0:
            self.answers.write(json.dumps(answer) + "\n")
            self.answers.flush()


def _as_rank_0(read):
    """What rank 0 reads, on every rank; all go on at the same time."""
    if not dist.is_initialized():
        return read()
    found = [read() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, 0)
    return found[0]


def _added(counts):
    if not dist.is_initialized():
        return counts
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, counts)
    return {name: sum(part[name] for part in parts) for name in counts}


def memory_mb() -> float:
    """The most resident memory so far, in MiB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


class OneStepATurn(TrainerCallback):
    """Makes an optimizer step of a `Trainer` a repetition: all from one step's log to the next, data and
    logging too.

    Args:
        trainer: each forward pass of its model is counted.
        unit: the name of what is counted.
        count: how many of them are in a forward pass, from its arguments.
    """

    def __init__(self, turns: Turns, trainer, unit: str, count):
        self.turns, self.trainer, self.unit, self.done = turns, trainer, unit, 0

        def add(module, args, batch):
            self.done += int(count(batch))

        trainer.model.register_forward_pre_hook(add, with_kwargs=True)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        if self.turns.clock:
            self.turns.clock.watch(self.trainer, "get_batch_samples", "data")
            self.turns.clock.watch(self.trainer, "training_step", "update")
            self.turns.clock.watch(self.trainer.accelerator, "clip_grad_norm_", "update")
            self.turns.clock.watch(optimizer, "step", "update")
            self.turns.clock.watch(self.trainer.model, "zero_grad", "update")
        self.turns.wait()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.turns.report({self.unit: self.done}, loss=logs["loss"])
            self.done = 0
            control.should_training_stop = not self.turns.wait()
