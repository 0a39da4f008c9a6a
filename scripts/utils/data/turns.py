"""Every answer of a conversation in one prompt group, for the loss on all of them (`loss_on: turns`).

A turn is the prompt that an answer is given to, and the answer with the token that ends it, both as token
ids: what the model sees when it is asked. As a rule the ids of a turn are the first ids of the next one. Then
both are one sequence, and each token is computed once.
"""

import os
from dataclasses import dataclass
from typing import NamedTuple

from utils.config import UserError

NO_LOSS = -100  # the label of a token that no loss is taken on


class TurnGroup(NamedTuple):
    """A prompt group and what is learnt of it."""

    prompt: list[int]
    completions: list[list[int]]
    # of each token of a completion: the id that is learnt in its place, or NO_LOSS
    labels: list[list[int]]


@dataclass
class _Sequence:
    tokens: list[int]
    labels: list[int]
    first: int  # place of the first label


def turn_group(turns: list[tuple[list[int], list[int]]]) -> TurnGroup:
    """The group in which each turn has the log-probabilities that it has in a row of its own.

    Args:
        turns: (prompt, answer) of each answer that is learnt, in the conversation's order.

    Raises:
        UserError: when two turns have not even their first token in common.
    """
    sequences: list[_Sequence] = []
    for prompt, answer in reversed(turns):
        tokens, end = prompt + answer, len(prompt) + len(answer)
        # the last token of an answer is a label only, as nothing of the turn is predicted from it: the plain
        # layout goes on without an end token
        home = next((sequence for sequence in sequences
                     if end <= sequence.first and sequence.tokens[: end - 1] == tokens[:-1]), None)
        if home is None:
            home = _Sequence(tokens, [NO_LOSS] * end, end)
            sequences.append(home)
        home.labels[len(prompt) : end] = answer
        home.first = len(prompt)
    shared = len(os.path.commonprefix([sequence.tokens for sequence in sequences]))
    shared = min(shared, *(sequence.first for sequence in sequences))
    if not shared:
        raise UserError("chat_template: a conversation begins otherwise once it goes on, so its answers "
                        "cannot be learnt together; give another chat_template, or take loss_on: completion")
    return TurnGroup(sequences[0].tokens[:shared], [sequence.tokens[shared:] for sequence in sequences],
                     [sequence.labels[shared:] for sequence in sequences])
