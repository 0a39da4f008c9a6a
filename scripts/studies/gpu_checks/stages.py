"""Part b, first half: the three stages on the embedded data, through their scripts, one after the other."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from studies.gpu_checks.device import ON_CARD
from studies.gpu_checks.results import Outcome, Results
from utils.paths import PROJECT

STAGES = ("sft", "reward", "ppo")
LAST_CHARACTERS = 600  # of a failed run's output, in the result
# without a card a few steps show that everything runs
SHRUNKEN = {
    "sft": "--max_steps 2 --eval_steps 2 --eval_rows 2 --test_rows 2 --per_device_batch_size 2 "
    "--max_new_tokens 4",
    "reward": "--max_steps 2 --eval_steps 2 --eval_rows 2 --test_rows 2 --per_device_batch_size 2 "
    "--centring_data none",
    "ppo": "--total_episodes 8 --prompts_per_update 2 --responses_per_prompt 2 --eval_rows 2 --test_rows 2 "
    "--max_new_tokens 4 --save_steps 9",
}


def run(results: Results, folder: Path) -> None:
    """Each stage is a check of its own; a stage whose parents are missing is skipped."""
    together = time.monotonic()
    for stage in STAGES:
        missing = [
            name for name, path in parents_of(stage, folder) if stage != "sft" and not Path(path).exists()
        ]
        if missing:
            results.skip(f"the {stage} stage", f"no {' and no '.join(missing)}: the stage before failed")
            continue
        results.check(f"the {stage} stage", 15, partial(one_stage, stage, folder, results.left()))
    if (folder / "ppo" / "final").exists():
        seconds = time.monotonic() - together
        results.check("the three stages", 0, lambda: Outcome({"seconds": seconds}))


def parents_of(stage: str, folder: Path) -> list[tuple[str, str]]:
    """The keys of a stage's parent models, and their folders."""
    if stage == "sft":
        return [("model", str(PROJECT / "assets" / "opt-mini"))]
    parents = [("model", str(folder / "sft" / "final"))]
    return parents if stage == "reward" else [*parents, ("reward_model", str(folder / "reward" / "final"))]


def one_stage(stage: str, folder: Path, seconds: float) -> Outcome:
    """Run a stage to its end, imports and evaluations included; its figures, and whether it learnt."""
    words = [word for name, path in parents_of(stage, folder) for word in (f"--{name}", path)]
    if not ON_CARD:
        words += SHRUNKEN[stage].split()
    began = time.monotonic()
    wrong = wait_for(start_stage(stage, folder / stage, words), seconds)
    wall = time.monotonic() - began
    if wrong:
        return Outcome({"wall seconds": wall}, wrong)
    summary = json.loads((folder / stage / "summary.json").read_text())
    return Outcome({"wall seconds": wall, **summary}, nothing_learnt(stage, summary) if ON_CARD else None)


def nothing_learnt(stage: str, summary: dict) -> str | None:
    """What is wrong with a stage's final figures; None: nothing."""
    low = {
        "sft": ("rouge_avg", summary.get("base_rouge_avg", 0) + 0.2),
        "reward": ("accuracy", 0.7),
        "ppo": ("gold_after", summary.get("gold_before", 0)),
    }[stage]
    name, limit = low
    return None if summary[name] > limit else f"{name} is {summary[name]:.3f}, not above {limit:.3f}"


def start_stage(stage: str, out: Path, words: list[str], threads: int | None = None) -> subprocess.Popen:
    """The stage's script as a process that writes everything to OUT.log.

    Args:
        threads: of the processor, where several runs share it; None: as many as torch takes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [
        sys.executable,
        str(PROJECT / "scripts" / f"train_{stage}.py"),
        "--output_dir",
        str(out),
        "--report_to",
        "none",
        *words,
    ]
    with out.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    process.log = out.with_suffix(".log")
    return process


def wait_for(process: subprocess.Popen, seconds: float, status: int = 0) -> str | None:
    """Wait; None when it ends with this status in time, else what went wrong."""
    try:
        found = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"not at its end after {seconds:.0f} s"
    if found == status:
        return None
    return f"status {found}, not {status}: {process.log.read_text(errors='replace')[-LAST_CHARACTERS:]}"
