"""Configuration keys that two stages share. Imports no heavy library, so that `--help` answers at once."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from utils.config import StageConfig, UserError, key


@dataclass
class EpochStageConfig(StageConfig):
    """What the stages have in common that pass over a fixed data set: SFT and the reward model."""

    num_train_epochs: float = key(1.0, "Passes over the training data; a reward model "
                                       "overfits in the second.",
                                  unit="epochs", source="detail 10", low=1e-6, high=10_000.0)
    max_steps: int = key(-1, "Optimizer steps, in place of epochs; -1: by epochs.", unit="steps",
                         low=-1, high=10**8)
    gradient_accumulation_steps: int = key(1, "Batches of per_device_batch_size rows in one optimizer step.",
                                           unit="batches", low=1, high=100_000)
    micro_batch_tokens: int | None = key(None, "A batch of more tokens is computed in parts, with the "
                                               "same result: less memory, and on a CPU less time "
                                               "(1024); none: at once.", unit="tokens", low=1, high=10**8)
    logging_steps: int = key(5, "Metrics are logged every so many steps.", unit="steps", low=1, high=10**9)
    eval_steps: int = key(100, "The validation data is looked at every so many steps.", unit="steps",
                          low=1, high=10**9)
    eval_rows: int = key(200, "Posts in each evaluation during training.", unit="posts", low=1, high=10**9)
    save_steps: int = key(100, "A checkpoint is saved every so many steps.", unit="steps", low=1, high=10**9)

    def __post_init__(self):
        super().__post_init__()
        if self.max_steps == 0:
            raise UserError("max_steps: 0 steps train nothing; give 1 or more, or -1 to "
                            "train num_train_epochs")

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step on all ranks."""
        from utils.distributed import world  # imports torch

        return self.per_device_batch_size * self.gradient_accumulation_steps * world().num_processes

    def schedule(self, rows: int) -> "Schedule":
        """The schedule of a run over so many training rows."""
        steps_per_epoch = math.ceil(rows / self.rows_per_step)
        steps = self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)
        return Schedule(steps, steps, "cosine")


class Schedule(NamedTuple):
    """How long a run is, and how its learning rate falls after `warmup_steps`."""

    steps: int  # of the loop: optimizer steps, or PPO's updates
    optimizer_steps: int  # in the whole run
    decay: str  # "cosine" or "linear", both to 0 (detail 9)
