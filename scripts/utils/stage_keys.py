"""Configuration keys that all three stages have, or two of them. Imports no heavy library, so that `--help`
answers at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from utils.config import key, refuse_missing_file
from utils.errors import UserError
from utils.input_files import ROW_BYTES


@dataclass
class StageConfig:
    """The keys of every stage. Defaults are those of the reference task (OPT on TL;DR)."""

    section: ClassVar[str] = ""  # of YAML files: the one of SECTIONS that is for this stage
    belongs_to: ClassVar[dict] = {}  # a data key -> keys whose values are for that data set only
    notes: ClassVar[Sequence[str]] = ()  # what is to be said of how the keys were read

    output_dir: str = key("outputs/run/stage", "Folder of this run; must be new or empty unless `resume`.")
    resume: bool = key(False, "Continue from the newest checkpoint in `output_dir`.")
    allow_changes: bool = key(False, "With `resume`: go on although data, models, code or libraries are not "
                                     "what the run began with.")
    seed: int = key(0, "Seed of everything random.", low=0, high=2**32 - 1)
    on_bad_rows: str = key("error", "What to do with data rows that cannot be used: stop before training, or "
                           "skip them and write them to rejected_rows.jsonl.", choices=["error", "skip"])
    max_row_bytes: int = key(ROW_BYTES, "A larger row of a data file is a bad row. It is not kept in memory.",
                             unit="bytes", low=1000, high=10**9)
    max_dropped_share: float = key(0.2, "Stop when a larger share of a data set is dropped: completions that "
                                   "are too long, pairs of equal answers, and so on.", low=0.0, high=1.0)
    allow_overlap: bool = key(False, "Accept a prompt that is in two of training, validation and test data.",
                              source="detail 7")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="detail 1",
                                 low=8, high=10_000_000)
    per_device_batch_size: int = key(8, "Rows (prompt groups) in one forward pass.", unit="rows",
                                     low=1, high=100_000)
    learning_rate: float | None = key(None, "Peak learning rate; none: 3e-6 from 1B parameters on, more for "
                                      "a smaller model (docs/options.md).", source="detail 9", low=1e-12,
                                      high=1.0)
    adam_eps: float = key(1e-5, "Epsilon of AdamW.", source="detail 9", low=1e-20, high=1.0)
    adam_beta2: float = key(0.999, "Decay of AdamW's second moment.", source="PyTorch", low=0.0,
                            high=0.999999)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", low=0.0, high=100.0)
    warmup_steps: int = key(0, "Optimizer steps of linear warm-up.", unit="steps", low=0, high=10**8)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm; 0: no clipping.", low=0.0, high=1e12)
    lora_rank: int = key(0, "Train adapters of this rank in place of the weights; 0: train the weights.",
                         source="LoRA, 2106.09685", low=0, high=4096)
    lora_alpha: int = key(16, "Adapters are scaled by lora_alpha / lora_rank.", source="LoRA, 2106.09685",
                          low=1, high=65_536)
    load_in_4bit: bool = key(False, "Store the frozen weights under the adapters in 4 bits: an eighth of the "
                             "memory, rounded weights (needs lora_rank).", source="QLoRA, 2305.14314")
    save_adapters: bool = key(False, "With load_in_4bit: final/ holds the adapters alone, for peft, in place "
                              "of the merged model.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass: less memory, more "
                                       "time.")
    mixed_precision: str = key("no", "Arithmetic of the forward pass. Weights stay float32; with DeepSpeed, "
                               "those of its optimizer do.", choices=["no", "bf16", "fp16"])
    tf32: bool = key(False, "On a GPU, float32 matrix products round their inputs to 10 bits (TF32): "
                     "faster. With mixed_precision few products are left in float32.", source="PyTorch")
    compile_trunk: bool = key(False, "Compile the layers of what is trained with torch.compile; a line says "
                              "what it costs.", source="PyTorch")
    deepspeed: str | None = key(None, "DeepSpeed configuration: a file of configs/deepspeed/, or your own; "
                                "none: no DeepSpeed.", source="ZeRO, 1910.02054",
                                there=refuse_missing_file)
    save_total_limit: int = key(2, "Checkpoints kept in `checkpoints/`.", unit="checkpoints",
                                low=1, high=10_000)
    chat_template: str | None = key(None, "Jinja file with a chat template for conversations; none: that of "
                                    "the tokenizer, or the plain layout where it has none.")
    push_to_hub: str | None = key(None, "Repository user/name on the hub that final/ is uploaded to, private "
                                  "when it is new; none: nothing is uploaded.")
    report_to: list[str] = key(["tensorboard"], "Experiment trackers: tensorboard, wandb, ...; none: no "
                               "tracker.")

    def __post_init__(self):
        if self.load_in_4bit and not self.lora_rank:
            raise UserError("load_in_4bit: weights in 4 bits cannot be trained, so nothing could be without "
                            "adapters; give lora_rank too (the paper takes 64), or leave load_in_4bit out")
        # DeepSpeed's hooks and 4-bit layers are untested; recomputed layers are never compiled (torch 2.13)
        for other in ("deepspeed", "load_in_4bit", "gradient_checkpointing"):
            if self.compile_trunk and getattr(self, other):
                raise UserError(f"compile_trunk: it does not go together with {other}; leave one of them out")

    def without_effect(self) -> dict[str, str]:
        """The keys that act on nothing beside the values of the others, each with the reason.

        `parse_config` refuses a value other than the default for them, if the user gave it. A subclass adds
        its own keys.
        """
        idle = {} if self.lora_rank else {"lora_alpha": "lora_rank is 0, so there are no adapters"}
        if not self.load_in_4bit:
            idle["save_adapters"] = "it is for load_in_4bit, which is off"
        return idle if self.resume else idle | {"allow_changes": "it is for resume"}


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
