"""Which rows are in which optimizer step: a function of the seed and the step, the same for any number of
processes.
"""

import math
import random
from collections.abc import Sequence

import numpy as np

_STEPS_SORTED = 50  # rows of so many steps are sorted by length together


class LengthGroupedBatches:
    """Row numbers of each optimizer step of all ranks, rows of like length together; pass after pass over the
    data.

    In each pass every row comes once, in another order: rows are shuffled, sorted by length within the rows
    of 50 steps, cut into steps, and the steps are shuffled. The last step of a pass may have fewer rows.

    Args:
        lengths: (N,) tokens of each row.
        size: rows of a step.
    """

    def __init__(self, lengths: Sequence[int], size: int, seed: int):
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed
        self.steps_per_epoch = math.ceil(len(self.lengths) / size)
        self._epoch, self._steps = None, []

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._steps = epoch, self._order(epoch)
        return self._steps[place]

    def _order(self, epoch: int) -> list[np.ndarray]:
        draw = random.Random(f"{self.seed}-{epoch}")
        rows = np.array(draw.sample(range(len(self.lengths)), len(self.lengths)))
        steps = []
        for first in range(0, len(rows), _STEPS_SORTED * self.size):
            part = rows[first : first + _STEPS_SORTED * self.size]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            steps += [part[begin : begin + self.size] for begin in range(0, len(part), self.size)]
        draw.shuffle(steps)
        return steps


def rows_at(table, places: Sequence[int]) -> list[dict]:
    """Some rows of a `datasets` table, read at once."""
    columns = table[list(map(int, places))]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


class PromptBatches:
    """Row numbers of each PPO update of all ranks: pass after pass over the prompts, each in its own shuffled
    order.
    """

    def __init__(self, rows: int, size: int, seed: int):
        self.rows, self.size, self.seed = rows, size, seed
        self._epoch, self._order = None, []

    def __getitem__(self, update: int) -> list[int]:
        return [self._row(place) for place in range(update * self.size, (update + 1) * self.size)]

    def _row(self, place: int) -> int:
        epoch, place = divmod(place, self.rows)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = random.Random(f"{self.seed}-{epoch}").sample(range(self.rows), self.rows)
        return self._order[place]
