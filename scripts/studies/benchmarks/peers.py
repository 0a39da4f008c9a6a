"""The other side of each stage: what a user would run in place of this project, with the settings that are
fastest here.

All of them train in float32 without gradient checkpointing (trl's defaults are bfloat16 and with it, which
are slower here), log once a step as ours does, and neither evaluate nor save. Batches are those of our side,
in the same order.

The processes of PPO run in the environment of requirements-bench.txt, so nothing is imported here that it has
not.
"""

import os

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

from studies.benchmarks.shapes import PAD, small_tokenizer
from studies.benchmarks.tasks import (
    ADAM_EPS,
    KL_COEF,
    LEARNING_RATE,
    PACKED_TOKENS,
    PPO_EPOCHS,
    RESPONSE_TOKENS,
    ROWS,
    TEMPERATURE,
    Task,
    all_pairs,
    whole_share,
)
from studies.benchmarks.turns import OneStepATurn, Turns


def reward(task: Task, turns: Turns) -> None:
    """trl's RewardTrainer: each pair is two rows that both hold the prompt."""
    from trl import RewardConfig, RewardTrainer

    pairs = [{"chosen_ids": prompt + group[b], "rejected_ids": prompt + group[w]}
             for prompt, group in zip(task.prompts, task.completions, strict=True)
             for b, w in all_pairs(task.k)]
    rows = whole_share(len(pairs), ROWS)
    trainer = RewardTrainer(
        model=_load(AutoModelForSequenceClassification, task, "reward"),
        args=RewardConfig(**_arguments(task, rows, len(pairs) // rows), max_length=None),
        train_dataset=Dataset.from_list(pairs * task.repetitions), processing_class=small_tokenizer(),
    )
    trainer.add_callback(OneStepATurn(turns, trainer, "pairs", lambda batch: len(batch["input_ids"]) // 2))
    trainer.train()


def sft(task: Task, turns: Turns) -> None:
    """trl's SFTTrainer with the loss on completions; packed (`packing`, best-fit decreasing) where the peer
    is so called.

    Packed, it is not quite the same algorithm: OPT in transformers does not hand the restarting position ids
    to its mask, and on a CPU there is no attention kernel that would read them, so an example sees those
    before it in its row. (Its loss is not compared with ours.) One packed row is a micro-batch, since trl
    lays those of a micro-batch into one row, and attention over it grows with the square.
    """
    from trl import SFTConfig, SFTTrainer, pack_dataset

    examples = [{"input_ids": p + c[0], "labels": [-100] * len(p) + c[0]}
                for p, c in zip(task.prompts, task.completions, strict=True)]
    packed = task.peer == "SFTTrainer, packed"
    rows, size = examples, whole_share(len(examples), ROWS)
    if packed:
        length = max(PACKED_TOKENS, *(len(example["input_ids"]) for example in examples))
        rows, size = pack_dataset(Dataset.from_list(examples), length).to_list(), 1
    trainer = SFTTrainer(
        model=_load(AutoModelForCausalLM, task, "policy"),
        args=SFTConfig(**_arguments(task, size, len(rows) // size), packing=packed,
                       max_length=length if packed else None, dataset_kwargs={"skip_prepare_dataset": True}),
        train_dataset=Dataset.from_list(rows * task.repetitions), processing_class=small_tokenizer(),
    )
    # without padding there is no mask
    trainer.add_callback(OneStepATurn(turns, trainer, "tokens",
                                      lambda batch: batch.get("attention_mask",
                                                              torch.ones_like(batch["input_ids"])).sum()))
    trainer.train()


def generation(task: Task, turns: Turns) -> None:
    """transformers' `generate`, which repeats the prompt for each of its K samples."""
    policy = _load(AutoModelForCausalLM, task, "policy").eval()
    policy.generation_config.eos_token_id = None  # responses of a fixed length
    batch = small_tokenizer().pad({"input_ids": task.prompts}, return_tensors="pt")
    if turns.clock:
        turns.clock.watch(policy, "generate", "generation")
    while turns.wait():
        with torch.no_grad():
            found = policy.generate(**batch, do_sample=True, num_return_sequences=task.k,
                                    max_new_tokens=RESPONSE_TOKENS,
                                    temperature=TEMPERATURE, top_k=0, top_p=1.0, pad_token_id=PAD)
        turns.report({"tokens": found[:, batch["input_ids"].shape[1] :].numel()})


def ppo(task: Task, turns: Turns) -> None:
    """trl's last PPOTrainer. It samples one response a prompt, so that each prompt is given K times."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    episodes = len(task.prompts) * task.k
    rows = whole_share(episodes, ROWS)
    policy = _load(AutoModelForCausalLM, task, "policy")
    trainer = PPOTrainer(
        args=PPOConfig(
            **_arguments(task, rows, episodes // rows), total_episodes=episodes * task.repetitions,
            num_ppo_epochs=PPO_EPOCHS, response_length=RESPONSE_TOKENS, temperature=TEMPERATURE,
            kl_coef=KL_COEF,
            num_sample_generations=0, missing_eos_penalty=1.0,
        ),
        processing_class=small_tokenizer(), model=policy,
        ref_model=_load(AutoModelForCausalLM, task, "policy"),
        reward_model=_load(AutoModelForSequenceClassification, task, "reward"),
        value_model=_load(AutoModelForSequenceClassification, task, "reward"),
        train_dataset=Dataset.from_list([{"input_ids": prompt} for prompt in task.prompts
                                         for _ in range(task.k)]),
    )
    if turns.clock:
        turns.clock.watch(ppo_trainer, "batch_generation", "generation")
        turns.clock.watch(ppo_trainer, "get_reward", "scoring")
        turns.clock.watch(ppo_trainer, "forward", lambda: "update" if torch.is_grad_enabled() else "scoring")
        turns.clock.watch(trainer.accelerator, "backward", "update")
        turns.clock.watch(trainer.optimizer, "step", "update")
    scored = []
    trainer.reward_model.base_model.register_forward_hook(lambda *_: scored.append(1))
    trainer.add_callback(OneUpdateATurn(turns, trainer, scored))
    trainer.train()


class OneUpdateATurn(TrainerCallback):
    """Makes an update of trl's PPO a repetition: all from the end of one to the end of the next."""

    def __init__(self, turns: Turns, trainer, scored: list):
        self.turns, self.trainer, self.scored, self.tokens, self.episodes = turns, trainer, scored, 0, 0
        generate = trainer.policy_model.generate

        def counted(*args, **kwargs):
            found = generate(*args, **kwargs)
            self.tokens += found.sequences[:, kwargs["input_ids"].shape[1] :].numel()
            return found

        trainer.policy_model.generate = counted

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.wait()

    def on_step_end(self, args, state, control, **kwargs):
        self.turns.report({"episodes": state.episode - self.episodes, "tokens": self.tokens},
                          epochs=args.num_ppo_epochs,
                          scored=bool(self.scored))
        self.tokens, self.episodes = 0, state.episode
        self.scored.clear()
        if not self.turns.wait():
            raise SystemExit  # its loop has no other end before the last update


def _load(kind, task: Task, name: str):
    return kind.from_pretrained(f"{task.folder}/{name}", dtype=torch.float32, attn_implementation="sdpa")


def _arguments(task: Task, rows: int, accumulated: int) -> dict:
    """As `training_arguments` of our side."""
    more = ({} if task.stage == "ppo" else {"lr_scheduler_type": "cosine",
                                            "train_sampling_strategy": "sequential",
                                            "max_steps": task.repetitions})
    return {
        "output_dir": f"{task.folder}/theirs-{task.stage}", "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": accumulated, "learning_rate": LEARNING_RATE, "adam_epsilon": ADAM_EPS,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False, **more,
    }
