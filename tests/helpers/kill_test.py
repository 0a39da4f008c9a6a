"""Does a run survive a kill at any moment? Tiny runs are killed, go on with --resume, and must end alike.

    python tests/helpers/kill_test.py --stage ppo --kills 20                   # a minute on one core
    python tests/helpers/kill_test.py --output outputs/kills.json              # at every operation

Each stage trains a random OPT of two layers on a few rows of data/tldr_mini for several epochs, with a
checkpoint every step or two: SFT with dropout, PPO with every option that hands something on from update to
update. Which weights are the best is scripted (`SCORES`), so that they change on every machine. Two
undisturbed runs come first; the second must equal the first and says which files a run opens, renames and
removes. In these runs every branch must move (`moves`): else a kill there would show nothing.

Then, again and again, a new run dies before one of these operations, in one of three ways in turn: by
SIGKILL; by SIGKILL while it wrote the file before, half of which is there; or by a loss of power, after which
nothing is left of what was not synced. It is resumed (started again when it had not written config.yaml yet;
left alone when it had final/). Every fourth run is killed once more while it resumes. In the end its
metrics.jsonl and summary.json without times, its samples.jsonl, every file in final/ and the names in its
folder must be the undisturbed run's, bit for bit, and nothing may have ended in a traceback.

Runs are forks of this process, which has imported what they need, so that most of a run is its own work. It
does not try several processes or DeepSpeed. Exit status 1 when a run ended in another way.
"""

import gzip
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets.config
from matplotlib.figure import Figure

import environment  # noqa: F401  where the scripts are, and no network
import train_ppo  # noqa: F401  what the stages import, once for all runs
import train_reward  # noqa: F401
import train_sft  # noqa: F401
from file_operations import HOW, KILLED, TORN, Operation, Operations
from run_folders import checkpoints, metrics
from tiny_models import save_opt
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start
from utils.runs.checkpoints import Best, checksums, number_of
from utils.runs.records import read_whole_rows
from utils.runs.run import output_file

STAGES = {
    "sft": "--model {models}/base --actor_training_data {models}/sft.jsonl "
           "--actor_validation_data data/tldr_mini/actor_validation.jsonl.gz "
           "--actor_test_data data/tldr_mini/actor_test.jsonl.gz --max_steps 8 --eval_steps 1 "
           "--save_steps 2 --logging_steps 3 --per_device_batch_size 4 --max_new_tokens 8 "
           "--eval_temperature 1.0 --learning_rate 0.03",
    "reward": "--model {models}/base --reward_training_data {models}/reward.jsonl "
              "--reward_validation_data data/tldr_mini/reward_validation.jsonl.gz "
              "--reward_test_data data/tldr_mini/reward_test.jsonl.gz --max_steps 8 "
              "--eval_steps 3 --save_steps 2 --logging_steps 3 --per_device_batch_size 4",
    "ppo": "--model {models}/base --reward_model {models}/reward --rlhf_training_data {models}/ppo.jsonl "
           "--rlhf_validation_data data/tldr_mini/rlhf_validation.jsonl.gz "
           "--rlhf_test_data data/tldr_mini/rlhf_test.jsonl.gz "
           "--total_episodes 32 --prompts_per_update 4 --responses_per_prompt 2 --ppo_epochs 2 "
           "--eval_steps 1 --save_steps 1 --per_device_batch_size 4 --max_new_tokens 8 --kl_target 0.01 "
           "--kl_horizon 20 --ema_decay 0.6 --value_model shared --ptx_coef 0.1 "
           "--actor_training_data {models}/sft.jsonl --learning_rate 0.006 --eval_temperature 1.0 "
           "--kl_budget 99 --seed 4",
}
# training data: so many rows that an epoch ends within a step
DATA = {"sft": ("actor_train", 10), "reward": ("reward_train", 10), "ppo": ("rlhf_train", 6)}
SCORES = (0, 2, 1, 3, 2, 5, 4, 1, 0)  # held-out scores of the weights after each step, as `Best` gets them
TIMES = re.compile("time/.*|seconds|.*_per_second|peak_memory_mb")
_FORK = multiprocessing.get_context("fork")


@dataclass
class KillConfig:
    """What is killed, and how often."""

    stage: str = key("all", "Stage whose runs are killed.", choices=[*STAGES, "all"])
    kills: int | None = key(None, "Runs of each stage that are killed, spread evenly over all operations; "
                                  "none: one at each operation.", unit="runs", low=1, high=10_000)
    seed: int = key(0, "Which of the three ways comes first.", low=0, high=2)
    output: str | None = key(None, "Every kill with its moment and what came of it: a .json file.")


# ------------------------------------------------------------------------------------------------- one run


def make_models(folder: Path) -> None:
    """base/ and reward/ with random weights, and the training data of each stage.

    Some responses end, and scores differ.
    """
    save_opt(folder / "base", eos_logit=3.0)
    save_opt(folder / "reward", "reward", head_scale=50)
    for stage, (name, count) in DATA.items():
        with gzip.open(PROJECT / "data" / "tldr_mini" / f"{name}.jsonl.gz", "rt") as rows:
            (folder / f"{stage}.jsonl").write_text("".join(itertools.islice(rows, count)))


def train(stage: str, models: Path, out: Path, more: list[str], dies_at: int | None, how: str) -> None:
    """The stage's script, as a user starts it; what it says and its operations go to files beside `out`."""
    log = os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # nobody looks at the plots: a second less
    Figure.savefig = lambda figure, path, **options: Path(path).write_bytes(b"a plot")
    Figure.tight_layout = lambda figure, **options: None
    offer = Best.offer
    Best.offer = lambda best, step, score, weights, **figures: offer(best, step, SCORES[step], weights,
                                                                     **figures)
    script = str(PROJECT / "scripts" / f"train_{stage}.py")
    words = STAGES[stage].format(models=models) + " --eval_rows 4 --test_rows 4"
    sys.argv = [script, *words.split(), "--output_dir", str(out), *more]
    operations = Operations(out, dies_at, how)
    runpy.run_path(script, run_name="__main__")
    operations.end()
    Path(f"{out}.operations").write_text(json.dumps(operations.done))


def run(stage: str, models: Path, out: Path, more=(), dies_at: int | None = None, how: str = KILLED) -> int:
    """A process that trains: this one must not have used torch's threads, which a fork has not.

    Returns:
        Its exit status; -9: it was killed.
    """
    process = _FORK.Process(target=train, args=(stage, models, out, list(more), dies_at, how))
    process.start()
    process.join()
    return process.exitcode


# ------------------------------------------------------------------------------------------ what a run leaves


def outcome(out: Path) -> dict:
    """What two runs must have in common, by the name that a difference is reported under."""
    summary = json.loads((out / "summary.json").read_text())
    return {"metrics.jsonl": metrics(out), "samples.jsonl": (out / "samples.jsonl").read_text(),
            "summary.json": {name: value for name, value in summary.items() if not TIMES.fullmatch(name)},
            "final": checksums(out / "final"),
            "names": sorted(path.name for path in [*out.iterdir(), *(out / "checkpoints").iterdir()]),
            "traceback": "Traceback" in Path(f"{out}.log").read_text()}


def moves(stage: str, out: Path, operations: list[Operation]) -> dict[str, bool]:
    """What must happen in an undisturbed run, or a kill there would show nothing."""
    removed = [operation.path for operation in operations if operation.event == "os.rename"]
    removed = Counter(path.split("/")[1].split("-")[0] for path in removed
                      if re.fullmatch("checkpoints/(step|update|best)-[0-9]+", path))
    rows = metrics(out)
    found = {"old checkpoints are removed": removed["step"] + removed["update"] > 1}
    if stage == "reward":
        return found
    best, last = json.loads((out / "summary.json").read_text())["best_step"], rows[-1]["step"]
    ended = [row["eval/ended"] for row in rows if "eval/ended" in row]
    found |= {"best weights give way to better ones, twice": removed["best"] > 1,
              "the best weights are neither the first nor the last": 0 < best < last,
              "some summaries end and some do not": any(0 < share < 1 for share in ended)}
    if stage == "ppo":
        scores = {row["eval/score"] for row in rows if "eval/score" in row}
        found |= {"scores differ": len(scores) > 2,
                  "kl_coef adapts": len({row.get("objective/kl_coef") for row in rows}) > 3}
    return found


def left(out: Path) -> set[str]:
    """What a run that was killed has left to go on from."""
    if not (out / "config.yaml").exists():
        return {"no configuration"}
    if (out / "final").exists():
        return {"final/"}
    names = [path.name for path in out.glob("checkpoints/*")]
    rows, saved = read_whole_rows(out / "metrics.jsonl"), checkpoints(out)
    found = {"final/ in part"} if (out / "final.tmp").exists() else set()
    if any(name.endswith(".old.tmp") for name in names):
        found.add("a checkpoint that is being removed")
    if any(name.endswith(".tmp") and not name.endswith(".old.tmp") for name in names):
        found.add("a checkpoint that is being written")
    if not saved:
        return found | {"no checkpoint"}
    step = number_of(saved[-1])
    bests = [number_of(path) for path in out.glob("checkpoints/best-*") if path.suffix != ".tmp"]
    if any(row["step"] > step for row in rows):
        found.add("metrics of later steps")
    if any(best > step for best in bests):
        found.add("best weights of later steps")
    if any(best < step for best in bests):
        found.add("best weights of earlier steps")
    return found | {"a checkpoint"}


# ----------------------------------------------------------------------------------------------------- kills


class Kill(NamedTuple):
    """When and how a run dies, and its resumed run once more; -1: that does not."""

    operation: int
    how: str
    again: int


def kills_of(operations: list[Operation], count: int | None, seed: int) -> list[Kill]:
    """So many kills from the first operation to the last, in each way in turn; None: one at each operation.

    Of every fourth run the resumed one is killed, too, in its first half.
    """
    count = min(count or len(operations), len(operations))
    kills = []
    for turn in range(count):
        place = round(turn * (len(operations) - 1) / max(1, count - 1))
        how = HOW[(turn + seed) % len(HOW)]
        kills.append(Kill(place, KILLED if how == TORN and not operations[place].written else how,
                          again=place // 2 if turn % 4 == 3 else -1))
    return kills


def killed(stage: str, models: Path, out: Path, kill: Kill, expected: dict) -> dict:
    """One run that is killed and resumed. Its row of the report."""
    status = run(stage, models, out, dies_at=kill.operation, how=kill.how)
    states = left(out) if status == -9 else {"a run that was not killed"}
    if kill.again >= 0 and not (out / "final").exists():
        if run(stage, models, out, resume(out), kill.again, kill.how) == -9:
            states |= {f"then {state}" for state in left(out)}
    if not (out / "final").exists():
        status = run(stage, models, out, resume(out))
    try:
        found = outcome(out)
    except (OSError, ValueError):  # it has not come to its end
        found = {}
    differs = [name for name in expected if found.get(name) != expected[name]]
    said = Path(f"{out}.log").read_text()[-1000:] if differs else ""
    return {**kill._asdict(), "left": sorted(states), "differs": differs, "said": said}


def resume(out: Path) -> list[str]:
    return ["--resume"] if (out / "config.yaml").exists() else []


def undisturbed(stage: str, models: Path, folder: Path) -> tuple[dict, list[Operation]]:
    """The outcome of a run, and its operations.

    Raises:
        UserError: when a second one ends otherwise, or something does not move in it.
    """
    expected = None
    for number in range(2):  # the second finds tokens in the cache, as those that are killed do
        out = folder / f"{stage}-undisturbed-{number}"
        if run(stage, models, out):
            raise UserError(f"{stage}: a run failed; the last that it said: "
                            f"{Path(f'{out}.log').read_text()[-2000:]}")
        if expected not in (None, outcome(out)):
            raise UserError(f"{stage}: two undisturbed runs differ, so nothing can be said of killed ones")
        expected = outcome(out)
    operations = [Operation(*row) for row in json.loads(Path(f"{out}.operations").read_text())]
    if still := [name for name, moved in moves(stage, out, operations).items() if not moved]:
        raise UserError(f"{stage}: {'; '.join(still)}: not so in the undisturbed run")
    return expected, operations


def kill_runs(stage: str, count: int | None, seed: int, folder: Path):
    """Rows of `killed`, for so many kills of all, spread evenly."""
    models = folder / "models"
    if not models.exists():
        models.mkdir()
        process = _FORK.Process(target=make_models, args=(models,))
        process.start()
        process.join()
    expected, operations = undisturbed(stage, models, folder)
    for number, kill in enumerate(kills_of(operations, count, seed)):
        row = killed(stage, models, folder / f"{stage}-{number}", kill, expected)
        yield {"operations": len(operations), "before": " ".join(operations[kill.operation][:2]), **row}
        shutil.rmtree(folder / f"{stage}-{number}")


# ----------------------------------------------------------------------------------------------------- report


def table_line(stage: str, rows: list[dict]) -> str:
    equal = sum(not row["differs"] for row in rows)
    again = sum(row["again"] >= 0 for row in rows)
    return f"{stage:6}  {rows[0]['operations']:10}  {len(rows):5}  {again:5}  {equal:5}"


def main(config: KillConfig) -> None:
    for late in ("deepspeed", "torch.utils.tensorboard"):  # what accelerate imports in each run, once for all
        importlib.import_module(late)
    output = output_file(config.output, "output", ".json") if config.output else None
    began, report = time.time(), {}
    with tempfile.TemporaryDirectory(prefix="kill-test-") as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        for stage in STAGES if config.stage == "all" else [config.stage]:
            report[stage] = []
            for row in kill_runs(stage, config.kills, config.seed, Path(folder)):
                report[stage].append(row)
                print(json.dumps({"stage": stage, **row}), flush=True)
    print("stage   operations  kills  again  equal")
    for stage, rows in report.items():
        print(table_line(stage, rows))
    for stage, rows in report.items():
        for state, count in sorted(Counter(state for row in rows for state in row["left"]).items()):
            print(f"{stage:6}  {count:5}  {state}")
    print(f"{time.time() - began:.0f} s")
    if output:
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if any(row["differs"] for rows in report.values() for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    start(main, read_config(KillConfig, None, __doc__))
