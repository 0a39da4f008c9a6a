"""Compare runs that differ in their seed only: each seed, mean and spread, curves, and which seeds collapsed.

    make seeds                                       # five seeds of the embedded default, then this script
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 outputs/seed2 \\
        --output outputs/seeds.png
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 --markdown

A run is a folder with the finished stages sft/, reward/ and ppo/, as `make demo OUT=outputs/seed0
ARGS="--seed 0"` writes it. Almost all figures are read from its summary.json files and are measured on test
posts. The exception is the share of summaries with EOS: it is `objective/ended` of the last PPO update,
measured on training posts with the policy before that update.

A seed counts as collapsed when PPO left the policy worse than the SFT model that it started from, or unable
to end its summaries. That is: a gold win rate over SFT below .5 (sampled), a lower gold score than before, or
a share with EOS below .9. Where the data has no gold score, only the share with EOS counts. A figure that is
NaN counts as collapsed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import UserError, key
from utils.judge.plots import plot_seeds, series
from utils.launch import read_config, start
from utils.runs.records import read_whole_rows
from utils.runs.run import finished_run, output_file
from utils.yaml_files import read_yaml


@dataclass
class CompareConfig:
    """What to compare, and what to write."""

    runs: list[str] = key([], "Folders, each with the finished stages sft/, reward/ and ppo/ of one seed.")
    output: str | None = key(None, "Plot the curves of all seeds into this .png file.")
    markdown: bool = key(False, "Also print the table as markdown.")


class Column(NamedTuple):
    """A column of the table."""

    title: str
    names: tuple[str, ...]  # stage/figure: one, or before and after
    layout: str = "{:.3f}"  # how each figure is printed
    interval: tuple[str, ...] = ()  # ends of its confidence interval


COLUMNS = [
    Column("ROUGE mean, base → SFT", ("sft/base_rouge_avg", "sft/rouge_avg")),
    Column("reward accuracy", ("reward/accuracy",)),
    Column("of its ceiling", ("reward/of_ceiling",), "{:.1%}"),
    Column("gold win rate, sampled (95 %)", ("ppo/gold_win_rate",),
           interval=("ppo/gold_win_rate_low", "ppo/gold_win_rate_high")),
    Column("greedy", ("ppo/gold_win_rate_greedy",)),
    Column("gold score, SFT → PPO", ("ppo/gold_before", "ppo/gold_after")),
    Column("KL", ("ppo/kl",), "{:.2f}"),
    Column("with EOS", ("ppo/ended",)),
    Column("reward score, SFT → PPO", ("ppo/score_before", "ppo/score_after")),
]
SPREAD = {
    "mean": np.mean, "sd": lambda values: np.std(values, ddof=1) if len(values) > 1 else None,
    "min": np.min, "max": np.max,
}
# title of a plot -> (stage, metric, label of the x axis)
CURVES = {
    "SFT loss [nats a token]": ("sft", "sft/loss", "step"),
    "ROUGE mean, validation": ("sft", "eval/rouge_avg", "step"),
    "reward accuracy, validation": ("reward", "eval/accuracy", "step"),
    "reward score, rollouts": ("ppo", "objective/score", "update"),
    "KL, rollouts [nats a summary]": ("ppo", "objective/kl", "update"),
    "length, rollouts [tokens]": ("ppo", "objective/length", "update"),
    "gold score, validation": ("ppo", "eval/gold", "update"),
}
# absent where the data has no gold score
GOLD = [name for column in COLUMNS for name in column.names + column.interval if name.startswith("ppo/gold_")]
# keys that always differ between seeds: folders, and the models that the stages before have trained
_DIFFERENT = {
    "sft": ("seed", "output_dir", "report_to"), "reward": ("seed", "output_dir", "report_to", "model"),
    "ppo": ("seed", "output_dir", "report_to", "model", "reward_model"),
}


class Seed(NamedTuple):
    """The runs of one seed."""

    number: int
    figures: dict[str, float | None]  # by stage/figure; None: the data does not have it
    metrics: dict[str, list[dict]]  # rows of metrics.jsonl by stage
    settings: dict[str, object]  # keys of the three configurations by stage/key, without those in _DIFFERENT


def load_seed(name: str) -> Seed:
    """Read the three stages in a folder.

    Raises:
        UserError: when the folder does not exist, a stage is not finished, or a figure is missing.
    """
    figures, metrics, settings = {}, {}, {}
    for stage in ("sft", "reward", "ppo"):
        folder, summary = finished_run(name, stage, "runs")
        figures |= {f"{stage}/{figure}": value for figure, value in summary.items()}
        metrics[stage] = read_whole_rows(folder / "metrics.jsonl")
        saved, _ = read_yaml(folder / "config.yaml")
        settings |= {f"{stage}/{key_name}": value for key_name, value in saved.items()
                     if key_name not in _DIFFERENT[stage]}
    figures["ppo/ended"] = (series(metrics["ppo"], "objective/ended")[1] or [None])[-1]
    figures["reward/of_ceiling"] = None  # computed below, where the data has a label ceiling
    if figures.keys().isdisjoint(GOLD):
        figures |= dict.fromkeys(GOLD)
    for figure in ("ppo/seed", *(name for column in COLUMNS for name in column.names + column.interval)):
        if figure not in figures:
            stage, missing = figure.split("/")
            raise UserError(f"runs: '{Path(name, stage, 'summary.json')}' has no '{missing}'; train that "
                            "stage again")
    if ceiling := figures.get("reward/label_ceiling"):
        figures["reward/of_ceiling"] = figures["reward/accuracy"] / ceiling
    return Seed(figures["ppo/seed"], figures, metrics, settings)


def load_seeds(names: list[str]) -> list[Seed]:
    """Read all seeds.

    Raises:
        UserError: for two runs of one seed, which would make the spread too small, and for runs of different
            configurations, which would make it too large.
    """
    if not names:
        raise UserError("runs: name the folders to compare, for example --runs outputs/seed0 outputs/seed1")
    seeds = [load_seed(name) for name in names]
    numbers = [seed.number for seed in seeds]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(f"runs: {numbers.count(number)} of them have seed {number}; give one run for "
                            "each seed")
    for seed in seeds:
        for name in sorted(seeds[0].settings.keys() | seed.settings.keys()):
            ours, first = (settings.get(name, "unknown") for settings in (seed.settings, seeds[0].settings))
            if ours != first:
                raise UserError(f"runs: {name} is {ours} with seed {seed.number} but {first} with seed "
                                f"{numbers[0]}; compare seeds of one configuration")
    return seeds


def why_collapsed(figures: dict) -> str | None:
    """The first reason why a seed counts as collapsed; None: it does not."""
    for name, limit, title in (
        ("ppo/gold_win_rate", 0.5, "gold win rate"),
        ("ppo/gold_after", figures["ppo/gold_before"], "gold score"),
        ("ppo/ended", 0.9, "share with EOS"),
    ):
        # `not (a >= b)` is true for NaN, `a < b` is not
        if figures[name] is not None and not figures[name] >= limit:
            return f"{title} {figures[name]:.3f} is below {limit:.3f}"
    return None


def table_rows(seeds: list[Seed]) -> list[list[str]]:
    """A row of cells for each seed, then the mean, standard deviation, minimum and maximum over the seeds."""
    rows = [[str(seed.number), *(cell(column, seed.figures, column.interval) for column in COLUMNS)]
            for seed in seeds]
    for label, statistic in SPREAD.items():
        figures = {}
        for name in (name for column in COLUMNS for name in column.names):
            values = [seed.figures[name] for seed in seeds if seed.figures[name] is not None]
            figures[name] = statistic(values) if values else None
        rows.append([label, *(cell(column, figures) for column in COLUMNS)])
    return rows


def cell(column: Column, figures: dict, interval: tuple[str, ...] = ()) -> str:
    """One figure with its interval, or before and after with an arrow; a dash where a figure is missing."""
    values = [figures[name] for name in column.names]
    if None in values:
        return "-"
    text = " → ".join(map(column.layout.format, values))
    if interval:
        text += " ({:.3f} - {:.3f})".format(*(figures[name] for name in interval))
    return text


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Print the table for the terminal."""
    table = Table(title="The stages over the seeds", title_justify="left")
    for column, *cells in zip(header, *rows, strict=True):
        # wide enough for every figure and every word of the header: headers may wrap, figures must not
        table.add_column(column, width=max(map(len, [*cells, *column.split()])))
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=number == len(rows) - len(SPREAD))
    Console(width=200, markup=False).print(table)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main(config: CompareConfig) -> None:
    path = output_file(config.output, "output", ".png") if config.output else None
    seeds = load_seeds(config.runs)
    header, rows = ["seed", *(column.title for column in COLUMNS)], table_rows(seeds)
    print_table(header, rows)
    if config.markdown:
        print(markdown(header, rows))
    collapsed = {seed.number: why_collapsed(seed.figures) for seed in seeds}
    reasons = [f"seed {number} ({reason})" for number, reason in collapsed.items() if reason]
    print(f"collapsed: {', '.join(reasons) or 'none'}")
    if path:
        plot_seeds(path, {title: (xlabel, [series(seed.metrics[stage], name) for seed in seeds])
                          for title, (stage, name, xlabel) in CURVES.items()})
        print(f"curves: {path}")


if __name__ == "__main__":
    start(main, read_config(CompareConfig, None, __doc__))
