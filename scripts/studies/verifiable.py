"""Rewards that are known to be true: gae, rloo and grpo side by side, each for the same time on one thread.

    python data/sorting/generate.py
    python scripts/studies/verifiable.py --workers 2 --minutes 10 --output outputs/verifiable.json

An arm is a method with the options of ARMS. The SFT model is trained once. Each arm and seed is a run of
scripts/train_ppo.py in a process of its own with one thread; as many run at once as there are workers. A
short run of each arm is timed first, among as many others, and says how many episodes fit into the time, so
that the learning rate has fallen to 0 at its end. The output is written again every few seconds: for each
run the seconds of training, the episodes, and the share of right answers at every evaluation and in the end.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start
from utils.runs.records import read_whole_rows, write_json

ARMS = {"gae": [], "gae_shared": ["--value_model", "shared"], "rloo": ["--advantage", "rloo"],
        "grpo": ["--advantage", "grpo"]}
_TIMED, _WRITTEN = 4, 10.0  # updates that are timed; seconds between two writings of the output
_TEST = ("right_before", "right_after", "in_place_before", "in_place_after", "kl", "best_step", "episodes",
         "seconds")


@dataclass
class VerifiableConfig:
    """Which runs, and for how long."""

    arms: list[str] = key(["gae", "rloo", "grpo"], f"Methods: {', '.join(ARMS)}.")
    learning_rates: list[float] = key([3e-4], "Learning rates; each arm is run with each.")
    seeds: list[int] = key([0, 1, 2], "Seeds; each arm is run with each.")
    minutes: float = key(10.0, "Training time of a run.", unit="minutes", low=0.05, high=1000.0)
    workers: int = key(2, "Runs at once, each on one thread.", unit="processes", low=1, high=1000)
    sft: str | None = key(None, "SFT model; none: it is trained first, into `folder`.")
    folder: str = key("outputs/verifiable_study", "Folder of all runs; must be new or empty.")
    output: str = key("outputs/verifiable.json", "The results.")


class Arm:
    """One run: a method, its learning rate and its seed."""

    def __init__(self, method: str, rate: float, seed: int):
        self.method, self.rate, self.seed = method, rate, seed
        self.name = f"{method}-{rate:g}-{seed}"

    def words(self, config, folder: Path, episodes: int) -> list[str]:
        return ["--config", "configs/verifiable/ppo.yaml", "--output_dir", str(folder), "--model", config.sft,
                "--seed", str(self.seed), "--learning_rate", str(self.rate), "--total_episodes",
                str(episodes), "--report_to", "none", *ARMS[self.method]]


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
    with ThreadPoolExecutor(config.workers) as pool:
        runs = [pool.submit(learn, arm, config, folder) for arm in arms]
        while not all(run.done() for run in runs):
            time.sleep(_WRITTEN)
            write_json(Path(config.output), {arm.name: found for arm in arms
                                             if (found := figures(folder / arm.name))})
    for run in runs:
        run.result()


def learn(arm: Arm, config: VerifiableConfig, folder: Path) -> None:
    """Time an arm, and train it for the time that there is."""
    timed = folder / f"{arm.name}-timed"
    words = arm.words(config, timed, _TIMED * 512)
    run_stage("ppo", [*words, "--eval_rows", "2", "--test_rows", "2"])
    seconds = [row["time/rollout"] + row["time/update"] for row in read_whole_rows(timed / "metrics.jsonl")
               if "time/update" in row]
    updates = max(1, int(60 * config.minutes / (sum(seconds[1:]) / len(seconds[1:]))))
    run_stage("ppo", arm.words(config, folder / arm.name, updates * 512))


def figures(run: Path) -> dict | None:
    """Training seconds (without evaluations), episodes and share of right answers at each evaluation; and the
    test figures of a finished run. None before its first evaluation.
    """
    if not (run / "metrics.jsonl").exists():
        return None
    curve, spent, episodes = [], 0.0, 0
    for row in read_whole_rows(run / "metrics.jsonl"):
        spent += row.get("time/rollout", 0.0) + row.get("time/update", 0.0)
        episodes = row.get("objective/episodes", episodes)
        if "eval/rewards/right" in row:
            curve.append({"seconds": spent, "episodes": episodes, "right": row["eval/rewards/right"],
                          "kl": row["eval/kl"]})
    path = run / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return {"curve": curve, "test": {name: summary[name] for name in _TEST if name in summary}}


def run_stage(stage: str, words: list[str]) -> None:
    """Run a stage on one thread. Raises UserError with its last line when it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, PROJECT / "scripts" / f"train_{stage}.py", *words], cwd=PROJECT,
                          env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"train_{stage}.py: {(done.stderr.strip() or 'no message').splitlines()[-1]}")


if __name__ == "__main__":
    start(main, read_config(VerifiableConfig, None, __doc__))
