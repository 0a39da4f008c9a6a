"""Write the tldr_mini data set: posts about everyday trouble, their summaries, and noisy rankings.

    python data/tldr_mini/generate.py                  # the committed files
    python data/tldr_mini/generate.py --pretraining    # and the corpus of the mini base model
    python data/tldr_mini/generate.py --tokenizer      # and train the tokenizer anew
    python data/tldr_mini/generate.py --output_dir outputs/uneven --answers 2 9    # unequal rankings

Everything follows from the seed: each file has its own random generator, drawn from the seed and
the file's name, and gzip's time stamp is zero. The same seed gives the same bytes.
"""

import argparse
import gzip
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT / "scripts")]

from posts import SLOTS, VALUES, Post, make_post  # noqa: E402
from pretraining import corpus, list_rows  # noqa: E402
from summaries import need_words, ranking, reference  # noqa: E402
from utils.judge.gold import load_gold  # noqa: E402

WEIGHTS = {"relation": 0.10, "name": 0.12, "age": 0.10, "action": 0.10, "object": 0.14, "place": 0.12,
           "when": 0.12, "feeling": 0.10, "question": 0.10}  # fmt: skip
PENALTIES = {"extra_word": 0.02, "repeated_trigram": 0.05, "repeated_trigram_cap": 0.5, "no_proper_end": 0.25}
# Set so that a perfect judge agrees with the label on about 83 % of the pairs (data card: label ceiling).
TEMPERATURE = 0.14

SIZES = {
    "actor": {"train": 4000, "validation": 300, "test": 400},
    "reward": {"train": 5000, "validation": 300, "test": 600},
    "rlhf": {"train": 4000, "validation": 300, "test": 400},
    "pretraining_lists": {"train": 8000, "validation": 300},
    "pretraining": {"train": 36000, "validation": 300},
}


def file_rng(seed: int, name: str) -> random.Random:
    """A generator for one file. Seeding with a string does not depend on PYTHONHASHSEED."""
    return random.Random(f"{seed}:{name}")


def distinct_posts(rng: random.Random, count: int) -> Iterator[Post]:
    """`count` posts with different bodies. A test checks that no two files share one."""
    seen = set()
    while len(seen) < count:
        post = make_post(rng)
        if post.body not in seen:
            seen.add(post.body)
            yield post


def make_rows(rng: random.Random, name: str, count: int, gold: dict,
              answers_of_a_post: range = range(4, 5)) -> Iterator[dict]:
    """The rows of one file: documents, posts with a ranking, or posts with their author's summary."""
    if name.startswith("pretraining"):
        yield from (list_rows if name.startswith("pretraining_lists") else corpus)(rng, count)
        return
    for index, post in enumerate(distinct_posts(rng, count)):
        if name.startswith("reward"):
            # drawing from a single number would take from the generator, and change the committed files
            size = answers_of_a_post[0] if len(answers_of_a_post) == 1 else rng.choice(answers_of_a_post)
            answers = ranking(rng, post, gold, size)
        else:
            answers = {"completion": reference(rng, post).text}
        yield {"id": f"{name}_{index}", "prompt": post.prompt, **answers, "facts": post.facts}


def write_rows(path: Path, rows: Iterator[dict]) -> None:
    """JSON lines, gzipped without time stamp and file name, so that the same rows give the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as file:
        for row in rows:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def write_gold(path: Path) -> None:
    gold = {
        "slots": {slot: {"weight": WEIGHTS[slot], "values": VALUES[slot]} for slot in SLOTS},
        "need_words": need_words(),
        "penalties": PENALTIES,
        "temperature": TEMPERATURE,
    }
    path.write_text(json.dumps(gold, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=HERE)
    parser.add_argument("--answers", type=int, nargs=2, default=[4, 4], metavar=("FEWEST", "MOST"),
                        help="of a post with a ranking, drawn for each post")
    parser.add_argument("--pretraining", action="store_true", help="also write the pretraining corpus")
    parser.add_argument("--tokenizer", action="store_true", help="also train the tokenizer on the corpus")
    parser.add_argument("--tokenizer_dir", type=Path, default=ROOT / "assets/opt-mini")
    args = parser.parse_args(arguments)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_gold(args.output_dir / "gold.json")
    gold = load_gold(args.output_dir / "gold.json")
    answers = range(args.answers[0], args.answers[1] + 1)
    for role, splits in SIZES.items():
        if role.startswith("pretraining") and not args.pretraining:
            continue
        for split, count in splits.items():
            name = f"{role}_{split}"
            rows = make_rows(file_rng(args.seed, name), name, count, gold, answers)
            write_rows(args.output_dir / f"{name}.jsonl.gz", rows)
    if args.tokenizer:
        from tokenizer import train_tokenizer  # imported here, because the data set alone needs no package

        train_tokenizer(args.output_dir, args.tokenizer_dir)


if __name__ == "__main__":
    main()
