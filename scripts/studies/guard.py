"""The guard, judged where the truth is known: what share of a run's gold peak does the kept policy have?

    python data/tldr_mini/generate.py --seed 77 --output_dir outputs/other_rankings
    python scripts/studies/guard.py --workers 4 --minutes 60     # again until nothing is left to do

Each cell is one PPO run without a KL budget, of twice the demo's length: an arm (`single`: a reward model
with one head; `mean`, `worst`, `uncertainty`: five heads), a kl_coef and a seed. Each seed has reward models
of its own; the guard's model learnt from other rankings. All runs have `guard: 1`, which changes what is kept
and nothing else, so that one run tells what every rule would have kept. A run that the time limit ends goes
on in the next call. A finished cell is one line of `results`, with all its evaluations.

The rules read no gold score. `guard: 1` was found on a run of seed 0, so that seed is not among those here;
the KL budget of 3 was read off the gold score of the demo.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import PROJECT, UserError, key
from utils.console import show_table
from utils.launch import read_config, start
from utils.runs.records import append_rows, end_line, read_objects, read_whole_rows

ARMS = {"single": 1, "mean": 5, "worst": 5, "uncertainty": 5}  # arm -> heads of its reward model
MEASURES = {"kl": "eval/kl", "length": "eval/tokens", "score": "eval/score", "gold": "eval/gold",
            "gold_sampled": "eval/gold_sampled", "spread": "eval/spread", "guard_score": "eval/guard_score",
            "gain": "eval/guard_gain"}
NO_BUDGET = "1e6"


@dataclass
class GuardStudyConfig:
    """What is run, and where."""

    sft: str = key("outputs/tldr_mini/sft/final", "The SFT model of all runs.")
    other_rankings: str = key("outputs/other_rankings/reward_train.jsonl.gz", "What the guard's model learns "
                              "from: rankings that no other reward model has seen.")
    arms: list[str] = key(list(ARMS), f"Of {', '.join(ARMS)}.")
    kl_coefs: list[float] = key([0.0, 0.04, 0.12], "KL coefficients.")
    seeds: list[int] = key([1, 2, 3, 4, 5], "Seeds: of the reward models and of PPO.")
    ensemble_coef: float = key(5.0, "Of the arm `uncertainty`.", low=0.0, high=1e6)
    reward: str = key("", "More options of train_reward.py.")
    ppo: str = key("--total_episodes 8192 --eval_steps 2 --eval_rows 128", "More options of train_ppo.py.")
    workers: int = key(1, "Runs at once, one thread each.", low=1, high=1000)
    minutes: float = key(60.0, "No run goes on after this.", unit="minutes", low=0.01, high=1e5)
    folder: str = key("outputs/guard", "Folder of the runs.")
    results: str = key("outputs/guard.jsonl", "Finished cells, a line each.")

    def __post_init__(self):
        for arm in self.arms:
            if arm not in ARMS:
                raise UserError(f"arms: '{arm}' is none of {', '.join(ARMS)}")


# --------------------------------------------------------------------------------------------------- the runs


def reward_words(config: GuardStudyConfig, heads: int, seed: int) -> list[str]:
    return ["--reward_heads", str(heads), "--seed", str(seed), *config.reward.split()]


def reward_folder(config: GuardStudyConfig, heads: int, seed: int) -> Path:
    return Path(config.folder) / "reward" / f"{heads}-heads-{seed}"


def cells_of(config: GuardStudyConfig) -> list[tuple[str, float, int]]:
    """(arm, kl_coef, seed) in order of value: all seeds of the coefficient that games most come first."""
    return [(arm, coef, seed) for coef, seed, arm in product(config.kl_coefs, config.seeds, config.arms)]


def ppo_words(config: GuardStudyConfig, cell: tuple[str, float, int]) -> list[str]:
    arm, coef, seed = cell
    entry = {"model": str(reward_folder(config, ARMS[arm], seed) / "final")}
    entry |= {} if arm == "single" else {"ensemble": arm}
    entry |= {"ensemble_coef": config.ensemble_coef} if arm == "uncertainty" else {}
    return ["--model", config.sft, "--reward_model", "none", "--rewards", json.dumps([entry]),
            "--guard_model", str(Path(config.folder) / "reward" / "guard" / "final"), "--guard", "1",
            "--kl_coef", str(coef), "--kl_budget", NO_BUDGET, "--kl_limit", NO_BUDGET, "--seed", str(seed),
            *config.ppo.split()]


def run_stage(script: str, folder: Path, words: list[str], until: float) -> bool:
    """Run a stage to its end, or go on with it; False when the time is up before. Its output is in a file.

    Raises:
        UserError: with the last line that it printed, when it fails.
    """
    if (folder / "final").exists():
        return True
    resume = ["--resume"] if list(folder.glob("checkpoints/*-*")) else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    command = [sys.executable, str(PROJECT / "scripts" / script), "--output_dir", str(folder), *words,
               *resume]
    with log.open("a") as file:
        try:
            done = subprocess.run(command, stdout=file, stderr=file, check=False,
                                  env=os.environ | {"OMP_NUM_THREADS": "1"},
                                  timeout=max(1.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
    if done.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(f"{folder}: {''.join(last)}")
    return True


def points_of(folder: Path) -> list[dict]:
    """The evaluations of a PPO run in order: `update`, the MEASURES that it has, and the entropy of the
    policy's last rollout.
    """
    rows = {}
    for row in read_whole_rows(folder / "metrics.jsonl"):
        rows.setdefault(row["step"], {}).update(row)
    return [{"update": step, "entropy": row.get("objective/entropy")}
            | {name: row[logged] for name, logged in MEASURES.items() if logged in row}
            for step, row in sorted(rows.items()) if "eval/score" in row]


def measure(config: GuardStudyConfig, cell: tuple[str, float, int], until: float) -> None:
    """Run one cell and add its line to the results, unless the time is up before."""
    arm, coef, seed = cell
    folder = Path(config.folder) / arm / f"coefficient-{coef}" / f"seed-{seed}"
    if time.monotonic() < until and run_stage("train_ppo.py", folder, ppo_words(config, cell), until):
        append_rows(Path(config.results), [{"arm": arm, "kl_coef": coef, "seed": seed,
                                            "points": points_of(folder)}])


# -------------------------------------------------------------------------------------------------- the rules


def kept_by_guard(points: list[dict], guard: float = 1.0) -> dict:
    """What `guard` kept: the last evaluation that was above the kept one by so much, else the first."""
    return [points[0], *(point for point in points if (point.get("gain") or 0.0) > guard)][-1]


def highest(measure: str):
    """The rule that keeps the evaluation with the highest figure; the last one of equals, as `Best` does."""
    return lambda points: max(reversed(points), key=lambda point: point[measure])


def within_budget(points: list[dict], budget: float = 3.0) -> dict:
    """The highest score among the evaluations whose KL is within the demo's `kl_budget`."""
    return highest("score")([point for point in points if point["kl"] <= budget])


RULES = {"the last policy": lambda points: points[-1], "the highest score": highest("score"),
         "kl_budget: 3": within_budget, "the highest score of the guard's model": highest("guard_score"),
         "guard: 1": kept_by_guard}


def share_kept(points: list[dict], rule, measure: str = "gold") -> float:
    """The gold score of the policy that a rule keeps, as a share of the run's gold peak."""
    return rule(points)[measure] / max(point[measure] for point in points)


def print_table(config: GuardStudyConfig, cells: list[dict], measure: str, what: str) -> None:
    """Mean over the seeds, and the lowest, of the share that each rule keeps; and the gold peak."""
    table = Table(title=f"Share of the gold peak that is kept, {what}", title_justify="left")
    for column in ("kl_coef", "arm", "runs", "gold peak", *RULES):
        table.add_column(column, overflow="fold")
    for coef, arm in product(config.kl_coefs, config.arms):
        runs = [cell["points"] for cell in cells if (cell["kl_coef"], cell["arm"]) == (coef, arm)
                and cell["seed"] in config.seeds]
        if not runs:
            continue
        peak = fmean(max(point[measure] for point in points) for points in runs)
        shares = [[share_kept(points, rule, measure) for points in runs] for rule in RULES.values()]
        table.add_row(str(coef), arm, str(len(runs)), f"{peak:.3f}",
                      *(f"{fmean(kept):.3f} ({min(kept):.3f})" for kept in shares))
    show_table(table)


def finished_cells(path: Path) -> dict[tuple[str, float, int], dict]:
    """What earlier calls have measured, by the names of `cells_of`."""
    return {(row["arm"], row["kl_coef"], row["seed"]): row for row in read_objects(path)}


def main(config: GuardStudyConfig) -> None:
    until = time.monotonic() + 60 * config.minutes
    results = Path(config.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    done = finished_cells(results)
    end_line(results)
    left = [cell for cell in cells_of(config) if cell not in done]
    models = list(dict.fromkeys((ARMS[arm], seed) for arm, _, seed in left))
    with ThreadPoolExecutor(config.workers) as pool:
        jobs = [pool.submit(run_stage, "train_reward.py", Path(config.folder) / "reward" / "guard",
                            ["--model", config.sft, "--reward_training_data", config.other_rankings,
                             *reward_words(config, 1, 999)], until)] if left else []
        jobs += [pool.submit(run_stage, "train_reward.py", reward_folder(config, *model),
                             ["--model", config.sft, *reward_words(config, *model)], until)
                 for model in models]
        if all([job.result() for job in jobs]):
            for job in [pool.submit(measure, config, cell, until) for cell in left]:
                job.result()
    done = finished_cells(results)
    finished = sum(cell in done for cell in cells_of(config))
    print(f"{finished} of {len(cells_of(config))} cells are finished: {results}")
    print_table(config, [*done.values()], "gold", "nearly greedy summaries")
    print_table(config, [*done.values()], "gold_sampled", "sampled summaries")


if __name__ == "__main__":
    start(main, read_config(GuardStudyConfig, None, __doc__))
