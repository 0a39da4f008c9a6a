"""How fast data becomes tokens: 100,000 comparisons in the layout of CarperAI/openai_summarize_comparisons.

    python scripts/studies/benchmark_data.py --posts reddit_tldr.jsonl.gz --tokenizer assets/opt-mini

The script makes comparisons from real posts (rows with subreddit, title, post, summary). It reads, checks,
groups and tokenises them as training does, tokenises the same texts with the tokenizer alone, and starts a
second time from the cache. Everything that it writes is removed at the end.

Times are CPU seconds of one process, so they do not depend on the number of cores. Other programs still slow
it down through the shared caches of the CPU. On a busy machine take the best of several runs.
"""

import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import datasets.config

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import key
from utils.data.rows import load_examples
from utils.data.sources import Source
from utils.data.store import StoredSet
from utils.data.tokens import token_rows
from utils.data.validation import read_set
from utils.launch import read_config, start
from utils.models.parents import Parent
from utils.runs.run import peak_memory_mb

BATCH = 1000  # texts that the tokenizer alone gets at once
# of read_set: the defaults of the reward stage
LIMITS = {"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}


@dataclass
class BenchmarkConfig:
    """What is measured."""

    posts: str = key("data/tldr_mini/actor_train.jsonl.gz", "Examples whose posts and summaries the "
                     "comparisons are made of.")
    rows: int = key(100_000, "Comparisons.", unit="rows", low=1, high=10**8)
    rows_per_post: int = key(5, "Comparisons of each post (the public set: 92,858 of some 21,000 posts).",
                             unit="rows", low=1, high=1000)
    tokenizer: str = key("assets/opt-mini", "The tokenizer: a model folder or a hub name.")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="detail 1",
                                 low=8, high=10_000_000)


def write_comparisons(path: Path, config: BenchmarkConfig) -> None:
    """Write comparisons made from the posts.

    The posts are used again and again, each time with another title. Each comparison is a pair from five
    summaries: the post's own and those of the next four posts.
    """
    examples, rng = list(load_examples(config.posts, "posts")), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(config.rows):
            post = number // config.rows_per_post
            example = examples[post % len(examples)]
            prompt = example.prompt.removesuffix("\n\nTL;DR:").replace("\n\n", "\n", 2)
            prompt = prompt.replace("TITLE: ", f"TITLE: {post // len(examples)} ", 1)
            chosen, rejected = (f"TL;DR:{examples[index % len(examples)].completion}"
                                for index in rng.sample(range(post, post + 5), 2))
            if chosen != rejected:
                file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def texts_of(stored: StoredSet) -> tuple[list[int], list[int]]:
    """The numbers of the distinct prompts and of the distinct completions."""
    prompts = stored.table.column("prompt").to_pylist()
    completions = stored.table.column("completions").combine_chunks().flatten().to_pylist()
    return list(dict.fromkeys(prompts)), list(dict.fromkeys(completions))


def seconds(call) -> float:
    """CPU seconds of this process for a call: all threads, and the system's work for them."""
    began = time.process_time()
    call()
    return time.process_time() - began


def tokenizer_alone(stored: StoredSet, tokenizer) -> float:
    """CPU seconds of the tokenizer for the set's texts, in batches, without reading or storing anything."""
    spent = 0.0
    for numbers in texts_of(stored):
        for first in range(0, len(numbers), BATCH):
            texts = [stored.text(number) for number in numbers[first : first + BATCH]]
            spent += seconds(lambda texts=texts: tokenizer(texts)["input_ids"])
    return spent


def main(config: BenchmarkConfig) -> None:
    tokenizer = Parent("tokenizer", config.tokenizer).tokenizer
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = folder
        path = Path(folder) / "comparisons.jsonl"
        write_comparisons(path, config)
        before = peak_memory_mb()
        stored, tokens = None, None  # the grouped comparisons, and their tokens

        def read():
            nonlocal stored
            stored = read_set(Source(str(path)), "reward_training_data", "rankings", **LIMITS)

        def tokenise():
            nonlocal tokens
            tokens = token_rows(stored, tokenizer, config.max_prompt_tokens)

        reading, tokenising, again = seconds(read), seconds(tokenise), seconds(lambda: (read(), tokenise()))
        rows, peak = stored.meta["read"], peak_memory_mb()
        alone = tokenizer_alone(stored, tokenizer)
    print(f"{rows} comparisons, {stored.meta['rows']} groups, {sum(tokens['length'])} tokens")
    print(f"validation and grouping  {reading:7.1f} s  {rows / reading:9.0f} rows/s")
    print(f"tokenising               {tokenising:7.1f} s  {tokenising / alone:9.2f} times the tokenizer "
          f"alone ({alone:.1f} s)")
    print(f"a second start           {again:7.1f} s")
    print(f"peak memory              {peak:7.0f} MiB, of which {before:.0f} before the first row")


if __name__ == "__main__":
    start(main, read_config(BenchmarkConfig, None, __doc__))
