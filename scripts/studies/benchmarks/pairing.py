"""Two sides, each in its own process, take turns on the same work; what is compared is their ratio, turn by
turn.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from utils.config import PROJECT, UserError

LOSS_TOLERANCE = 1e-4  # relative
PEER_ENVIRONMENT = PROJECT / ".venv-bench"
PRODUCTS = [(4096, 768, 3072), (2048, 2048, 2048), (8192, 192, 768)]  # rows, inner size, columns


class Side:
    """A process, or a group of them, that does the work of one side, a repetition whenever it is asked for
    one.
    """

    def __init__(self, name: str, task_path: Path, python: str | Path = sys.executable, processes: int = 1):
        self.name, self.log = name, task_path.with_name(f"{name}.log")
        environment = {**os.environ, "PYTHONPATH": str(PROJECT / "scripts"), "HF_HUB_OFFLINE": "1",
                       "TOKENIZERS_PARALLELISM": "false"}
        group = (["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
                 if processes > 1 else [])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [str(python), "-m", *group, "studies.benchmarks.side", name, str(task_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=task_path.parent)

    def repetition(self) -> dict:
        """What the side did, in how many seconds, and its memory so far.

        Raises:
            UserError: with the end of its log, when the process has ended.
        """
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = (self.log.read_text(errors="replace").strip().splitlines() or ["nothing was said"])[-1]
            raise UserError(f"the process of {self.name} ended with status {self.process.wait()}: {last}")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()


class Turn(NamedTuple):
    """One repetition of both sides, and the machine's matrix-product rate before and after ours [FLOPs a
    second].
    """

    ours: dict
    theirs: dict
    rate: float


def take_turns(task_path: Path, peer_python: str | Path, repetitions: int, processes: int) -> list[Turn]:
    """Ours, theirs, ours, theirs ... The first turn is the warm-up: the caller checks it and leaves it out of
    the figures.
    """
    ours, theirs = Side("ours", task_path, processes=processes), Side("peers", task_path, peer_python)
    try:
        return [_turn(ours, theirs) for _ in range(repetitions + 1)]
    finally:
        ours.close()
        theirs.close()


def _turn(ours: Side, theirs: Side) -> Turn:
    before, done, after = product_rate(), ours.repetition(), product_rate()
    return Turn(done, theirs.repetition(), (before + after) / 2)


def refuse_unequal_work(turn: Turn, compare_losses: bool) -> None:
    """Raise UserError when the two sides did not do the same.

    Args:
        turn: the first one, in which the weights are still equal.
        compare_losses: whether both sides compute the same loss.
    """
    measured = {"seconds", "memory", "loss", "parts"}
    ours, theirs = ({name: value for name, value in side.items() if name not in measured}
                    for side in (turn.ours, turn.theirs))
    if ours != theirs or not ours:
        raise UserError(f"the sides did not do the same work: ours {ours}, theirs {theirs}")
    if compare_losses and not math.isclose(turn.ours["loss"], turn.theirs["loss"], rel_tol=LOSS_TOLERANCE):
        raise UserError(f"the sides' losses differ: ours {turn.ours['loss']}, theirs {turn.theirs['loss']}")


def product_rate() -> float:
    """The machine's float32 matrix-product rate [FLOPs a second]: the best of a few sizes, each the best of
    three.
    """
    return max(_rate(*shape) for shape in PRODUCTS)


def _rate(rows, inner, columns):
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * rows * inner * columns / min(seconds)


class Figures(NamedTuple):
    """What a comparison says. Rates are units a second; the ratio is that of the rates, above 1 where ours is
    faster.
    """

    ours: float
    theirs: float
    ratio: float
    ratio_low: float
    ratio_high: float
    memory_ratio: float
    utilisation: float


def figures(turns: list[Turn], unit: str, flops: int) -> Figures:
    """Medians over the turns; low and high are the smallest and the largest ratio of a turn.

    Args:
        turns: without the warm-up.
        unit: the name of what is counted, a key of each side's answers.
        flops: those that a repetition needs.
    """
    ratios = [turn.theirs["seconds"] / turn.ours["seconds"] for turn in turns]
    return Figures(
        ours=statistics.median(turn.ours[unit] / turn.ours["seconds"] for turn in turns),
        theirs=statistics.median(turn.theirs[unit] / turn.theirs["seconds"] for turn in turns),
        ratio=statistics.median(ratios), ratio_low=min(ratios), ratio_high=max(ratios),
        memory_ratio=turns[-1].ours["memory"] / turns[-1].theirs["memory"],
        utilisation=statistics.median(flops / turn.ours["seconds"] / turn.rate for turn in turns),
    )
