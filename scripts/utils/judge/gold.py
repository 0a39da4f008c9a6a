"""The gold score of a tldr_mini summary: how many of the post's facts it gets right. No torch, no model.

The labels of the reward stage are noisy draws from this score, and PPO never sees it: it is the
judge that a real project does not have, which shows whether a rising reward means better summaries.
"""

import json
import re
from collections import defaultdict
from pathlib import Path


def load_gold(path: str | Path) -> dict:
    """Read `gold.json` and index its values by their first word, so that a summary is scanned once."""
    gold = json.loads(Path(path).read_text(encoding="utf-8"))
    index = defaultdict(list)
    for slot, spec in gold["slots"].items():
        for value in spec["values"]:
            value_words = words_of(value)
            index[value_words[0]].append((value_words, slot, value))
    gold["index"] = dict(index)
    return gold


def words_of(text: str) -> list[str]:
    """Lower-cased words; all that lies between them is ignored."""
    return re.findall(r"[a-z0-9']+", text.lower())


def mentioned_values(words: list[str], gold: dict) -> dict[str, set[str]]:
    """The values of each slot that occur as contiguous words."""
    mentioned = {slot: set() for slot in gold["slots"]}
    for start, word in enumerate(words):
        for value_words, slot, value in gold["index"].get(word, ()):
            if words[start : start + len(value_words)] == value_words:
                mentioned[slot].add(value)
    return mentioned


def gold_score(summary: str, facts: dict[str, str], gold: dict, ended: bool = True) -> float:
    """Facts right minus facts wrong, by weight, minus penalties for length, repetition and a missing end.

    A complete and correct summary scores 1. `ended` False says that the text was cut off at the
    length limit, which costs as much as a missing full stop (not twice, if both hold).
    """
    words = words_of(summary)
    mentioned = mentioned_values(words, gold)
    score = 0.0
    for slot, spec in gold["slots"].items():
        if facts[slot] in mentioned[slot]:
            score += spec["weight"]
        if mentioned[slot] - {facts[slot]}:
            score -= spec["weight"]

    penalties = gold["penalties"]
    score -= penalties["extra_word"] * max(0, len(words) - gold["need_words"])
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    repeats = len(trigrams) - len(set(trigrams))
    score -= min(penalties["repeated_trigram"] * repeats, penalties["repeated_trigram_cap"])
    if not ended or not summary.rstrip().endswith((".", "?", "!")):
        score -= penalties["no_proper_end"]
    return score
