"""Answers of other prompts in the reward stage: which are taken, and that each is worse than a row's own."""

import math
from collections import Counter

import pytest
import torch
from datasets import Dataset

import train_reward
from families import scalar_model
from loops import epoch_loop
from utils.config import UserError
from utils.data.other_answers import OtherAnswers
from utils.models.loading import without_dropout

# two rows of the first prompt; the best answers are [3], [5], [8, 8] and [10]
ROWS = [{"prompt": [1, 2], "completions": [[4], [3]], "pairs": [[1, 0]], "margins": [0.5], "length": 4},
        {"prompt": [1, 2], "completions": [[5], [6]], "pairs": [[0, 1]], "margins": None, "length": 4},
        {"prompt": [7], "completions": [[9], [8, 8], [3]], "pairs": [[1, 0], [0, 2], [1, 2]],
         "margins": [1.0, 1.0, 2.0], "length": 5},
        {"prompt": [6], "completions": [[10], [11], [12]], "pairs": [[0, 2], [1, 2]], "margins": None,
         "length": 4}]
BEST = {0: [3], 1: [5], 2: [8, 8], 3: [10]}


@pytest.fixture
def table():
    return Dataset.from_list(ROWS)


def test_added_answers_are_the_best_of_other_prompts_and_worse_than_all(table):
    others, met = OtherAnswers(table, 2, seed=0), Counter()
    for step in range(60):
        for place, row in enumerate(others(ROWS, range(4), step)):
            before = ROWS[place]
            own = len(before["completions"])
            added = row["completions"][own:]
            assert row["completions"][:own] == before["completions"]
            # the third row has [3] itself, which is the best answer of the first row, too
            assert len(added) == 2 or (place == 2 and len(added) == 1)
            origins = [next(other for other, best in BEST.items() if best == answer) for answer in added]
            prompts = [tuple(ROWS[other]["prompt"]) for other in origins]
            assert len({*prompts, tuple(before["prompt"])}) == len(prompts) + 1
            met.update((place, other) for other in origins)
            new = [[better, own + number] for number in range(len(added)) for better in range(own)]
            assert sorted(row["pairs"]) == sorted(before["pairs"] + new)
            assert row["length"] == len(row["prompt"]) + sum(map(len, row["completions"]))
            assert row["margins"] == (before["margins"] and before["margins"] + [0.0] * len(new))
    assert set(met) == {(a, b) for a in range(4) for b in range(4)
                        if ROWS[a]["prompt"] != ROWS[b]["prompt"]} - {(2, 0)}
    assert ROWS[0]["completions"] == [[4], [3]]  # a row is not changed in its place


def test_a_draw_is_a_function_of_seed_step_and_row_alone(table):
    """Whatever other rows this process has in the step, and wherever a run was stopped."""
    others = OtherAnswers(table, 1, seed=0)
    whole = others(ROWS, range(4), 3)
    assert OtherAnswers(table, 1, seed=0)([ROWS[2]], [2], 3) == [whole[2]]
    assert [others(ROWS, range(4), step) for step in range(20)] != [whole] * 20
    assert others([], [], 3) == []


def test_the_loss_with_an_added_answer_by_hand(tmp_path, monkeypatch):
    """With two prompts each gets the best answer of the other one."""
    monkeypatch.setattr(train_reward, "evaluate", lambda *_: None)
    config = train_reward.RewardStageConfig(output_dir=str(tmp_path), other_answers=1, logging_steps=1,
                                            per_device_batch_size=2, gradient_accumulation_steps=1)
    loop = epoch_loop(config, without_dropout(scalar_model("opt")), 2)
    rows, losses, oracle = ROWS[1:3], [], scalar_model("opt")
    for row, added in zip(rows, ([8, 8], [5]), strict=True):
        answers = [*row["completions"], added]
        score = [oracle(input_ids=torch.tensor([row["prompt"] + answer])).logits.item() for answer in answers]
        pairs = [*row["pairs"], *([own, len(answers) - 1] for own in range(len(answers) - 1))]
        losses += [math.log1p(math.exp(score[worse] - score[better])) for better, worse in pairs]
    train_reward.train(loop, Dataset.from_list(rows), None)
    [logged] = [row["reward/loss"] for row in loop.run.read_metrics() if "reward/loss" in row]
    assert len(losses) == 9 and logged == pytest.approx(sum(losses) / 9, rel=1e-5)



def test_raters_who_contradict_each_other_leave_a_best_answer_too():
    """Of one prompt each answer loses a pair; [8] wins two."""
    torn = {"prompt": [1], "completions": [[7], [8], [9]], "margins": None, "length": 4,
            "pairs": [[0, 1], [1, 0], [1, 2], [1, 2], [2, 1]]}
    other = {"prompt": [2], "completions": [[5], [6]], "margins": None, "length": 3,
             "pairs": [[0, 1], [1, 0]]}
    rows = OtherAnswers(Dataset.from_list([torn, other]), 1, seed=0)([torn, other], [0, 1], 0)
    assert [row["completions"][-1] for row in rows] == [[5], [8]]


def test_too_few_prompts_are_said(table):
    with pytest.raises(UserError, match="^other_answers: 3 answers .* has 3 prompts; take at most 2$"):
        OtherAnswers(table, 3, seed=0)
