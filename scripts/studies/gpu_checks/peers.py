"""The other side of each comparison: trl's trainers, transformers' `generate` and `generate_batch`, as users
run them.

trl trains float32 weights under bfloat16 autocast without gradient checkpointing. Its micro-batches hold as
many tokens as ours. cuDNN's attention kernel, which our models switch off, is on in the peers' turns.
"""

import os
import threading
import traceback
from itertools import combinations
from queue import Queue

import torch
from datasets import Dataset, concatenate_datasets
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback

from studies.gpu_checks.device import DEVICE, ON_CARD, arithmetic, now
from studies.gpu_checks.ours import (
    ADAM_EPS,
    CLIP_NORM,
    LEARNING_RATE,
    PAD,
    PASS_TOKENS,
    TEMPERATURE,
    random_model,
    weights_of,
)
from utils.models.loading import with_our_heads
from utils.rollouts.continuous import engine_settings
from utils.rollouts.vllm_engine import sample_by_vllm

PACKED_TOKENS = (
    2048 if ON_CARD else 64
)  # OPT has no more positions, and counts them along the whole packed row
STEPS = 1000  # more than there are turns
EPOCH = 10  # steps
PATIENCE = 120  # seconds for a trainer to end


class StepByStep(TrainerCallback):
    """Lets a `Trainer` that runs in a thread of its own do one step at a time."""

    def __init__(self):
        self.allowed, self.finished, self.stop, self.loss = threading.Semaphore(0), Queue(), False, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.allowed.acquire()
        control.should_training_stop = self.stop

    def on_step_end(self, args, state, control, **kwargs):
        now()  # wait for the card
        control.should_log = state.global_step == 1  # a log waits for the card: users log, but not each step

    def on_log(self, args, state, control, logs, **kwargs):
        self.loss = logs.get("loss", self.loss)

    def on_step_begin(self, args, state, control, **kwargs):
        """A turn ends when the next step's batch is fetched, so that each turn has one fetch in it."""
        if state.global_step:
            self.finished.put(None)
            self.allowed.acquire()
            control.should_training_stop = self.stop


class TrlSide:
    """A trainer of trl, a step at a time."""

    def __init__(self, trainer):
        self.turns = StepByStep()
        trainer.add_callback(self.turns)
        self.thread = threading.Thread(target=self._train, args=(trainer,), daemon=True)
        self.thread.start()

    def _train(self, trainer):
        try:
            trainer.train()
        except BaseException:
            self.turns.finished.put(traceback.format_exc())
        else:
            self.turns.finished.put("the trainer ended" if not self.turns.stop else None)

    def step(self) -> None:
        """Raises RuntimeError with the trainer's traceback when it failed."""
        torch.backends.cuda.enable_cudnn_sdp(True)
        self.turns.allowed.release()
        if problem := self.turns.finished.get():
            raise RuntimeError(problem)

    def first_loss(self) -> float | None:
        return self.turns.loss

    def close(self) -> None:
        self.turns.stop = True
        self.turns.allowed.release()
        self.thread.join(PATIENCE)
        del self.turns


def reward(config, batch, precision, folder) -> TrlSide:
    """trl's RewardTrainer: each pair is two rows that both hold the prompt."""
    from trl import RewardConfig, RewardTrainer

    pairs = [
        {"chosen_ids": prompt + group[a], "rejected_ids": prompt + group[b]}
        for prompt, group in zip(batch.prompts, batch.completions, strict=True)
        for a, b in combinations(range(len(group)), 2)
    ]
    longest = max(max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs)
    size = divisor(len(pairs), PASS_TOKENS // (2 * longest))
    return TrlSide(
        RewardTrainer(
            model=random_model(config, scalar=True),
            processing_class=small_tokenizer(),
            args=RewardConfig(**arguments(folder, precision, size, len(pairs) // size), max_length=None),
            train_dataset=repeated(pairs),
        )
    )


def sft(config, batch, precision, folder, packing=False) -> TrlSide:
    """trl's SFTTrainer with the loss on completions.

    Packed, a micro-batch is one row of PACKED_TOKENS: trl lays the rows of a micro-batch into one, and OPT
    counts its positions along it. OPT hands no position ids to its mask: examples of a row see each other.
    """
    from trl import SFTConfig, SFTTrainer, pack_dataset

    rows = [
        {"input_ids": p + c[0], "labels": [-100] * len(p) + c[0]}
        for p, c in zip(batch.prompts, batch.completions, strict=True)
    ]
    size, length = divisor(len(rows), PASS_TOKENS // max(len(row["input_ids"]) for row in rows)), None
    if packing:
        rows, size, length = pack_dataset(Dataset.from_list(rows), PACKED_TOKENS).to_list(), 1, PACKED_TOKENS
    return TrlSide(
        SFTTrainer(
            model=random_model(config, scalar=False),
            processing_class=small_tokenizer(),
            args=SFTConfig(
                **arguments(folder, precision, size, len(rows) // size),
                packing=packing,
                max_length=length,
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=repeated(rows),
        )
    )


def packed_sft(config, batch, precision, folder) -> TrlSide:
    return sft(config, batch, precision, folder, packing=True)


class Sampler:
    """A stock model that samples K responses of a fixed length for each prompt."""

    def __init__(self, config, batch, precision, folder, length):
        self.policy = random_model(config, scalar=False).to(weights_of(precision)).eval()
        self.prompts, self.k, self.length = batch.prompts, len(batch.completions[0]), length
        self.precision = precision

    def first_loss(self) -> None:
        return None

    def close(self) -> None:
        del self.policy


class Generate(Sampler):
    """transformers' `generate`, which repeats the prompt for each of its K samples."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.policy.generation_config.eos_token_id = None  # responses of a fixed length
        self.batch = small_tokenizer().pad({"input_ids": self.prompts}, return_tensors="pt").to(DEVICE)

    def step(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(True)
        with torch.no_grad(), arithmetic(self.precision):
            self.policy.generate(
                **self.batch,
                do_sample=True,
                num_return_sequences=self.k,
                max_new_tokens=self.length,
                min_new_tokens=self.length,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                pad_token_id=PAD,
            ).tolist()


class GenerateBatch(Sampler):
    """transformers' continuous batching, which forks the K samples of a prompt. No autocast holds in its
    thread. It starts anew in each turn, as in each update of PPO.
    """

    def step(self) -> None:
        """Raises RuntimeError when it leaves a response out."""
        torch.backends.cuda.enable_cudnn_sdp(True)
        settings = GenerationConfig(
            do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=self.length,
            num_return_sequences=self.k, eos_token_id=-1, pad_token_id=PAD)
        found = self.policy.generate_batch(
            self.prompts, settings, engine_settings(self.prompts, self.k, self.length)).values()
        if (tokens := sum(len(one.generated_tokens) for one in found)) != self.tokens:
            raise RuntimeError(f"{tokens} tokens, not {self.tokens}")

    @property
    def tokens(self) -> int:
        return len(self.prompts) * self.k * self.length


class Vllm(Sampler):
    """vLLM as each update of PPO calls it: it is given the weights and forgets what it has cached.

    vLLM wants a real token as the end: PAD, which random weights hardly ever sample.
    """

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        with_our_heads(self.policy)

    def step(self) -> None:
        """Raises RuntimeError when responses that ended are more than one in a hundred tokens short."""
        found = sample_by_vllm(
            self.policy,
            self.prompts,
            k=self.k,
            max_new_tokens=self.length,
            temperature=TEMPERATURE,
            seed=0,
            eos_id=PAD,
            longest_prompt=max(map(len, self.prompts)),
            batch_size=len(self.prompts),
        )
        if (tokens := sum(map(len, found.responses))) < 0.99 * (whole := len(found.responses) * self.length):
            raise RuntimeError(f"{tokens} tokens, not {whole}")


PEERS = {
    ("trl", "reward"): reward,
    ("trl", "sft"): sft,
    ("trl, packed", "sft"): packed_sft,
    ("generate", "sampling"): Generate,
    ("generate_batch", "sampling"): GenerateBatch,
}


def arguments(folder, precision, size, accumulated) -> dict:
    """As our side, with everything off that trl does besides training."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # of the trainer before
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulated,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "adam_epsilon": ADAM_EPS,
        "max_grad_norm": CLIP_NORM,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_steps": 2 * STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "gradient_checkpointing": False,
        "bf16": precision == "bf16",
        "use_cpu": not ON_CARD,
        "disable_tqdm": True,
        "dataloader_pin_memory": ON_CARD,
    }


def repeated(rows: list[dict]) -> Dataset:
    """The same rows for every step, in one epoch: a new epoch would begin with a new data loader."""
    return concatenate_datasets([Dataset.from_list(rows)] * EPOCH)


def divisor(items: int, most: int) -> int:
    """The largest divisor of `items` up to `most`: micro-batches of one size."""
    return next(size for size in range(max(1, min(items, most)), 0, -1) if items % size == 0)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens alone: all data is given as token ids, and trainers ask for nothing else."""
    words = {"<s>": 0, "<pad>": PAD, "</s>": 2}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<s>")),
        pad_token="<pad>",
        eos_token="</s>",
        padding_side="left",
    )
