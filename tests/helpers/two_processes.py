"""One of two processes that run the SFT stage with dropout, started by torchrun from test_invariances.py.

    torchrun --standalone --nproc_per_node 2 tests/helpers/two_processes.py FOLDER OUTPUT_DIR

FOLDER holds base/ and sft.yaml. Each rank writes rank<r>.json there: the numbers of its rows in each step, and its exit
status. A signal comes to rank 1 alone, while the metrics of its twelfth step are written.
"""

import json
import os
import signal
import sys
from pathlib import Path

import environment  # noqa: F401  where the scripts are, and no network
import train_sft
from utils.config import parse_config
from utils.loop import Loop
from utils.runs.run import Run

RANK = int(os.environ["RANK"])


def main(folder: Path, out: str) -> None:
    rows, share, metrics, load = [], Loop.share, Run.metrics, train_sft.load_policy

    def recorded(self, places):
        mine = share(self, places)
        rows.append(list(map(int, mine)))
        return mine

    def with_dropout(parent):
        model = load(parent)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.1
        return model

    def signalled(self, step, values):
        if RANK == 1 and step == 12:
            signal.raise_signal(signal.SIGTERM)
        metrics(self, step, values)

    Loop.share, train_sft.load_policy, Run.metrics = recorded, with_dropout, signalled
    words = ["--output_dir", out, "--per_device_batch_size", "4", "--max_steps", "20", "--eval_steps", "20",
             "--save_steps", "20"]
    stopped = None
    try:
        train_sft.main(parse_config(train_sft.SFTStageConfig, folder / "sft.yaml", words))
    except SystemExit as error:
        stopped = error.code
    (folder / f"rank{RANK}.json").write_text(json.dumps({"rows": rows, "stopped": stopped}))
    sys.exit(stopped)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
