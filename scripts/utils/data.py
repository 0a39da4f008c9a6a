"""Reading data sets and turning text into tokens, once.

Two kinds of rows: examples (a prompt, perhaps with its reference completion) and rankings (a prompt with K
completions and the pairs of them that somebody compared). `utils/layouts.py` says what a row means.
"""

import bisect
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow

from utils.config import UserError, find_input, find_local, is_hub_name
from utils.files import FILE_ENDINGS, read_file
from utils.layouts import (
    TLDR,
    TLDR_TEMPLATE,
    Example,
    Ranking,
    comparison_of,
    example_of,
    ranking_of,
    score_ratio,
)

_SPLITS = {"training": ["train"], "validation": ["validation", "valid", "valid1"], "test": ["test", "valid2"]}


def load_examples(name: str, field: str, need_completion: bool = True) -> list[Example]:
    """Every example of a data set.

    Args:
        name: a file, a folder saved by `datasets`, or a hub name.
        field: the configuration key it came from, such as `actor_training_data`, for messages and hub splits.
        need_completion: False for prompts only (PPO).

    Raises:
        UserError: naming file and line, for anything that is not an example.
    """
    return [example_of(row, where, need_completion) for where, row in read_rows(name, field)]


def load_rankings(
    name: str, field: str, max_completions: int, say, min_score_ratio: float = 1.0, max_pairs_per_prompt: int | None = None
) -> list[Ranking]:
    """Every ranking of a data set; pairwise rows are grouped by prompt, so that a prompt is computed once.

    Args:
        max_completions: larger groups are split so that each pair stands in one of the parts.
        say: called with a line about what was dropped and why (detail 6).
        min_score_ratio: rows with a smaller `score_ratio` are dropped (SHP: votes of the better over those of the worse).
        max_pairs_per_prompt: of pairwise rows, the first so many of a prompt are taken.
    """
    rankings, pairs_of, dropped = [], {}, Counter()
    for where, row in read_rows(name, field):
        if "completions" in row:
            rankings += _capped(ranking_of(row, where), max_completions)
            continue
        prompt, chosen, rejected, note = comparison_of(row, where)
        if score_ratio(row, where) < min_score_ratio:
            dropped["a score_ratio that is too small"] += 1
        elif prompt is None:
            dropped["share no prompt"] += 1
        elif chosen.strip() == rejected.strip():
            dropped["equal answers"] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped["an empty answer"] += 1
        elif len(pairs_of.setdefault(prompt, [])) == max_pairs_per_prompt:
            dropped["more pairs of one prompt than max_pairs_per_prompt"] += 1
        else:
            pairs_of[prompt].append((chosen, rejected, note))
    for prompt, pairs in pairs_of.items():
        rankings += _grouped(prompt, pairs, max_completions)
    if dropped:
        say(f"{name}: dropped {sum(dropped.values())} pairs (" + ", ".join(f"{n} {why}" for why, n in dropped.items()) + ")")
    if not rankings:
        raise UserError(f"{field}: '{name}' holds no usable comparison")
    return rankings


def read_rows(name: str, field: str) -> Iterator[tuple[str, dict]]:
    """Rows of a local file (`utils/files.py`), a folder saved by `datasets`, or a hub data set, each with where it stands."""
    if is_hub_name(name) and not name.endswith(FILE_ENDINGS) and find_local(name) is None:
        return _read_hub(name, field)
    path = find_input(name, field)
    return _read_saved(path, field) if path.is_dir() else read_file(path, field)


def _read_saved(path: Path, field: str):
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException):
        raise UserError(f"{field}: '{path}' is a folder that `datasets` did not save; name a file in it, one of "
                        f"{', '.join(FILE_ENDINGS)}") from None
    where = str(path)
    if isinstance(rows, DatasetDict):
        split = _split_of(list(rows), field, where)
        rows, where = rows[split], f"{path}[{split}]"
    yield from ((f"{where}:{number}", row) for number, row in enumerate(rows, start=1))


def _read_hub(name: str, field: str):
    from datasets import get_dataset_split_names, load_dataset

    try:
        split = _split_of(get_dataset_split_names(name), field, name)
        rows = load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # Runtime: loading scripts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: '{name}' is neither a file nor a data set of the hub that can be reached ({reason}); "
                        "without a network, name a local copy: a file, or a folder saved by `datasets`") from None
    yield from ((f"{name}[{split}]:{number}", row) for number, row in enumerate(rows, start=1))


def _split_of(splits: list[str], field: str, name: str) -> str:
    """The split that serves the role of a configuration key."""
    wanted = next((names for role, names in _SPLITS.items() if role in field), _SPLITS["validation"])
    found = next((split for split in wanted if split in splits), None)
    if found is None:
        raise UserError(f"{field}: '{name}' has no split {' or '.join(wanted)} (it has {', '.join(splits)}); name a local file "
                        "instead")
    return found


def _capped(ranking: Ranking, max_completions: int) -> list[Ranking]:
    """The ranking itself, or parts of it that hold each pair once."""
    texts, strength = ranking.completions, ranking.label_scores
    if len(texts) <= max_completions:
        return [ranking]
    parts = _grouped(ranking.prompt, [(texts[i], texts[j], {}) for i, j in ranking.pairs], max_completions)
    if strength is None:
        return parts
    known = dict(zip(texts, strength, strict=True))
    return [part._replace(label_scores=[known[text] for text in part.completions]) for part in parts]


def _grouped(prompt: str, pairs: list[tuple[str, str, dict]], max_completions: int) -> list[Ranking]:
    groups: list[tuple[dict, list, list]] = []
    for chosen, rejected, note in pairs:
        group = next((g for g in groups if len({*g[0], chosen, rejected}) <= max_completions), None)
        if group is None:
            group = ({}, [], [])
            groups.append(group)
        texts, indices, notes = group
        for text in (chosen, rejected):
            texts.setdefault(text, len(texts))
        indices.append((texts[chosen], texts[rejected]))
        notes.append(note)
    return [Ranking(prompt, list(texts), indices, None, notes if any(notes) else None) for texts, indices, notes in groups]


def split_off(rows: list, share: float, seed: int) -> tuple[list, list]:
    """Hold some prompts out: (rows that stay, rows held out). No prompt is in both (detail 7)."""
    prompts = sorted({row.prompt for row in rows})
    if len(prompts) < 4:
        raise UserError(f"{len(prompts)} different prompts are too few to hold some out; name validation and test data too")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(len(prompts) * share))])
    return [row for row in rows if row.prompt not in held], [row for row in rows if row.prompt in held]


def refuse_overlap(splits: dict[str, list]) -> None:
    """Raise UserError when one prompt stands in two of the named splits (detail 7)."""
    owner = {}
    for name, rows in splits.items():
        for prompt in {row.prompt for row in rows}:
            if owner.setdefault(prompt, name) != name:
                raise UserError(f"the same prompt stands in {owner[prompt]} and in {name}: {prompt[:80]!r}...; "
                                "remove it from one")


def prompt_tokens(tokenizer, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, special tokens in front as the tokenizer has them, cut to `max_tokens`."""
    return [
        ids if len(ids) <= max_tokens else _cut_prompt(tokenizer, prompt, max_tokens)
        for prompt, ids in zip(prompts, _ids(tokenizer, prompts), strict=True)
    ]


def _ids(tokenizer, text, add_special_tokens=True):
    """Token ids. A special token that somebody has written into a text is text: `</s>` in a post ends nothing (detail 4)."""
    return tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]


def _cut_prompt(tokenizer, prompt: str, max_tokens: int) -> list[int]:
    """Cut the *post* at its last newline, then at its last sentence, then at a word; never `TL;DR:` (detail 1).

    A prompt of another layout keeps its end, since that is where the question stands.
    """
    match = TLDR.fullmatch(prompt)
    if not match:
        ids = _ids(tokenizer, prompt)
        special = len(ids) - len(_ids(tokenizer, prompt, add_special_tokens=False))
        return ids[:special] + ids[len(ids) - max_tokens + special :]
    post = match[3]

    def cut_at(end: int) -> list[int]:
        shorter = TLDR_TEMPLATE.format(subreddit=match[1], title=match[2], post=post[:end].rstrip())
        return _ids(tokenizer, shorter)

    for breaks in _breaks(post):
        # the further the cut, the longer the prompt: find the last one that fits by bisection
        last = bisect.bisect_left(breaks, True, key=lambda end: len(cut_at(end)) > max_tokens) - 1
        if last >= 0:
            return cut_at(breaks[last])
    raise UserError(f"a prompt cannot fit into max_prompt_tokens={max_tokens} even without its post: {prompt[:60]!r}...")


def _breaks(post: str) -> list[list[int]]:
    """Where a post may be cut: at newlines; else behind sentences of its first paragraph; else at words; else wholly."""
    first = post.split("\n", 1)[0]
    return [
        [found.start() for found in re.finditer(r"(?<=\S)\n", post)],
        [found.start() for found in re.finditer(r"(?<=[.?!]) ", first)],
        [0] + [found.start() for found in re.finditer(r"(?<=\S) ", first)],
    ]


def completion_tokens(tokenizer, completions: list[str]) -> list[list[int]]:
    """Token ids of each completion, followed by EOS."""
    ids = _ids(tokenizer, completions, add_special_tokens=False)
    return [tokens + [tokenizer.eos_token_id] for tokens in ids]
