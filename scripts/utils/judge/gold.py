"""The gold score: how many of a synthetic post's facts a summary gets right.

The posts of data/tldr_mini are made from known facts, so every summary has a true score. The labels of the
reward stage are noisy draws from it, and PPO is not trained on it. It is the judge that a real project does
not have: it shows whether a rising reward means better summaries. A data set brings it by `gold_rules`;
without that key nothing here is used.
"""

import math
import re
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from utils.config import find_input
from utils.errors import UserError, quoted
from utils.input_files import read_json
from utils.judge.evaluation import Summaries
from utils.judge.metrics import label_ceiling, length_controlled_win_rate, reliability, win_rate
from utils.judge.rankings import confidence, gaps_of


class GoldJudge:
    """Scores summaries by the facts of their posts.

    Raises:
        UserError: when the file holds no rules, or an example's `facts` are not what the rules need.
    """

    def __init__(self, path: str, examples: list):
        self.rules = load_rules(path)
        refuse_missing_facts(self.rules, examples)

    def scores(self, examples, written: Summaries) -> list[float]:
        """The gold score of each summary."""
        judged = zip(written.texts, examples, written.ended, strict=True)
        return [gold_score(text, example.facts, self.rules, ended) for text, example, ended in judged]

    def compare(self, examples, written: dict[tuple[str, str], Summaries], seed: int) -> dict[str, float]:
        """Figures for summary.json: gold scores and win rates of PPO over SFT on the same posts (detail 37).

        Args:
            written: summaries by (before or after, sampled or greedy).
        """
        gold = {key: self.scores(examples, summaries) for key, summaries in written.items()}
        posts = [example.prompt for example in examples]
        rate, low, high = win_rate(gold["after", "sampled"], gold["before", "sampled"], posts, seed)
        lengths = [list(map(len, written[name, "sampled"].tokens)) for name in ("after", "before")]
        return {
            "gold_before": fmean(gold["before", "sampled"]),
            "gold_after": fmean(gold["after", "sampled"]),
            "gold_win_rate": rate,
            "gold_win_rate_low": low,
            "gold_win_rate_high": high,
            "gold_win_rate_greedy": win_rate(gold["after", "greedy"], gold["before", "greedy"], posts,
                                             seed)[0],
            "gold_win_rate_length_controlled": length_controlled_win_rate(
                gold["after", "sampled"], gold["before", "sampled"], *lengths),
        }


def table_rows(summary: dict):
    """Rows of the table at the end for one stage's summary: (measure, before, after, interval); none without
    gold.
    """
    if "label_ceiling" in summary:
        yield "  of the labels' ceiling", "", f"{summary['accuracy'] / summary['label_ceiling']:.0%}", ""
    if "gold_after" not in summary:
        return
    span = f"{summary['gold_win_rate_low']:.3f} - {summary['gold_win_rate_high']:.3f}"
    yield "gold score", f"{summary['gold_before']:.3f}", f"{summary['gold_after']:.3f}", ""
    yield "gold win rate over SFT, sampled", "", f"{summary['gold_win_rate']:.3f}", span
    at_equal_length = f"{summary['gold_win_rate_length_controlled']:.3f}"
    yield "  at equal length", "", at_equal_length, ""
    yield "gold win rate over SFT, greedy", "", f"{summary['gold_win_rate_greedy']:.3f}", ""


def labeller_figures(rows, scores: list[list[float]]) -> tuple[dict[str, float], dict[str, list]]:
    """What is known of rankings whose labeller is known: (figures for summary.json, reliability curves); else
    ({}, {}).

    `label_ceiling` is the accuracy that the labels' noise allows. The curve has the reward model's accuracy
    by the labeller's confidence (detail 20): on the diagonal the model reaches what that noise allows.

    Args:
        scores: the reward model's, of each completion.
    """
    if not all(group is not None for group in rows["label_scores"]):
        return {}, {}
    sure = confidence(gaps_of(rows["label_scores"], rows["pairs"])[0])
    _, right = gaps_of(scores, rows["pairs"])
    ceiling = label_ceiling(rows["label_scores"], rows["pairs"])
    return {"label_ceiling": ceiling}, {"labeller's confidence": reliability(sure, right)}


def load_rules(path: str) -> dict:
    """The rules of the gold score.

    Raises:
        UserError: when the file is not there or holds no rules that `gold_score` could work with.
    """
    file = find_input(path, "gold_rules")
    try:
        rules = load_gold(file)
        gold_score("", dict.fromkeys(rules["slots"], ""), rules)
        _refuse_odd_rules(rules)
    except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"gold_rules: '{file}' holds no rules of a gold score ({type(error).__name__}: "
                        f"{error}); make it "
                        "again with data/tldr_mini/generate.py, or leave gold_rules out") from None
    return rules


def _refuse_odd_rules(rules: dict) -> None:
    """Raise ValueError for what an empty summary never meets: numbers that are none, slots without values."""
    if not rules["slots"]:
        raise ValueError("there are no slots")
    for slot, spec in rules["slots"].items():
        if not isinstance(spec["values"], list) or not spec["values"]:
            raise ValueError(f"the values of slot '{slot}' are {quoted(spec['values'])}; a list of texts is "
                             "needed")
    found = {f"the weight of slot '{slot}'": spec["weight"] for slot, spec in rules["slots"].items()}
    found |= {f"the penalty '{name}'": value for name, value in rules["penalties"].items()}
    found["need_words"] = rules["need_words"]
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} is {quoted(value)}; a number is needed")


def refuse_missing_facts(rules: dict, examples: list) -> None:
    """Raise UserError when a held-out example's `facts` are not what the gold score needs: a text for each
    slot.
    """
    for example in examples:
        facts = example.facts if isinstance(example.facts, dict) else {}
        missing = [slot for slot in rules["slots"] if not isinstance(facts.get(slot), str)]
        if missing:
            raise UserError(f"gold_rules: a held-out row has no column 'facts' with a text "
                            f"for '{missing[0]}' ({example.prompt[:60]!r}...); leave gold_rules "
                            f"out for this data")


def load_gold(path: str | Path) -> dict:
    """Read `gold.json` and index its values by their first word, so that a summary is scanned once."""
    gold = read_json(Path(path))
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
