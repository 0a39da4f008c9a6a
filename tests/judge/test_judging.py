"""Judging summaries: each measure against an independent way to get it, and no pass of a model that nobody
asked for.
"""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from families import EOS, PAD, policy, random_groups, scalar_model
from utils.data.rows import Tokenised
from utils.judge import evaluation
from utils.judge.evaluation import Summaries
from utils.judge.held_out import evaluate, length_figures
from utils.judge.judging import Judge
from utils.models.policy_value import Models, PolicyAndValue
from utils.rewards.entries import ModelEntry
from utils.rewards.model import ModelReward
from utils.rewards.rewards import Rewards, Scores

PROMPTS = random_groups([5, 1, 8, 3, 6], [[1]] * 5)[0]
POSTS = Tokenised([SimpleNamespace(prompt="p", completion=" w3 w4.", facts=None) for _ in PROMPTS], PROMPTS,
                  None)
CONFIG = SimpleNamespace(max_new_tokens=6, eval_batch_size=2, temperature=0.7, eval_temperature=0.01, seed=0,
                         missing_eos_score=-1.0, kl_budget=20.0, guard=None)


class Tokenizer:
    """Tokens as words."""

    eos_token_id, pad_token_id = EOS, PAD

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(f"w{token}" for token in row if token > EOS) for row in rows]


def judge():
    rewards = Rewards([ModelReward(ModelEntry(name="model"), None, scalar_model("opt"))])
    return Judge(policy("opt", 1), rewards, Tokenizer(), CONFIG)


def stock_logprob(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / CONFIG.temperature).log_softmax(-1)[torch.arange(len(response)), response].sum().item()


@torch.no_grad()
def test_kl_is_the_difference_of_two_stock_forward_passes():
    ours, trained = judge(), policy("opt", 2)
    found = ours.summaries(trained, POSTS, CONFIG.temperature, "")
    expected = [stock_logprob(trained, p, r) - stock_logprob(ours.ref_policy, p, r)
                for p, r in zip(PROMPTS, found.tokens, strict=True)]
    assert ours.kls(POSTS, found, "") == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, expected)) > 0.1


@torch.no_grad()
def test_each_policys_summaries_are_scored_and_one_without_eos_gets_the_fixed_score():
    ours = judge()
    found = [ours.summaries(policy("opt", seed), POSTS, 2.0, "") for seed in (2, 3)]
    assert found[0].tokens != found[1].tokens
    for summaries, scores in zip(found, ours.scores(POSTS, found, ""), strict=True):
        for prompt, response, ended, score in zip(PROMPTS, summaries.tokens, summaries.ended, scores.total,
                                                  strict=True):
            stock = ours.rewards.models[0](input_ids=torch.tensor([prompt + response])).logits.item()
            assert score == pytest.approx(stock if ended else -1.0, abs=1e-4)
    assert any(not ended for summaries in found for ended in summaries.ended)


def evaluated(trained, judge, gold=None):
    """What an evaluation of PPO logs, and what it offers as the best policy."""
    figures, offered = {}, []
    run = SimpleNamespace(metrics=lambda step, values: figures.update(values), log=lambda line: None,
                          samples=lambda *_: None)
    best = SimpleNamespace(offer=lambda step, score, weights, kl: offered.append((step, score, kl)))
    accelerator = SimpleNamespace(autocast=nullcontext)
    loop = SimpleNamespace(config=CONFIG, run=run, best=best, accelerator=accelerator, carried={})
    models = Models(PolicyAndValue(trained, None), None, None)
    evaluate(loop, models, POSTS, judge, gold, 3)
    return figures, offered


def test_an_evaluation_samples_twice_and_asks_each_judge_once(monkeypatch):
    """Greedy and sampled summaries; the scores of both in one pass, the KL of the sampled ones."""
    ours, trained, asked = judge(), policy("opt", 2), []
    for model, name in ((ours.ref_policy, "reference"), (ours.rewards.models[0], "reward")):
        model.base_model.register_forward_hook(lambda *_, name=name: asked.append(name))
    drawn, sample = [], evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda *a, **k: (drawn.append(k["temperature"]),
                                                               sample(*a, **k))[1])
    figures, offered = evaluated(trained, ours)
    assert drawn == [0.01, 0.7]
    assert asked.count("reference") == asked.count("reward") == 3, "five rows in batches of two"
    assert list(figures) == ["eval/tokens", "eval/ended", "eval/score", "eval/score_sampled", "eval/kl",
                             "eval/rouge_avg"]
    assert offered == [(3, figures["eval/score"], figures["eval/kl"])]


def test_the_score_at_equal_length_by_hand():
    """Posts of which both summaries ended: the gains are 1, 2 and 3 for 0, 2 and 4 tokens more, so a token
    pays 1/2. All four posts together: 2 tokens more, of which the gain of 1 in the mean is what they pay.
    """
    before = Summaries([[5] * n for n in (3, 4, 5, 4)], [], [True] * 4, [])
    after = Summaries([[5] * n for n in (3, 6, 9, 6)], [], [True, True, True, False], [])
    scored = (Scores([0.0, 1.0, 2.0, 3.0], {"own": [0.0, 0.0, math.nan, 0.0]}),
              Scores([1.0, 3.0, 5.0, 1.0], {"own": [1.0, 2.0, 7.0, 5.0]}))
    assert length_figures(*scored, before, after) == pytest.approx({
        "score_slope": 0.5, "score_after_length_controlled": 2.5 - 2 * 0.5, "own_slope": 0.5})


class Recorded:
    """A judge whose every measure says of which summaries it was taken: 0.01 greedy, 0.7 sampled."""

    def __init__(self, kl=10.0):
        self.kl = kl

    def summaries(self, policy, posts, temperature, title):
        return SimpleNamespace(tokens=[[0]], ended=[True], texts=[""], temperature=temperature)

    def kls(self, posts, found, title):
        return [self.kl * found.temperature]

    def scores(self, posts, found, title):
        return [Scores([summaries.temperature], {}) for summaries in found]

    def opinions(self, posts, greedy, sampled):
        return [], {}

    def rouge(self, posts, found):
        return found.temperature


class RecordedGold:
    def scores(self, examples, found):
        return [found.temperature]


def test_an_evaluations_kl_and_score_are_of_the_right_summaries():
    """The KL of sampled summaries (greedy ones are no sample of the policy), the score of greedy ones."""
    figures, offered = evaluated(policy("opt"), Recorded(), RecordedGold())
    assert {name: figures[f"eval/{name}"] for name in ("kl", "score", "score_sampled", "gold", "gold_sampled",
                                                       "rouge_avg")} == {
        "kl": 7.0, "score": 0.01, "score_sampled": 0.7, "gold": 0.01, "gold_sampled": 0.7, "rouge_avg": 0.01}
    assert offered == [(3, 0.01, 7.0)]


@pytest.mark.parametrize(("kl", "kept"), [(20 / 0.7 - 0.1, True), (20 / 0.7 + 0.1, False), (math.nan, False)])
def test_a_policy_beyond_the_kl_budget_is_never_chosen(kl, kept):
    """Detail 33. The budget is 20."""
    assert bool(evaluated(policy("opt"), Recorded(kl))[1]) == kept
