"""Reading data sets and turning text into tokens, once.

Two kinds of rows: examples (a prompt, perhaps with its reference completion) and rankings (a prompt with K
completions and the pairs of them that somebody compared). Formats are recognised by their columns.
"""

import bisect
import math
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow

from utils.config import UserError, find_input, find_local, is_hub_name
from utils.files import FILE_ENDINGS, read_file

# ST and N+ write prompts so; a completion starts with one space and ends with EOS (details 1 and 2).
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_TLDR = re.compile(r"SUBREDDIT: r/(.*?)\n+TITLE: (.*?)\n+POST: (.*?)\s*(?:\n+TL;DR:\s*)?", re.DOTALL)
_SPLITS = {"training": ["train"], "validation": ["validation", "valid", "valid1"], "test": ["test", "valid2"]}


class Example(NamedTuple):
    """A prompt and, where known, its reference completion and the facts behind a synthetic post."""

    prompt: str
    completion: str | None
    facts: dict[str, str] | None


class Ranking(NamedTuple):
    """A prompt and its distinct completions; `pairs` holds (better, worse) indices into them.

    `label_scores`: Bradley-Terry strengths of the completions where the labeller is known, else None.
    `notes`: what the set says of each pair besides, by NOTES, for evaluation (detail 20); None when it says nothing.
    """

    prompt: str
    completions: list[str]
    pairs: list[tuple[int, int]]
    label_scores: list[float] | None
    notes: list[dict[str, str]] | None = None


NOTES = ("confidence", "policies", "batch", "worker")  # columns of a comparison that say who compared what, and how sure


def load_examples(name: str, field: str, need_completion: bool = True) -> list[Example]:
    """Every example of a data set.

    Args:
        name: a file, a folder saved by `datasets`, or a hub name.
        field: the configuration key it came from, such as `actor_training_data`, for messages and hub splits.
        need_completion: False for prompts only (PPO).

    Raises:
        UserError: naming file and line, for anything that is not an example.
    """
    return [_example(row, where, need_completion) for where, row in read_rows(name, field)]


def load_rankings(name: str, field: str, max_completions: int, say) -> list[Ranking]:
    """Every ranking of a data set; pairwise rows are grouped by prompt, so that a prompt is computed once.

    Args:
        max_completions: larger groups are split so that each pair stands in one of the parts.
        say: called with a line about what was dropped and why (detail 6).
    """
    rankings, pairs_of, dropped = [], {}, Counter()
    for where, row in read_rows(name, field):
        if "completions" in row:
            rankings += _capped(_ranking(row, where), max_completions)
            continue
        prompt, chosen, rejected, note = _comparison(row, where)
        if prompt is None:
            dropped["share no prompt"] += 1
        elif chosen.strip() == rejected.strip():
            dropped["equal answers"] += 1
        elif not chosen.strip() or not rejected.strip():
            dropped["an empty answer"] += 1
        else:
            pairs_of.setdefault(prompt, []).append((chosen, rejected, note))
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


def _text(row: dict, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        found = "is empty" if value in ("", None) or isinstance(value, str) else f"is a {type(value).__name__}"
        raise UserError(f"{where}: column '{column}' {found}; text is needed")
    return value


def _example(row: dict, where: str, need_completion: bool) -> Example:
    facts = row.get("facts")
    if {"subreddit", "title", "post"} <= row.keys():
        prompt = TLDR_TEMPLATE.format(**{c: _text(row, c, where) for c in ("subreddit", "title", "post")})
        column = "summary"
    elif "prompt" in row:
        prompt = tldr_layout(_text(row, "prompt", where)).rstrip()
        column = "label" if "label" in row and "completion" not in row else "completion"
    else:
        raise UserError(f"{where}: has columns {sorted(row)}; needed are prompt and completion, prompt and label, or "
                        "subreddit, title, post and summary")
    if column not in row:
        if need_completion:
            raise UserError(f"{where}: column '{column}' is missing (found: {', '.join(sorted(row))})")
        return Example(prompt, None, facts)
    return Example(prompt, spaced(_text(row, column, where)), facts)


def _ranking(row: dict, where: str) -> Ranking:
    if "prompt" not in row:
        raise UserError(f"{where}: column 'prompt' is missing beside 'completions'")
    completions, ranks = row["completions"], row.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError(f"{where}: column 'completions' must be a list of two or more texts, best first")
    texts = [spaced(_text({"completions": text}, "completions", where)) for text in completions]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: column 'completions' holds the same text twice")
    if ranks is None:
        ranks = list(range(len(texts)))
    strengths = row.get("label_scores")
    for column, numbers in (("ranks", ranks), ("label_scores", strengths)):
        whole = isinstance(numbers, list) and len(numbers) == len(texts) and all(map(_is_number, numbers))
        if numbers is not None and not whole:
            raise UserError(f"{where}: column '{column}' must hold one number for each of the {len(texts)} completions")
    pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
    return Ranking(tldr_layout(_text(row, "prompt", where)).rstrip(), texts, pairs, strengths)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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


def _comparison(row: dict, where: str):
    """Prompt, better and worse answer, and what the row says besides. Prompt None: the two dialogues share none."""
    if {"info", "summaries", "choice"} <= row.keys():
        return _openai_comparison(row, where)
    note = {column: str(row[column]) for column in NOTES if row.get(column) is not None}
    if not {"chosen", "rejected"} <= row.keys():
        raise UserError(f"{where}: has columns {sorted(row)}; needed are prompt, chosen and rejected; chosen and rejected "
                        "(dialogues); or prompt and completions, best first")
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], str):
            raise UserError(f"{where}: column '{column}' is a {type(row[column]).__name__}; text is needed")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row:
        if "\n\nAssistant:" not in chosen:
            raise UserError(f"{where}: column 'prompt' is missing, and 'chosen' is no dialogue with 'Assistant:' turns")
        return *_shared_dialogue(chosen, rejected), note
    prompt = _text(row, "prompt", where)
    if chosen.startswith("TL;DR:") and rejected.startswith("TL;DR:"):
        prompt = f"{prompt.rstrip()}\n\nTL;DR:"
        chosen, rejected = chosen.removeprefix("TL;DR:"), rejected.removeprefix("TL;DR:")
    return tldr_layout(prompt).rstrip(), spaced(chosen), spaced(rejected), note


def _openai_comparison(row: dict, where: str):
    """A row of openai/summarize_from_feedback: `choice` is the index of the better of two summaries.

    Its articles (CNN/DM) have no subreddit and no title.
    """
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    two = isinstance(summaries, list) and len(summaries) == 2 and all(isinstance(summary, dict) for summary in summaries)
    if not isinstance(info, dict) or not two:
        raise UserError(f"{where}: columns 'info' and 'summaries' must be an object and a list of two objects with 'text'")
    if choice not in (0, 1) or isinstance(choice, bool):
        raise UserError(f"{where}: column 'choice' is {choice!r}; it must be 0 or 1, the better of the two summaries")
    if info.get("article"):
        prompt = f"{_text(info, 'article', where).strip()}\n\nTL;DR:"
    else:
        prompt = TLDR_TEMPLATE.format(**{c: _text({c: info.get(c)}, c, where).strip() for c in ("subreddit", "title", "post")})
    texts = [summary.get("text") for summary in summaries]
    for text in texts:
        if not isinstance(text, str):
            raise UserError(f"{where}: a summary has no 'text'")
    extra = row.get("extra") if isinstance(row.get("extra"), dict) else {}
    policies = [summary.get("policy") for summary in summaries]
    note = {"confidence": extra.get("confidence"), "batch": row.get("batch"), "worker": row.get("worker"),
            "policies": " and ".join(sorted(policies)) if all(isinstance(policy, str) for policy in policies) else None}
    known = {column: str(note[column]) for column in NOTES if note[column] is not None}
    return prompt, spaced(texts[choice]), spaced(texts[1 - choice]), known


def _shared_dialogue(chosen: str, rejected: str):
    """HH rows hold whole dialogues that share all but the last assistant turn."""
    turn = "\n\nAssistant:"
    head, _, answer = chosen.rpartition(turn)
    other_head, _, other = rejected.rpartition(turn)
    if head != other_head:
        return None, chosen, rejected
    return (head + turn).strip(), spaced(answer), spaced(other)


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


def tldr_layout(prompt: str) -> str:
    """The prompt in the TL;DR layout when it is one of its spellings, else unchanged."""
    match = _TLDR.fullmatch(prompt)
    return TLDR_TEMPLATE.format(subreddit=match[1], title=match[2], post=match[3]) if match else prompt


def spaced(completion: str) -> str:
    """A completion that starts with a white-space character, so that it continues its prompt (detail 2)."""
    completion = completion.rstrip()
    return completion if completion[:1].isspace() else f" {completion}"


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
        for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True)
    ]


def _cut_prompt(tokenizer, prompt: str, max_tokens: int) -> list[int]:
    """Cut the *post* at its last newline, then at its last sentence, then at a word; never `TL;DR:` (detail 1).

    A prompt of another layout keeps its end, since that is where the question stands.
    """
    match = _TLDR.fullmatch(prompt)
    if not match:
        ids = tokenizer(prompt)["input_ids"]
        special = len(ids) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return ids[:special] + ids[len(ids) - max_tokens + special :]
    post = match[3]

    def cut_at(end: int) -> list[int]:
        shorter = TLDR_TEMPLATE.format(subreddit=match[1], title=match[2], post=post[:end].rstrip())
        return tokenizer(shorter)["input_ids"]

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
    ids = tokenizer(completions, add_special_tokens=False)["input_ids"]
    return [tokens + [tokenizer.eos_token_id] for tokens in ids]
