"""A step whose loss or gradient is not finite is left out; several in a row end the run, before it saves its
weights.
"""

import json
import math

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from utils.config import UserError
from utils.distributed import max_over_ranks
from utils.models.prompt_groups import PromptGroups, unpack
from utils.runs.run import Run

_IN_A_ROW = 3


class Divergence:
    """Watches the loss and the gradient of each optimizer step. All ranks decide alike.

    fp16 finds its loss scale by steps whose gradient overflows, so there only the loss counts. DeepSpeed's
    engine steps inside the backward pass, where no step can be left out any more: there the first one ends
    the run.
    """

    def __init__(self, run: Run, tokenizer, accelerator: Accelerator):
        self.run, self.tokenizer = run, tokenizer
        self.counts_norm = accelerator.mixed_precision != "fp16"
        self.in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.step = 0  # what is reported: the step of the loop
        self.row = 0  # steps left out since the last finite one; nothing is saved in between
        self.parts: list[tuple[torch.Tensor, PromptGroups]] = []

    def watch(self, loss: torch.Tensor, groups: PromptGroups) -> None:
        """One part of a step, before its backward pass."""
        self.parts.append((loss.detach(), groups))
        if self.in_backward and max_over_ranks(int(not loss.isfinite())):
            self._leave_out()

    def leaves_out(self, norm) -> bool:
        """Whether the step of the parts watched so far must not be made.

        Args:
            norm: of the gradient, before clipping; None when the engine has none.

        Raises:
            UserError: at the third in a row.
        """
        numbers = [loss for loss, _ in self.parts]
        if self.counts_norm and norm is not None:
            numbers.append(norm)
        if max_over_ranks(int(not all(map(math.isfinite, numbers)))):
            self._leave_out()
            return True
        self.row, self.parts = 0, []
        return False

    def end(self) -> None:
        """The run's last step is done. If several were left out there, a third cannot come any more: refuse.
        """
        if self.row > 1:
            self._refuse()

    def _leave_out(self):
        self.row += 1
        rows = gather_object([row for loss, groups in self.parts for row in self._rows(loss.item(), groups)])
        self.parts = []
        if self.run.is_main:
            with self.path.open("w" if self.row == 1 else "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if self.row == _IN_A_ROW or self.in_backward:
            self._refuse()
        self.run.log(f"{self._message()}; left out, its rows are in '{self.path}'")

    @property
    def path(self):
        return self.run.folder / "broken_batch.jsonl"

    def _message(self):
        before = f", as in {self.row - 1} before it" if self.row > 1 else ""
        return (f"{self.run.unit} {self.step}: the loss or the gradient is not finite (NaN or "
                f"infinite){before}")

    def _refuse(self):
        raise UserError(f"{self._message()}: lower learning_rate, or look for broken rows in "
                        f"'{self.path}'; the last "
                        "checkpoint is intact")

    def _rows(self, loss, groups):
        for prompt, completions in unpack(groups):
            yield {"step": self.step, "loss": str(loss), "prompt": self.tokenizer.decode(prompt),
                   "completions": [self.tokenizer.decode(completion) for completion in completions]}
