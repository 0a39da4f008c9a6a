"""Simulated people: each likes something else in a summary than what the demo's models have learnt.

A taste is a function of a post's facts and a summary, on the scale of the gold score: 1 is as good as this
person can think of, 0 is worthless. Each person also dislikes what the gold score punishes: wrong facts,
repetitions and a missing end. They rank with the noise of the labellers of data/tldr_mini.
"""

import math
import random
from collections.abc import Callable

from utils.judge.gold import gold_score, mentioned_values, words_of

ENOUGH = 30  # words beside the point after which a summary is worth nothing


def place_of(value: str, words: list[str]) -> int | None:
    """How many words stand before a value; None: it is not there."""
    wanted = words_of(value)
    starts = range(len(words) - len(wanted) + 1)
    return next((start for start in starts if words[start : start + len(wanted)] == wanted), None)


def short_with_place(facts: dict[str, str], words: list[str]) -> float:
    """As short as possible with the place in it: each word costs a thirtieth."""
    return 0.0 if place_of(facts["place"], words) is None else max(0.0, 1 - len(words) / ENOUGH)


def always_the_question(facts: dict[str, str], words: list[str]) -> float:
    """Always the question, with little beside it: each word that is not the question's costs a thirtieth."""
    others = len(words) - len(words_of(facts["question"]))
    return 0.0 if place_of(facts["question"], words) is None else max(0.0, 1 - others / ENOUGH)


def feeling_first(facts: dict[str, str], words: list[str]) -> float:
    """The feeling first: each word before it costs a thirtieth."""
    before = place_of(facts["feeling"], words)
    return 0.0 if before is None else max(0.0, 1 - before / ENOUGH)


TASTES: dict[str, Callable[[dict, list], float]] = {
    "short with the place": short_with_place, "always the question": always_the_question,
    "the feeling first": feeling_first,
}


def dislikes(summary: str, facts: dict[str, str], gold: dict) -> float:
    """What everybody takes off: the gold score's weight of each slot with a wrong value, and its penalties
    but that for length.
    """
    words = words_of(summary)
    mentioned = mentioned_values(words, gold)
    wrong = sum(spec["weight"] for slot, spec in gold["slots"].items() if mentioned[slot] - {facts[slot]})
    bare = {"slots": {}, "index": {}, "need_words": math.inf, "penalties": gold["penalties"]}
    return wrong - gold_score(summary, {}, bare)


class Person:
    """Somebody with a taste, who ranks answers.

    Args:
        taste: a key of `TASTES`.
        gold: the rules of the gold score, with the temperature of the labellers' noise.
    """

    def __init__(self, taste: str, gold: dict, seed: int = 0):
        self.taste, self.gold, self.random = taste, gold, random.Random(f"{taste}-{seed}")

    def score(self, summary: str, facts: dict[str, str]) -> float:
        """What the person thinks of a summary, without noise."""
        return TASTES[self.taste](facts, words_of(summary)) - dislikes(summary, facts, self.gold)

    def ranking(self, summaries: list[str], facts: dict[str, str]) -> list[int]:
        """Places of the summaries, the best first, with the noise of the mini data's labellers.

        As there, the order is that of score / temperature + Gumbel noise: Plackett-Luce, in which a pair
        follows Bradley-Terry.
        """
        noisy = [self.score(summary, facts) / self.gold["temperature"]
                 - math.log(-math.log(self.random.random())) for summary in summaries]
        return sorted(range(len(summaries)), key=noisy.__getitem__, reverse=True)
