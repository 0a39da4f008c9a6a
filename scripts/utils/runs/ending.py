"""What every stage ends with: samples, summary.json, plots, final/, and the table of the stages so far."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from utils.distributed import world
from utils.judge.gold import table_rows
from utils.models.parents import Parent
from utils.runs.run import Run


class Ending(NamedTuple):
    """What a finished stage has to say."""

    samples: list[dict]  # of samples.jsonl
    summary: dict  # of summary.json
    stage: dict  # of stage.json in final/, besides what every stage writes there
    plot: Callable[[Run], None]  # draws into plots/


def end_stage(run: Run, model, tokenizer, parents: list[Parent], ending: Ending) -> None:
    """Write everything that a finished stage leaves, and print the table."""
    run.samples(ending.samples)
    run.write_summary(ending.summary)
    if run.is_main:
        ending.plot(run)
    run.save_final(model, tokenizer, parents, ending.stage)
    print_stages(stage_folders(run, parents))
    run.end_tracking()


def stage_folders(run: Run, parents: list[Parent]) -> dict[str, Path]:
    """Run folders by stage, in the order of the stages: those whose final/ the parents are, and this run's
    own.
    """
    folders = dict(parent.run for parent in parents if parent.run is not None) | {run.stage: run.folder}
    return {stage: folders[stage] for stage in ("sft", "reward", "ppo") if stage in folders}


def print_stages(folders: dict[str, Path]) -> None:
    """The table at the end: what each stage reached, with intervals where they are known; and where it all
    lies.

    Args:
        folders: run folder of each stage, each with its summary.json.
    """
    if not world().is_main_process:  # the others may be here before the summary is written
        return
    summaries = {stage: json.loads((folder / "summary.json").read_text())
                 for stage, folder in folders.items()}
    table = Table(title="RLHF in three stages", title_justify="left")
    for column in ("stage", "measure", "before", "after", "95 % interval", "seconds"):
        table.add_column(column)
    for row in _stage_rows(summaries):
        table.add_row(*row)
    console = Console(width=110, markup=False)  # brackets are units
    console.print(table)
    for stage, folder in folders.items():
        for path in (folder, *sorted((folder / "plots").iterdir())):
            console.print(f"{stage}: {path}", highlight=False, soft_wrap=True)


def _stage_rows(summaries):
    if sft := summaries.get("sft"):
        yield ("sft", "ROUGE mean on held-out posts", _f(sft["base_rouge_avg"]), _f(sft["rouge_avg"]), "",
               _s(sft))
    if reward := summaries.get("reward"):
        span = f"{_f(reward['accuracy_low'])} - {_f(reward['accuracy_high'])}"
        yield ("reward", "pair accuracy (before: the longer wins)", _f(reward["longest_accuracy"]),
               _f(reward["accuracy"]), span, _s(reward))
        yield from (("", *row, "") for row in table_rows(reward))
    if ppo := summaries.get("ppo"):
        yield ("ppo", "reward model's score", _f(ppo["score_before"]), _f(ppo["score_after"]), "", _s(ppo))
        yield from (("", *row, "") for row in table_rows(ppo))
        yield ("", "KL to the SFT policy [nats a summary]", "", _f(ppo["kl"]), "", "")


def _f(value):
    return f"{value:.3f}"


def _s(summary):
    return f"{summary['seconds']:.0f}"
