"""How fast data becomes tokens: 100,000 comparisons in the layout of CarperAI/openai_summarize_comparisons.

    python scripts/studies/benchmark_data.py --posts reddit_tldr.jsonl.gz --tokenizer assets/opt-mini

It writes comparisons made of real posts (rows with subreddit, title, post, summary), reads, checks and groups them as
training does, tokenises them, tokenises the same texts with the tokenizer alone, and starts a second time from the cache.
Times are processor seconds of one process, so that they are those of one core. Caches that other programs use too still cost
time: on a busy machine take the best of several. All that it writes is removed at the end.
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
from utils.launch import start
from utils.models.parents import Parent
from utils.runs.run import peak_memory_mb

BATCH = 1000
LIMITS = {"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}


@dataclass
class BenchmarkConfig:
    """What is measured."""

    posts: str = key("data/tldr_mini/actor_train.jsonl.gz", "Examples whose posts and summaries the comparisons are made of.")
    rows: int = key(100_000, "Comparisons.", unit="rows", low=1)
    rows_per_post: int = key(5, "Comparisons of one post (92,858 of some 21,000 posts in the public set).", unit="rows", low=1)
    tokenizer: str = key("assets/opt-mini", "A folder or a hub name.")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="detail 1", low=8)


def write_comparisons(path: Path, config: BenchmarkConfig) -> None:
    """Posts again and again, each time with another title, and pairs of five summaries each: its own and other posts'."""
    examples, draw = list(load_examples(config.posts, "posts")), random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(config.rows):
            post = number // config.rows_per_post
            example = examples[post % len(examples)]
            prompt = example.prompt.removesuffix("\n\nTL;DR:").replace("\n\n", "\n", 2)
            prompt = prompt.replace("TITLE: ", f"TITLE: {post // len(examples)} ", 1)
            chosen, rejected = draw.sample(range(post, post + 5), 2)
            answers = [f"TL;DR:{examples[index % len(examples)].completion}" for index in (chosen, rejected)]
            if answers[0] != answers[1]:
                file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True))) + "\n")


def texts_of(stored: StoredSet) -> tuple[list[int], list[int]]:
    """Numbers of the different prompts and completions."""
    prompts = stored.table.column("prompt").to_pylist()
    completions = stored.table.column("completions").combine_chunks().flatten().to_pylist()
    return list(dict.fromkeys(prompts)), list(dict.fromkeys(completions))


def seconds(call) -> float:
    """Processor seconds, all threads and the system's work for them included: other programs on the machine do not count."""
    began = time.process_time()
    call()
    return time.process_time() - began


def tokenizer_alone(stored: StoredSet, tokenizer) -> float:
    """Seconds that the tokenizer needs for the set's texts in batches, without reading or keeping anything."""
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
        found = []

        def read():
            found.append(read_set(Source(str(path)), "reward_training_data", "rankings", **LIMITS))

        def tokenise():
            found.append(token_rows(found[0], tokenizer, config.max_prompt_tokens))

        reading, tokenising, again = seconds(read), seconds(tokenise), seconds(lambda: (read(), tokenise()))
        rows, peak = found[0].meta["read"], peak_memory_mb()
        alone = tokenizer_alone(found[0], tokenizer)
    print(f"{rows} comparisons, {found[0].meta['rows']} groups, {sum(found[1]['length'])} tokens")
    print(f"validation and grouping  {reading:7.1f} s  {rows / reading:9.0f} rows/s")
    print(f"tokenising               {tokenising:7.1f} s  {tokenising / alone:9.2f} times the tokenizer alone ({alone:.1f} s)")
    print(f"a second start           {again:7.1f} s")
    print(f"peak memory              {peak:7.0f} MiB, of which {before:.0f} before the first row")


if __name__ == "__main__":
    start(main, BenchmarkConfig, None, __doc__)
