"""Does a run survive a kill at any moment? Tiny runs are killed, go on with --resume, and must end alike.

    python tests/helpers/kill_test.py --stage ppo --kills 3                    # a minute on one core
    python tests/helpers/kill_test.py --output outputs/kills.json              # 30 kills of each stage

Each stage trains a random OPT of two layers on data/tldr_mini, with a checkpoint every step or two: SFT
with dropout, PPO with every option that hands something on from update to update. The best weights change
during the run and are not the last ones. Two undisturbed runs come first; the second must equal the first
and says how long a run is. Then, again and again, a new run is killed with SIGKILL at a moment drawn from
all of that time and resumed (started again when it had not written config.yaml yet; left alone when it had
final/). In the end its metrics.jsonl without `time/*`, its samples.jsonl and every file in final/ must be
the undisturbed run's, bit for bit.

Runs are forks of this process, which has imported what they need, so that most of a run is its own work. It
does not try several processes or DeepSpeed. Exit status 1 when a run ended in another way.
"""

import json
import multiprocessing
import os
import random
import runpy
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets.config

import environment  # noqa: F401  where the scripts are, and no network
import train_ppo  # noqa: F401  what the stages import, once for all runs
import train_reward  # noqa: F401
import train_sft  # noqa: F401
from run_folders import checkpoints
from tiny_models import save_opt
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start
from utils.runs.checkpoints import checksums
from utils.runs.records import read_whole_rows
from utils.runs.run import output_file

STAGES = {
    "sft": "--model {models}/base --max_steps 16 --eval_steps 2 --save_steps 2 --logging_steps 3 "
           "--max_new_tokens 8 --eval_temperature 1.0 --learning_rate 0.01",
    "reward": "--model {models}/base --max_steps 24 --eval_steps 3 --save_steps 2 --logging_steps 3",
    "ppo": "--model {models}/base --reward_model {models}/reward --total_episodes 80 --prompts_per_update 4 "
           "--responses_per_prompt 2 --ppo_epochs 2 --eval_steps 2 --save_steps 1 --max_new_tokens 8 "
           "--kl_target 0.01 --kl_horizon 20 --ema_decay 0.6 --value_model shared --ptx_coef 0.1 "
           "--actor_training_data data/tldr_mini/actor_train.jsonl.gz --learning_rate 0.003 "
           "--eval_temperature 1.0 --kl_budget 99",
}
SAVE_STEPS = {"sft": 2, "reward": 2, "ppo": 1}
FIRST_OFFER = {"sft": 2, "ppo": 0}  # the step after which weights may first be the best ones
_FORK = multiprocessing.get_context("fork")


@dataclass
class KillConfig:
    """What is killed, and how often."""

    stage: str = key("all", "Stage whose runs are killed.", choices=[*STAGES, "all"])
    kills: int = key(30, "Runs of each stage that are killed.", unit="runs", low=1, high=10_000)
    seed: int = key(0, "Seed of the moments.", low=0, high=2**32 - 1)
    output: str | None = key(None, "Every kill with its moment and what came of it: a .json file.")


# ------------------------------------------------------------------------------------------------- one run


def make_models(folder: Path) -> None:
    """base/ and reward/ in `folder`, with random weights. Some responses end, and scores differ."""
    save_opt(folder / "base", eos_logit=3.0)
    save_opt(folder / "reward", "reward", head_scale=50)


def train(stage: str, models: Path, out: Path, more: list[str]) -> None:
    """The stage's script, as a user starts it; what it says goes to a file beside `out`."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = str(PROJECT / "scripts" / f"train_{stage}.py")
    words = STAGES[stage].format(models=models) + " --per_device_batch_size 4 --eval_rows 4 --test_rows 8"
    sys.argv = [script, *words.split(), "--output_dir", str(out), *more]
    runpy.run_path(script, run_name="__main__")


def started(stage, models, out, *more):
    """A process that trains: this one must not have used torch's threads, which a fork has not."""
    process = _FORK.Process(target=train, args=(stage, models, out, more))
    process.start()
    return process


def finished(process, out: Path) -> None:
    process.join()
    if process.exitcode != 0:
        raise UserError(f"a run failed; the last that it said: {Path(f'{out}.log').read_text()[-2000:]}")


# ------------------------------------------------------------------------------------------ what a run leaves


def outcome(out: Path) -> dict:
    """What two runs must have in common, by the name that a difference is reported under."""
    rows = [{name: value for name, value in row.items() if not name.startswith("time/")}
            for row in read_whole_rows(out / "metrics.jsonl")]
    return {"metrics.jsonl": rows, "samples.jsonl": (out / "samples.jsonl").read_text(),
            "final": checksums(out / "final")}


def progress(out: Path) -> tuple[int, int]:
    """The last step in the metrics, and that of the newest checkpoint."""
    logged = [row["step"] for row in read_whole_rows(out / "metrics.jsonl")]
    saved = [int(path.name.split("-")[1]) for path in checkpoints(out)]
    return max(logged, default=0), max(saved, default=0)


def refuse_one_best(stage: str, out: Path) -> None:
    """Raise UserError when the best weights are the first ones or the last: no resume brings those back."""
    left = json.loads((checkpoints(out)[-1] / "progress.json").read_text())
    if stage in FIRST_OFFER and not FIRST_OFFER[stage] < left["best"]["step"] < left["step"]:
        raise UserError(f"{stage}: the best weights are those of step {left['best']['step']} of "
                        f"{left['step']}; give the tiny models scores that move")


def killed(stage: str, models: Path, out: Path, moment: float, expected: dict) -> dict:
    """One run that is killed `moment` seconds after its start, and resumed. Its row of the report."""
    process = started(stage, models, out)
    process.join(moment)
    process.kill()
    process.join()
    (logged, saved), complete = progress(out), (out / "final").exists()
    if not complete:
        resume = ["--resume"] if (out / "config.yaml").exists() else []
        process = started(stage, models, out, *resume)
        process.join()
    found = outcome(out) if process.exitcode == 0 or complete else {}
    differs = [name for name in expected if found.get(name) != expected[name]]
    return {"moment": round(moment, 3), "finished": complete, "logged": logged, "saved": saved,
            "lost": 0 if complete else logged - saved, "differs": differs}


def kill_runs(stage: str, kills: int, seed: int, folder: Path):
    """Rows of `killed`, one for each kill, at moments drawn from all of an undisturbed run's time."""
    models = folder / "models"
    if not models.exists():
        process = _FORK.Process(target=make_models, args=(models,))
        process.start()
        process.join()
    expected, seconds = None, 0.0
    for number in range(2):
        out, began = folder / f"{stage}-undisturbed-{number}", time.time()
        finished(started(stage, models, out), out)
        seconds = time.time() - began  # the second finds tokens in the cache, as those that are killed do
        if expected not in (None, outcome(out)):
            raise UserError(f"{stage}: two undisturbed runs differ, so nothing can be said of killed ones")
        expected = outcome(out)
    refuse_one_best(stage, out)
    draw = random.Random(f"{seed}-{stage}")
    for number in range(kills):
        yield killed(stage, models, folder / f"{stage}-{number}", draw.random() * seconds, expected)


# ----------------------------------------------------------------------------------------------------- report


def table_line(stage: str, rows: list[dict]) -> str:
    moments = [row["moment"] for row in rows]
    equal, lost = sum(not row["differs"] for row in rows), max(row["lost"] for row in rows)
    return (f"{stage:6}  {len(rows):5}  {min(moments):6.2f} .. {max(moments):5.2f} s  {equal:5}  {lost:10}"
            f"  {SAVE_STEPS[stage]:10}")


def main(config: KillConfig) -> None:
    output = output_file(config.output, "output", ".json") if config.output else None
    began, report = time.time(), {}
    with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        for stage in STAGES if config.stage == "all" else [config.stage]:
            report[stage] = []
            for row in kill_runs(stage, config.kills, config.seed, Path(folder)):
                report[stage].append(row)
                print(json.dumps({"stage": stage, **row}), flush=True)
    print("stage   kills            moments  equal  steps lost  save_steps")
    for stage, rows in report.items():
        print(table_line(stage, rows))
    print(f"{time.time() - began:.0f} s")
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(row["differs"] for rows in report.values() for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    start(main, read_config(KillConfig, None, __doc__))
