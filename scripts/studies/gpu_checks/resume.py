"""Part b, second half: a run that is stopped by Ctrl-C and resumed ends with an undisturbed run's weights."""

import json
import math
import signal
import time
from pathlib import Path

from safetensors.torch import load_file

from studies.gpu_checks.device import ON_CARD
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.stages import start_stage, wait_for
from utils.paths import PROJECT

STEPS = 120 if ON_CARD else 6
STOP_AFTER = 10 if ON_CARD else 1  # logged steps
ROWS = 16 if ON_CARD else 2
THREADS = 2  # of each run: other jobs run at the same time
# Of the way that training goes from the base weights. Kernels that add in any order differ from run to run:
# the difference of two undisturbed runs counts, too.
LIMIT, SPREAD_FACTOR = 0.02, 4.0


def run(results: Results, folder: Path) -> None:
    results.check("stop and resume, sft", 45, lambda: stop_and_resume(folder, results.left()))


def stop_and_resume(folder: Path, seconds: float) -> Outcome:
    """Two undisturbed runs at the same time, then one that is stopped and goes on."""
    ends = time.monotonic() + seconds
    base = PROJECT / "assets" / "opt-mini"
    words = (
        f"--model {base} --max_steps {STEPS} --logging_steps 1 --eval_steps {STEPS} "
        f"--per_device_batch_size {ROWS} --learning_rate 1e-4 --warmup_steps 0 --eval_rows 2 --test_rows 2 "
        "--max_new_tokens 4"
    ).split()
    runs = {name: folder / f"resume_{name}" for name in ("first", "second", "stopped")}
    started = (
        [start_stage("sft", runs[name], words, THREADS) for name in ("first", "second")] if ON_CARD else []
    )
    process = start_stage("sft", runs["stopped"], words, THREADS)
    at = _stop(process, runs["stopped"] / "metrics.jsonl", ends)
    if wrong := wait_for(process, ends - time.monotonic(), 128 + signal.SIGINT):
        return Outcome({}, f"stopped after {at} steps: {wrong}")
    if not ON_CARD:  # one after the other: cores are few
        started = [start_stage("sft", runs["first"], words, THREADS)]
        runs["second"] = runs["first"]
    started.append(start_stage("sft", runs["stopped"], [*words, "--resume"], THREADS))
    for process in started:
        if wrong := wait_for(process, ends - time.monotonic()):
            return Outcome({}, wrong)
    weights = {name: load_file(path / "final" / "model.safetensors") for name, path in runs.items()}
    way = _distance(weights["first"], load_file(base / "model.safetensors"))
    off = _distance(weights["stopped"], weights["first"]) / way
    spread = _distance(weights["second"], weights["first"]) / way
    figures = {
        "stopped after step": at,
        "of steps": STEPS,
        "off, of the way trained": off,
        "two undisturbed runs": spread,
    }
    limit = max(LIMIT, SPREAD_FACTOR * spread)
    return Outcome(figures, None if off <= limit else f"off by {off:.1e} of the way, above {limit:.1e}")


def _stop(process, metrics: Path, ends: float) -> int:
    """Send Ctrl-C when enough steps are logged; returns how many were."""
    count = 0
    while process.poll() is None and time.monotonic() < ends:
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        count = sum('"sft/loss"' in row for row in rows)
        if count >= STOP_AFTER:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    return count


def _distance(a: dict, b: dict) -> float:
    """Euclidean, over the weights that both have: a tied head may be stored or not."""
    return math.sqrt(
        sum(float((a[name].double() - b[name].double()).square().sum()) for name in set(a) & set(b))
    )


def losses(run_folder: Path) -> list[float]:
    """All losses that a run has logged, in order."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in sorted(row) if "loss" in name]
