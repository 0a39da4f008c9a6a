"""What the two stages on transformers' `Trainer` share: prompt-group batches, one mean per step, our logging."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler

from utils.config import StageConfig, UserError, key
from utils.distributed import agreed, gradients_of_part
from utils.models.prompt_groups import PromptGroups, micro_batches
from utils.runs.checkpoints import CheckpointFolder, load_weights
from utils.runs.divergence import Divergence
from utils.runs.run import Run
from utils.zero import resumable, save_pretrained, use_engine


@dataclass
class TrainerStageConfig(StageConfig):
    """What a stage on `Trainer` needs besides."""

    gradient_accumulation_steps: int = key(1, "Micro-batches summed into one optimizer step.", unit="micro-batches", low=1)
    micro_batch_tokens: int | None = key(None, "A batch of more tokens is computed in parts, with the same result: less memory, "
                                         "and on a CPU less time (1024); none: at once.", unit="tokens", low=1)
    max_steps: int = key(-1, "Optimizer steps, in place of epochs; -1: by epochs.", unit="steps", low=-1)
    logging_steps: int = key(5, "Metrics are logged every so many steps.", unit="steps", low=1)

    def __post_init__(self):
        if self.max_steps == 0:  # `Trainer` takes it for -1
            raise UserError("max_steps: 0 steps train nothing; give 1 or more, or -1 to train num_train_epochs")


class GroupLossMixin:
    """Puts in front of a `Trainer`: the loss is one mean over all items of an optimizer step (detail 12).

    A batch holds its parts (`in_parts`), dicts of tensors with `items`, the number of tokens (SFT) or pairs (reward) in
    it; the model's forward returns the *sum* of the loss over them. Dividing by the items of the whole step, over
    parts, micro-batches and ranks, gives one mean, whatever the lengths are.
    """

    def __init__(self, *args, loss_sum, run: Run, **kwargs):
        super().__init__(*args, **kwargs)
        self.run = run
        self.evaluated = (None, None)  # step and figures
        self.divergence = Divergence(run, self.processing_class, self.accelerator)
        self.progress = RunCallback(run, lambda: self.model_wrapped, self.divergence)
        self.checkpoints = CheckpointFolder(run)
        self.model_accepts_loss_kwargs = True  # the loss below is already divided, over micro-batches too
        # the sampler draws its order from torch's own state, which dropout moves on each rank as far as its rows are long
        self.accelerator.rng_types = ["torch"]
        self.remove_callback(PrinterCallback)
        self.add_callback(self.progress)
        group_forward(self.model, loss_sum)

    def evaluate(self, *args, **kwargs):
        """`figures()` as the evaluation, once for each step: `Trainer` asks twice at the last one."""
        if self.evaluated[0] != self.state.global_step:
            figures = {f"eval_{name}": value for name, value in self.figures().items()}
            self.log(dict(figures))  # a copy: the epoch is added to it
            shown = ", ".join(f"{name.removeprefix('eval_')} {value:.3f}" for name, value in figures.items())
            self.run.say(f"step {self.state.global_step}, validation: {shown}")
            self.evaluated = (self.state.global_step, figures)
        return self.evaluated[1]

    def rows_trained(self) -> int:
        """Rows of all ranks since this process began: not those before a `--resume`, which its seconds do not hold."""
        steps = self.state.global_step - self.progress.first_step
        return steps * self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def _get_train_sampler(self, *args):
        sampler = super()._get_train_sampler(*args)
        if isinstance(sampler, LengthGroupedSampler):
            # rows of like length in a step of all ranks, which then are those that one process would take
            sampler.batch_size *= self.args.world_size
            sampler.lengths = list(sampler.lengths)  # else a read from the disk for each row
        return sampler

    def _run_epoch(self, *args, **kwargs):
        # after a resume at the last step, in the middle of an epoch, `Trainer` would make one more
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples, device):
        count = torch.stack([batch["items"] for batch in batch_samples]).sum().to(device)
        return self.accelerator.gather(count).sum()

    def training_step(self, model, inputs, num_items_in_batch=None):
        ends_step = self.accelerator.sync_gradients  # false for all but the last of gradient_accumulation_steps batches
        parts = [(part, num_items_in_batch) for part in inputs["parts"]]
        if self.is_deepspeed_enabled:  # all ranks must compute as many; what is computed once more counts nothing
            parts += [(parts[-1][0], math.inf)] * (agreed(len(parts)) - len(parts))
        losses = []
        for number, (part, items) in enumerate(parts, start=1):
            with gradients_of_part(self.accelerator, model, last=ends_step and number == len(parts)):
                losses.append(super().training_step(model, part, items))
        return sum(losses)

    def _get_grad_norm(self, model, grad_norm=None):
        """`Trainer`'s, which it asks for before each step."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.divergence.step = self.state.global_step + 1
        if self.divergence.leaves_out(norm):
            model.zero_grad()  # to None: at a gradient of 0 AdamW would still move
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._tr_loss.zero_()  # `Trainer` subtracts it from itself, and a NaN stays

    def _save_checkpoint(self, model, trial):
        """`Trainer`'s, but written aside."""
        best = self.state.best_global_step and self.checkpoints.folder / f"checkpoint-{self.state.best_global_step}"
        self.state.best_model_checkpoint = best and str(best)
        self.checkpoints.write(f"checkpoint-{self.state.global_step}", self._write_checkpoint)
        self.checkpoints.keep("checkpoint", self.args.save_total_limit, besides=best)

    def _write_checkpoint(self, folder):
        save_pretrained(self.model, folder)
        if resumable():
            self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        if self.args.should_save:
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_best_model(self):
        load_weights(self.model, Path(self.state.best_model_checkpoint))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        items = inputs.pop("items")
        total = model(**inputs)
        if num_items_in_batch is None:
            num_items_in_batch = items
        # every rank's gradient is averaged over the ranks afterwards
        loss = total / num_items_in_batch * self.accelerator.num_processes
        self.divergence.watch(loss, PromptGroups(**{name: inputs[name] for name in PromptGroups._fields}))
        return loss


def in_parts(rows, collate, max_tokens: int | None) -> dict:
    """Rows with a `length` as the parts that are computed one after the other, each `collate(rows)`; and `items` of all."""
    parts = [collate([rows[i] for i in part]) for part in micro_batches([row["length"] for row in rows], max_tokens)]
    return {"parts": parts, "items": sum(part["items"] for part in parts)}


def group_forward(model, loss_sum):
    """Let `model(**batch)` return `loss_sum(model, groups, **rest)`.

    Only the instance's forward is replaced, so that distributed wrappers, which hook the forward, work as
    ever and what is saved stays a stock checkpoint.
    """
    def forward(**batch):
        groups = PromptGroups(**{name: batch.pop(name) for name in PromptGroups._fields})
        return loss_sum(model, groups, **batch)

    model.forward = forward


class RunCallback(TrainerCallback):
    """A progress bar, metrics.jsonl, and a clean stop; replaces the default printing."""

    def __init__(self, run: Run, wrapped, divergence: Divergence):
        self.run, self.wrapped, self.divergence, self.bar, self.first_step = run, wrapped, divergence, None, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = state.global_step
        use_engine(self.wrapped())
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.run.stage, unit="step",
                        disable=not state.is_world_process_zero)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)
        self.run.stop_signal = agreed(self.run.stop_signal)
        if self.run.stop_signal is not None:
            control.should_save = control.should_training_stop = True
        if self.divergence.row:  # the weights may be broken
            control.should_save = control.should_evaluate = False

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}")
            self.run.metrics(state.global_step, {f"{self.run.stage}/{name}": logs[name]
                                                 for name in ("loss", "grad_norm", "learning_rate")})
        evaluated = {name.replace("eval_", "eval/"): value for name, value in logs.items() if name.startswith("eval_")}
        if evaluated:
            self.run.metrics(state.global_step, evaluated)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        self.divergence.end()


def training_arguments(config, run: Run, kind, **more):
    """`TrainingArguments` (or a subclass) with what the stages have in common."""
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run.folder / "tensorboard")
    return kind(
        output_dir=str(run.folder / "checkpoints"),
        seed=config.seed,
        per_device_train_batch_size=config.per_device_batch_size,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        adam_epsilon=config.adam_eps,
        adam_beta2=config.adam_beta2,
        weight_decay=config.weight_decay,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_steps,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.mixed_precision == "bf16",
        fp16=config.mixed_precision == "fp16",
        logging_steps=config.logging_steps,
        logging_nan_inf_filter=False,  # which would log the loss before it broke, again and again
        save_total_limit=config.save_total_limit,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        ddp_find_unused_parameters=False,  # every weight has a gradient; looking for others costs a pass over the graph
        use_cpu=not torch.cuda.is_available(),  # else several processes form no group, see `world`
        dataloader_pin_memory=torch.cuda.is_available(),
        **more,
    )


def newest_checkpoint(run: Run) -> str | None:
    """The checkpoint that a run with `resume` goes on from; None for its beginning, and for a new run."""
    newest = CheckpointFolder(run).newest("checkpoint") if run.config.resume else None
    return newest and str(newest)
