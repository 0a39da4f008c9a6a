"""Real posts for the three stages, and the ranked summaries that the reward model learns from.

A ranked group has a post and up to five summaries: the author's own (best), two that the SFT model sampled at
two temperatures, the author's with one fact changed, and the one of another post (worst). Those in the middle
are not compared with each other: nobody knows which of them is better.
"""

import gzip
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from utils.config import UserError
from utils.data.layouts import TLDR_TEMPLATE
from utils.data.tokens import prompt_tokens
from utils.distributed import world
from utils.models.generation import sample
from utils.models.loading import load_policy
from utils.models.parents import Parent

COLUMNS = ("subreddit", "title", "post", "summary")
# GPT-2's tokens of a summary: OpenAI kept those of 24 to 48, so that authors who say little are left out
SHORTEST, LONGEST = 20, 48
TEMPERATURES = (0.7, 1.0)  # of the two samples
KINDS = ("the author's", *(f"sampled at {temperature}" for temperature in TEMPERATURES), "a fact changed",
         "another post's")
RANKS = (1, 2, 2, 2, 3)

# a word and what takes its place; both directions
_FACTS = [("he", "she"), ("him", "her"), ("his", "her"), ("boyfriend", "girlfriend"), ("husband", "wife"),
          ("guy", "girl"), ("man", "woman"), ("men", "women"), ("mom", "dad"), ("mother", "father"),
          ("brother", "sister"), ("son", "daughter"), ("bf", "gf"), ("friend", "boss"),
          ("friends", "parents"), ("years", "days"), ("year", "week"), ("months", "hours"), ("month", "day"),
          ("before", "after"),
          ("more", "less"), ("first", "last"), ("old", "new"), ("good", "bad"), ("love", "hate"),
          ("always", "never"), ("can", "can't"), ("want", "don't want"), ("is", "isn't"), ("was", "wasn't"),
          ("don't", "do"), ("dog", "cat"), ("buy", "sell"), ("work", "school"), ("money", "time")]
_OTHER = {b: a for a, b in _FACTS} | dict(_FACTS)
_FACT = re.compile(r"(?<![\w'])(?:\d+|" + "|".join(sorted(map(re.escape, _OTHER), key=len, reverse=True))
                   + r")(?![\w'])", re.IGNORECASE)


class Sizes(NamedTuple):
    """Posts of each part. No post is in two of them."""

    validation: int  # of all stages
    sft: int
    reward: int  # ranked groups of the reward model
    judge: int  # ranked groups of the second reward model
    held_out: int  # ranked groups that both are tested on


def read_rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def split_posts(rows: list[dict], sizes: Sizes, longest_prompt: int) -> dict[str, list[dict]]:
    """The parts of `sizes`, and `prompts`: all that PPO may learn from, which is every post of none but the
    training sets.

    Args:
        rows: of reddit_tldr.jsonl.gz, with the lengths `prompt_tokens` and `summary_tokens`.
        longest_prompt: longer posts are left out, in GPT-2's tokens.

    Raises:
        UserError: when there are fewer posts than the parts need.
    """
    kept = [{name: row[name] for name in COLUMNS} for row in rows
            if SHORTEST <= row["summary_tokens"] <= LONGEST and row["prompt_tokens"] <= longest_prompt]
    if len(kept) < sum(sizes):
        raise UserError(f"{len(kept)} posts fit (summaries of {SHORTEST} to {LONGEST} tokens, prompts of at "
                        f"most {longest_prompt}), and the parts need {sum(sizes)}: lower sft_posts, "
                        "reward_posts, judge_posts or held_out_posts, or raise longest_prompt")
    random.Random(0).shuffle(kept)
    parts, first = {}, 0
    for name, size in sizes._asdict().items():
        parts[name] = kept[first : first + size]
        first += size
    parts["prompts"] = kept[first:] + parts["reward"] + parts["sft"]
    return parts


def with_a_fact_changed(summary: str, seed: int) -> str | None:
    """The summary with one number, or one word of a short list, replaced by another; None: it has none."""
    found = list(_FACT.finditer(summary))
    if not found:
        return None
    draw = random.Random(seed)
    match = draw.choice(found)
    old = match.group()
    new = str(int(old) + draw.randint(1, 9)) if old.isdecimal() else _OTHER[old.lower()]
    if old[0].isupper():
        new = new[0].upper() + new[1:]
    return summary[: match.start()] + new + summary[match.end() :]


def ranked(row: dict, sampled: list[str], other: str, seed: int) -> dict:
    """A ranking as train_reward.py takes it, with the kind of each summary. Empty and repeated ones are left
    out.
    """
    texts = (row["summary"], *sampled, with_a_fact_changed(row["summary"], seed) or "", other)
    group = {}  # text -> (kind, rank); the first of equal texts stays
    for text, kind, rank in zip(texts, KINDS, RANKS, strict=True):
        if text.strip():
            group.setdefault(text.strip(), (kind, rank))
    kinds, ranks = map(list, zip(*group.values(), strict=True))
    return {"prompt": TLDR_TEMPLATE.format(**row), "completions": list(group), "ranks": ranks, "kinds": kinds}


def rank_posts(parts: dict[str, list[dict]], policy: str, stage, target: Path) -> dict[str, Path]:
    """Write the rankings of several parts of the posts; their files.

    Args:
        policy: the SFT model's folder.
        stage: the configuration of the SFT stage, for the lengths, the batch and the seed.
    """
    rows = [row for part in parts.values() for row in part]
    texts = iter(samples_of([TLDR_TEMPLATE.format(**row) for row in rows], policy, stage))
    return {name: write_rows(target / f"{name}.jsonl", [
        ranked(row, next(texts), part[(i + 1) % len(part)]["summary"], i) for i, row in enumerate(part)])
        for name, part in parts.items()}


def samples_of(prompts: list[str], policy: str, stage) -> list[list[str]]:
    """What the policy writes for each prompt, at each of the TEMPERATURES."""
    parent = Parent("model", policy)
    tokenizer, model = parent.tokenizer, load_policy(parent).to(world().device)
    ids = prompt_tokens(tokenizer, prompts, stage.max_prompt_tokens)
    columns = []
    for first, temperature in enumerate(TEMPERATURES):
        seeds = [(stage.seed * 2 + first) * 1_000_003 + place for place in range(len(prompts))]
        written = sample(model, ids, k=1, max_new_tokens=stage.max_new_tokens, temperature=temperature,
                         eos_id=tokenizer.eos_token_id, seeds=seeds, pad_id=tokenizer.pad_token_id,
                         batch_size=stage.eval_batch_size, progress=f"samples at {temperature}")
        columns.append(tokenizer.batch_decode(written.responses, skip_special_tokens=True))
    return list(map(list, zip(*columns, strict=True)))
