"""Rewards that are known to be true: gae, rloo and grpo side by side, each for the same CPU seconds.

    python data/sorting/generate.py
    python scripts/studies/verifiable.py --output outputs/verifiable.json

An arm is a method with the options of ARMS. The SFT model is trained once. Each arm and seed is a run of
scripts/train_ppo.py in a process of its own with one thread. A short run of each arm is timed first and says
how many updates fit into the time, so that the learning rate has fallen to 0 at its end. Time is CPU time of
sampling and training, without evaluations (`time/cpu`): it means the same on a machine that others use too.
The output is written again every few seconds: for each run the CPU seconds, the episodes, and the share of
right answers at every evaluation and in the end. A table of all runs is printed at the end.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start
from utils.runs.records import read_whole_rows, write_json

_SEPARATE = ["--value_model", "separate"]  # the default, which methods without a value model want, too
ARMS = {"gae": [], "gae_separate": _SEPARATE, "rloo": ["--advantage", "rloo", *_SEPARATE],
        "grpo": ["--advantage", "grpo", *_SEPARATE]}
_TIMED, _WRITTEN = 8, 10.0  # updates that are timed; seconds between two writings of the output
_EPISODES = 512  # of an update of configs/verifiable/ppo.yaml
_GOAL = 0.9  # share of right answers
_TEST = ("right_before", "right_after", "in_place_before", "in_place_after", "kl", "best_step", "episodes",
         "seconds")


@dataclass
class VerifiableConfig:
    """Which runs, and for how long."""

    arms: list[str] = key(["gae", "rloo", "grpo"], f"Methods: {', '.join(ARMS)}.")
    learning_rates: list[float] = key([1e-3], "Learning rates; each arm is run with each.")
    seeds: list[int] = key([0, 1, 2], "Seeds; each arm is run with each.")
    minutes: float = key(0.5, "Training time of a run.", unit="CPU minutes", low=0.01, high=1000.0)
    workers: int = key(1, "Runs at once, each on one thread.", unit="processes", low=1, high=1000)
    sft: str | None = key(None, "SFT model; none: it is trained first, into `folder`.")
    folder: str = key("outputs/verifiable_study", "Folder of all runs; must be new or empty.")
    output: str = key("outputs/verifiable.json", "The results.")


class Arm:
    """One run: a method, its learning rate and its seed."""

    def __init__(self, method: str, rate: float, seed: int):
        self.method, self.rate, self.seed = method, rate, seed
        self.name = f"{method}-{rate:g}-{seed}"

    def words(self, config, folder: Path, updates: int) -> list[str]:
        return ["--config", "configs/verifiable/ppo.yaml", "--output_dir", str(folder), "--model", config.sft,
                "--seed", str(self.seed), "--learning_rate", str(self.rate), "--total_episodes",
                str(updates * _EPISODES), "--report_to", "none", *ARMS[self.method]]


def main(config: VerifiableConfig) -> None:
    for name in config.arms:
        if name not in ARMS:
            raise UserError(f"arms: '{name}' is none of {', '.join(ARMS)}")
    folder = Path(config.folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"folder: '{folder}' is not empty; name a new one")
    if config.sft is None:
        config.sft = str(folder / "sft" / "final")
        run_stage("sft", ["--config", "configs/verifiable/sft.yaml", "--output_dir", str(folder / "sft"),
                          "--report_to", "none"])
    arms = [Arm(method, rate, seed) for seed in config.seeds for rate in config.learning_rates
            for method in config.arms]
    updates = {method: updates_in_time(Arm(method, config.learning_rates[0], config.seeds[0]), config, folder)
               for method in config.arms}
    with ThreadPoolExecutor(config.workers) as pool:
        runs = [pool.submit(run_stage, "ppo", arm.words(config, folder / arm.name, updates[arm.method]))
                for arm in arms]
        while not all(run.done() for run in runs):
            time.sleep(_WRITTEN)
            write_json(Path(config.output), results(arms, folder))
    for run in runs:
        run.result()
    write_json(Path(config.output), results(arms, folder))
    print_table(results(arms, folder))


def updates_in_time(arm: Arm, config: VerifiableConfig, folder: Path) -> int:
    """How many updates of an arm fit into the time. The first update is not counted: it warms up."""
    timed = folder / f"{arm.name}-timed"
    run_stage("ppo", [*arm.words(config, timed, _TIMED), "--eval_rows", "2", "--test_rows", "2"])
    seconds = [row["time/cpu"] for row in read_whole_rows(timed / "metrics.jsonl") if "time/cpu" in row]
    return max(1, int(60 * config.minutes / fmean(seconds[1:])))


def results(arms: list[Arm], folder: Path) -> dict[str, dict]:
    """The figures of all runs that have begun, by their names."""
    return {arm.name: found for arm in arms if (found := figures(folder / arm.name))}


def figures(run: Path) -> dict | None:
    """CPU seconds of training (without evaluations), episodes and share of right answers at each evaluation;
    and the test figures of a finished run. None before its first evaluation.
    """
    if not (run / "metrics.jsonl").exists():
        return None
    curve, spent, episodes = [], 0.0, 0
    for row in read_whole_rows(run / "metrics.jsonl"):
        spent += row.get("time/cpu", 0.0)
        episodes = row.get("objective/episodes", episodes)
        if "eval/rewards/right" in row:
            curve.append({"seconds": spent, "episodes": episodes, "right": row["eval/rewards/right"],
                          "kl": row["eval/kl"]})
    path = run / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {"curve": curve, "test": {name: summary[name] for name in _TEST if name in summary}}


def seconds_to_goal(curve: list[dict]) -> float | None:
    """CPU seconds of training until the first evaluation with at least _GOAL right answers; None: never."""
    return next((point["seconds"] for point in curve if point["right"] >= _GOAL), None)


def print_table(runs: dict) -> None:
    """One row for each run, in Markdown."""
    print(f"| run | CPU s | episodes | CPU s to {_GOAL:g} | right, greedy, validation |"
          " right, sampled, test |")
    print("|---|---|---|---|---|---|")
    for name, run in runs.items():
        last, reached = run["curve"][-1], seconds_to_goal(run["curve"])
        test = [f"{run['test'][key]:.3f}" for key in ("right_before", "right_after") if key in run["test"]]
        print(f"| {name} | {last['seconds']:.0f} | {last['episodes']:,} | "
              f"{'never' if reached is None else f'{reached:.0f}'} | "
              f"{run['curve'][0]['right']:.3f} → {max(point['right'] for point in run['curve']):.3f} | "
              f"{' → '.join(test)} |")


def run_stage(stage: str, words: list[str]) -> None:
    """Run a stage on one thread. Raises UserError with its last line when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, PROJECT / "scripts" / f"train_{stage}.py", *words], cwd=PROJECT,
                          env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train_{stage}.py: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


if __name__ == "__main__":
    start(main, read_config(VerifiableConfig, None, __doc__))
