"""Answers to other prompts as worse ones: a reward model of few rankings learns that answers must fit."""

import random

from utils.config import UserError
from utils.data.batches import rows_at


class OtherAnswers:
    """Adds answers of other rows to rankings, each worse than all answers of the row itself.

    In a few rankings nearly all answers fit their prompt, so nothing in them says that they must. A policy
    that is trained on such a reward model soon writes what is liked everywhere. An added answer is the best
    one of a row with another prompt; in each step other ones are drawn.

    Args:
        rankings: a table with `prompt`, `completions` and `pairs`.
        count: answers that are added to a row.

    Raises:
        UserError: when there are fewer than `count` other prompts.
    """

    def __init__(self, rankings, count: int, seed: int):
        self.rankings, self.count, self.seed = rankings, count, seed
        self.posts = [hash(tuple(prompt)) for prompt in rankings["prompt"]]
        if (known := len(set(self.posts))) <= count:
            raise UserError(f"other_answers: {count} answers of other prompts are wanted, and the training "
                            f"data has {known} prompts; take at most {known - 1}")

    def __call__(self, rows: list[dict], places, step: int) -> list[dict]:
        """The rows that stand at these places, with what is added at this step; they are not changed."""
        drawn = [self._draw(int(place), step) for place in places]
        others = iter(rows_at(self.rankings, [other for some in drawn for other in some]))
        return [self._wider(row, [_best(next(others)) for _ in some])
                for row, some in zip(rows, drawn, strict=True)]

    def _draw(self, place: int, step: int) -> list[int]:
        """Rows of as many other prompts, all different."""
        draw, taken = random.Random(f"{self.seed}-{step}-{place}"), {self.posts[place]: place}
        while len(taken) <= self.count:
            other = draw.randrange(len(self.posts))
            taken.setdefault(self.posts[other], other)
        return list(taken.values())[1:]

    @staticmethod
    def _wider(row: dict, answers: list[list[int]]) -> dict:
        own = len(row["completions"])
        # the same text may be an answer to two prompts; it is not worse than itself
        answers = [answer for answer in answers if answer not in row["completions"]]
        pairs = [[better, own + number] for number in range(len(answers)) for better in range(own)]
        margins = None if row["margins"] is None else row["margins"] + [0.0] * len(pairs)
        return row | {"completions": row["completions"] + answers, "pairs": row["pairs"] + pairs,
                      "margins": margins, "length": row["length"] + sum(map(len, answers))}


def _best(row: dict) -> list[int]:
    """The answer that wins most pairs beyond those that it loses: raters who contradict each other leave none
    that always wins.
    """
    balance = [0] * len(row["completions"])
    for better, worse in row["pairs"]:
        balance[better] += 1
        balance[worse] -= 1
    return row["completions"][balance.index(max(balance))]
