"""One of two processes that run the SFT stage with dropout, started by torchrun from test_invariances.py.

    torchrun --standalone --nproc_per_node 2 tests/two_processes.py FOLDER OUTPUT_DIR

FOLDER holds base/ and sft.yaml. Each rank writes rank<r>.json there: the prompts it was given, in order, and its exit
status. A signal comes to rank 1 alone, when its twelfth step is done.
"""

import json
import os
import signal
import sys
from pathlib import Path

from utils.trainer import RunCallback

import environment  # noqa: F401  where the scripts are, and no network
import train_sft
from utils.config import parse_config

RANK = int(os.environ["RANK"])


def main(folder: Path, out: str) -> None:
    rows, collate, log = [], train_sft.collate, RunCallback.on_log
    load = train_sft.load_policy

    def recorded(batch, **more):
        rows.extend(str(row["prompt"]) for row in batch)
        return collate(batch, **more)

    def with_dropout(*args, **more):
        model = load(*args, **more)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.1
        return model

    def signalled(self, args, state, control, **more):
        if RANK == 1 and state.global_step == 12:
            signal.raise_signal(signal.SIGTERM)
        log(self, args, state, control, **more)

    train_sft.collate, train_sft.load_policy, RunCallback.on_log = recorded, with_dropout, signalled
    words = ["--output_dir", out, "--per_device_batch_size", "4", "--max_steps", "20", "--eval_steps", "20"]
    stopped = None
    try:
        train_sft.main(parse_config(train_sft.SFTStageConfig, folder / "sft.yaml", words))
    except SystemExit as error:
        stopped = error.code
    (folder / f"rank{RANK}.json").write_text(json.dumps({"rows": rows, "stopped": stopped}))
    sys.exit(stopped)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
