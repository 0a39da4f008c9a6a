"""Time and memory of our side alone, against one quantity at a time: K, the prompt's length, posts, the
model's size.

Completions have one length, so that the work grows with that quantity and with nothing else.
"""

import statistics
from pathlib import Path
from typing import NamedTuple

from studies.benchmarks.measure import needed_flops, write_task
from studies.benchmarks.pairing import Side, product_rate
from studies.benchmarks.plan import KS, Comparison
from studies.benchmarks.posts import batch_of
from studies.benchmarks.shapes import SHAPES

COMPLETION = 32  # tokens
BASE = {"K": 4, "prompt [tokens]": 280, "posts": 8}
SWEEPS = {"K": [1, 2, 4, 8], "prompt [tokens]": [70, 140, 280, 560], "posts": [2, 4, 8, 16]}
MODEL = "model [parameters in its layers]"


class Point(NamedTuple):
    """One measurement: `x` is the quantity; seconds, and MiB at the peak, of a repetition."""

    stage: str
    quantity: str
    x: float
    seconds: float
    memory: float
    needed: float  # FLOPs of a repetition over the best matrix-product rate of the run [seconds]


def layer_weights(shape: str) -> int:
    size = SHAPES[shape]["size"]
    return size.layers * (4 * size.hidden**2 + 2 * size.hidden * size.ffn)


def settings(stage: str, shapes: list[str]) -> list[tuple[str, float, str, dict]]:
    """(quantity, x, shape, everything else) of each measurement. The first shape is that of all sweeps but
    the model's.
    """
    base = BASE if len(KS[stage]) > 1 else {**BASE, "K": 1}
    found = [(quantity, x, shapes[0], {**base, quantity: x}) for quantity, xs in SWEEPS.items() for x in xs
             if quantity != "K" or (len(KS[stage]) > 1 and x >= KS[stage][0])]
    return found + [(MODEL, layer_weights(shape), shape, base) for shape in shapes if len(shapes) > 1]


def costs(stages: list[str], shapes: list[str], repetitions: int, posts, folder: Path) -> list[Point]:
    """Every measurement; the median of its repetitions after one that is not counted."""
    measured, rates = [], []
    for stage in stages:
        for quantity, x, shape, values in settings(stage, shapes):
            k = values["K"]
            batch = batch_of(posts, values["posts"], k, values["prompt [tokens]"], COMPLETION)
            side = Side("ours", write_task(Comparison(stage, shape, k, "", values["posts"], repetitions),
                                           batch, folder))
            try:
                answers = [side.repetition() for _ in range(repetitions + 1)][1:]
            finally:
                side.close()
            rates.append(product_rate())
            seconds, memory = statistics.median(answer["seconds"]
                                                for answer in answers), answers[-1]["memory"]
            measured.append(Point(stage, quantity, x, seconds, memory, needed_flops(stage, shape, k, batch)))
            print(f"{stage}, {quantity} {x:g}: {seconds:.2f} s, {memory:.0f} MiB", flush=True)
    return [point._replace(needed=point.needed / max(rates)) for point in measured]
