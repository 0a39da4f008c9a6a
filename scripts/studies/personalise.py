"""How many ratings make a model yours: simulated people rate on the page, and the model is trained on it.

    make demo && python scripts/studies/personalise.py           # goes on where it was stopped
    python scripts/studies/personalise.py --ways rankings/100 --seeds 0  # a part of it
    python scripts/studies/personalise.py --workers 12 --minutes 6       # twelve cells at once, six minutes

Three people (scripts/studies/tastes.py) rank the answers to some posts through the rating page's HTTP
interface, with the noise of the mini data's labellers. All of them see the same answers. Then, for each
person and number of rated posts, the model is trained in one of three ways:

- `rankings`: SFT on the best answers, the reward stage on all pairs of each ranking, then PPO
  (configs/personal);
- `pairs`: the same, with a reward model of the best and the worst answer alone;
- `best`: SFT alone.

Size 0 is the old model against itself.

The old and the new model summarise held-out posts at temperature 1. A win is a summary that the person likes
better, without noise; a tie is half a win. With `rankings/100/unsure` the rated posts are not random: they
are those, of three times as many, on whose answers the scores of the old reward model are closest.

Each finished cell is a line of `results`, so that the study can be stopped and goes on. The figure is drawn
at the end. With several `workers` each cell has a process, a folder and a thread of its own.
"""

import fcntl
import gzip
import json
import math
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from studies.stage_processes import fork_server, run_stage
from studies.tastes import TASTES, Person
from utils.config import UserError, find_input, key
from utils.launch import read_config, start

ARMS = ("rankings", "pairs", "best")
PICKS = ("random", "unsure")
WAYS = ("rankings/100", "best/100", "pairs/100", "rankings/30", "rankings/10", "rankings/0", "best/30",
        "rankings/100/unsure", "rankings/300", "best/300", "best/10", "pairs/30", "pairs/10", "pairs/300")
# quantiles of Student's t for a 95 % interval, by the number of runs
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306}


@dataclass
class PersonaliseConfig:
    """What is measured, and with which models."""

    model: str = key("outputs/tldr_mini/ppo/final", "The old model, which a round starts from.")
    other_model: str | None = key("outputs/tldr_mini/sft/final", "A second model whose answers are rated, "
                                  "which makes them differ more; none: those of `model` alone.")
    reward_model: str = key("outputs/tldr_mini/reward/final", "The reward model that goes on learning.")
    posts: str = key("data/tldr_mini/rlhf_train.jsonl.gz", "Posts that are rated and that PPO trains on.")
    test_posts: str = key("data/tldr_mini/rlhf_test.jsonl.gz", "Held-out posts.")
    gold_rules: str = key("data/tldr_mini/gold.json", "Rules of the gold score.")
    tastes: list[str] = key(list(TASTES), f"Of {', '.join(TASTES)}.")
    ways: list[str] = key(list(WAYS), f"Arm ({', '.join(ARMS)}), number of rated posts (0: nothing is "
                          "trained) and, perhaps, `unsure`; measured in this order.")
    seeds: list[int] = key([2, 3, 4], "Seeds: of the posts, the noise and the training.")
    k: int = key(4, "Answers to a post.", unit="answers", low=2, high=9)
    test_rows: int = key(200, "Held-out posts of each cell.", unit="posts", low=1, high=10**6)
    sft_config: str = key("configs/personal/sft.yaml", "Configuration of SFT.")
    reward_config: str = key("configs/personal/reward.yaml", "Configuration of the reward stage.")
    ppo_config: str = key("configs/personal/ppo.yaml", "Configuration of PPO.")
    extra: list[str] = key([], "Words that are added to the command of every stage.")
    workers: int = key(1, "Cells that are measured at once; with more than one each takes one thread.",
                       unit="cells", low=1, high=1000)
    minutes: float | None = key(None, "The study ends then; what is not finished is lost. none: no limit.",
                                unit="minutes", low=0.01, high=1e6)
    folder: str = key("outputs/personalise", "Folder for ratings and runs.")
    results: str = key("outputs/personalise.jsonl", "Finished cells.")
    figure: str | None = key("outputs/personalise.png", "Picture of all finished cells; none: no "
                             "picture.")

    def __post_init__(self):
        for taste in self.tastes:
            if taste not in TASTES:
                raise UserError(f"tastes: '{taste}' is none of {', '.join(TASTES)}")
        for way in self.ways:
            arm, size, pick = parts_of(way)
            if arm not in ARMS or pick not in PICKS or not size.isascii() or not size.isdecimal():
                raise UserError(f"ways: '{way}' is none; write an arm ({', '.join(ARMS)}), a number and, for "
                                "picked posts, 'unsure', as in rankings/100/unsure")
            if 0 < int(size) < 4:
                raise UserError(f"ways: '{way}': a round needs 4 rated posts or more")


def parts_of(way: str) -> tuple[str, str, str]:
    """Arm, number of rated posts and which posts, as they are written."""
    arm, _, rest = way.partition("/")
    size, _, pick = rest.partition("/")
    return arm, size, pick or "random"


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(PersonaliseConfig, None, __doc__)

from studies.rating_people import rate_posts, rated, rating_page
from utils.data.tokens import prompt_tokens
from utils.feedback.rounds import SFT_ALONE
from utils.judge.evaluation import score_groups, summarise
from utils.judge.gold import gold_score, load_rules, words_of
from utils.judge.metrics import win_rate
from utils.judge.plots import plot_win_rates
from utils.models.generation import sample
from utils.models.loading import load_policy, load_scalar_model
from utils.models.parents import Parent
from utils.runs.records import end_line, read_objects


class OutOfTime(Exception):
    """The `minutes` are over."""


class Cell(NamedTuple):
    """One training that is measured."""

    taste: str
    arm: str
    size: int
    pick: str
    seed: int

    @property
    def name(self) -> str:
        return "/".join(map(str, self))


def cells_of(config: PersonaliseConfig) -> list[Cell]:
    """All cells in the order in which they are measured: a way with all its seeds and people."""
    ways = [(arm, int(size), pick) for arm, size, pick in map(parts_of, config.ways)]
    return [Cell(taste, *way, seed) for way, seed, taste in product(ways, config.seeds, config.tastes)]


# ---------------------------------------------------------------------------------------------- what is rated


@lru_cache
def read_rows(path: str, name: str) -> list[dict]:
    """The rows of a file of posts with their facts."""
    file = find_input(path, name)
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if not all(isinstance(row.get("facts"), dict) for row in rows):
        raise UserError(f"{name}: '{path}' has rows without facts; take posts of data/tldr_mini")
    return rows


def session(config: PersonaliseConfig, cell: Cell, rows: list[dict], gold: dict) -> Path:
    """The database in which every person has rated the cell's posts; what is rated already is kept.

    One worker at a time fills it; the others wait.
    """
    # random posts of a larger session begin with those of a smaller one, unsure ones do not
    size, pick, seed = cell.size, cell.pick, cell.seed
    folder = Path(config.folder) / (f"random-{seed}" if pick == "random" else f"unsure-{size}-{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    database = folder / "ratings.db"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # an earlier person may have been stopped half-way, so all are asked: whoever is done rates nothing
        done = database.exists() and all(len(rated(database, taste)) >= size for taste in config.tastes)
        if not done:
            posts = folder / f"posts-{size}.jsonl"
            chosen = (random_posts if pick == "random" else unsure_posts)(config, rows, size, seed)
            posts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in chosen))
            facts = {row["prompt"].strip(): row["facts"] for row in rows}
            models = [config.model, *([config.other_model] if config.other_model else [])]
            with rating_page(models, posts, config.k, seed, folder) as address:
                for taste in config.tastes:
                    rate_posts(address, Person(taste, gold, seed), size, facts)
    return database


def random_posts(config: PersonaliseConfig, rows: list[dict], size: int, seed: int) -> list[dict]:
    """Posts by chance. More of them begin with the same ones, so that a session can go on."""
    return random.Random(seed).sample(rows, len(rows))[:size]


def unsure_posts(config: PersonaliseConfig, rows: list[dict], size: int, seed: int) -> list[dict]:
    """Of three times as many posts those on whose answers the reward model's scores are closest."""
    pool = random_posts(config, rows, 3 * size, seed)
    parent = Parent("model", config.model)
    prompts = prompt_tokens(parent.tokenizer, [row["prompt"] for row in pool], 256)
    count = len(prompts) * config.k
    answers = sample(load_policy(parent), prompts, k=config.k, max_new_tokens=48, temperature=1.0,
                     seeds=[seed * 1_000_003 + number for number in range(count)],
                     eos_id=parent.tokenizer.eos_token_id, pad_id=parent.tokenizer.pad_token_id)
    groups = [answers.responses[first : first + config.k] for first in range(0, count, config.k)]
    model = load_scalar_model(Parent("reward_model", config.reward_model))
    scores = score_groups(model, parent.tokenizer, prompts, groups, 32)
    sure = [fmean(1 / (1 + math.exp(low - high)) for low, high in pairwise(sorted(group)))
            for group in scores]
    return [pool[place] for place in sorted(range(len(pool)), key=sure.__getitem__)[:size]]


# ----------------------------------------------------------------------------------------------- one training


def training_rows(arm: str, rankings: list[dict]) -> list[dict]:
    """What an arm learns from: whole rankings, the best and the worst answer, or the best one."""
    if arm == "rankings":
        return [{name: row[name] for name in ("prompt", "completions", "ranks")} for row in rankings]
    ends = [(row["prompt"], *(row["completions"][row["ranks"].index(end(row["ranks"]))]
                              for end in (min, max))) for row in rankings]
    if arm == "pairs":
        return [{"prompt": prompt, "chosen": best, "rejected": worst} for prompt, best, worst in ends]
    return [{"prompt": prompt, "completion": best} for prompt, best, _ in ends]


def train(config: PersonaliseConfig, cell: Cell, rankings: list[dict]) -> tuple[str, dict]:
    """Train a model as the cell says: its folder, and what it took."""
    folder = Path(config.folder) / cell.name.replace(" ", "-")
    folder = next(path for number in range(10**6) if not (path := folder / f"try-{number}").exists())
    folder.mkdir(parents=True)  # a run that was stopped stays: nothing is deleted here
    common = ["--seed", str(cell.seed), *config.extra]

    def stage(name: str, script: str, own_config: str, *words: str) -> str:
        """Run a stage; the folder of its model."""
        took[name] = run_stage(script, ["--config", own_config, *words, "--output_dir", str(folder / name),
                                        *common], folder / f"{name}.log")
        return str(folder / name / "final")

    def data(arm: str) -> str:
        path = folder / f"{arm}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in training_rows(arm, rankings)))
        return str(path)

    took = {}
    policy = stage("sft", "train_sft.py", config.sft_config, "--model", config.model,
                   "--actor_training_data", data("best"), *(SFT_ALONE if cell.arm == "best" else []))
    if cell.arm == "best":
        return policy, took
    reward_model = stage("reward", "train_reward.py", config.reward_config, "--model", config.reward_model,
                         "--reward_training_data", data(cell.arm))
    policy = stage("ppo", "train_ppo.py", config.ppo_config, "--model", policy,
                   "--reward_model", reward_model, "--rlhf_training_data", config.posts)
    took["kl"] = json.loads((folder / "ppo" / "summary.json").read_text())["kl"]
    return policy, took


@lru_cache(maxsize=8)  # those of the old model are wanted again
def summaries(model: str, posts: str, count: int, seed: int) -> list[str]:
    """A summary of each of the first posts of a file, sampled at temperature 1."""
    parent = Parent("model", model)
    prompts = [row["prompt"] for row in read_rows(posts, "test_posts")[:count]]
    prompts = prompt_tokens(parent.tokenizer, prompts, 256)
    settings = SimpleNamespace(max_new_tokens=48, seed=seed, eval_batch_size=64)
    return summarise(load_policy(parent), parent.tokenizer, prompts, settings, 1.0).texts


def judged(person: Person, rows: list[dict], old: list[str], new: list[str], seed: int) -> dict[str, float]:
    """What the person thinks of the summaries of two models, without noise; and the gold score."""
    facts = [row["facts"] for row in rows]
    scores = [[person.score(text, fact) for text, fact in zip(texts, facts, strict=True)]
              for texts in (old, new)]
    rate, low, high = win_rate(scores[1], scores[0], [row["prompt"] for row in rows], seed)
    gold = [fmean(gold_score(text, fact, person.gold) for text, fact in zip(texts, facts, strict=True))
            for texts in (old, new)]
    words = [fmean(len(words_of(text)) for text in texts) for texts in (old, new)]
    figures = {"win_rate": rate, "low": low, "high": high}
    for name, (before, after) in (("taste", map(fmean, scores)), ("gold", gold), ("words", words)):
        figures |= {f"{name}_before": before, f"{name}_after": after}
    return {name: round(value, 4) for name, value in figures.items()}


# -------------------------------------------------------------------------------------------------- the study


def averages(done: dict[str, dict]) -> dict[tuple, tuple[float, float, float, int]]:
    """(taste, arm, size, pick) -> mean win rate over the seeds, its 95 % interval, and the number of runs.

    The interval is Student's over the runs; of one run it is that over the posts.
    """
    groups = {}
    for figures in done.values():
        cell = Cell(*figures["cell"])
        groups.setdefault(cell[:4], []).append(figures)
        groups.setdefault(("all three", *cell[1:4]), []).append(figures)
    found = {}
    for name, runs in groups.items():
        rates = [run["win_rate"] for run in runs]
        if len(runs) == 1:
            found[name] = (rates[0], runs[0]["low"], runs[0]["high"], 1)
        else:
            half = STUDENT.get(len(runs), 2.0) * stdev(rates) / math.sqrt(len(runs))
            found[name] = (fmean(rates), fmean(rates) - half, fmean(rates) + half, len(runs))
    return found


def draw(done: dict[str, dict], path: Path) -> None:
    """Win rate against the number of rated posts: a panel for each taste and one for all, a line an arm.

    The old model against itself has no place on a logarithmic axis.
    """
    panels = {}
    trained = {name: figures for name, figures in done.items() if Cell(*figures["cell"]).size}
    for (taste, arm, size, pick), (rate, low, high, _) in sorted(averages(trained).items(), key=str):
        label = arm if pick == "random" else f"{arm}, unsure posts"
        panels.setdefault(taste, {}).setdefault(label, []).append((size, rate, low, high))
    order = [*(taste for taste in TASTES if taste in panels), "all three"]
    plot_win_rates(path, {taste: {arm: sorted(points) for arm, points in panels[taste].items()}
                          for taste in order}, goal=0.75)


def measure(config: PersonaliseConfig, cell: Cell, until: float) -> dict:
    """One cell, from the ratings to the judgement: what a line of `results` holds.

    Args:
        until: on the clock of `time.monotonic`, which all processes share.

    Raises:
        OutOfTime: when it is not finished by then; its processes have ended.
    """
    if (left := until - time.monotonic()) <= 0:
        raise OutOfTime
    signal.signal(signal.SIGALRM, _time_is_up)
    signal.setitimer(signal.ITIMER_REAL, 0.0 if left == math.inf else left)
    try:
        gold = load_rules(config.gold_rules)
        model, took, seed = config.model, {}, cell.seed + 1000  # the old model says something else
        if cell.size:
            database = session(config, cell, read_rows(config.posts, "posts"), gold)
            model, took = train(config, cell, rated(database, cell.taste)[: cell.size])
            seed = cell.seed
        old = summaries(config.model, config.test_posts, config.test_rows, cell.seed)
        new = summaries(model, config.test_posts, config.test_rows, seed)
        test = read_rows(config.test_posts, "test_posts")[: config.test_rows]
        return {"cell": list(cell), **judged(Person(cell.taste, gold), test, old, new, cell.seed), **took}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _time_is_up(number, frame):
    raise OutOfTime


def finished_cells(path: Path) -> dict[str, dict]:
    """What earlier calls have measured, by the name of the cell."""
    return {Cell(*row["cell"]).name: row for row in read_objects(path)}


def line_of(name: str, figures: dict) -> str:
    """What is said of a finished cell."""
    return (f"{name}: wins {figures['win_rate']:.3f} ({figures['low']:.3f} - {figures['high']:.3f}), taste "
            f"{figures['taste_before']:.3f} -> {figures['taste_after']:.3f}, gold "
            f"{figures['gold_before']:.3f} -> {figures['gold_after']:.3f}")


def main(config: PersonaliseConfig) -> None:
    until = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    results = Path(config.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    done, failed = finished_cells(results), []
    end_line(results)
    if config.workers > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with (ProcessPoolExecutor(config.workers, fork_server()) as pool,
          results.open("a", encoding="utf-8") as file):
        waiting = {pool.submit(measure, config, cell, until): cell for cell in cells_of(config)
                   if cell.name not in done}
        try:
            for future in as_completed(waiting):
                name = waiting[future].name
                try:
                    done[name] = figures = future.result()
                except OutOfTime:
                    continue
                except UserError as error:  # the other cells go on
                    failed.append(f"{name}: {error}")
                    print(failed[-1], flush=True)
                    continue
                file.write(json.dumps(figures) + "\n")
                file.flush()
                print(line_of(name, figures), flush=True)
        finally:  # Ctrl-C: nothing more begins
            pool.shutdown(cancel_futures=True)
    if config.figure and any(figures["cell"][2] for figures in done.values()):
        draw(done, Path(config.figure))
    for name, (rate, low, high, runs) in sorted(averages(done).items(), key=str):
        print(f"{', '.join(map(str, name))}: {rate:.3f} ({low:.3f} - {high:.3f}), {runs} runs")
    if failed:
        raise UserError(f"{len(failed)} cells failed; the first: {failed[0]}")


if __name__ == "__main__":
    start(main, CONFIG)
