"""How long a stage takes: the operations that it needs (planning/flops.py), by what the devices do of them."""

from typing import NamedTuple

from planning import flops
from planning.fit import Setup, held_models


class Duration(NamedTuple):
    """Of a whole stage over `total` rows (SFT: examples, reward model: prompts with K completions) or episodes (PPO)."""

    tokens: int  # in one micro-batch of all processes
    flops: int  # of the stage
    hours: float | None  # None: nobody said how fast the devices are


def needed_flops(stage: str, setup: Setup, total: int, epochs: int) -> int:
    """Operations of a stage; evaluations are not in it."""
    train = flops.TRAIN_ADAPTERS if setup.lora_rank else flops.TRAIN
    held = {one.role: one.model.size for one in held_models(stage, setup._replace(lora_rank=0))}
    prompts, length, k = [setup.prompt], setup.completion, setup.work(stage).k
    if stage == "sft":
        return total * flops.sft(held["policy"], prompts, [[length]], train)
    if stage == "reward":
        return total * flops.reward(held["reward_model"], prompts, [[length] * k], train)
    # values of a shared trunk are one more pass of the policy before the update, and none in it
    before = {"separate": "value_model", "shared": "policy", "none": None}[setup.value_model]
    judges = [held["reward_model"]] + ([held[before]] if before else [])
    values = [held["value_model"]] if setup.value_model == "separate" else []
    return total * flops.ppo(held["policy"], prompts, k, length, epochs, judges, values, train) // k


def duration(stage: str, setup: Setup, total: int, epochs: int, rate: float | None) -> Duration:
    """`rate`: FLOPs a second of one process, as it reaches them; None: unknown."""
    needed = needed_flops(stage, setup, total, epochs)
    tokens = setup.processes * setup.micro_batch * setup.work(stage).length
    return Duration(tokens, needed, needed / (rate * setup.processes) / 3600 if rate else None)
