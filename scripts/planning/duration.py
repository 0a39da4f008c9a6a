"""How long a stage takes: required FLOPs (planning/flops.py) / FLOP/s that the devices reach."""

from typing import NamedTuple

from planning import flops
from planning.fit import Setup, held_models


class Duration(NamedTuple):
    """The work of a whole stage."""

    tokens: int  # in one micro-batch of all processes
    flops: int  # of the stage
    hours: float | None  # None: the speed of the devices is unknown


def needed_flops(stage: str, setup: Setup, total: int, epochs: int) -> int:
    """FLOPs of a stage without its evaluations.

    Args:
        total: examples (SFT), prompts with K completions (reward), or episodes (PPO) of the whole stage.
        epochs: passes over the episodes of a PPO update.
    """
    train = flops.TRAIN_ADAPTERS if setup.lora_rank else flops.TRAIN
    held = {one.role: one.model.size for one in held_models(stage, setup._replace(lora_rank=0))}
    prompts, length, k = [setup.prompt], setup.completion, setup.work(stage).k
    if stage == "sft":
        return total * flops.sft(held["policy"], prompts, [[length]], train)
    if stage == "reward":
        return total * flops.reward(held["reward_model"], prompts, [[length] * k], train)
    # With a shared trunk the values before the update cost one more pass of the policy, those in the update
    # none.
    before = {"separate": "value_model", "shared": "policy", "none": None}[setup.value_model]
    judges = [held["reward_model"]] + ([held[before]] if before else [])
    values = [held["value_model"]] if setup.value_model == "separate" else []
    return total * flops.ppo(held["policy"], prompts, k, length, epochs, judges, values, train) // k


def duration(stage: str, setup: Setup, total: int, epochs: int, rate: float | None) -> Duration:
    """The work of a stage, and how long it takes.

    Args:
        rate: FLOP/s that one process reaches; None: unknown.
    """
    required = needed_flops(stage, setup, total, epochs)
    tokens = setup.processes * setup.micro_batch * setup.work(stage).length
    return Duration(tokens, required, required / (rate * setup.processes) / 3600 if rate else None)
