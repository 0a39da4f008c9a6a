"""One of two processes that run the SFT stage with dropout, started by torchrun from test_invariances.py.

    torchrun --standalone --nproc_per_node 2 tests/helpers/two_processes.py FOLDER

FOLDER holds base/ and sft.yaml. One run goes to FOLDER/whole; another, in FOLDER/stopped, gets a signal on
rank 1 alone in its thirteenth step, and is resumed. Each rank writes rank<r>.json: the numbers of its rows in
each step of the three runs, and the exit status of the stopped one.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

import environment  # noqa: F401  where the scripts are, and no network
import train_sft
from utils.config import parse_config
from utils.loop import Loop

RANK = int(os.environ["RANK"])
WORDS = "--per_device_batch_size 4 --max_steps 20 --eval_steps 20 --save_steps 20 --logging_steps 5".split()


def main(folder: Path) -> None:
    share, load = Loop.share, train_sft.load_policy
    runs, status = [], None

    def recorded(self, places):
        mine = share(self, places)
        runs[-1].append(list(map(int, mine)))
        if len(runs) == 2 and len(runs[-1]) == 13 and RANK == 1:
            signal.raise_signal(signal.SIGTERM)
        return mine

    def with_dropout(*parent_and_storage):
        model = load(*parent_and_storage)
        for module in model.modules():
            if hasattr(module, "dropout"):
                module.dropout = 0.1
        return model

    Loop.share, train_sft.load_policy = recorded, with_dropout
    # a run ends with this, and the next one needs the group
    torch.distributed.destroy_process_group = lambda *group: None
    for out, more in (("whole", []), ("stopped", []), ("stopped", ["--resume"])):
        runs.append([])
        words = [*WORDS, "--output_dir", str(folder / out), *more]
        try:
            train_sft.main(parse_config(train_sft.SFTStageConfig, folder / "sft.yaml", words))
        except SystemExit as error:
            status = error.code
    (folder / f"rank{RANK}.json").write_text(json.dumps({"runs": runs, "status": status}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
