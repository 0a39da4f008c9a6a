"""Real posts for the three stages, and the ranked summaries that the reward model learns from.

A ranked group has a post and up to four summaries: the author's own (best), one that the SFT model sampled at
one of two temperatures, the author's with one fact changed, and the one of another post (worst). The second
and the third are not compared with each other: nobody knows which of them is better.
"""

import gzip
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from utils.data.layouts import TLDR_TEMPLATE
from utils.data.tokens import prompt_tokens
from utils.distributed import world
from utils.models.generation import sample
from utils.models.loading import load_policy
from utils.models.parents import Parent

COLUMNS = ("subreddit", "title", "post", "summary")
# GPT-2's tokens of a summary: OpenAI kept those of 24 to 48, so that authors who say little are left out
SHORTEST, LONGEST = 20, 48
LONGEST_PROMPT = 256  # GPT-2's tokens: what fits whole into the prompts of configs/smollm2-135m
TEMPERATURES = (0.7, 1.0)  # of the samples, in turn
KINDS = ("the author's", "sampled", "a fact changed", "another post's")
RANKS = (1, 2, 2, 3)

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


def split_posts(rows: list[dict], sizes: Sizes) -> dict[str, list[dict]]:
    """The parts of `sizes`, and `prompts`: all that PPO may learn from, which is every post of none but the
    training sets. A part is smaller where there are too few posts.

    Args:
        rows: of reddit_tldr.jsonl.gz, with the lengths `prompt_tokens` and `summary_tokens`.
    """
    kept = [{name: row[name] for name in COLUMNS} for row in rows
            if SHORTEST <= row["summary_tokens"] <= LONGEST and row["prompt_tokens"] <= LONGEST_PROMPT]
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


def ranked(row: dict, sampled: str, other: str, seed: int) -> dict:
    """A ranking as train_reward.py takes it, with the kind of each summary. Empty and repeated ones are left
    out.
    """
    texts = (row["summary"], sampled, with_a_fact_changed(row["summary"], seed) or "", other)
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
    texts = iter(one_sample_each([TLDR_TEMPLATE.format(**row) for row in rows], policy, stage))
    return {name: write_rows(target / f"{name}.jsonl", [
        ranked(row, next(texts), part[(i + 1) % len(part)]["summary"], i) for i, row in enumerate(part)])
        for name, part in parts.items()}


def one_sample_each(prompts: list[str], policy: str, stage) -> list[str]:
    """What the policy writes for each prompt, at the TEMPERATURES in turn."""
    parent = Parent("model", policy)
    tokenizer, model = parent.tokenizer, load_policy(parent).to(world().device)
    ids, texts = prompt_tokens(tokenizer, prompts, stage.max_prompt_tokens), [""] * len(prompts)
    for first, temperature in enumerate(TEMPERATURES):
        places = range(first, len(prompts), len(TEMPERATURES))
        written = sample(model, [ids[place] for place in places], k=1, max_new_tokens=stage.max_new_tokens,
                         temperature=temperature, eos_id=tokenizer.eos_token_id,
                         seeds=[stage.seed * 1_000_003 + place for place in places],
                         pad_id=tokenizer.pad_token_id, batch_size=stage.eval_batch_size,
                         progress=f"samples at {temperature}")
        for place, text in zip(places, tokenizer.batch_decode(written.responses, skip_special_tokens=True),
                               strict=True):
            texts[place] = text
    return texts
