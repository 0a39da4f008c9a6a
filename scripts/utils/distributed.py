"""What the project needs of several processes beside accelerate. With one process each function is the
identity.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, broadcast_object_list, gather_object, reduce

from utils.config import UserError

# A process that waits longer for the others ends. The first of a node may tokenise a large data set
# meanwhile.
TIMEOUT = timedelta(minutes=30)


def world() -> PartialState:
    """Rank and size of this process's group. The first call forms the group.

    Raises:
        UserError: when the processes do not find each other, or the group is smaller than the number of
            started processes: each would train alone.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > 1 and "LOCAL_RANK" not in os.environ:
        raise UserError(f"WORLD_SIZE: it is {started} here, but LOCAL_RANK is not set; start with "
                        f"torchrun, or unset "
                        "WORLD_SIZE")
    # without CUDA accelerate forms no group unless it is asked for the CPU
    try:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        if started == 1:
            raise
        raise _no_meeting(started, str(error)) from None
    formed = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if not started == formed == state.num_processes:
        raise UserError(f"WORLD_SIZE: {started} processes were started, but torch.distributed has a "
                        f"group of {formed} and accelerate one of {state.num_processes}; start with "
                        f"torchrun, and one process for each "
                        "GPU")
    return state


def _no_meeting(started: int, error: str) -> UserError:
    """Why the processes cannot form a group."""
    address, port = (os.environ.get(name, "not set") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in error:
        return UserError(f"MASTER_PORT: {port} is in use on this machine, perhaps by another run; set a free "
                         "one, or start with torchrun --standalone, which finds one")
    return UserError(f"MASTER_ADDR, MASTER_PORT: the {started} processes do not find each other at "
                     f"{address}:{port} ({error.splitlines()[0]:.200}); start all of them, with torchrun")


def max_over_ranks(number: int | None) -> int | None:
    """The largest number that a rank has, on every rank; None when it is 0 or no rank has one.

    A signal reaches the ranks at different steps, but they must stop at the same one.
    """
    state = world()
    if state.num_processes == 1:
        return number or None
    return int(reduce(torch.tensor(number or 0, device=state.device), "max")) or None


def true_anywhere(flag: torch.Tensor) -> torch.Tensor:
    """A boolean () on the device, True where it is True on any rank. The host does not wait for it."""
    if world().num_processes == 1:
        return flag
    return reduce(flag.float(), "max") > 0


def on_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """A tensor of the host on a device. A GPU copies it when its turn comes; the host goes on meanwhile."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Reading:
    """A tensor () on its way to the host, which can read it later without stopping the device."""

    def __init__(self, tensor: torch.Tensor):
        self.copy, self.arrival = tensor.to("cpu", non_blocking=True), None
        if tensor.is_cuda:
            self.arrival = torch.cuda.Event()
            self.arrival.record()

    def __bool__(self) -> bool:
        """Waits until the device has computed it, but not for what it was given since."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return bool(self.copy.numpy())


def on_main(work: Callable[[], None]) -> None:
    """Run `work` on the main process alone; a UserError of it is raised on every rank."""
    message = None
    if world().is_main_process:
        try:
            work()
        except UserError as error:
            message = str(error)
    [message] = broadcast_object_list([message])
    if message is not None:
        raise UserError(message)


def on_all(work: Callable):
    """What `work()` returns on this rank. A UserError of one rank is raised on every rank."""
    if world().num_processes == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    messages = [one for one in gather_object([message]) if one is not None]
    if messages:
        raise UserError(messages[0])
    return result


@contextmanager
def first_of_a_node():
    """One process of each node runs the body, then the others.

    Unlike accelerate's `local_main_process_first` it lets the others go on when the first one fails, so that
    all of them report the same mistake instead of waiting.
    """
    state = world()
    if not state.is_local_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_local_main_process:
            state.wait_for_everyone()


def build_accelerator(config, folder, settings: dict | None) -> Accelerator:
    """The accelerator of a stage, for the experiment trackers of the configuration.

    Args:
        folder: that of the run.
        settings: DeepSpeed's configuration; None without it.
    """
    trackers = [name for name in config.report_to if name != "none"]
    return Accelerator(mixed_precision=config.mixed_precision, log_with=trackers or None,
                       project_dir=str(folder / "tensorboard"),
                       deepspeed_plugin=settings and DeepSpeedPlugin(hf_ds_config=settings))
