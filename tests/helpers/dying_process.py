"""One of two processes that train, of which one dies, hangs or meets a full disk; started by torchrun.

    torchrun --nproc_per_node 2 tests/helpers/dying_process.py RANK HOW WORDS...

The process of this rank, after the metrics of its second update: `kill` dies, `node` dies with its launcher,
`hang` waits, `full` finds the disk full. WORDS go to scripts/train_ppo.py.
"""

import errno
import os
import runpy
import signal
import sys
import time
from datetime import timedelta

import environment  # noqa: F401  where the scripts are, and no network
import utils.distributed
from utils.config import PROJECT
from utils.runs.run import Run


def befall(how: str) -> None:
    """What happens to this process."""
    if how == "node":
        os.kill(os.getppid(), signal.SIGKILL)
    if how in ("kill", "node"):
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by which torchrun ends it, once the other has
        time.sleep(600)
    if how == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")


def main(rank: str, how: str, words: list[str]) -> None:
    metrics = Run.metrics

    def then(self, step, values):
        metrics(self, step, values)
        if step == 2 and rank == os.environ["RANK"]:
            befall(how)

    Run.metrics = then
    utils.distributed.TIMEOUT = timedelta(seconds=20)
    sys.argv = [str(PROJECT / "scripts" / "train_ppo.py"), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
