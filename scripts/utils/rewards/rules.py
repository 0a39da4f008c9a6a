"""Rewards that are a rule: length, repetition, form, likeness to the reference, a missing end."""

import regex

from utils.config import UserError
from utils.errors import quoted
from utils.judge.metrics import rouge_of_each
from utils.rewards.answers import Answers
from utils.rewards.entries import (
    Entry,
    FormatEntry,
    LengthLimitEntry,
    LengthPriceEntry,
    LengthTargetEntry,
    MissingEosEntry,
    RepetitionEntry,
    RougeEntry,
)

_SECONDS = 1.0  # that one answer may take to match


class RuleReward:
    """One of the rules below as a reward."""

    reads_text = True

    def __init__(self, entry: Entry, where: str):
        self.entry, self.where, self.rule = entry, where, _RULES[type(entry)]

    def of_answers(self, answers: Answers) -> list[float | None]:
        """The rule's scores of some answers."""
        try:
            return self.rule(answers, self.entry)
        except UserError as error:
            raise UserError(f"{self.where}: {error}") from None


def _target(answers, entry):
    return [-abs(len(tokens) - entry.length_target) / entry.length_target for tokens in answers.tokens]


def _limit(answers, entry):
    return [-max(0, len(tokens) - entry.length_limit) / entry.length_limit for tokens in answers.tokens]


def _price(answers, entry):
    return [-entry.length_price * len(tokens) for tokens in answers.tokens]


def _repetition(answers, entry):
    return [-repeated_share(text.split(), entry.repetition) for text in answers.completions]


def repeated_share(words: list[str], n: int) -> float:
    """The share of the n-grams that stood before; 0 when there is none."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _format(answers, entry):
    pattern, scores = regex.compile(entry.format), []
    for text, place in zip(answers.completions, answers.places, strict=True):
        try:
            scores.append(float(pattern.fullmatch(text, timeout=_SECONDS) is not None))
        except TimeoutError:
            raise UserError(f"{quoted(entry.format)} takes more than {_SECONDS:g} s to match an answer to "
                            f"{place}; write it without nested repetitions") from None
    return scores


def _rouge(answers, entry):
    name = "rouge_avg" if entry.rouge == "mean" else entry.rouge
    return [None if reference is None
            else rouge_of_each([text], [reference])[0][name]
            for text, reference in zip(answers.completions, answers.references, strict=True)]


def _missing_eos(answers, entry):
    return [0.0 if ended else entry.missing_eos for ended in answers.ended]


_RULES = {LengthTargetEntry: _target, LengthLimitEntry: _limit, LengthPriceEntry: _price,
          RepetitionEntry: _repetition, FormatEntry: _format, RougeEntry: _rouge,
          MissingEosEntry: _missing_eos}
