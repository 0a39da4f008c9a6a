"""Everything that knows of more than one process. With one process each function is the identity."""

from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object


def world() -> PartialState:
    """Rank and size of the group of processes this one belongs to."""
    return PartialState()


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


def build_accelerator(config, folder) -> Accelerator:
    """The accelerator of the PPO loop, with the experiment trackers of the configuration.

    Args:
        folder: that of the run; its last two names are the trackers' name of the project.
    """
    trackers = [name for name in config.report_to if name != "none"]
    accelerator = Accelerator(mixed_precision=config.mixed_precision, log_with=trackers,
                              project_dir=str(folder / "tensorboard"))
    if trackers:
        accelerator.init_trackers("-".join(folder.resolve().parts[-2:]))
    return accelerator
