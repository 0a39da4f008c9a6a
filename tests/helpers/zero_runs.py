"""Processes that run stages one after the other, with and without DeepSpeed, started from zero_cases.py.

    torchrun --standalone --nproc_per_node 2 tests/zero_runs.py CASES

CASES is a JSON file: a list of [stage, output folder, words of the command line, step to stop at or null].
One start of Python for all of them saves minutes. A run ends with its last weights, so that weights after
all steps can be compared; but first it goes back to its best ones, and writes what it then has into their
folder.
"""

import gc
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from matplotlib.figure import Figure
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import environment  # noqa: F401  where the scripts are, and no network
import train_ppo
import train_reward
import train_sft
from utils import zero
from utils.config import PROJECT, UserError, parse_config
from utils.distributed import world
from utils.runs.checkpoints import Best, load_weights, save_weights
from utils.runs.run import Run

STAGES = {"sft": (train_sft, train_sft.SFTStageConfig),
          "reward": (train_reward, train_reward.RewardStageConfig),
          "ppo": (train_ppo, train_ppo.PPOStageConfig)}
write_metrics, restore, offer = Run.metrics, Best.restore, Best.offer


def forget_engine() -> None:
    """As in a new process, but for the group of processes."""
    zero._active.clear()
    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    gc.collect()


def run(stage: str, out: str, words: list[str]) -> None:
    script, kind = STAGES[stage]
    default = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    script.main(parse_config(kind, default, [*words, "--output_dir", out]))


def stop_at(step: int | None) -> None:
    """As if a signal came while the metrics of a step are written."""
    def metrics(run, at, values):
        write_metrics(run, at, values)
        if at == step:
            run.stop_signal = signal.SIGTERM

    Run.metrics = metrics


def restore_and_come_back(best: Best, weights: dict, last: int) -> int:
    """Leave last-*, restored-* and best-* in the folder of the best weights, and the weights as they were."""
    folder = best.checkpoints.folder / f"best-{best.found['step']}"
    save_weights(weights, folder, "last")
    step = restore(best, weights, last)
    save_weights(weights, folder, "restored")
    world().wait_for_everyone()  # they read what the main process writes
    load_weights(weights, folder, "last")
    return step


def prefer_the_first(best: Best, step: int, score: float, weights: dict, **figures: float) -> None:
    """PPO's tiny policies score the same, and of equal ones the last is kept: here the first is better."""
    offer(best, step, score - step if best.checkpoints.run.stage == "ppo" else score, weights, **figures)


def main(cases: Path) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what the imports made; each run collects garbage
    Figure.savefig = lambda *args, **kwargs: None  # half a second a run, and not what is tested here
    zero.FILE_BYTES = 50_000
    Best.restore, Best.offer = restore_and_come_back, prefer_the_first
    # a run ends with this, and the next one needs the group
    torch.distributed.destroy_process_group = lambda *group: None
    for stage, out, words, step in json.loads(cases.read_text()):
        stop_at(step)
        try:
            run(stage, out, words)
        except (UserError, SystemExit) as error:
            print(f"{out}: {error}", flush=True)
        except Exception:
            traceback.print_exc()
            os._exit(1)  # the other rank may wait for this one
        forget_engine()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
