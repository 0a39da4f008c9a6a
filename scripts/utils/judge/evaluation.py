"""Summaries of held-out posts and what they are worth; the table of the three stages."""

import json
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from utils.config import UserError
from utils.distributed import collect, my_share, world
from utils.models.generation import sample
from utils.models.loading import scores
from utils.models.prompt_groups import pack


class Summaries(NamedTuple):
    """What a policy wrote for each prompt."""

    tokens: list[list[int]]  # response tokens, with EOS where there is one
    texts: list[str]
    ended: list[bool]
    logprobs: list[list[float]]  # of each token, at the temperature it was sampled at


def refuse_too_long(model, tokens: int, what: str) -> None:
    """Raise UserError when a row would need more positions than the model has."""
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", tokens)
    if tokens > limit:
        raise UserError(f"{what} makes rows of {tokens} tokens, but the model has {limit} positions; lower max_prompt_tokens")


def summarise(policy, tokenizer, prompts, config, temperature, seed, title="") -> Summaries:
    """One summary for each prompt (token ids); the prompts are shared out over the ranks.

    The seed of a prompt's summary depends on `seed` and the prompt's place only.
    """
    numbered = my_share(list(enumerate(prompts)))
    samples = sample(
        policy,
        [prompt for _, prompt in numbered],
        k=1,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        seeds=[seed * 1_000_003 + number for number, _ in numbered],
        eos_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        batch_size=config.eval_batch_size,
        progress=title if world().is_main_process else "",
    )
    rows = collect(list(zip(samples.responses, samples.ended, samples.logprobs, strict=True)))
    tokens, ended, logprobs = map(list, zip(*rows, strict=True))
    return Summaries(tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True), ended, logprobs)


def print_stages(folders: dict[str, Path]) -> None:
    """The table at the end: what each stage reached, with intervals where they are known; and where it all lies.

    Args:
        folders: run folder of each stage, each with its summary.json.
    """
    if not world().is_main_process:  # the others may be here before the summary is written
        return
    summaries = {stage: json.loads((folder / "summary.json").read_text()) for stage, folder in folders.items()}
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
        yield ("sft", "ROUGE mean on held-out posts", _f(sft["base_rouge_avg"]), _f(sft["rouge_avg"]), "", _s(sft))
    if reward := summaries.get("reward"):
        span = f"{_f(reward['accuracy_low'])} - {_f(reward['accuracy_high'])}"
        yield ("reward", "pair accuracy (before: the longer wins)", _f(reward["longest_accuracy"]), _f(reward["accuracy"]), span,
               _s(reward))
        if reward["label_ceiling"] is not None:
            yield ("", "  of the labels' ceiling", "", f"{reward['accuracy'] / reward['label_ceiling']:.0%}", "", "")
    if ppo := summaries.get("ppo"):
        yield ("ppo", "reward model's score", _f(ppo["score_before"]), _f(ppo["score_after"]), "", _s(ppo))
        if ppo["gold_after"] is not None:
            span = f"{_f(ppo['gold_win_rate_low'])} - {_f(ppo['gold_win_rate_high'])}"
            yield ("", "gold score", _f(ppo["gold_before"]), _f(ppo["gold_after"]), "", "")
            yield ("", "gold win rate over SFT, sampled", "", _f(ppo["gold_win_rate"]), span, "")
            yield ("", "gold win rate over SFT, greedy", "", _f(ppo["gold_win_rate_greedy"]), "", "")
        yield ("", "KL to the SFT policy [nats a summary]", "", _f(ppo["kl"]), "", "")


def _f(value):
    return f"{value:.3f}"


def _s(summary):
    return f"{summary['seconds']:.0f}"


def score_groups(reward_model, tokenizer, prompts, completions, batch_size, title="") -> list[list[float]]:
    """The reward model's score of each completion of each prompt, all as token ids."""
    reward_model.eval()
    device = reward_model.device
    return measure_groups(partial(scores, reward_model), tokenizer, prompts, completions, batch_size, device, title)


@torch.no_grad()
def measure_groups(measure, tokenizer, prompts, completions, batch_size, device, title="") -> list[list[float]]:
    """`measure(groups)`, (N,), of each completion of each prompt; rows are shared out over the ranks.

    Rows of like length are measured together, so that little padding is computed.
    """
    everything = list(zip(prompts, completions, strict=True))
    mine = my_share(everything)
    # as many on every rank, since under ZeRO-3 all compute together
    rows = mine + everything[:1] * (math.ceil(len(everything) / world().num_processes) - len(mine))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - sum(map(len, rows[i][1])))
    found = [[] for _ in rows]
    shown = title and world().is_main_process
    for start in tqdm(range(0, len(order), batch_size), desc=title, disable=not shown, leave=False):
        part = order[start : start + batch_size]
        groups = pack([rows[i][0] for i in part], [rows[i][1] for i in part], tokenizer.pad_token_id)
        values = iter(measure(groups.to(device)).tolist())
        for i in part:
            found[i] = [next(values) for _ in rows[i][1]]
    return collect(found[: len(mine)])
