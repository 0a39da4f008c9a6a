"""Part b, second half: a run of each stage that is stopped by Ctrl-C and resumed ends with the weights of an
undisturbed run.
"""

import math
import signal
import time
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import load_file

from studies.gpu_checks.device import ON_CARD
from studies.gpu_checks.engines import save_parents
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.stages import start_stage, wait_for

STEPS, UPDATES = (400, 20) if ON_CARD else (60, 8)  # so many that the stop comes before the end
ROWS = 16 if ON_CARD else 2
THREADS = 2  # of each run: other jobs run at the same time
SPREAD_FACTOR = 4.0
_COMMON = "--eval_rows 2 --test_rows 2 --learning_rate 1e-4 --warmup_steps 0 --eval_steps 999"
_EPOCHS = f"{_COMMON} --max_steps {STEPS} --logging_steps 1 --per_device_batch_size {ROWS}"


class Case(NamedTuple):
    """A stage's run, and how far off it may end.

    Attributes:
        words: of its command line.
        logged: a metric of each step or update.
        stop_after: steps or updates that are logged when Ctrl-C comes.
        limit: of the distance, as a part of the way that training goes from the first weights. Kernels that
            add in any order differ from run to run, so the distance of two undisturbed runs counts, too.
    """

    words: str
    logged: str
    stop_after: int
    limit: float


CASES = {
    "sft": Case(f"{_EPOCHS} --max_new_tokens 4", "sft/loss", 10 if ON_CARD else 1, 0.02),
    "reward": Case(f"{_EPOCHS} --centring_data none", "reward/loss", 10 if ON_CARD else 1, 0.02),
    # a token that is sampled otherwise changes all that follows
    "ppo": Case(f"{_COMMON} --prompts_per_update 4 --responses_per_prompt 2 --num_minibatches 1 "
                f"--total_episodes {8 * UPDATES} --max_new_tokens 8 --save_steps 999", "loss/policy",
                2 if ON_CARD else 1, 0.1),
}
STAGES = tuple(CASES) if ON_CARD else ("ppo",)  # a slow test has time for one


def run(results: Results, folder: Path) -> None:
    folder = folder / "resume"
    save_parents(folder)
    ends = time.monotonic() + results.left()
    runs = {}
    for stage in STAGES if ON_CARD else ():
        runs[stage] = Runs(stage, folder)
    for stage in STAGES:
        results.check(f"stop and resume, {stage}", 0,
                      lambda stage=stage: (runs.get(stage) or Runs(stage, folder)).outcome(ends))


class Runs:
    """Of one stage: two undisturbed runs, and one that is stopped. On a card all begin at the same time; on a
    CPU one follows another, and the second is spared.
    """

    def __init__(self, stage: str, folder: Path):
        self.stage, self.case, self.parents = stage, CASES[stage], folder
        self.words = [f"--model={folder}/policy", *self.case.words.split()]
        if stage == "ppo":
            self.words.append(f"--reward_model={folder}/reward")
        self.folders = {name: folder / f"{stage}_{name}" for name in ("first", "second", "stopped")}
        if not ON_CARD:
            self.folders["second"] = self.folders["first"]
        self.stopped = start_stage(stage, self.folders["stopped"], self.words, THREADS)
        self.others = self._undisturbed() if ON_CARD else []

    def _undisturbed(self):
        folders = dict.fromkeys([self.folders["first"], self.folders["second"]])
        return [start_stage(self.stage, path, self.words, THREADS) for path in folders]

    def outcome(self, ends: float) -> Outcome:
        """Stop the one, let it go on, and compare."""
        case, stopped = self.case, self.folders["stopped"]
        at = stop(self.stopped, stopped / "metrics.jsonl", case, ends)
        if wrong := wait_for(self.stopped, ends - time.monotonic(), 128 + signal.SIGINT):
            return Outcome({}, f"stopped after {at} steps: {wrong}")
        going_on = start_stage(self.stage, stopped, [*self.words, "--resume"], THREADS)
        for process in (going_on, *self.others):
            if wrong := wait_for(process, ends - time.monotonic()):
                return Outcome({}, wrong)
        for process in [] if ON_CARD else self._undisturbed():
            if wrong := wait_for(process, ends - time.monotonic()):
                return Outcome({}, wrong)
        weights = {name: load_file(path / "final" / "model.safetensors")
                   for name, path in self.folders.items()}
        start = load_file(self.parents / "policy" / "model.safetensors")
        way = distance(weights["first"], start)
        off = distance(weights["stopped"], weights["first"]) / way
        spread = distance(weights["second"], weights["first"]) / way
        limit = max(case.limit, SPREAD_FACTOR * spread)
        return Outcome({"stopped after step": at, "off, of the way trained": off,
                        "two undisturbed runs": spread},
                       None if off <= limit else f"off by {off:.1e} of the way, above {limit:.1e}")


def stop(process, metrics: Path, case: Case, ends: float) -> int:
    """Send Ctrl-C when enough steps are logged; returns how many were."""
    count = 0
    while process.poll() is None and time.monotonic() < ends:
        rows = metrics.read_text().splitlines() if metrics.exists() else []
        count = sum(f'"{case.logged}"' in row for row in rows)
        if count >= case.stop_after:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.02)
    return count


def distance(a: dict, b: dict) -> float:
    """Euclidean, over the weights that both have: a tied head may be stored or not."""
    return math.sqrt(
        sum(float((a[name].double() - b[name].double()).square().sum()) for name in set(a) & set(b))
    )
