"""One of two processes that train, of which one dies, hangs or meets a full disk; started by torchrun.

    torchrun --nproc_per_node 2 tests/dying_process.py STAGE HOW WORDS...

HOW: `kill`, `hang` (rank 1), `full` (rank 0), each after the second step's metrics, or `none`; WORDS go to the stage's script.
"""

import errno
import os
import runpy
import signal
import sys
import time
from datetime import timedelta

import conftest  # noqa: F401  where the scripts are, and no network

import utils.distributed
from utils.config import PROJECT
from utils.run import Run

RANK = int(os.environ["RANK"])


def befall(how: str) -> None:
    """What happens to this process."""
    if RANK == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if RANK == 1 and how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends it, once the other has
        time.sleep(600)
    if RANK == 0 and how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


def main(stage: str, how: str, words: list[str]) -> None:
    metrics = Run.metrics

    def then(self, step, values):
        metrics(self, step, values)
        if step == 2:
            befall(how)

    Run.metrics = then
    utils.distributed.TIMEOUT = timedelta(seconds=20)
    sys.argv = [str(PROJECT / "scripts" / f"train_{stage}.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
