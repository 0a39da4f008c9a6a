"""Does a fault of the disk end a run in one line? Tiny runs of a stage meet one fault each.

    python tests/helpers/faults.py sft FOLDER

A fault is met at the nth time that the run opens, makes, renames or truncates something in its folder, for n
spread over a whole run: the folder is removed, it is removed and made again, or the operating system refuses
(EIO, ENOSPC, EROFS, EDQUOT). Others are limits on the size of files (RLIMIT_FSIZE), which the libraries'
writers meet in the middle of a file. FOLDER/report.json has the exit status and the output of each run.
"""

import errno
import json
import os
import resource
import shutil
import sys
from itertools import count
from pathlib import Path

import datasets.config

import kill_test

EVENTS = ("open", "os.mkdir", "os.rename", "os.truncate", "os.remove")
REFUSALS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT}
LIMITS = (3_000, 30_000, 100_000)  # below them the output itself is cut


def at_operation(out: Path, number: int, fault: str) -> list[int]:
    """Let the fault come at this operation of the process in `out`. Returns a list that counts them."""
    counted, busy = [0], [False]

    def hook(event, arguments):
        if event not in EVENTS or busy[0] or not str(arguments[0]).startswith(f"{out}/"):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        counted[0] += 1
        if counted[0] < number:
            return
        if fault in REFUSALS:
            raise OSError(REFUSALS[fault], os.strerror(REFUSALS[fault]), str(arguments[0]))
        if counted[0] == number:
            busy[0] = True
            shutil.rmtree(out, ignore_errors=True)
            if fault == "made again":
                (out / "plots").mkdir(parents=True)
                (out / "config.yaml").write_text("of: another run")
            busy[0] = False

    sys.addaudithook(hook)
    return counted


def run(stage: str, models: Path, out: Path, fault: str, number: int) -> None:
    if fault == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))
        kill_test.train(stage, models, out, [], None, kill_test.KILLED)
        return
    counted = at_operation(out, number, fault)
    try:
        kill_test.train(stage, models, out, [], None, kill_test.KILLED)
    finally:
        Path(f"{out}.count").write_text(str(counted[0]))


def main(stage: str, folder: Path) -> None:
    datasets.config.HF_DATASETS_CACHE = str(folder / "cache")
    models, numbers, report = folder / "models", count(), []

    def met(fault, number):
        out = folder / f"run{next(numbers)}"
        process = kill_test._FORK.Process(target=run, args=(stage, models, out, fault, number))
        process.start()
        process.join()
        report.append({"fault": fault, "number": number, "status": process.exitcode,
                       "said": Path(f"{out}.log").read_text(), "final": (out / "final").exists()})
        return out

    made = kill_test._FORK.Process(target=kill_test.make_models, args=(models,))
    made.start()
    made.join()
    operations = int(Path(f"{met('none', 10**9)}.count").read_text())
    for place in (0.0, 0.1, 0.5, 0.9, 0.97, 0.99):
        number = 2 + int(place * (operations - 2))
        for fault in ("removed", "made again", list(REFUSALS)[number % len(REFUSALS)]):
            met(fault, number)
    for limit in LIMITS:
        met("limit", limit)
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
