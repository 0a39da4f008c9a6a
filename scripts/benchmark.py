"""How fast each stage is beside what a user would otherwise run: the same model, data and settings, side by side.

    python scripts/benchmark.py --quick                                  # the mini shape, a few minutes on two cores
    python scripts/benchmark.py --output outputs/benchmark.json --figure outputs/benchmark.png
    python scripts/benchmark.py --stage reward --shape mini 125m --k 4 --repetitions 5

Peers: trl's SFTTrainer (plain and packed) and RewardTrainer, transformers' `generate`, and trl's last PPOTrainer, which
runs in an environment of its own (.venv-bench, made from requirements-bench.txt where it is missing).

Each side is a process of its own. They take turns, so both see the same machine: a turn is one optimizer step, one PPO
update or one round of sampling, of each side, on the same posts. After a turn that is not counted, the ratio is the
median over turns of their time over ours; its low and high are the smallest and the largest. Before that the two must have
done the same: as many tokens, pairs or episodes, and the same loss where the algorithm is the same.

Memory is the peak of the whole process. Utilisation is that of ours: the floating-point operations that the algorithm needs
(benchmarks/flops.py), divided by the time and by the float32 matrix-product rate measured in the same turn.
Models have random weights. Threads are torch's default; OMP_NUM_THREADS sets them.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks import flops
from benchmarks.pairing import PEER_ENVIRONMENT, figures, refuse_unequal_work, take_turns
from benchmarks.plan import KS, PEERS, UNITS, Comparison, comparisons
from benchmarks.posts import Batch, all_posts, batch_of
from benchmarks.report import plot_ratios, print_table
from benchmarks.shapes import SHAPES, save_models
from benchmarks.tasks import PPO_EPOCHS, RESPONSE_TOKENS, Task
from utils.config import PROJECT, UserError, key, start
from utils.run import output_file


@dataclass
class BenchmarkConfig:
    """What to measure."""

    stage: list[str] = key(["sft", "reward", "ppo", "generation"], "Stages to measure.")
    shape: list[str] = key(["mini", "30m", "125m"], "Sizes of the model.")
    peer: list[str] = key([], "Peers by name, such as RewardTrainer; none: all.")
    k: list[int] = key([], "Completions for each prompt; none: all that a stage is measured with.")
    quick: bool = key(False, "The mini shape with K = 4 and few repetitions only.")
    repetitions: int | None = key(None, "Turns that are counted; none: more for smaller models.", unit="turns", low=1)
    output: str | None = key(None, "The rows of the table: a .json file.")
    figure: str | None = key(None, "The ratios: a .png file.")


def refuse_unknown(config: BenchmarkConfig) -> None:
    """Raise UserError for a name that is none."""
    known = {"stage": list(PEERS), "shape": list(SHAPES), "peer": [peer for peers in PEERS.values() for peer in peers],
             "k": sorted({k for ks in KS.values() for k in ks})}
    for name, valid in known.items():
        for value in getattr(config, name):
            if value not in valid:
                raise UserError(f"{name}: '{value}' is none; there are: {' | '.join(map(str, valid))}")


def needed_flops(comparison: Comparison, batch: Batch) -> int:
    """Floating-point operations of one repetition."""
    size, (prompts, completions) = SHAPES[comparison.shape]["size"], batch.lengths
    if comparison.stage == "ppo":
        return flops.ppo(size, prompts, comparison.k, RESPONSE_TOKENS, PPO_EPOCHS)
    if comparison.stage == "generation":
        return flops.generation(size, prompts, comparison.k, RESPONSE_TOKENS)
    return {"sft": flops.sft, "reward": flops.reward}[comparison.stage](size, prompts, completions)


def peer_python(stage: str) -> Path | str:
    """The interpreter of the peer: that of .venv-bench for PPO, which is made where it is missing."""
    if stage != "ppo":
        return sys.executable
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print(f"making {PEER_ENVIRONMENT} from requirements-bench.txt")
        for command in ([sys.executable, "-m", "venv", PEER_ENVIRONMENT],
                        [python, "-m", "pip", "install", "--quiet", "-r", PROJECT / "requirements-bench.txt"]):
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"{PEER_ENVIRONMENT}: cannot be made; remove it and make it as requirements-bench.txt says, or "
                                "leave ppo out of --stage")
    return python


def measure(comparison: Comparison, batch: Batch, folder: Path) -> dict:
    """One row of the result."""
    models, work = folder / comparison.shape, Path(tempfile.mkdtemp(dir=folder))
    if not models.exists():
        save_models(comparison.shape, models)
    for name in ("policy", "reward"):
        (work / name).symlink_to(models / name)
    task = work / "task.json"
    Task(comparison.stage, comparison.peer, comparison.k, str(work), batch.prompts, batch.completions,
         comparison.repetitions + 1).save(task)
    turns = take_turns(task, peer_python(comparison.stage), comparison.repetitions)
    refuse_unequal_work(turns[0], comparison.peer in ("SFTTrainer", "RewardTrainer"))
    unit = UNITS[comparison.stage]
    found = figures(turns[1:], unit, needed_flops(comparison, batch))
    return {"stage": comparison.stage, "shape": comparison.shape, "k": comparison.k, "peer": comparison.peer, "unit": unit,
            **found._asdict()}


def main(config: BenchmarkConfig) -> None:
    refuse_unknown(config)
    output = output_file(config.output, "output", ".json") if config.output else None
    figure = output_file(config.figure, "figure", ".png") if config.figure else None
    plan = comparisons(config.stage, config.shape, config.peer, config.k, config.repetitions, config.quick)
    if not plan:
        raise UserError("k: no comparison is left; leave out one of --stage, --shape, --peer, --k")
    posts, rows = all_posts(), []
    with tempfile.TemporaryDirectory() as folder:
        for comparison in plan:
            rows.append(measure(comparison, batch_of(posts, comparison.posts, comparison.k), Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    print_table(rows, [comparison.goal for comparison in plan])
    if output:
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if figure:
        plot_ratios(figure, rows, plan)


if __name__ == "__main__":
    start(main, BenchmarkConfig, None, __doc__)
