"""One job of gpu_check.py in a process of its own: a failure of one leaves the others alone.

    python -m studies.gpu_checks.job NAME RESULTS.jsonl FOLDER SHAPE

It imports what it needs, then waits for a line on its standard input: the seconds that it has. So a job can
be started while another one still has the card.
"""

import importlib
import logging
import sys
import warnings
from pathlib import Path

from studies.gpu_checks.results import Results

PARTS = {
    "equalities": "a", "kernels": "a", "stages": "b", "resume": "b", "engines": "c", "speed": "d",
    "sampling": "d", "long_prompts": "d", "where": "d",
}


def main(name: str, path: str, folder: str, shape: str) -> None:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    module = importlib.import_module(f"studies.gpu_checks.{name}")
    if transformers := sys.modules.get("transformers"):  # jobs that only start other processes do without it
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    seconds = float(sys.stdin.readline())
    results = Results(Path(path), PARTS[name], seconds)
    needs = {
        "stages": (Path(folder),),
        "resume": (Path(folder),),
        "engines": (Path(folder),),
        "speed": (shape, Path(folder)),
        "sampling": (shape, Path(folder)),
        "where": (shape, Path(folder)),
    }
    module.run(results, *needs.get(name, ()))


if __name__ == "__main__":
    main(*sys.argv[1:])
