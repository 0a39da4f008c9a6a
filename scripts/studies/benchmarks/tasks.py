"""What a measured process is told, and what both sides of a comparison share: the same work, the same
hyper-parameters.
"""

import json
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

LEARNING_RATE, ADAM_EPS, TEMPERATURE, KL_COEF = 1e-5, 1e-5, 0.7, 0.05
RESPONSE_TOKENS, PPO_EPOCHS = 48, 4
ROWS = 8  # rows of the peers' forward passes: pairs, examples or episodes
PACKED_TOKENS = 1024  # the length of trl's packed rows, its default


class Task(NamedTuple):
    """A repetition works on the whole batch, in one optimizer step or one PPO update. All in token ids."""

    stage: str
    peer: str
    k: int
    folder: str  # has policy/ and reward/; what is written goes into it too
    prompts: list[list[int]]
    completions: list[list[list[int]]]  # K for each prompt
    repetitions: int  # at most
    profile: bool = False  # report where the time goes

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self._asdict()), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Task":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


def all_pairs(k: int) -> list[tuple[int, int]]:
    """(better, worse) of K ranked completions, best first."""
    return list(combinations(range(k), 2))


def whole_share(items: int, most: int) -> int:
    """The largest divisor of `items` up to `most`: micro-batches of one size."""
    return next(size for size in range(min(items, most), 0, -1) if items % size == 0)
