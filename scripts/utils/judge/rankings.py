"""What a reward model's scores of held-out rankings are worth: by pair, by confidence, by what is known of
each pair.
"""

from collections import defaultdict

import numpy as np

from utils.data.columns import NOTES
from utils.judge.metrics import pair_accuracy, reliability


def gaps_of(scores, pairs) -> tuple[np.ndarray, np.ndarray]:
    """Score of the better minus score of the worse completion of each pair, and whether that is right: (P,)
    both.
    """
    gaps = np.array([group[b] - group[w] for group, order in zip(scores, pairs, strict=True)
                     for b, w in order])
    return gaps, (gaps > 0) + 0.5 * (gaps == 0)


def confidence(gaps: np.ndarray) -> np.ndarray:
    """How sure a model is of an order whose scores are `gaps` apart, right or wrong: sigmoid(|gap|), 0.5 to
    1.
    """
    return 1 / (1 + np.exp(-np.abs(gaps)))


def reliability_by_confidence(scores, pairs) -> list[tuple[float, float, int]]:
    """Confidence against accuracy, in bins (detail 20). On the diagonal the model is calibrated."""
    gaps, right = gaps_of(scores, pairs)
    return reliability(confidence(gaps), right)


def accuracy_by_note(scores, rows, most=20) -> dict[str, list[tuple[str, float, int]]]:
    """For each of NOTES that the set has: (value, accuracy, pairs) of its most frequent values (detail 20).
    """
    _, right = gaps_of(scores, rows["pairs"])
    notes = [note for group, pairs in zip(rows["notes"], rows["pairs"], strict=True)
             for note in group or [{}] * len(pairs)]
    table = {}
    for column in NOTES:
        outcomes = defaultdict(list)
        for note, outcome in zip(notes, right, strict=True):
            if note.get(column) is not None:
                outcomes[note[column]].append(outcome)
        if outcomes:
            frequent = sorted(outcomes, key=lambda value: (-len(outcomes[value]), value))[:most]
            table[column] = [(value, float(np.mean(outcomes[value])), len(outcomes[value]))
                             for value in sorted(frequent)]
    return table


def longest_accuracy(rows) -> float:
    """The accuracy of "the longer one wins", which needs no model (detail 20)."""
    lengths = [[len(completion) for completion in group] for group in rows["completions"]]
    correct, count = pair_accuracy(lengths, rows["pairs"])
    return float(correct.sum() / count.sum())
