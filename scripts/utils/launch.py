"""How a script starts and ends: configuration, quiet libraries, memory, and errors in one line.

A script reads its command line before it imports the libraries, so that `--help` and a mistyped key answer at
once:

    if __name__ == "__main__":
        CONFIG = read_config(...)
    import torch
    ...
    if __name__ == "__main__":
        start(main, CONFIG)
"""

import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path

from utils.config import parse_config, refuse_missing
from utils.errors import UserError, quoted
from utils.failures import broken_output, errors_of_threads, lost_process
from utils.screen import outlive_readers


def read_config(config_class, default_file: Path | None, description: str, notes=sys.stdout):
    """The configuration that the command line asks for; a mistake in it becomes one line and exit status 2.

    From here to `start`, while the libraries are imported, Ctrl-C ends the process at once.

    Args:
        config_class, default_file, description: see `parse_config`.
        notes: where it is said that libraries are loaded; not standard output where results go there.
    """
    outlive_readers()
    # peft imports bitsandbytes, which says on some CPUs that it misses a package that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background ignores it
        signal.signal(signal.SIGINT, _stop_at_once)
    if sys.platform == "win32":
        _leave("Windows is not supported; use the Windows Subsystem for Linux (WSL 2)")
    try:
        _refuse_odd_ranks()
        config = parse_config(config_class, default_file, sys.argv[1:], description)
        refuse_missing(config)
    except UserError as error:
        _leave(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"{Path(sys.argv[0]).name}: loading PyTorch and other libraries (about 10 s)", file=notes,
              flush=True)
    return config


def _refuse_odd_ranks() -> None:
    """Raise UserError for a place among the processes that no launcher gives; libraries end in tracebacks."""
    numbers = {}
    for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if (text := os.environ.get(name)) is not None:
            if not (text.isascii() and text.isdecimal() and len(text) < 7):
                raise UserError(f"{name}: it is {quoted(text)} in the environment, where a whole number is "
                                "needed; start with torchrun, or unset it")
            numbers[name] = int(text)
    for rank, size in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if numbers.get(rank, 0) >= numbers.get(size, numbers.get(rank, 0) + 1):
            raise UserError(f"{rank}: it is {numbers.get(rank, 0)} in the environment, but {size} is "
                            f"{numbers[size]}; start with torchrun, or unset them")


def _say_stopped() -> None:
    with suppress(OSError):  # the terminal may be what has gone
        os.write(2, b"stopped\n")  # print may have been interrupted, and is not reentrant


def _stop_at_once(number, frame) -> None:
    _say_stopped()
    os._exit(130)  # an exception could be caught by what is being imported


def _stop(number, frame) -> None:
    """Until a run catches signals itself nothing is lost, but what was begun is tidied up."""
    signal.signal(number, signal.SIG_IGN)  # a second one, of a launcher, must not interrupt that
    _say_stopped()
    sys.exit(128 + number)


def start(main, config) -> None:
    """Run `main(config)`; a user's mistake becomes one line and exit status 2."""
    if signal.getsignal(signal.SIGINT) is _stop_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _stop)
    try:
        _quiet_libraries()
        if getattr(config, "deepspeed", None):
            give_back_freed_memory()
        elif not getattr(config, "gradient_checkpointing", False):
            keep_freed_memory()
        main(config)
    except KeyboardInterrupt:  # while models load, or the second Ctrl-C: the run handles the first
        signal.signal(signal.SIGINT, _stop_at_once)  # a further one, while the process ends
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        _leave(error)
    except Exception as error:
        if reason := broken_output(error):
            _leave(reason)
        if not (reason := lost_process(error)):
            raise
        _leave(f"another process of this run died or hung ({reason}); the last checkpoint is intact: read "
               "what that process printed, then go on with --resume", status=1)


def _leave(message, status=2):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)


def _quiet_libraries() -> None:
    """Turn off the libraries' notes and progress bars, which would bury our own messages."""
    import huggingface_hub
    import torch
    import transformers

    from utils.console import warn_above_bars

    warn_above_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    for library in ("transformers", "torch.distributed"):  # meant for the authors of these libraries
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    threading.excepthook = errors_of_threads
    logging.raiseExceptions = False  # else a full disk gives a traceback for each line of train.log
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it searches for one


# ----------------------------------------------------------------------------------------------------- memory


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors. Fetching it again costs a page fault for every 4 KB.

    Steps on a CPU became 4 % (OPT-125m) to 20 % (the mini model) faster, at the same peak. It is off with
    gradient checkpointing: there the peak of OPT-125m rose from 3.7 to 7.0 GiB. Giving memory back at once is
    not used there either: it took 28 % more time.
    """
    _mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets pages of its own
    _mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the free end of the heap stays


def give_back_freed_memory() -> None:
    """Let glibc give every tensor of 128 KiB or more pages of its own, which go back when it is freed.

    glibc starts with this limit but raises it up to 32 MiB as tensors are freed, and keeps the holes that
    smaller ones leave. An OPT-1.3B reward model under zero3_nvme then took 15.0 to 17.1 GiB; with this, 13.0.
    """
    _mallopt(-3, 2**17)  # M_MMAP_THRESHOLD: once set, glibc no longer raises it


def _mallopt(option: int, value: int) -> None:
    """glibc's `mallopt`; does nothing where the C library has none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(option, value)
