"""This project's side of each stage: what the scripts run, without their evaluations and checkpoints."""

import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainingArguments, set_seed
from trl import SFTConfig
from utils.models.ppo_models import load_models, prepare

import train_ppo
import train_reward
import train_sft
import utils.models.generation
import utils.rollout
from studies.benchmarks.shapes import PAD, VOCABULARY, small_tokenizer
from studies.benchmarks.tasks import (
    ADAM_EPS,
    KL_COEF,
    LEARNING_RATE,
    PPO_EPOCHS,
    RESPONSE_TOKENS,
    TEMPERATURE,
    Task,
    all_pairs,
)
from studies.benchmarks.turns import OneStepATurn, Turns
from utils.data.report import DataReport
from utils.distributed import my_share, world
from utils.models.loading import load_policy, load_scalar_model
from utils.rollout import Carried, collect_rollout, rollout_metrics
from utils.runs.divergence import Divergence
from utils.runs.run import Run
from utils.trainer import in_parts, training_arguments

# What is computed at once is about a thousand tokens, as the README advises for CPUs; it changes no result.
TOKENS = 1024  # micro_batch_tokens of SFT and reward
PROMPTS = 2  # per_device_batch_size of PPO
# responses have a fixed length: an EOS that no model emits
TOKENIZER = SimpleNamespace(eos_token_id=VOCABULARY, pad_token_id=PAD)


def sft(task: Task, turns: Turns) -> None:
    config = train_sft.SFTStageConfig(**_trainer_config(task, "sft"))
    run = Run(config, "sft", DataReport())
    rows = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])}
            for p, c in zip(task.prompts, task.completions, strict=True)]
    trainer = train_sft.SFTStageTrainer(
        model=load_policy(f"{task.folder}/policy"),
        args=training_arguments(config, run, SFTConfig, train_sampling_strategy="sequential", save_strategy="no",
                                dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
        train_dataset=Dataset.from_list(rows * task.repetitions),
        data_collator=partial(in_parts, collate=partial(train_sft.collate, pad_id=PAD, loss_on="completion"),
                              max_tokens=config.micro_batch_tokens),
        processing_class=small_tokenizer(), run=run, config=config, validation=None,
    )
    trainer.add_callback(OneStepATurn(turns, trainer, "tokens", lambda batch: (batch["segments"] >= 0).sum()))
    trainer.train()


def reward(task: Task, turns: Turns) -> None:
    config = train_reward.RewardStageConfig(**_trainer_config(task, "reward"))
    run = Run(config, "reward", DataReport())
    pairs = all_pairs(task.k)
    rows = [{"prompt": p, "completions": c, "pairs": pairs, "length": len(p) + sum(map(len, c))}
            for p, c in zip(task.prompts, task.completions, strict=True)]
    trainer = train_reward.RewardStageTrainer(
        model=load_scalar_model(f"{task.folder}/reward", "model"),
        args=training_arguments(config, run, TrainingArguments, train_sampling_strategy="sequential", save_strategy="no"),
        train_dataset=Dataset.from_list(rows * task.repetitions),
        data_collator=partial(in_parts, collate=partial(train_reward.collate, pad_id=PAD),
                              max_tokens=config.micro_batch_tokens),
        processing_class=small_tokenizer(), run=run, config=config, validation=None,
    )
    trainer.add_callback(OneStepATurn(turns, trainer, "pairs", lambda batch: len(batch["better"])))
    trainer.train()


def ppo(task: Task, turns: Turns) -> None:
    config = train_ppo.PPOStageConfig(
        **_stage_config(task), per_device_batch_size=PROMPTS, model=f"{task.folder}/policy", reward_model=f"{task.folder}/reward",
        prompts_per_update=len(task.prompts), responses_per_prompt=task.k, ppo_epochs=PPO_EPOCHS,
        total_episodes=len(task.prompts) * task.k * task.repetitions, max_new_tokens=RESPONSE_TOKENS,
        temperature=TEMPERATURE, kl_coef=KL_COEF,
    )
    set_seed(config.seed)
    accelerator = Accelerator(cpu=True)
    models, optimizer, scheduler = prepare(load_models(config), config, accelerator)
    scored, prompts = [], my_share(task.prompts)
    models.reward_model.base_model.register_forward_hook(lambda *_: scored.append(1))
    carried, divergence = Carried(config.kl_coef), Divergence(None, TOKENIZER, accelerator)
    if turns.clock:
        for name, part in (("sample", "generation"), ("judged", "scoring"), ("pack", "data")):
            turns.clock.watch(utils.rollout, name, part)
        turns.clock.watch(train_ppo, "ppo_update", "update")
    for update in range(task.repetitions):
        if not turns.wait():
            return
        batches = collect_rollout(models, TOKENIZER, prompts, config, update, accelerator, carried)
        figures = rollout_metrics(batches, accelerator)
        figures |= train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, divergence,
                                         random.Random(update))
        counts = {"episodes": sum(len(batch.ended) for batch in batches),
                  "tokens": sum(batch.rollout.response_mask.sum().item() for batch in batches)}
        turns.report(counts, epochs=figures["policy/epochs"], scored=bool(scored))
        scored.clear()


def generation(task: Task, turns: Turns) -> None:
    policy = load_policy(f"{task.folder}/policy").eval()
    if turns.clock:
        turns.clock.watch(utils.models.generation, "sample", "generation")
    prompts = my_share(task.prompts)
    number = len(prompts) * task.k
    while turns.wait():
        samples = utils.models.generation.sample(policy, prompts, k=task.k, max_new_tokens=RESPONSE_TOKENS, temperature=TEMPERATURE,
                                          seeds=list(range(number)), eos_id=TOKENIZER.eos_token_id, pad_id=PAD,
                                          batch_size=len(prompts))
        turns.report({"tokens": sum(map(len, samples.responses))})


def _stage_config(task: Task) -> dict:
    return {"output_dir": str(Path(task.folder) / f"ours-{task.stage}"), "learning_rate": LEARNING_RATE,
            "adam_eps": ADAM_EPS, "report_to": ["none"]}


def _trainer_config(task: Task, stage: str) -> dict:
    return {**_stage_config(task), "model": f"{task.folder}/policy", "max_steps": task.repetitions, "logging_steps": 1,
            "per_device_batch_size": len(task.prompts) // world().num_processes, "micro_batch_tokens": TOKENS}
