"""How fast each stage is beside what a user would otherwise run: the same model, data and settings, side by
side.

    python scripts/studies/benchmark.py --quick                   # the mini shape, a few minutes on two cores
    python scripts/studies/benchmark.py --output outputs/benchmark.json --figure outputs/benchmark.png
    python scripts/studies/benchmark.py --stage reward --shape mini 125m --k 4 --repetitions 5
    python scripts/studies/benchmark.py --shape mini --prompt_length 500    # how the ratio moves; also --k
    python scripts/studies/benchmark.py --profile --k 4 --shape mini             # where the time goes
    python scripts/studies/benchmark.py --cost --figure outputs/cost.png    # time and memory against the work

Peers: trl's SFTTrainer (plain and packed) and RewardTrainer, transformers' `generate`, and trl's last
PPOTrainer, which runs in an environment of its own (.venv-bench, made from requirements-bench.txt where it is
missing).

Each side is a process of its own. They take turns, so both see the same machine: a turn is one optimizer
step, one PPO update or one round of sampling, of each side, on the same posts. After a turn that is not
counted, the ratio is the median over turns of their time over ours; its low and high are the smallest and the
largest. Before that the two must have done the same: as many tokens, pairs or episodes, and the same loss
where the algorithm is the same.

Memory is the peak of the whole process. Utilisation is that of ours: the floating-point operations that the
algorithm needs (planning/flops.py), divided by the time and by the float32 matrix-product rate measured in
the same turn. Models have random weights. Threads are torch's default; OMP_NUM_THREADS sets them.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from studies.benchmarks.cost import costs
from studies.benchmarks.measure import row_of, turns_of
from studies.benchmarks.plan import KS, PEERS, Comparison, comparisons
from studies.benchmarks.posts import all_posts, batch_of
from studies.benchmarks.report import plot_costs, plot_ratios, print_profile, print_table
from studies.benchmarks.shapes import SHAPES
from utils.config import UserError, key
from utils.launch import read_config, start
from utils.runs.run import output_file


@dataclass
class BenchmarkConfig:
    """What to measure."""

    stage: list[str] = key(["sft", "reward", "ppo", "generation"], "Stages to measure.")
    shape: list[str] = key(["mini", "30m", "125m"], "Sizes of the model.")
    peer: list[str] = key([], "Peers by name, such as RewardTrainer; none: all.")
    k: list[int] = key([], "Completions for each prompt; none: all that a stage is measured with.")
    quick: bool = key(False, "The mini shape with K = 4 and few repetitions only.")
    repetitions: int | None = key(None, "Turns that are counted; none: more for smaller models.",
                                  unit="turns", low=1, high=1000)
    prompt_length: int | None = key(None, "Give every prompt this length; none: those of real posts.",
                                    unit="tokens", low=1, high=1900)
    processes: int = key(1, "Run our side as so many processes (torchrun) that share out the cores; the peer "
                            "has one with all.",
                         unit="processes", low=1, high=1000)
    profile: bool = key(False, "Say besides where each side's time goes: generation, scoring, "
                               "update, data, other.")
    cost: bool = key(False, "Measure in place of ratios how time and memory of ours grow with K, "
                            "prompt, posts and model.")
    output: str | None = key(None, "The rows of the table: a .json file.")
    figure: str | None = key(None, "The ratios, or the costs: a .png file.")


def refuse_unknown(config: BenchmarkConfig) -> None:
    """Raise UserError for a name that is none."""
    known = {"stage": list(PEERS), "shape": list(SHAPES),
             "peer": [peer for peers in PEERS.values() for peer in peers],
             "k": sorted({k for ks in KS.values() for k in ks})}
    for name, valid in known.items():
        for value in getattr(config, name):
            if value not in valid:
                raise UserError(f"{name}: '{value}' is none; there are: {' | '.join(map(str, valid))}")


def paths_of(config: BenchmarkConfig) -> tuple[Path | None, Path | None]:
    """Where the rows and the figure go.

    Raises:
        UserError: before anything is measured, for a name that cannot be written to or a result that has no
            such file.
    """
    if config.output and (config.profile or config.cost):
        raise UserError("output: it holds the rows of comparisons; leave it out with --profile or --cost")
    if config.figure and config.profile:
        raise UserError("figure: a profile has none; leave it out with --profile")
    return (output_file(config.output, "output", ".json") if config.output else None,
            output_file(config.figure, "figure", ".png") if config.figure else None)


def refuse_uneven(config: BenchmarkConfig, plan: list[Comparison]) -> None:
    """Raise UserError when the work cannot be shared out over the processes."""
    cores = len(os.sched_getaffinity(0))
    if config.processes > cores:
        raise UserError(f"processes: {config.processes} need a core each, there are {cores}; take fewer")
    for comparison in plan:
        if comparison.posts % config.processes:
            raise UserError(f"processes: {comparison.posts} posts ({comparison.stage} {comparison.shape}, K "
                            f"= {comparison.k}) cannot be shared out over {config.processes}; leave that K "
                            f"or shape out, or take 1")


def main(config: BenchmarkConfig) -> None:
    refuse_unknown(config)
    output, figure = paths_of(config)
    plan = comparisons(config.stage, config.shape, config.peer, config.k, config.repetitions, config.quick)
    if not plan:
        raise UserError("k: no comparison is left; leave out one of --stage, --shape, --peer, --k")
    refuse_uneven(config, plan)
    posts, rows, profiles = all_posts(), [], []
    with tempfile.TemporaryDirectory() as folder:
        if config.cost:
            points = costs(config.stage, config.shape, config.repetitions or 2, posts, Path(folder))
            if figure:
                plot_costs(figure, points)
            return
        for comparison in plan:
            batch = batch_of(posts, comparison.posts, comparison.k, config.prompt_length)
            turns = turns_of(comparison, batch, Path(folder), config.processes, config.profile)
            rows.append(row_of(comparison, batch, turns))
            profiles.append(turns)
            print(json.dumps(rows[-1]), flush=True)
            if output:  # after each: the whole takes most of an hour
                output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if config.profile:
        print_profile(plan, profiles)
    print_table(rows, [comparison.goal for comparison in plan])
    if figure:
        plot_ratios(figure, rows, plan)


if __name__ == "__main__":
    start(main, read_config(BenchmarkConfig, None, __doc__))
