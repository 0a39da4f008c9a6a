"""Everything that knows of more than one process. With one process each function is the identity."""

import os
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, gather_object, reduce

from utils.config import UserError

# A process that waits longer for the others ends. The first of a node may read and tokenise a large data set meanwhile.
TIMEOUT = timedelta(minutes=30)


def world() -> PartialState:
    """Rank and size of the group of processes this one belongs to. The first call makes the group.

    Raises:
        UserError: when the group is not of as many processes as were started: each would train the same thing alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE: it is {started} here, but LOCAL_RANK is not set; start with torchrun, or unset WORLD_SIZE")
    # without CUDA accelerate forms no group unless it is asked for the CPU
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    formed = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not started == formed == state.num_processes:
        raise UserError(f"WORLD_SIZE: {started} processes were started, but torch.distributed has a group of {formed} and "
                        f"accelerate one of {state.num_processes}; start with torchrun, and one process for each GPU")
    return state


def agreed(number: int | None) -> int | None:
    """The largest number that a rank has, on every rank; None when none has one.

    A signal reaches the ranks at different steps, but they must stop at the same one.
    """
    state = world()
    if state.num_processes == 1:
        return number
    return int(reduce(torch.tensor(number or 0, device=state.device), "max")) or None


@contextmanager
def first_of_a_node():
    """The body is run by one process of each node, then by the others, also when it fails in the first."""
    state = world()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


@contextmanager
def gradients_of_part(accelerator: Accelerator, model, last: bool):
    """Around the forward and backward pass of one part of an optimizer step: ranks exchange gradients with the last one.

    DeepSpeed's engine makes its optimizer step there as well.
    """
    accelerator.gradient_state._set_sync_gradients(last)
    exchanged = last or accelerator.distributed_type == DistributedType.DEEPSPEED
    with nullcontext() if exchanged else accelerator.no_sync(model):
        yield
    accelerator.gradient_state._set_sync_gradients(True)


def my_share(items: list) -> list:
    """This rank's part of a list: every world-size-th item."""
    state = world()
    return items[state.process_index :: state.num_processes]


def collect(part: list) -> list:
    """The whole list again, in the order it had before `my_share`, on every rank."""
    state = world()
    if state.num_processes == 1:
        return part
    gathered = gather_object([(state.process_index + i * state.num_processes, item) for i, item in enumerate(part)])
    return [item for _, item in sorted(gathered, key=lambda pair: pair[0])]


def build_accelerator(config, folder, settings: dict | None) -> Accelerator:
    """The accelerator of the PPO loop, with the experiment trackers of the configuration.

    Args:
        folder: that of the run; its last two names are the trackers' name of the project.
        settings: DeepSpeed's configuration; None without it.
    """
    trackers = [name for name in config.report_to if name != "none"]
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=trackers or None,
                              project_dir=str(folder / "tensorboard"),
                              deepspeed_plugin=settings and DeepSpeedPlugin(hf_ds_config=settings))
    if trackers:
        accelerator.init_trackers("-".join(folder.resolve().parts[-2:]))
    return accelerator
