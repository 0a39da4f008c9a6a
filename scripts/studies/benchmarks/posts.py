"""Posts and summaries of real lengths, as token ids.

Where real posts are (`TLDR_DATA_DIR`, or shared/data beside the project's folder) they are used with the OPT
tokenizer; elsewhere random ids of the same lengths: QUANTILES are those of 7,849 Reddit posts with the
author's own TL;DR.
"""

import gzip
import json
import os
import random
from pathlib import Path
from typing import NamedTuple

from utils.config import PROJECT
from utils.data.layouts import TLDR_TEMPLATE, spaced
from utils.data.tokens import completion_tokens, prompt_tokens

# lengths in tokens at 0 %, 5 %, ... 100 %; prompts are cut to 512, completions have their EOS
PROMPT_QUANTILES = [61, 125, 147, 164, 179, 195, 210, 225, 239, 257, 273, 290, 310, 329, 350, 373, 395, 420,
                    449, 480, 512]
COMPLETION_QUANTILES = [9, 11, 12, 13, 15, 16, 17, 18, 19, 21, 22, 23, 25, 26, 28, 31, 33, 36, 41, 48, 65]
SAMPLE = 1024  # posts that batches are drawn from
FIRST_ID, LAST_ID = 3, 50264


class Batch(NamedTuple):
    """What one repetition works on. The K completions of a post: its own summary, and those of other posts.
    """

    prompts: list[list[int]]
    completions: list[list[list[int]]]

    @property
    def lengths(self) -> tuple[list[int], list[list[int]]]:
        return list(map(len, self.prompts)), [list(map(len, group)) for group in self.completions]


def data_folder() -> Path | None:
    """Where the real posts are, or None."""
    for folder in (os.environ.get("TLDR_DATA_DIR"), PROJECT.parent / "shared" / "data"):
        if folder and (Path(folder) / "reddit_tldr.jsonl.gz").exists():
            return Path(folder)
    return None


def real_posts(folder: Path, count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, summary) of so many posts."""
    from transformers import AutoTokenizer

    with gzip.open(folder / "reddit_tldr.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = random.Random(seed).sample([json.loads(line) for line in file], count)
    tokenizer = AutoTokenizer.from_pretrained(folder / "opt_tokenizer")
    prompts = [TLDR_TEMPLATE.format(**{name: row[name] for name in ("subreddit", "title", "post")})
               for row in rows]
    return list(zip(prompt_tokens(tokenizer, prompts, 512),
                    completion_tokens(tokenizer, [spaced(r["summary"]) for r in rows]),
                    strict=True))


def synthetic_posts(count: int, seed: int) -> list[tuple[list[int], list[int]]]:
    """The same with random ids; prompt and summary lengths are drawn apart from each other."""
    draw = random.Random(seed)

    def tokens(quantiles):
        place, rest = divmod(draw.random() * (len(quantiles) - 1), 1)
        low, high = quantiles[int(place) : int(place) + 2]
        return [draw.randint(FIRST_ID, LAST_ID) for _ in range(round(low + rest * (high - low)))]

    return [(tokens(PROMPT_QUANTILES), tokens(COMPLETION_QUANTILES)) for _ in range(count)]


def all_posts(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Posts to draw batches from: real ones where they are."""
    folder = data_folder()
    return real_posts(folder, SAMPLE, seed) if folder else synthetic_posts(SAMPLE, seed)


def batch_of(posts: list[tuple[list[int], list[int]]], count: int, k: int, prompt_length: int | None = None,
             completion_length: int | None = None) -> Batch:
    """A batch whose lengths stand for all: a post from the middle of each of `count` equal shares, ordered by
    length.

    Args:
        prompt_length, completion_length: give each prompt or completion this length, by cutting or repeating
            it; None: as it is.
    """
    ordered = sorted(posts, key=lambda post: len(post[0]) + len(post[1]))
    places = [int((share + 0.5) / count * len(ordered)) for share in range(count)]
    chosen = random.Random(0).sample(places, count)
    others = random.Random(1).sample(range(len(posts)), count * (k - 1))
    prompts = [_of_length(ordered[place][0], prompt_length) for place in chosen]
    completions = [[ordered[place][1],
                    *(posts[other][1] for other in others[i * (k - 1) : (i + 1) * (k - 1)])]
                   for i, place in enumerate(chosen)]
    return Batch(prompts, [[_of_length(completion, completion_length) for completion in group]
                           for group in completions])


def _of_length(tokens, length):
    return tokens if length is None else (tokens * (length // len(tokens) + 1))[:length]
