"""The reward stage's own functions: its loss with margin and centring, and who is how sure of an order."""

import math

import pytest
import torch
from families import PAD, random_groups, scalar_model
from test_models import each_row, stock_scores

import train_reward
from utils.prompt_groups import pack

PROMPTS, COMPLETIONS = random_groups([4, 6], [[3, 1, 5], [2, 4]])
PAIRS = [(0, 1), (2, 0), (2, 1), (4, 3)]  # (better, worse) of the five completions


@pytest.mark.parametrize(("margin", "centring_coef"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.01), (0.7, 0.3)])
def test_the_loss_by_its_definition(margin, centring_coef):
    """In float64 from the stock model's scores of plain rows, a pair at a time."""
    model = scalar_model("opt")
    better, worse = torch.tensor(PAIRS).T
    found = train_reward.pairwise_loss_sum(model, pack(PROMPTS, COMPLETIONS, PAD), better, worse, margin, centring_coef)
    score = stock_scores(model, [p + c for p, c in each_row(PROMPTS, COMPLETIONS)]).double().tolist()
    expected = sum(-math.log(1 / (1 + math.exp(-(score[b] - score[w] - margin)))) + centring_coef * (score[b] + score[w]) ** 2
                   for b, w in PAIRS)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_the_trainer_takes_margin_and_centring_from_the_configuration(monkeypatch):
    taken = {}
    monkeypatch.setattr(train_reward, "GroupLossMixin", object)
    monkeypatch.setattr("utils.trainer.GroupLossMixin.__init__", lambda self, *_, loss_sum, **__: taken.update(loss_sum.keywords))
    config = train_reward.RewardStageConfig(margin=0.5, centring_coef=0.25)
    train_reward.RewardStageTrainer(config=config, validation=None)
    assert taken == {"margin": 0.5, "centring_coef": 0.25}


SCORES = [[2.0, 0.0, 0.0], [0.0, 3.0]]
ROWS = {"pairs": [[(0, 1), (1, 2)], [(0, 1)]], "label_scores": [[0.0, 0.0, 0.5], [2.0, 0.0]]}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_confidence_against_accuracy_by_hand():
    """Gaps 2 (right), 0 (a tie, one half), -3 (wrong); the labeller's 0, .5 and 2: his second and third bin."""
    curves = train_reward.reliabilities(SCORES, ROWS)
    assert curves["reward model's confidence"] == [(0.5, 0.5, 1), (pytest.approx(sigmoid(2)), 1.0, 1),
                                                   (pytest.approx(sigmoid(3)), 0.0, 1)]
    assert curves["labeller's confidence"] == [(0.5, 1.0, 1), (pytest.approx(sigmoid(0.5)), 0.5, 1),
                                               (pytest.approx(sigmoid(2)), 0.0, 1)]


def test_accuracy_by_what_the_set_says_of_each_pair():
    rows = {**ROWS, "notes": [[{"batch": "1", "worker": None}, {"batch": "2", "worker": "x"}], None]}
    assert train_reward.accuracy_by_note(SCORES, rows) == {"batch": [("1", 1.0, 1), ("2", 0.5, 1)], "worker": [("x", 0.5, 1)]}
    assert train_reward.accuracy_by_note(SCORES, {**ROWS, "notes": [None, None]}) == {}


def test_an_unknown_labeller_has_no_curve():
    assert list(train_reward.reliabilities(SCORES, {**ROWS, "label_scores": [None, [2.0, 0.0]]})) == ["reward model's confidence"]
