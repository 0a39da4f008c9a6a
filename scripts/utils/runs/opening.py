"""What a stage says when it begins: the model, where it is trained, and what comes next."""

import torch

from utils.distributed import world
from utils.models.parents import Parent
from utils.models.size import learning_rate, parameters


def open_stage(config, parent: Parent) -> None:
    """Choose the learning rate where none is given, the arithmetic of a GPU's float32 products, and say what
    is going to be trained.

    Raises:
        UserError: when the parent's config cannot be read.
    """
    if config.tf32 and torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
    count, chosen = parameters(parent), config.learning_rate is None
    if chosen:
        config.learning_rate = learning_rate(config.section, count, bool(config.lora_rank))
    if world().is_main_process:
        stored = ", stored in 4 bits" if config.load_in_4bit else ""
        print(f"{config.section}: {parent.name}, {spelled(count)} parameters{stored}, on {_machine()}; "
              f"learning rate {config.learning_rate:g}"
              f"{' (by its size, as none is given)' if chosen else ''}", flush=True)
        print(f"{config.section}: reading the data", flush=True)


def spelled(count: int) -> str:
    """2.3 million, 6.7 billion."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if count >= 0.95 * size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"


def _machine() -> str:
    state = world()
    processes = f", {state.num_processes} processes" if state.num_processes > 1 else ""
    if state.device.type != "cpu":
        name = torch.cuda.get_device_name(state.device) if torch.cuda.is_available() else state.device
        return f"{name}{processes}"
    threads = torch.get_num_threads()
    return f"the CPU with {threads} thread{'s' * (threads > 1)}{processes}"


def plan_of(config, rows: int, steps: int, unit: str) -> str:
    """One line: the data and the steps that are ahead. `unit`: what the stage counts, a step or an update."""
    warmup = f" (a warm-up of {config.warmup_steps} does not end)" if config.warmup_steps >= steps else ""
    return (f"{config.section}: {rows:,} rows to learn from, {steps:,} {unit}s{warmup}, evaluated every "
            f"{config.eval_steps}, saved every {config.save_steps}, into {config.output_dir}")
