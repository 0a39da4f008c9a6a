"""Scripts as processes that start at once: a server has loaded the libraries, and forks them."""

import multiprocessing
import os
import runpy
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from utils.config import UserError

SCRIPTS = Path(__file__).resolve().parents[1]
# what the rating page and the stages need
LIBRARIES = ["torch", "transformers.trainer", "trl", "peft", "evaluate", "datasets", "uvicorn", "starlette"]


def fork_server():
    """The server that processes are forked from, with the libraries loaded: a multiprocessing context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def _run_script(script: str, words: list[str], log: str, pipe) -> None:
    """What a process does: it becomes the script; its exit status and CPU seconds go into the pipe."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(SCRIPTS / script), *words]
    began, status = time.process_time(), 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    finally:
        pipe.send((status, time.process_time() - began))


@contextmanager
def process(script: str, words: list[str], log: Path):
    """A script that runs as a process of its own while the block runs; then it is ended.

    Yields:
        The process, and the pipe that says how it ended. The libraries are loaded: it starts at once.
    """
    context = fork_server()
    ours, theirs = context.Pipe(duplex=False)
    running = context.Process(target=_run_script, args=(script, words, str(log), theirs))
    running.start()
    theirs.close()
    try:
        yield running, ours
    finally:
        running.terminate()
        running.join()


def run_stage(script: str, words: list[str], log: Path) -> dict[str, float]:
    """Run a stage to its end: seconds and CPU seconds, without loading the libraries.

    Raises:
        UserError: with the last line that it printed, when it fails.
    """
    began = time.monotonic()
    with process(script, words, log) as (running, pipe):
        try:
            status, cpu = pipe.recv()
        except EOFError:
            status, cpu = "killed", 0.0
        running.join()
    if status:
        raise UserError(f"{script}: ended with status {status}; '{log}' ends with: {last_line(log)}")
    return {"seconds": round(time.monotonic() - began, 1), "cpu_seconds": round(cpu, 1)}


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "nothing"
