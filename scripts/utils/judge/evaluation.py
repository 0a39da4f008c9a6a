"""Summaries of held-out posts, and what a model says of given completions; shared out over the ranks."""

import math
from functools import partial
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from utils.console import progress_bar
from utils.distributed import world
from utils.models.generation import sample
from utils.models.outputs import scores
from utils.models.prompt_groups import pack


class Summaries(NamedTuple):
    """What a policy wrote for each prompt."""

    tokens: list[list[int]]  # response tokens, with EOS where there is one
    texts: list[str]
    ended: list[bool]
    logprobs: list[list[float]]  # of each token, at the temperature it was sampled at


def summarise(policy, tokenizer, prompts, config, temperature, title="", k=1) -> Summaries:
    """K summaries for each prompt (token ids), one after the other; prompts are shared out over the ranks.

    The seed of a summary depends on `config.seed`, the prompt's place and the summary's number only.
    """
    with world().split_between_processes(list(enumerate(prompts))) as numbered:
        samples = sample(
            policy,
            [prompt for _, prompt in numbered],
            k=k,
            max_new_tokens=config.max_new_tokens,
            temperature=temperature,
            seeds=[config.seed * 1_000_003 + number + len(prompts) * further
                   for number, _ in numbered for further in range(k)],
            eos_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            batch_size=max(1, config.eval_batch_size // k),
            progress=title if world().is_main_process else "",
        )
    rows = gather_object(list(zip(samples.responses, samples.ended, samples.logprobs, strict=True)))
    tokens, ended, logprobs = map(list, zip(*rows, strict=True))
    return Summaries(tokens, tokenizer.batch_decode(tokens, skip_special_tokens=True), ended, logprobs)


def score_groups(reward_model, tokenizer, prompts, completions, batch_size, title="",
                 outputs=scores) -> list[list]:
    """The reward model's score of each completion of each prompt, all as token ids; or other `outputs`."""
    reward_model.eval()
    device = reward_model.device
    return measure_groups(partial(outputs, reward_model), tokenizer, prompts, completions, batch_size, device,
                          title)


@torch.no_grad()
def measure_groups(measure, tokenizer, prompts, completions, batch_size, device,
                   title="") -> list[list[float]]:
    """`measure(groups)`, (N,), of each completion of each prompt; rows are shared out over the ranks.

    Rows of like length are measured together, so that little padding is computed.
    """
    everything = list(zip(prompts, completions, strict=True))
    with world().split_between_processes(everything) as mine:
        # pad: every rank must run the same number of forward passes under ZeRO-3
        rows = mine + everything[:1] * (math.ceil(len(everything) / world().num_processes) - len(mine))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - sum(map(len, rows[i][1])))
    measured = [[] for _ in rows]
    shown = bool(title) and world().is_main_process
    for start in progress_bar(range(0, len(order), batch_size), desc=title, shown=shown, leave=False):
        part = order[start : start + batch_size]
        groups = pack([rows[i][0] for i in part], [rows[i][1] for i in part], tokenizer.pad_token_id)
        values = iter(measure(groups.to(device)).tolist())
        for i in part:
            measured[i] = [next(values) for _ in rows[i][1]]
    return gather_object(measured[: len(mine)])
