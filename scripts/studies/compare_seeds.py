"""What the three stages reach with several seeds: each seed, mean and spread, curves, and which seeds collapsed.

    make seeds                                       # five seeds of the embedded default, then this
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 outputs/seed2 --output outputs/seeds.png
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 --markdown

A run is a folder with the finished stages sft/, reward/ and ppo/, as `make demo OUT=outputs/seed0 ARGS="--seed 0"`
leaves it. All figures are those of its summary.json files (test posts), but the share with EOS: that is
`objective/ended` of the last PPO update (training posts, the policy before that update).

A seed counts as collapsed when PPO left it worse than the SFT model it started from, or not ending its summaries:
gold win rate over SFT below .5 (sampled), or a gold score lower than before, or a share with EOS below .9. Data
without a gold score is judged by EOS alone. A figure that is not a number counts as collapsed too.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import UserError, key, read_yaml
from utils.judge.plots import plot_seeds, series
from utils.launch import start
from utils.runs.run import finished_run, output_file, read_whole_rows


@dataclass
class CompareConfig:
    """What to compare, and what to make of it."""

    runs: list[str] = key([], "Folders, each with the finished sft/, reward/ and ppo/ of one seed.")
    output: str | None = key(None, "Curves over the seeds: a .png file.")
    markdown: bool = key(False, "Print the table as markdown too.")


class Column(NamedTuple):
    """A column of the table: the figures in it (before and after, or one), and how each is written."""

    title: str
    names: tuple[str, ...]
    layout: str = "{:.3f}"
    interval: tuple[str, ...] = ()


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
SPREAD = {"mean": np.mean, "sd": lambda values: np.std(values, ddof=1) if len(values) > 1 else None, "min": np.min, "max": np.max}
# title -> (stage, metric, what its step is)
CURVES = {
    "SFT loss [nats a token]": ("sft", "sft/loss", "step"),
    "ROUGE mean, validation": ("sft", "eval/rouge_avg", "step"),
    "reward accuracy, validation": ("reward", "eval/accuracy", "step"),
    "reward score, rollouts": ("ppo", "objective/score", "update"),
    "KL, rollouts [nats a summary]": ("ppo", "objective/kl", "update"),
    "length, rollouts [tokens]": ("ppo", "objective/length", "update"),
    "gold score, validation": ("ppo", "eval/gold", "update"),
}


# what differs between seeds by its nature: folders, and the models of the stage before
_OWN = {"sft": ("seed", "output_dir", "report_to"), "reward": ("seed", "output_dir", "report_to", "model"),
        "ppo": ("seed", "output_dir", "report_to", "model", "reward_model")}


class Seed(NamedTuple):
    """One seed's figures by stage/name, None where the data has none; and the rows of its metrics.jsonl by stage."""

    number: int
    figures: dict[str, float | None]
    metrics: dict[str, list[dict]]
    settings: dict[str, object]  # every key of the three configurations that is not the seed's own, by stage/key


def load_seed(name: str) -> Seed:
    """Everything that is reported of the runs in one folder.

    Raises:
        UserError: when the folder is not there, a stage is not finished, or a figure is missing.
    """
    figures, metrics, settings = {}, {}, {}
    for stage in ("sft", "reward", "ppo"):
        folder, summary = finished_run(name, stage, "runs")
        figures |= {f"{stage}/{measure}": value for measure, value in summary.items()}
        metrics[stage] = read_whole_rows(folder / "metrics.jsonl")
        saved, _ = read_yaml(folder / "config.yaml")
        settings |= {f"{stage}/{name}": value for name, value in saved.items() if name not in _OWN[stage]}
    figures["ppo/ended"] = (series(metrics["ppo"], "objective/ended")[1] or [None])[-1]
    figures["reward/of_ceiling"] = None  # known further down
    for measure in ("ppo/seed", *(measure for column in COLUMNS for measure in column.names + column.interval)):
        if measure not in figures:
            stage, key_name = measure.split("/")
            raise UserError(f"runs: '{Path(name, stage, 'summary.json')}' has no '{key_name}'; train that stage again")
    if ceiling := figures.get("reward/label_ceiling"):
        figures["reward/of_ceiling"] = figures["reward/accuracy"] / ceiling
    return Seed(figures["ppo/seed"], figures, metrics, settings)


def load_seeds(names: list[str]) -> list[Seed]:
    """All of them; two runs of one seed would make the spread too small, two configurations too large."""
    if not names:
        raise UserError("runs: name the folders to compare, for example --runs outputs/seed0 outputs/seed1")
    seeds = [load_seed(name) for name in names]
    numbers = [seed.number for seed in seeds]
    for number in numbers:
        if numbers.count(number) > 1:
            raise UserError(f"runs: {numbers.count(number)} of them have seed {number}; name one run for each seed")
    for seed in seeds:
        for name in sorted(seeds[0].settings.keys() | seed.settings.keys()):
            ours, first = (settings.get(name, "unknown") for settings in (seed.settings, seeds[0].settings))
            if ours != first:
                raise UserError(f"runs: {name} is {ours} with seed {seed.number} but {first} with seed {numbers[0]}; compare "
                                "seeds of one configuration")
    return seeds


def why_collapsed(figures: dict) -> str | None:
    """The first reason why a seed counts as collapsed; None when it does not."""
    for name, limit, what in (
        ("ppo/gold_win_rate", 0.5, "gold win rate"),
        ("ppo/gold_after", figures["ppo/gold_before"], "gold score"),
        ("ppo/ended", 0.9, "share with EOS"),
    ):
        # so written, what is not a number is below every limit
        if figures[name] is not None and not figures[name] >= limit:
            return f"{what} {figures[name]:.3f} is below {limit:.3f}"
    return None


def table_rows(seeds: list[Seed]) -> list[list[str]]:
    """A row of cells for each seed, then mean, sample standard deviation, minimum and maximum over the seeds."""
    rows = [[str(seed.number), *(cell(column, seed.figures, column.interval) for column in COLUMNS)] for seed in seeds]
    for label, spread in SPREAD.items():
        figures = {}
        for measure in (measure for column in COLUMNS for measure in column.names):
            known = [seed.figures[measure] for seed in seeds if seed.figures[measure] is not None]
            figures[measure] = spread(known) if known else None
        rows.append([label, *(cell(column, figures) for column in COLUMNS)])
    return rows


def cell(column: Column, figures: dict, interval: tuple[str, ...] = ()) -> str:
    """Before and after with an arrow, or one figure and its interval; a dash where nothing is known."""
    values = [figures[name] for name in column.names]
    if None in values:
        return "-"
    text = " → ".join(map(column.layout.format, values))
    return text + (" ({:.3f} - {:.3f})".format(*(figures[name] for name in interval)) if interval else "")


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """For people."""
    table = Table(title="The stages over the seeds", title_justify="left")
    for column, *cells in zip(header, *rows, strict=True):
        table.add_column(column, width=max(map(len, [*cells, *column.split()])))  # headers may wrap, figures must not
    for number, row in enumerate(rows, start=1):
        table.add_row(*row, end_section=number == len(rows) - len(SPREAD))
    Console(width=200, markup=False).print(table)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """For a README."""
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
    start(main, CompareConfig, None, __doc__)
