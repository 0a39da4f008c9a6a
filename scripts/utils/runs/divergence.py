"""A step whose loss or gradient is not finite is left out; several in a row end the run, before it saves its
weights.
"""

import json
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from utils.config import UserError
from utils.distributed import Reading, true_anywhere
from utils.models.prompt_groups import PromptGroups, unpack
from utils.runs.run import Run

_IN_A_ROW = 3
Parts = list[tuple[torch.Tensor, PromptGroups]]  # of a step: loss, and what it was computed on


class _Judged(NamedTuple):
    """An optimizer step that the host does not know the outcome of yet."""

    step: int
    left_out: Reading
    parts: Parts


class Divergence:
    """Watches the loss and the gradient of each optimizer step. All ranks decide alike.

    The device decides, and the optimizer's kernel makes no step. On a GPU the host reads of it one optimizer
    step later, or when it must know (`left_out_now`): it would have to wait for the device otherwise.

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
        self.parts: Parts = []
        self.unread: list[_Judged] = []

    def watch(self, loss: torch.Tensor, groups: PromptGroups) -> None:
        """One part of a step, before its backward pass."""
        self.parts.append((loss.detach(), groups))
        if self.in_backward and Reading(true_anywhere(~loss.detach().isfinite())):
            self._leave_out(self.step, self.parts)

    def leaves_out(self, norm) -> torch.Tensor:
        """Whether the step of the parts watched so far must not be made, a boolean () on the device.

        Args:
            norm: of the gradient, before clipping; None when the engine has none.

        Raises:
            UserError: at the third in a row, on a GPU one step later.
        """
        numbers = [loss for loss, _ in self.parts]
        if self.counts_norm and norm is not None:
            numbers.append(torch.as_tensor(norm, device=numbers[0].device if numbers else None))
        left_out = true_anywhere(~torch.stack(numbers).isfinite().all())
        self.unread.append(_Judged(self.step, Reading(left_out), self.parts))
        self.parts = []
        self._read(all_but=1 if left_out.is_cuda else 0)
        return left_out

    def left_out_now(self) -> bool:
        """Whether the newest step was left out; waits for the device."""
        self._read()
        return self.row > 0

    def end(self) -> None:
        """The run's last step is done. If several were left out there, a third cannot come any more: refuse.
        """
        if self.left_out_now() and self.row > 1:
            self._refuse()

    def _read(self, all_but: int = 0) -> None:
        while len(self.unread) > all_but:
            step, left_out, parts = self.unread.pop(0)
            if left_out:
                self._leave_out(step, parts)
            else:
                self.row = 0

    def _leave_out(self, step: int, parts: Parts) -> None:
        self.row, self.reported = self.row + 1, step
        rows = gather_object([row for loss, groups in parts for row in self._rows(loss.item(), groups)])
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
        return (f"{self.run.unit} {self.reported}: the loss or the gradient is not finite (NaN or "
                f"infinite){before}")

    def _refuse(self):
        raise UserError(f"{self._message()}: lower learning_rate, or look for broken rows in "
                        f"'{self.path}'; the last "
                        "checkpoint is intact")

    def _rows(self, loss, groups):
        for prompt, completions in unpack(groups):
            yield {"step": self.reported, "loss": str(loss), "prompt": self.tokenizer.decode(prompt),
                   "completions": [self.tokenizer.decode(completion) for completion in completions]}
