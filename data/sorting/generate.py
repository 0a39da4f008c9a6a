"""Writes problems whose answers can be checked: names to be put in alphabetical order.

    python data/sorting/generate.py                   # into outputs/sorting, the same bytes each time

The SFT rows show the form of an answer, and not how it is found: their names stand in random order. So the
SFT model is right by chance alone, once in n! answers of n names.
"""

import json
import random
import sys
from pathlib import Path

# one token each in the tokenizer of assets/opt-mini
NAMES = """Adam Ben Brian Carl Clara David Diana Emma Felix George Hannah Helen Ivan Jack Julia Kate Laura
Luke Maria Max Nina Oscar Paul Rachel Robert Sam Susan Tom Vera Zoe""".split()
SIZES = (3, 4, 5)  # names of a problem, from easy to hard
ROWS = {"sft_train": 2000, "sft_validation": 100, "sft_test": 100,
        "ppo_train": 6000, "ppo_validation": 300, "ppo_test": 600}


def problem(names: list[str]) -> str:
    """The prompt of a problem."""
    return f"Names: {' '.join(names)}\n\nIn order:"


def rows(seed: int) -> dict[str, list[dict]]:
    """The rows of each file. No set of names is in two files."""
    draw, taken, made = random.Random(seed), set(), {}
    for name, count in ROWS.items():
        made[name] = []
        while len(made[name]) < count:
            names = draw.sample(NAMES, SIZES[len(made[name]) % len(SIZES)])
            if frozenset(names) in taken:
                continue
            taken.add(frozenset(names))
            row = {"prompt": problem(names)}
            if name.startswith("sft"):
                row["completion"] = " ".join(draw.sample(names, len(names)))
            else:
                row["names"] = names
            made[name].append(row)
    return made


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in rows(seed=0).items():
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("outputs/sorting"))
