"""Signals that ask a run to stop: it finishes its step and saves before it leaves."""

import os
import signal
import time
from collections.abc import Callable

AGAIN_SECONDS = 3.0  # torchrun passes on a Ctrl-C that the terminal has already sent to its processes
_ASKING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def catch_signals(ask: Callable[[int], None]) -> None:
    """Call `ask(number)` for the first of SIGINT (Ctrl-C), SIGTERM and SIGHUP.

    torchrun, Slurm and systemd send a signal to a process that others have sent to it as well. So further
    ones count for nothing, but for a Ctrl-C `AGAIN_SECONDS` or more after the first signal: that is somebody
    who cannot wait, and raises KeyboardInterrupt. Signals that the process was started to ignore stay
    ignored: SIGHUP under nohup, SIGINT of a job in the background.
    """
    first = []

    def caught(number, frame):
        if not first:
            first.append(time.monotonic())
            ask(number)
        elif number == signal.SIGINT and time.monotonic() - first[0] >= AGAIN_SECONDS:
            raise KeyboardInterrupt

    for number in _ASKING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, caught)


def time_for_saving() -> str:
    """What torchrun does to a process that takes long to stop; empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    return ("; if a signal went to torchrun, it kills its processes after its --shutdown_timeout, by default "
            "30 seconds: what is not saved by then is lost")
