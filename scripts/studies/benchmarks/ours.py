"""This project's side of each stage: the loops of the scripts, without their evaluations and checkpoints."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from accelerate import PartialState
from datasets import Dataset
from transformers import set_seed

import train_ppo
import train_reward
import train_sft
import utils.models.generation
import utils.rollouts.episodes
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
from studies.benchmarks.turns import Turns
from utils.data.report import DataReport
from utils.loop import Loop, Schedule
from utils.models.heads import head_scores
from utils.models.loading import load_policy, load_scalar_model
from utils.models.outputs import GroupModel, supervised_outputs
from utils.models.parents import Parent
from utils.models.policy_value import load_models
from utils.rewards.rewards import open_rewards
from utils.runs.run import Run

# What is computed at once is about a thousand tokens, as the docs advise for CPUs; it changes no result.
TOKENS = 1024  # micro_batch_tokens of SFT and reward
PROMPTS = 2  # per_device_batch_size of PPO
# responses have a fixed length: an EOS that no model emits
TOKENIZER = SimpleNamespace(eos_token_id=VOCABULARY, pad_token_id=PAD)
NEVER = 10**9  # steps between evaluations and checkpoints


class NoMoreTurns(Exception):
    """The benchmark has asked for its last repetition."""


class TurnRun(Run):
    """A run whose metrics of each step end one repetition and wait for the next."""

    def __init__(self, config, stage: str, turns: Turns):
        super().__init__(config, stage, DataReport())
        self.turns, self.counts = turns, Counter()

    def metrics(self, step, values):
        loss = values.get(f"{self.stage}/loss")
        figures = {"loss": loss} if loss is not None else {"epochs": values["policy/epochs"],
                                                           "scored": self.counts.pop("scored", 0) > 0}
        self.turns.report(dict(self.counts), **figures)
        self.counts.clear()
        if not self.turns.wait():
            raise NoMoreTurns


def sft(task: Task, turns: Turns) -> None:
    config = train_sft.SFTStageConfig(**_epoch_config(task))
    rows = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])}
            for p, c in zip(task.prompts, task.completions, strict=True)]
    policy = load_policy(Parent("model", f"{task.folder}/policy"))
    model = GroupModel(policy, supervised_outputs)
    run = TurnRun(config, "sft", turns)
    loop = Loop(run, model, small_tokenizer(), config.schedule(len(rows)))
    _count(model, run, lambda groups: {"tokens": int((groups.segments >= 0).sum())})
    _run(train_sft, loop, turns, lambda: train_sft.train(loop, Dataset.from_list(rows), None))


def reward(task: Task, turns: Turns) -> None:
    config = train_reward.RewardStageConfig(**_epoch_config(task))
    pairs = all_pairs(task.k)
    rows = [{"prompt": p, "completions": c, "pairs": pairs, "length": len(p) + sum(map(len, c))}
            for p, c in zip(task.prompts, task.completions, strict=True)]
    model = GroupModel(load_scalar_model(Parent("model", f"{task.folder}/reward")), head_scores)
    run = TurnRun(config, "reward", turns)
    loop = Loop(run, model, small_tokenizer(), config.schedule(len(rows)))
    _count(model, run, lambda groups: {"pairs": len(groups.end_columns) // task.k * len(pairs)})
    _run(train_reward, loop, turns, lambda: train_reward.train(loop, Dataset.from_list(rows), None))


def _run(stage, loop: Loop, turns: Turns, train) -> None:
    if turns.clock:
        for name in ("rows_at", "collate"):
            turns.clock.watch(stage, name, "data")
        turns.clock.watch(loop.module, "outputs", "update")
        for name in ("backward", "optimizer_step"):
            turns.clock.watch(loop, name, "update")
    turns.wait()
    try:
        train()
    except NoMoreTurns:
        return


def _count(model, run: TurnRun, count) -> None:
    """Count what is in each forward pass."""
    model.register_forward_pre_hook(lambda module, args: run.counts.update(count(args[0])))


def ppo(task: Task, turns: Turns) -> None:
    config = train_ppo.PPOStageConfig(
        **_stage_config(task), per_device_batch_size=PROMPTS, model=f"{task.folder}/policy",
        reward_model=f"{task.folder}/reward", prompts_per_update=len(task.prompts),
        responses_per_prompt=task.k,
        ppo_epochs=PPO_EPOCHS, total_episodes=len(task.prompts) * task.k * (task.repetitions + 1),
        max_new_tokens=RESPONSE_TOKENS, temperature=TEMPERATURE, kl_coef=KL_COEF, eval_steps=NEVER,
    )
    set_seed(config.seed)
    policy = Parent("model", config.model)
    models = load_models(policy, open_rewards(config, policy), config)
    run = TurnRun(config, "ppo", turns)
    loop = Loop(run, models.trained, TOKENIZER, Schedule(config.updates, config.updates * config.ppo_epochs,
                                                         "linear"))
    loop.carried = {"kl_coef": config.kl_coef}
    models.rewards.models[0].base_model.register_forward_hook(lambda *_: run.counts.update({"scored": 1}))
    measured = utils.rollouts.episodes.Episodes.measure

    def measure(episodes, model):
        values = measured(episodes, model)
        run.counts["episodes"], run.counts["tokens"] = (len(episodes.responses),
                                                        int(episodes.response_mask.sum()))
        return values

    utils.rollouts.episodes.Episodes.measure = measure
    if turns.clock:
        turns.clock.watch(utils.rollouts.episodes, "sample", "generation")
        turns.clock.watch(utils.rollouts.episodes, "pack", "data")
        turns.clock.watch(utils.rollouts.episodes.Episodes, "measure", "scoring")
        turns.clock.watch(train_ppo, "optimise", "update")
    posts = train_ppo.Posts(task.prompts, None, None, None)
    turns.wait()
    try:
        train_ppo.train(loop, models, posts, None, None)
    except NoMoreTurns:
        return


def generation(task: Task, turns: Turns) -> None:
    policy = load_policy(Parent("model", f"{task.folder}/policy")).eval()
    if turns.clock:
        turns.clock.watch(utils.models.generation, "sample", "generation")
    with PartialState().split_between_processes(task.prompts) as prompts:
        seeds = list(range(len(prompts) * task.k))
    while turns.wait():
        samples = utils.models.generation.sample(
            policy, prompts, k=task.k, max_new_tokens=RESPONSE_TOKENS, temperature=TEMPERATURE, seeds=seeds,
            eos_id=TOKENIZER.eos_token_id, pad_id=PAD, batch_size=len(prompts))
        turns.report({"tokens": sum(map(len, samples.responses))})


def _stage_config(task: Task) -> dict:
    return {"output_dir": str(Path(task.folder) / f"ours-{task.stage}"), "learning_rate": LEARNING_RATE,
            "adam_eps": ADAM_EPS, "report_to": ["none"], "save_steps": NEVER}


def _epoch_config(task: Task) -> dict:
    processes = PartialState(cpu=True).num_processes
    return {**_stage_config(task), "model": f"{task.folder}/policy", "max_steps": task.repetitions + 1,
            "logging_steps": 1, "eval_steps": NEVER, "per_device_batch_size": len(task.prompts) // processes,
            "micro_batch_tokens": TOKENS}
