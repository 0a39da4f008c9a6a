"""Which rows are in which step: every row once a pass, and a function of the seed and the step alone."""

from collections import Counter
from random import Random
from types import SimpleNamespace

import datasets
import numpy as np
import pytest

from utils.data import batches
from utils.data.batches import LengthGroupedBatches, PromptBatches, rows_at
from utils.loop import Loop

_DRAW = Random(0)
LENGTHS = [_DRAW.randint(10, 500) for _ in range(1003)]


def a_pass(grouped, epoch=0):
    first = epoch * grouped.steps_per_epoch
    return [grouped[step].tolist() for step in range(first, first + grouped.steps_per_epoch)]


@pytest.mark.parametrize("size", [1, 8, 64, 1003, 2000])
def test_every_row_comes_once_a_pass_in_steps_of_one_size(size):
    grouped = LengthGroupedBatches(LENGTHS, size, seed=0)
    for epoch in (0, 1):
        steps = a_pass(grouped, epoch)
        assert sorted(row for step in steps for row in step) == list(range(1003))
        rest = [1003 % size] if 1003 % size else []
        assert Counter(map(len, steps)) == Counter([size] * (1003 // size) + rest)
    assert grouped.steps_per_epoch == -(-1003 // size)


def test_rows_of_like_length_are_together():
    """Rows are padded to the longest of a step: 1.6 times the tokens with random rows, 1.06 with these."""
    def padded(steps):
        return sum(len(step) * max(LENGTHS[row] for row in step) for step in steps) / sum(LENGTHS)

    shuffled = Random(1).sample(range(1003), 1003)
    assert padded([shuffled[first : first + 8] for first in range(0, 1003, 8)]) > 1.6
    assert padded(a_pass(LengthGroupedBatches(LENGTHS, 8, seed=0))) < 1.06


def test_rows_meet_others_in_each_pass_and_with_each_seed():
    """Sorting is within the rows of 50 steps, which are drawn anew: no two rows stay together for good."""
    grouped = LengthGroupedBatches(LENGTHS, 8, seed=0)
    passes = [a_pass(grouped, epoch) for epoch in (0, 1)] + [a_pass(LengthGroupedBatches(LENGTHS, 8, seed=1))]
    together = [{frozenset(step) for step in steps} for steps in passes]
    assert len(together[0] & together[1]) < 5 and len(together[0] & together[2]) < 5


def test_the_order_of_steps_says_nothing_of_their_length():
    """Else a run would train on short rows last, at the smallest learning rate."""
    grouped = LengthGroupedBatches(LENGTHS, 8, seed=0)
    means = [np.mean([LENGTHS[row] for row in step]) for epoch in range(4) for step in a_pass(grouped, epoch)]
    # 504 steps: the standard error of a correlation is .045
    assert abs(np.corrcoef(means, np.arange(len(means)) % grouped.steps_per_epoch)[0, 1]) < 0.15
    tokens = [[sum(LENGTHS[row] for row in step) for step in a_pass(grouped, epoch)] for epoch in range(4)]
    longest = [int(np.argmax(of_steps)) for of_steps in tokens]
    assert len(set(longest)) > 1


def test_the_rows_are_sorted_within_those_of_fifty_steps(monkeypatch):
    """When one step is sorted at a time, no two rows are brought together: a plain shuffle is left."""
    monkeypatch.setattr(batches, "_STEPS_SORTED", 1)
    drawn = [set(step) for step in a_pass(LengthGroupedBatches(LENGTHS, 8, seed=0))]
    order = Random("0-0").sample(range(1003), 1003)
    plain = [set(order[first : first + 8]) for first in range(0, 1003, 8)]
    assert sorted(map(sorted, drawn)) == sorted(map(sorted, plain))


MADE = {"length-grouped": lambda seed: LengthGroupedBatches(LENGTHS, 8, seed),
        "prompts": lambda seed: PromptBatches(1003, 8, seed)}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_step_is_a_function_of_seed_and_number_alone(make):
    """A run that goes on at step 200 finds the rows it would have had, in whatever order."""
    steps = [list(make(3)[step]) for step in range(300)]
    backwards, ours = make(3), {}
    for step in reversed(range(300)):
        ours[step] = list(backwards[step])
    in_order = make(3)
    assert [ours[step] for step in range(300)] == steps == [list(in_order[step]) for step in range(300)]
    assert steps != [list(make(4)[step]) for step in range(300)]


def test_the_same_rows_for_any_number_of_processes():
    """The ranks share the rows of a step, each row on one of them; also of the last step, which has fewer."""
    grouped = LengthGroupedBatches(LENGTHS, 8, seed=0)
    for step in (0, grouped.steps_per_epoch - 1, *(n for n in range(126) if len(grouped[n]) < 8)):
        shares = []
        for ranks in (1, 2, 3, 8):
            loops = [SimpleNamespace(accelerator=SimpleNamespace(process_index=rank, num_processes=ranks))
                     for rank in range(ranks)]
            shares.append([Loop.share(loop, grouped[step]).tolist() for loop in loops])
        assert all(sorted(sum(share, [])) == sorted(grouped[step].tolist()) for share in shares)
        assert all(max(map(len, share)) - min(map(len, share)) <= 1 for share in shares)


def test_prompts_come_once_a_pass_also_where_an_update_reaches_into_the_next():
    taken = [row for update in range(10) for row in PromptBatches(25, 10, seed=0)[update]]
    assert len(taken) == 100 and all(sorted(taken[n : n + 25]) == list(range(25)) for n in range(0, 100, 25))
    assert len({tuple(taken[n : n + 25]) for n in range(0, 100, 25)}) == 4  # another order in each
    assert [len(PromptBatches(25, 10, seed=0)[update]) for update in range(4)] == [10] * 4


def test_an_update_may_take_more_prompts_than_there_are():
    [update] = [PromptBatches(3, 8, seed=0)[0]]
    assert sorted(update[:3]) == sorted(update[3:6]) == [0, 1, 2] and set(update[6:]) < {0, 1, 2}


def test_rows_are_read_in_the_order_asked_for():
    table = datasets.Dataset.from_dict({"prompt": [[n] for n in range(9)], "length": list(range(9))})
    assert rows_at(table, np.array([7, 2, 7])) == [{"prompt": [n], "length": n} for n in (7, 2, 7)]
    assert rows_at(table, np.array([], dtype=int)) == []
