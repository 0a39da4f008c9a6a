"""Rewards that are known to be true: is a list of names the list of the prompt in alphabetical order?

The functions that configs/verifiable/ppo.yaml names; utils/rewards/python.py says how they are called. The
column `names` of a row holds the names as the prompt has them.
"""


def right(completions: list[str], names: list[list[str]]) -> list[float]:
    """1 for an answer that is right as a whole, else 0."""
    return [float(answer.split() == sorted(given)) for answer, given in zip(completions, names, strict=True)]


def in_place(completions: list[str], names: list[list[str]]) -> list[float]:
    """The share of the names that stand where they belong; a name too many costs as much as a missing one."""
    return [_share(answer.split(), sorted(given)) for answer, given in zip(completions, names, strict=True)]


def _share(answer: list[str], order: list[str]) -> float:
    hits = sum(one == other for one, other in zip(answer, order, strict=False))
    return hits / max(len(answer), len(order))
