"""What every stage ends with: samples, summary.json, plots, final/, the table of the stages so far, and two
posts before and after.
"""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from utils.console import show_table
from utils.distributed import world
from utils.errors import UserError, one_line
from utils.input_files import read_json
from utils.judge.gold import table_rows
from utils.models.parents import Parent
from utils.runs.card import model_card
from utils.runs.hub import push
from utils.runs.run import Run
from utils.runs.standstill import standstill

_PRINTED = 2  # posts
_LONGEST = 1500  # characters of a post


class Ending(NamedTuple):
    """What a finished stage has to say."""

    samples: list[dict]  # of samples.jsonl, test posts
    summary: dict  # the test figures, of summary.json
    work: dict  # of summary.json as well: how much the stage did, and how fast
    stage: dict  # of stage.json in final/, besides what every stage writes there
    plot: Callable[[Run], None]  # draws into plots/
    tensors: dict[str, dict] | None = None  # files of tensors in final/, besides the model's
    compared: tuple[str, str] | None = None  # keys of a sample: what was written before and after the stage


def end_stage(run: Run, step: int, model, tokenizer, parents: list[Parent], ending: Ending) -> None:
    """Write everything that a finished stage leaves after its last `step`, and print the table."""
    if note := standstill(run.read_metrics(), run.stage, run.config.learning_rate):
        run.log(note)
    run.samples(step, "test", ending.samples)
    run.metrics(step, {f"test/{name}": value for name, value in ending.summary.items()})
    run.write_summary(ending.summary | ending.work)
    if run.is_main:
        _draw(run, ending)
    card = model_card(run.config, run.stage, parents, ending.summary, tokenizer)
    run.save_final(model, tokenizer, parents, ending.stage, card, ending.tensors)
    if run.is_main and run.config.push_to_hub:
        push(run.folder / "final", run.config.push_to_hub, run.log)
    print_stages(stage_folders(run, parents))
    print_samples(run, ending)
    run.end_tracking()


def _draw(run: Run, ending: Ending) -> None:
    try:
        ending.plot(run)
    except Exception as error:  # a damaged row of metrics.jsonl, say: pictures must not cost the run its end
        run.log(f"plots: not all are drawn ({type(error).__name__}: {error})")


def refuse_broken_summaries(*parents: Parent) -> None:
    """Raise UserError when the table at the end could not show the run that a parent comes from."""
    for parent in parents:
        try:
            if parent.run is not None:
                _shown(*parent.run)
        except UserError as error:
            raise UserError(f"{parent.key}: {error}; train that stage again, or remove the file: the table "
                            "at the end then leaves it out") from None


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
    rows, seconds = [], []
    for stage, folder in folders.items():
        try:
            of_stage, took = _shown(stage, folder)
        except UserError as error:  # of an earlier stage, changed since the start
            print(f"{stage}: is not in the table: {error}")
        else:
            rows += of_stage
            seconds.append(f"{stage} {took}")
    table = Table(title="RLHF in three stages", title_justify="left")
    for column in ("stage", "measure", "before", "after", "95 % interval"):
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    show_table(table)
    print(f"seconds: {', '.join(seconds)}")
    for stage, folder in folders.items():
        for path in (folder, *sorted((folder / "plots").glob("*"))):
            print(f"{stage}: {path}")


def _shown(stage: str, folder: Path) -> tuple[list[tuple], str]:
    """Rows of the table, and the seconds of a stage's run. Raises UserError when its summary.json is broken.
    """
    path = folder / "summary.json"
    try:
        summary = read_json(path)
        return list(_stage_rows({stage: summary})), f"{summary['seconds']:.0f}"
    except (UserError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' does not have the figures of a finished run ({one_line(error)})") from None


def _stage_rows(summaries):
    if sft := summaries.get("sft"):
        yield "sft", "ROUGE mean, held-out posts", _f(sft["base_rouge_avg"]), _f(sft["rouge_avg"]), ""
    if reward := summaries.get("reward"):
        span = f"{_f(reward['accuracy_low'])} - {_f(reward['accuracy_high'])}"
        yield "reward", "pair accuracy", "", _f(reward["accuracy"]), span
        yield "", "  choosing the longer one", "", _f(reward["longest_accuracy"]), ""
        yield from (("", *row) for row in table_rows(reward))
    if ppo := summaries.get("ppo"):
        yield "ppo", "reward model's score", _f(ppo["score_before"]), _f(ppo["score_after"]), ""
        if "score_slope" in ppo:
            controlled = _f(ppo["score_after_length_controlled"])
            yield "", "  at equal length", _f(ppo["score_before"]), controlled, ""
            yield from (("", f"  paid for a token: {name.removesuffix('_slope')}", "", _f(slope), "")
                        for name, slope in ppo.items() if name.endswith("_slope"))
        yield from (("", *row) for row in table_rows(ppo))
        yield "", "KL to SFT [nats a summary]", "", _f(ppo["kl"]), ""


def _f(value):
    return f"{value:.3f}"


def print_samples(run: Run, ending: Ending) -> None:
    """The first posts with what was written for them before and after; and how to try the model.

    Posts are printed with their own line breaks alone, so that they can be pasted into the command.
    """
    if not run.is_main or ending.compared is None:
        return
    for number, row in enumerate(ending.samples[:_PRINTED], start=1):
        prompt = row["prompt"]
        if len(prompt) > _LONGEST:
            prompt = f"{prompt[: _LONGEST // 2]} ... {prompt[-_LONGEST // 2 :]}"
        print(f"\n--- held-out post {number}\n{prompt.strip()}")
        for when, name in zip(("before", "after"), ending.compared, strict=True):
            print(f"--- {when} ({name}): {row[name].strip() or '(nothing)'}")
    model = ["--model", str(run.folder / "final")]
    print(f"\ntry the model: {shlex.join(['python', 'scripts/chat.py', *model])}")
    if run.stage == "ppo":
        page = ["python", "scripts/feedback.py", *model, *_asked(run)]
        print(f"rate its answers in a browser: {shlex.join(page)}")


def _asked(run: Run) -> list[str]:
    """What the rating page needs besides the model: PPO's reward model, its prompts, the model before it."""
    prompts = run.config.rlhf_training_data
    scorer = run.config.reward_model
    return [*(["--reward_model", scorer] if scorer else []), "--compare", run.config.model, "--prompts",
            prompts if isinstance(prompts, str) else json.dumps(prompts)]
