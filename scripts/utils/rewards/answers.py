"""Answers as text, for rewards that read no token ids of the policy."""

from collections.abc import Sequence
from typing import NamedTuple

from utils.data.layouts import Example
from utils.data.rows import Rows


class Answers(NamedTuple):
    """Answers with what is known of their rows. Each list has one item for each answer, N in all.

    The K answers to a prompt stand one after the other.
    """

    prompts: list[str]  # as people read them
    completions: list[str]  # without special tokens, and without white space around
    references: list[str | None]  # completions of the rows; None: there is none
    tokens: list[list[int]]  # of the answers, with EOS where there is one
    ended: list[bool]
    columns: list[dict]  # the other columns of the row
    messages: list[list[dict] | None]  # of a conversation whose next turn is the answer; None: plain text
    places: list[str]  # where the row stands, `file:line`

    def take(self, numbers: Sequence[int]) -> "Answers":
        """Some of the answers, by number."""
        return Answers(*([values[n] for n in numbers] for values in self))

    def joined(self, *others: "Answers") -> "Answers":
        """These answers, and then others."""
        return Answers(*(sum(lists, []) for lists in zip(self, *others, strict=True)))


def answers_of(rows: Sequence[Example], tokens: list[list[int]], ended: Sequence[bool],
               tokenizer) -> Answers:
    """Answers to the prompts of some rows, as many to each.

    Args:
        rows: one for each prompt.
        tokens: of the answers, the K to a prompt one after the other.
    """
    k = len(tokens) // max(len(rows), 1)
    examples = [rows[i] for i in range(len(rows))]
    stored = isinstance(rows, Rows)
    messages = [rows.messages(i) if stored else None for i in range(len(rows))]
    places = [rows.place(i) if stored else f"row {i + 1}" for i in range(len(rows))]

    def each(values) -> list:
        return [value for value in values for _ in range(k)]

    return Answers(
        each(example.prompt for example in examples),
        [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)],
        each(example.completion and example.completion.strip() for example in examples),
        tokens, list(map(bool, ended)),
        each(_columns(example) for example in examples), each(messages), each(places),
    )


def _columns(example: Example) -> dict:
    """The columns of a row besides prompt and completion."""
    return (example.columns or {}) | ({} if example.facts is None else {"facts": example.facts})
