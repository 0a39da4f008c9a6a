"""Rounds of training: the three stages on what has been rated, as processes of their own.

A round's folder has a copy of the ratings, the folders of the runs, and the log of what they print. The
processes end with the server, also when it is killed; a round that was running then has failed.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from utils.config import PROJECT, UserError
from utils.errors import escaped, one_line
from utils.feedback.database import Ratings
from utils.runs.records import read_whole_rows

_LOG, _PROCESS = "log.txt", "process.json"
_STAGES = ("sft", "reward", "ppo")
# words of SFT where it is a round's only stage: six passes won more than three on validation posts
SFT_ALONE = ["--num_train_epochs", "6"]
_LINES = 200  # of the log that are shown
_TAIL = 1 << 16  # bytes of the log that are read
_POINTS = 200  # of a curve
_PATIENCE = 120.0  # seconds for which a cancelled stage may save
# The first process of a stage asks Linux for SIGTERM when the server dies, then becomes the stage. Without
# this, a killed server would leave it behind.
_TIED = """import ctypes, os, signal, sys
prctl = getattr(ctypes.CDLL(None), "prctl", None)
if prctl is not None:
    prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(143)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"""


class RunningError(Exception):
    """A round is running already."""


class Rounds:
    """Starts, watches and cancels rounds; one at a time.

    Args:
        folder: where the rounds' folders are made.
        stages: of a round's folder: the name of each stage with the words of its command, in their order.
        finished: called with a round's name and the folder of its policy.
        why_not: why no round can be started at all; None: one can.
        least: rated prompts that a round needs.
        full: rated prompts from which it has all stages.
    """

    def __init__(self, ratings: Ratings, folder: Path, stages: Callable[[Path], dict[str, list[str]]],
                 finished: Callable[[str, Path], None], why_not: str | None, least: int,
                 full: int):
        self.ratings, self.folder, self.stages = ratings, folder, stages
        self.finished, self.why_not, self.least, self.full = finished, why_not, least, full
        self._lock, self._thread, self._process = threading.Lock(), None, None
        self._stage, self._cancelled = None, threading.Event()
        for row in ratings.rounds():
            # those elsewhere belong to another server
            if row["state"] == "running" and Path(row["folder"]).resolve().parent == folder.resolve():
                self._give_up(row)

    def _give_up(self, row: dict) -> None:
        """End what an earlier server has left of a round."""
        folder = Path(row["folder"])
        _kill_left_over(folder)
        _append(folder / _LOG, "error: the server ended while this round was running; start another one")
        self.ratings.end_round(row["id"], "failed")

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def possible(self, rated: int) -> str | None:
        """Why no round can begin with so many prompts to learn from; None: one can."""
        if self.why_not:
            return self.why_not
        if rated < self.least:
            return f"{rated} of the {self.least} rated prompts that a round needs"
        return None

    def start(self) -> str:
        """Begin a round, and return its name.

        Raises:
            RunningError: when one is running.
            UserError: when its folder cannot be written.
        """
        with self._lock:
            if self.is_running():
                raise RunningError
            taken = {row["name"] for row in self.ratings.rounds()}
            number = next(n for n in range(1, len(taken) + 10**6)
                          if f"round-{n}" not in taken and not (self.folder / f"round-{n}").exists())
            name = f"round-{number}"
            folder = self.folder / name
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"{folder}: cannot be made ({error.strerror})") from None
            self.ratings.copy_to(folder / "ratings.db")
            row = self.ratings.add_round(name, folder)
            self._cancelled.clear()
            self._thread = threading.Thread(target=self._run, name=name, args=(row, name, folder))
            self._thread.start()
            return name

    def cancel(self) -> bool:
        """Ask the round to end: its stage saves a checkpoint. False: none is running."""
        with self._lock:
            if not self.is_running():
                return False
            self._cancelled.set()
            self._signal(signal.SIGTERM)
            return True

    def end(self) -> None:
        """Cancel what runs, and wait for it."""
        if self.cancel():
            print("the round of training saves a checkpoint and ends", flush=True)
            self._thread.join()

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _run(self, row: int, name: str, folder: Path) -> None:
        """The thread of a round."""
        state = "failed"
        try:
            state = self._train(name, folder)
        except Exception as error:  # a full disk, no memory, a policy that does not load
            _append(folder / _LOG, f"error: {one_line(error)}")
        finally:
            self._stage = self._process = None
            self.ratings.end_round(row, state)

    def _train(self, name: str, folder: Path) -> str:
        """Run the stages one after the other; the state in which the round ends."""
        stages = self.stages(folder)
        for stage, words in stages.items():
            if self._cancelled.is_set():
                return "cancelled"
            self._stage = stage
            if self._status_of(words, folder, list(stages)):
                return "cancelled" if self._cancelled.is_set() else "failed"
        if self._cancelled.is_set():
            return "cancelled"
        self.finished(name, policy_of(folder))
        return "finished"

    def _status_of(self, words: list[str], folder: Path, stages: list[str]) -> int:
        """Run a command to its end, and return its exit status."""
        command = [sys.executable, "-c", _TIED, str(os.getpid()), *words]
        with (folder / _LOG).open("ab") as log:
            log.write(f"$ python {' '.join(words)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(command, cwd=Path.cwd(), stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=subprocess.STDOUT, start_new_session=True)
        (folder / _PROCESS).write_text(json.dumps(
            {"process": self._process.pid, "stage": self._stage, "stages": stages}))
        if self._cancelled.is_set():  # in between
            self._signal(signal.SIGTERM)
        until = None  # when a cancelled stage has had its time
        while True:
            with suppress(subprocess.TimeoutExpired):
                return self._process.wait(0.5)
            if self._cancelled.is_set():
                until = until or time.monotonic() + _PATIENCE
                if time.monotonic() > until:
                    self._signal(signal.SIGKILL)

    # ---------------------------------------------------------------------------------------- what is shown

    def state(self) -> dict:
        """All rounds, and log and curves of the newest one."""
        rounds = self.ratings.rounds()
        shown = ("id", "name", "state", "ratings", "created", "ended")
        current = None
        if rounds:
            newest = rounds[-1]
            folder, running = Path(newest["folder"]), newest["state"] == "running"
            log = _tail(folder / _LOG)
            error = next((line for line in reversed(log) if line.startswith("error:")), None)
            stage = self._stage if running else _noted(folder).get("stage")  # in which it ended
            current = {"stage": stage, "stages": _stages(folder), "log": log,
                       "curves": {stage: _curves(folder / stage / "metrics.jsonl") for stage in _STAGES},
                       "error": error or "the log says no more" if newest["state"] == "failed" else None}
        return {"rounds": [{name: row[name] for name in shown} for row in rounds], "current": current}


def policy_of(folder: Path) -> Path:
    """The policy of a finished round: that of its last stage."""
    return folder / _stages(folder)[-1] / "final"


def _stages(folder: Path) -> list[str]:
    """The stages of a round; all, before the first has begun."""
    return _noted(folder).get("stages", list(_STAGES))


def _noted(folder: Path) -> dict:
    """What a round's folder says of its processes; nothing, if it says nothing that can be read."""
    with suppress(OSError, ValueError):
        found = json.loads((folder / _PROCESS).read_text())
        if isinstance(found, dict):
            return found
    return {}


def _append(path: Path, line: str) -> None:
    with suppress(OSError), path.open("a", encoding="utf-8") as log:
        log.write(f"{line}\n")


def _tail(path: Path) -> list[str]:
    """The last lines of a log; of a line that was written over and over (progress) what it says last."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [escaped(line) for line in lines if line.strip()][-_LINES:]


def _curves(path: Path) -> dict[str, list[list[float]]]:
    """Name of a metric -> [step, value] of some of its rows."""
    curves: dict[str, list[list[float]]] = {}
    for row in read_whole_rows(path):
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(name, []).append([row["step"], value])
    return {name: points[:: max(1, len(points) // _POINTS)] for name, points in curves.items()}


def _kill_left_over(folder: Path) -> None:
    """Kill the process that a round's folder names, if it is still that one."""
    number = _noted(folder).get("process")
    try:
        words = Path(f"/proc/{number}/cmdline").read_bytes()
    except OSError:
        return  # it is gone
    if os.fsencode(folder) in words:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(number, signal.SIGKILL)


def script(name: str) -> str:
    """The path of a stage's script."""
    return str(PROJECT / "scripts" / name)
