"""Compare runs: the figures of each, mean and spread over seeds, curves, and which runs collapsed.

    make seeds                                       # five seeds of the embedded default, then this script
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 outputs/seed2 \\
        --output outputs/seeds.png
    python scripts/studies/compare_seeds.py --runs outputs/seed0 outputs/seed1 --markdown

A run is a folder with finished stages in sft/, reward/ and ppo/, as `make demo OUT=outputs/seed0
ARGS="--seed 0"` writes it, or the folder of one stage. A figure of a stage that is not there is a dash.

Runs of different configurations are told apart by a letter, and what differs is listed. Mean and spread are
over the runs of one configuration, never over several. They are meant for different seeds: two runs of one
seed differ by rounding alone, which is said.

Almost all figures are read from the summary.json files and are measured on test posts. The exception is the
share of summaries with EOS: it is `objective/ended` of the last PPO update, measured on training posts with
the policy before that update.

A run counts as collapsed when PPO left the policy worse than the SFT model that it started from, or unable
to end its summaries. That is: a gold win rate over SFT below .5 (sampled), a lower gold score than before, or
a share with EOS below .9. Where the data has no gold score, only the share with EOS counts. A figure that is
NaN counts as collapsed.
"""

import json
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import UserError, find_input, key
from utils.console import show_table
from utils.judge.plots import plot_runs, series
from utils.launch import read_config, start
from utils.runs.records import read_whole_rows
from utils.runs.run import finished_run, output_file
from utils.yaml_files import read_yaml


@dataclass
class CompareConfig:
    """What to compare, and what to write."""

    runs: list[str] = key([], "Folders with finished stages in sft/, reward/ and ppo/, or of one stage.")
    output: str | None = key(None, "Plot the curves of all runs into this .png file.")
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
# title of a plot -> (stage, metric, label of the x axis, label of the y axis)
CURVES = {
    "SFT loss": ("sft", "sft/loss", "step", "nats a token"),
    "ROUGE mean, validation": ("sft", "eval/rouge_avg", "step", "F1, 0 to 1"),
    "reward accuracy, validation": ("reward", "eval/accuracy", "step", "share of pairs"),
    "reward model's score, rollouts": ("ppo", "objective/score", "update", "score"),
    "KL, rollouts": ("ppo", "objective/kl", "update", "nats a summary"),
    "length, rollouts": ("ppo", "objective/length", "update", "tokens"),
    "gold score, validation": ("ppo", "eval/gold", "update", "gold score, at most 1"),
}
# absent where the data has no gold score
GOLD = [name for column in COLUMNS for name in column.names + column.interval if name.startswith("ppo/gold_")]
# keys that always differ between seeds: folders, and the models that the stages before have trained
_DIFFERENT = {
    "sft": ("seed", "output_dir", "report_to"), "reward": ("seed", "output_dir", "report_to", "model"),
    "ppo": ("seed", "output_dir", "report_to", "model", "reward_model"),
}


STAGES = ("sft", "reward", "ppo")


class Compared(NamedTuple):
    """One run: up to three stages of one seed."""

    name: str  # as given
    seed: int
    figures: dict[str, float | None]  # by stage/figure; None: it does not have it
    metrics: dict[str, list[dict]]  # rows of metrics.jsonl by stage
    settings: dict[str, object]  # keys of the configurations by stage/key, without those in _DIFFERENT


def load_run(name: str) -> Compared:
    """Read the stages in a folder, or the one whose folder it is.

    Raises:
        UserError: when the folder does not exist, no stage in it is finished, or a figure is missing.
    """
    figures, metrics, settings, seed = dict.fromkeys(["ppo/ended", "reward/of_ceiling"]), {}, {}, None
    for stage, folder, summary in stages_of(name):
        found = {f"{stage}/{figure}": value for figure, value in summary.items()}
        refuse_missing(found, stage, folder)
        figures |= found
        seed = summary["seed"]
        metrics[stage] = read_whole_rows(folder / "metrics.jsonl")
        saved, _ = read_yaml(folder / "config.yaml")
        settings |= {f"{stage}/{key_name}": value for key_name, value in saved.items()
                     if key_name not in _DIFFERENT[stage]}
    if "ppo" in metrics:
        figures["ppo/ended"] = (series(metrics["ppo"], "objective/ended")[1] or [None])[-1]
    if ceiling := figures.get("reward/label_ceiling"):
        figures["reward/of_ceiling"] = figures["reward/accuracy"] / ceiling
    return Compared(name, seed, figures, metrics, settings)


def stages_of(name: str) -> list[tuple[str, Path, dict]]:
    """(stage, folder, summary) of each finished stage in a folder, or of the stage whose folder it is."""
    folder = find_input(name, "runs")
    if (folder / "summary.json").exists():
        _, summary = finished_run(name, "", "runs")
        try:
            stage = json.loads((folder / "final" / "stage.json").read_text(encoding="utf-8"))["stage"]
        except (OSError, ValueError, LookupError, TypeError):
            stage = None
        if stage not in STAGES:
            raise UserError(f"runs: '{folder / 'final' / 'stage.json'}' does not say which stage this is; "
                            "train it to its end")
        return [(stage, folder, summary)]
    there = [stage for stage in STAGES if (folder / stage).is_dir()]
    if not there:
        raise UserError(f"runs: no run in '{folder}': neither summary.json nor a folder sft, reward or ppo; "
                        "name what `make demo` or a stage has written")
    return [(stage, *finished_run(name, stage, "runs")) for stage in there]


def refuse_missing(found: dict, stage: str, folder: Path) -> None:
    """Raise UserError when a stage's summary lacks a figure of the table; all gold figures may be missing."""
    wanted = {f"{stage}/seed", *(name for column in COLUMNS for name in column.names + column.interval)}
    wanted -= {"ppo/ended", "reward/of_ceiling"}  # computed here
    if found.keys().isdisjoint(GOLD):
        wanted -= set(GOLD)
    for figure in sorted(wanted - found.keys()):
        if figure.startswith(f"{stage}/"):
            raise UserError(f"runs: '{folder / 'summary.json'}' has no '{figure.removeprefix(f'{stage}/')}'; "
                            "train that stage again")


def configurations(runs: list[Compared]) -> tuple[list[str], dict[str, list[object]]]:
    """A letter for the configuration of each run, and what differs: the value of each run by stage/key.

    Only stages that all runs have are compared, key by key; a key that a run does not know is "not there".
    """
    shared = set.intersection(*({name.split("/")[0] for name in run.settings} for run in runs))
    names = sorted({name for run in runs for name in run.settings if name.split("/")[0] in shared})
    differing = {name: [run.settings.get(name, "not there") for run in runs] for name in names}
    differing = {name: values for name, values in differing.items() if any(v != values[0] for v in values)}
    marks = [repr([values[number] for values in differing.values()]) for number in range(len(runs))]
    kinds = list(dict.fromkeys(marks))
    letters = [string.ascii_uppercase[i] if i < 26 else f"Z{i}" for i in map(kinds.index, marks)]
    return letters, differing


def why_collapsed(figures: dict) -> str | None:
    """The first reason why a run counts as collapsed; None: it does not."""
    for name, limit, title in (
        ("ppo/gold_win_rate", 0.5, "gold win rate"),
        ("ppo/gold_after", figures.get("ppo/gold_before"), "gold score"),
        ("ppo/ended", 0.9, "share with EOS"),
    ):
        # `not (a >= b)` is true for NaN, `a < b` is not
        if figures.get(name) is not None and not figures[name] >= limit:
            return f"{title} {figures[name]:.3f} is below {limit:.3f}"
    return None


def labels_of(runs: list[Compared], letters: list[str]) -> list[str]:
    """How the table calls each run: by its seed where that tells all apart, else by its folder."""
    if len(set(letters)) == 1 and len({run.seed for run in runs}) == len(runs):
        return [str(run.seed) for run in runs]
    several = len(set(letters)) > 1
    return [f"{run.name.rstrip('/')} (seed {run.seed}{f', {letter}' if several else ''})"
            for run, letter in zip(runs, letters, strict=True)]


def spread_rows(runs: list[Compared], suffix: str) -> list[list[str]]:
    """Mean, standard deviation, minimum and maximum over some runs."""
    rows = []
    for label, statistic in SPREAD.items():
        figures = {}
        for name in (name for column in COLUMNS for name in column.names):
            values = [run.figures[name] for run in runs if run.figures.get(name) is not None]
            figures[name] = statistic(values) if values else None
        rows.append([label + suffix, *(cell(column, figures) for column in COLUMNS)])
    return rows


def table_rows(runs: list[Compared], letters: list[str]) -> tuple[list[list[str]], list[list[str]]]:
    """A row of cells for each run; and for each configuration with several runs its mean and spread."""
    rows = [[label, *(cell(column, run.figures, column.interval) for column in COLUMNS)]
            for label, run in zip(labels_of(runs, letters), runs, strict=True)]
    groups = grouped(runs, letters)
    if len(groups) == 1:
        return rows, spread_rows(runs, "")
    return rows, [row for letter, group in groups.items() if len(group) > 1
                  for row in spread_rows(group, f", {letter}")]


def grouped(runs: list, letters: list[str]) -> dict[str, list]:
    """The runs of each configuration."""
    groups = {letter: [] for letter in letters}
    for run, letter in zip(runs, letters, strict=True):
        groups[letter].append(run)
    return groups


def cell(column: Column, figures: dict, interval: tuple[str, ...] = ()) -> str:
    """One figure with its interval, or before and after with an arrow; a dash where a figure is missing."""
    values = [figures.get(name) for name in column.names]
    if None in values:
        return "-"
    text = " → ".join(map(column.layout.format, values))
    if interval:
        text += " ({:.3f} - {:.3f})".format(*(figures[name] for name in interval))
    return text


def print_table(header: list[str], rows: list[list[str]], spread: list[list[str]]) -> None:
    """Print the table for the terminal."""
    table = Table(title="The stages of each run", title_justify="left")
    for column, *cells in zip(header, *rows, *spread, strict=True):
        # wide enough for every figure and every word of the header: headers may wrap, figures must not
        table.add_column(column, width=max(map(len, [*cells, *column.split()])))
    for number, row in enumerate([*rows, *spread], start=1):
        table.add_row(*row, end_section=number == len(rows))
    show_table(table)


def notes_on(runs: list[Compared], letters: list[str], differing: dict[str, list[object]]) -> list[str]:
    """What a reader of the table must know: what differs between configurations, and seeds that repeat."""
    lines = []
    for name, values in differing.items():
        by_letter = dict(zip(letters, values, strict=True))
        lines.append(f"{name}: " + ", ".join(f"{value} in {letter}" for letter, value in by_letter.items()))
    for letter, group in grouped(runs, letters).items():
        for seed, count in Counter(run.seed for run in group).items():
            if count > 1:
                of = f" of {letter}" if differing else ""
                lines.append(f"seed {seed}{of} was run {count} times: that is no spread over seeds")
    return lines


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """The table in markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def main(config: CompareConfig) -> None:
    path = output_file(config.output, "output", ".png") if config.output else None
    if not config.runs:
        raise UserError("runs: name the folders to compare, for example --runs outputs/seed0 outputs/seed1")
    runs = [load_run(name) for name in config.runs]
    letters, differing = configurations(runs)
    rows, spread = table_rows(runs, letters)
    by_seed = rows[0][0] == str(runs[0].seed)
    header = ["seed" if by_seed else "run", *(column.title for column in COLUMNS)]
    print_table(header, rows, spread)
    for line in notes_on(runs, letters, differing):
        print(line)
    if config.markdown:
        print(markdown(header, rows + spread))
    reasons = [f"{'seed ' if by_seed else ''}{row[0]} ({reason})" for row, run in zip(rows, runs, strict=True)
               if (reason := why_collapsed(run.figures))]
    print(f"collapsed: {', '.join(reasons) or 'none'}")
    if path:
        plot_runs(path, {title: (xlabel, ylabel, {
            letter: [series(run.metrics.get(stage, []), name) for run in group]
            for letter, group in grouped(runs, letters).items()})
            for title, (stage, name, xlabel, ylabel) in CURVES.items()})
        print(f"curves: {path}")


if __name__ == "__main__":
    start(main, read_config(CompareConfig, None, __doc__))
