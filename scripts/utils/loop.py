"""The training loop of all three stages: micro-batches, gradients, clipping, optimizer steps, checkpoints,
stop, resume.

A stage writes its algorithm between these calls:

    loop.resume()
    for step, batch in loop.steps(batches):
        for part in loop.parts(parts, spare):           # the micro-batches of one optimizer step
            loop.backward(loss of the part / items of the whole step, groups)
        loop.optimizer_step()

Every loss is one mean over all items (tokens or pairs) of an optimizer step, over micro-batches and ranks
(detail 12): a stage divides the sum of a part by `loop.total(items)`, and gradients add up.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from accelerate.utils import DistributedType
from transformers import get_scheduler

from utils.console import progress_bar
from utils.distributed import build_accelerator, max_over_ranks
from utils.models.compiled import Cost
from utils.models.prompt_groups import PromptGroups
from utils.runs.checkpoints import (
    Best,
    CheckpointFolder,
    Weights,
    load_weights,
    save_weights,
    trainable_weights,
)
from utils.runs.divergence import Divergence
from utils.runs.resume import PROGRESS, find_point, refuse_changes
from utils.runs.run import Run
from utils.stage_keys import Schedule
from utils.zero import full_shape, load_engine, resumable, save_engine, use_engine, weights_only


class Loop:
    """What training carries from step to step. One record for the functions of a stage.

    Args:
        run: where everything is written; its `config` is that of the stage.
        model: the module that is trained; its forward is the one that engines hook.
        tokenizer: for the report of broken rows.
        schedule: how long, and how the learning rate falls.
        deepspeed: DeepSpeed's settings; None without it.

    Attributes:
        model: the module as the accelerator wrapped it: call this one for a loss.
        module: the same without the wrapper.
        step: steps done, those before a resume included.
        part_counts: 1 in a part of this rank, 0 in a spare one.
        carried: what the stage itself goes on with after a resume, values for JSON.
    """

    def __init__(self, run: Run, model: torch.nn.Module, tokenizer, schedule: Schedule,
                 deepspeed: dict | None = None):
        self.run, self.config, self.tokenizer, self.schedule = run, run.config, tokenizer, schedule
        self.accelerator = build_accelerator(run.config, run.folder, deepspeed)
        run.use_trackers(self.accelerator)
        self.module = model
        self.adam = _optimizer(model, run.config)  # as torch made it; DeepSpeed takes its own
        self.model, self.optimizer = self.accelerator.prepare(model.train(), self.adam)
        use_engine(self.model)
        # of the optimizer in use, which DeepSpeed may have exchanged; stepped by hand and on every rank alike
        self.scheduler = get_scheduler(schedule.decay, self.optimizer, run.config.warmup_steps,
                                       schedule.optimizer_steps)
        self.checkpoints = CheckpointFolder(run)
        self.best = Best(self.checkpoints)
        # looked for before anything is computed: a run that cannot go on says so at once
        self.resume_point = find_point(self.checkpoints, run.unit) if run.config.resume else None
        if self.resume_point is not None:
            refuse_changes(self.resume_point, run)
        self.divergence = Divergence(run, tokenizer, self.accelerator)
        self.step, self.first_step, self.carried = 0, 0, {}
        self.weights: dict[str, Weights] = {"trained": trainable_weights(model)}  # what a checkpoint holds
        self._engine = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self.part_counts, self._losses, self._steps_summed = 1.0, torch.zeros((), device=self.device), 0
        self._cost = Cost(run.log) if run.config.compile_trunk else None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def steps_done(self) -> int:
        """Steps of this process: not those before a resume."""
        return self.step - self.first_step

    @property
    def learning_rate(self) -> float:
        return self.scheduler.get_last_lr()[0]

    # -------------------------------------------------------------------------------------- steps of the loop

    def steps(self, batches: Sequence | Callable) -> Iterator[tuple[int, object]]:
        """(number of the step from 1 on, `batches[number - 1]`) for each step still to do.

        After the body of each step: stop when a signal asked for it, and save when it is time.
        """
        self.first_step = self.step
        self.run.catch_signals()
        with progress_bar(total=self.schedule.steps, initial=self.step, desc=self.run.stage,
                          unit=self.run.unit, shown=self.accelerator.is_main_process) as self.bar:
            while self.step < self.schedule.steps:
                # randomness (dropout) is a function of seed, step and rank: a resumed run draws what it would
                # have drawn
                torch.manual_seed(_seed_of(self.config.seed, self.step, self.accelerator.process_index))
                self.divergence.step = self.step + 1
                with nullcontext() if self._cost is None else self._cost.step():
                    yield self.step + 1, batches[self.step]
                self.step += 1
                self.bar.update(1)
                self._end_of_step()
        self.divergence.end()
        self.run.finish()

    def _end_of_step(self) -> None:
        self.run.stop_signal = max_over_ranks(self.run.stop_signal)
        due = self.step % self.config.save_steps == 0 or self.step == self.schedule.steps
        if not (due or self.run.stop_signal):
            return
        if self.divergence.left_out_now():  # between left-out steps weights may be broken
            return
        if due or self.run.stop_signal:
            self.save()
        if self.run.stop_signal:
            self.bar.close()
            self.run.stopped()

    def show(self, **figures: float) -> None:
        """Show figures beside the progress bar."""
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in figures.items()})

    def logs(self, step: int) -> bool:
        """Whether metrics are logged after this step: every `logging_steps`, and after the last one."""
        return step % self.config.logging_steps == 0 or step == self.schedule.steps

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated after this step: every `eval_steps`, and after the last one.

        Not between steps that were left out: there the weights may be broken.
        """
        due = step % self.config.eval_steps == 0 or step == self.schedule.steps
        return due and not self.divergence.left_out_now()

    # ------------------------------------------------------------------------------------- one optimizer step

    def total(self, count: torch.Tensor | int) -> torch.Tensor:
        """A number summed over all ranks."""
        return self.accelerator.reduce(torch.as_tensor(count, device=self.device), "sum")

    def share(self, rows: Sequence) -> Sequence:
        """This rank's rows of a step that all ranks take together; those of one process in the same order."""
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def parts(self, parts: Sequence, spare: Callable, exchange: bool = True) -> Iterator:
        """The micro-batches of an optimizer step; ranks exchange gradients once, in the last one's backward
        pass.

        Every rank runs the same number of forward and backward passes, as DDP and ZeRO need it. A rank with
        fewer micro-batches computes `spare()` more often, which counts nothing.

        Args:
            exchange: False when more parts of the same optimizer step follow in another call.
        """
        self.model.train()
        count = max_over_ranks(len(parts)) or 0
        for number in range(count):
            self.part_counts = float(number < len(parts))
            last = exchange and number == count - 1
            self.accelerator.sync_gradients = last
            # DeepSpeed's engine knows by itself when it exchanges
            with nullcontext() if last or self._engine else self.accelerator.no_sync(self.model):
                yield parts[number] if number < len(parts) else spare()
        self.accelerator.sync_gradients = True

    def backward(self, loss: torch.Tensor, groups: PromptGroups) -> None:
        """Add the gradient of a part's share of the loss.

        Args:
            loss: the part's sum over its items, divided by the items of the whole step on all ranks.
            groups: what it was computed on, for the report when it is not finite.
        """
        loss = loss * self.part_counts
        self.divergence.watch(loss, groups)
        self._losses += loss.detach()
        # ranks' gradients are averaged, but the shares of one mean add up; DeepSpeed would divide by its
        # accumulation steps
        more = {"scale_wrt_gas": False} if self._engine else {}
        self.accelerator.backward(loss * self.accelerator.num_processes, **more)

    def optimizer_step(self) -> None:
        """Clip, step, next learning rate. No step is made when its loss or gradient is not finite."""
        limit = self.config.max_grad_norm or math.inf  # 0 is no clipping
        self._norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        left_out = self.divergence.leaves_out(self._norm)
        if not self._engine:  # AdamW's kernel reads it, as it does for GradScaler; so the host need not know
            self.adam.found_inf = left_out.float()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self._steps_summed += 1

    def made_step(self) -> bool:
        """Whether the last optimizer step was made, not left out; waits for the device."""
        return not self.divergence.left_out_now()

    @property
    def grad_norm(self) -> float:
        """Of the last optimizer step, before clipping; waits for the device. NaN where an engine has none."""
        return math.nan if self._norm is None else float(self._norm)

    def skip_optimizer_steps(self, count: int) -> None:
        """Let the learning rate pass steps that are not made."""
        for _ in range(count):
            self.scheduler.step()

    def mean_loss(self) -> float:
        """Mean over the optimizer steps since the last call, over all ranks."""
        mean = self.total(self._losses).item() / max(1, self._steps_summed)
        self._losses, self._steps_summed = torch.zeros_like(self._losses), 0
        return mean

    # ---------------------------------------------------------------------------------------- stop and resume

    def save(self) -> None:
        """A checkpoint with all that a resume needs; the newest `save_total_limit` are kept."""
        if resumable():
            self.checkpoints.write(f"{self.run.unit}-{self.step}", self._write)
        self._drop_old()

    def _drop_old(self) -> None:
        self.checkpoints.keep(self.run.unit, self.config.save_total_limit, self.step)
        if self.accelerator.is_main_process:
            self.best.drop_forgotten([_best_of(path) for path in self.checkpoints.paths(self.run.unit)])

    def _write(self, folder) -> None:
        if self._engine:
            save_engine(self.model, folder / "engine")
        elif self.accelerator.is_main_process:
            torch.save(self.optimizer.state_dict(), folder / "optimizer.pt")
        for name, weights in self.weights.items():
            if not (self._engine and name == "trained"):  # the engine has written them
                save_weights(weights, folder, name)
        losses = self.accelerator.gather(self._losses[None]).tolist()  # of each rank, since the last log
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            progress = {"step": self.step, "best": self.best.found, "carried": self.carried,
                        "losses": losses, "steps_summed": self._steps_summed,
                        "scheduler": self.scheduler.state_dict(), "scaler": scaler and scaler.state_dict(),
                        "processes": self.accelerator.num_processes, "origins": self.run.origins,
                        "metrics_bytes": self.run.metrics_bytes()}
            (folder / PROGRESS).write_text(json.dumps(progress, indent=1))

    def resume(self) -> None:
        """With `resume` go back to the newest whole checkpoint, if there is one.

        Metrics, checkpoints and best weights of later steps are dropped: the run is going to make them again.
        """
        if self.resume_point is not None:
            self._read(*self.resume_point)
        if self.config.resume:
            self.run.rewind(self.resume_point.progress["metrics_bytes"] if self.resume_point else 0)
            self.run.rewind_samples(self.step if self.resume_point else -1)
        self.checkpoints.go_on_after(self.run.unit, self.step)
        self._drop_old()  # a run that was killed after its last checkpoint writes no other

    def _read(self, folder, progress: dict) -> None:
        if self._engine:
            load_engine(self.model, folder / "engine")
        else:
            with weights_only(folder):
                state = torch.load(folder / "optimizer.pt", map_location="cpu")
            self.optimizer.load_state_dict(state)
        for name, weights in self.weights.items():
            if not (self._engine and name == "trained"):
                load_weights(weights, folder, name)
        self.step, self.best.found, self.carried = progress["step"], progress["best"], progress["carried"]
        self._losses.fill_(progress["losses"][self.accelerator.process_index])
        self._steps_summed = progress["steps_summed"]
        self.scheduler.load_state_dict(progress["scheduler"])
        if progress["scaler"]:
            self.accelerator.scaler.load_state_dict(progress["scaler"])


def _best_of(checkpoint) -> dict | None:
    """The best weights that a checkpoint would go back to; None when it is damaged."""
    try:
        return json.loads((checkpoint / PROGRESS).read_text())["best"]
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _seed_of(seed: int, step: int, rank: int) -> int:
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**63


def _optimizer(model: torch.nn.Module, config) -> torch.optim.Optimizer:
    """AdamW over what is trained; weight decay spares biases and norms."""
    weights = trainable_weights(model).values()
    matrices = [weight for weight in weights if len(full_shape(weight)) > 1]
    vectors = [weight for weight in weights if len(full_shape(weight)) <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate,
                             eps=config.adam_eps, betas=(0.9, config.adam_beta2), fused=True)
