"""A step whose loss or gradient is not finite is left out; several in a row end the run, before it saves what it became."""

import json
import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from utils.config import UserError
from utils.distributed import agreed, collect
from utils.models.prompt_groups import PromptGroups, unpack
from utils.runs.run import Run

_IN_A_ROW = 3


class Divergence:
    """What the steps of a run say of its health. All ranks decide alike.

    fp16 finds its loss scale by steps whose gradient overflows, so there only the loss counts. DeepSpeed's engine steps
    inside the backward pass, where no step can be left out any more: the first ends the run.
    """

    def __init__(self, run: Run, tokenizer, accelerator: Accelerator):
        self.run, self.tokenizer = run, tokenizer
        self.counts_norm = accelerator.mixed_precision != "fp16"
        self.in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.step = 0  # what is reported: the optimizer step, or PPO's update
        self.row = 0  # steps left out since the last whole one; nothing is saved in between
        self.parts = []

    def watch(self, loss: torch.Tensor, *groups: PromptGroups) -> None:
        """One part of a step, before its backward pass."""
        self.parts.append((loss.detach(), groups))
        if self.in_backward and agreed(int(not loss.isfinite())):
            self._left_out()

    def leaves_out(self, norm) -> bool:
        """Whether the step of the parts watched so far must not be made.

        Args:
            norm: of the gradient, before clipping.

        Raises:
            UserError: at the third in a row.
        """
        numbers = [loss for loss, _ in self.parts]
        if self.counts_norm and norm is not None:  # DeepSpeed's engine may have none
            numbers.append(norm)
        if agreed(int(not all(map(math.isfinite, numbers)))):
            self._left_out()
            return True
        self.row, self.parts = 0, []
        return False

    def end(self) -> None:
        """The run's last step is done: of several that were left out there the third cannot come any more."""
        if self.row > 1:
            self._refuse()

    def _left_out(self):
        self.row += 1
        rows = collect([row for loss, part in self.parts for groups in part for row in self._rows(loss.item(), groups)])
        self.parts = []
        if self.run.is_main:
            with self.path.open("w" if self.row == 1 else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self.row == _IN_A_ROW or self.in_backward:
            self._refuse()
        self.run.say(f"{self._found()}; left out, its rows are in '{self.path}'")

    @property
    def path(self):
        return self.run.folder / "broken_batch.jsonl"

    def _found(self):
        before = f", as in {self.row - 1} before it" if self.row > 1 else ""
        return f"step {self.step}: the loss or the gradient is not finite (NaN or infinite){before}"

    def _refuse(self):
        raise UserError(f"{self._found()}: lower learning_rate, or look for broken rows in '{self.path}'; the last checkpoint is "
                        "intact")

    def _rows(self, loss, groups):
        for prompt, completions in unpack(groups):
            yield {"step": self.step, "loss": str(loss), "prompt": self.tokenizer.decode(prompt),
                   "completions": [self.tokenizer.decode(completion) for completion in completions]}
