"""The guard: what it compares, against stock forward passes, and what it keeps of hand-made curves."""

import math
import statistics
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_judging import CONFIG, POSTS, PROMPTS, Recorded, Tokenizer

from families import policy, scalar_model
from utils.judge.guard import gain
from utils.judge.held_out import evaluate
from utils.judge.judging import Judge
from utils.models.heads import Heads
from utils.models.policy_value import Models, PolicyAndValue
from utils.rewards.entries import ModelEntry
from utils.rewards.length import LengthFit
from utils.rewards.model import ModelReward
from utils.rewards.rewards import Rewards, Scores


def test_the_gain_is_the_smallest_of_all_judges_in_standard_errors():
    new, kept = [[1.0, 2.0, 4.0], [5.0, 1.0, 0.0]], [[0.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    # differences (1, 2, 4) and (4, 1, -1), each mean by its sample deviation over the root of 3
    expected = [statistics.mean(d) / (statistics.stdev(d) / math.sqrt(3)) for d in ([1, 2, 4], [4, 1, -1])]
    assert gain(new, kept) == pytest.approx(min(expected))
    assert gain(new[:1], kept[:1]) == pytest.approx(expected[0])
    assert gain(kept, kept) == 0.0
    assert gain([[1.0, 1.0]], [[0.0, 0.0]]) == math.inf and gain([[0.0, 0.0]], [[1.0, 1.0]]) == -math.inf
    assert not gain([[math.nan, 1.0]], [[0.0, 0.0]]) > 0


def kept_of(curves, guard, kl=1.0):
    """The updates that are offered while each judge's mean score goes along its curve (evaluations,).

    The scores of a judge's four posts are the mean with -.1, -.1, .1, .1, turned by a place at each
    evaluation. So the mean difference of two evaluations has a standard error of .082
    one or three apart, .115 two apart.
    """
    offered = []
    config = SimpleNamespace(**vars(CONFIG) | {"guard": guard})
    loop = SimpleNamespace(config=config, carried={}, accelerator=SimpleNamespace(autocast=nullcontext),
                           run=SimpleNamespace(metrics=lambda *_: None, log=lambda _: None,
                                               samples=lambda *_: None),
                           best=SimpleNamespace(offer=lambda step, score, weights, kl: offered.append(step)))

    def posts_of(mean, update):
        noise = [-0.1, -0.1, 0.1, 0.1]
        return [mean + noise[(place + update) % 4] for place in range(4)]

    for update, means in enumerate(zip(*curves, strict=True)):
        class Judges(Recorded):
            def scores(self, posts, found, title, means=means, update=update):
                return [Scores(posts_of(means[0], update), {})] * 2

            def opinions(self, posts, greedy, sampled, means=means, update=update):
                return [posts_of(mean, update) for mean in means[1:]], {}

        models = Models(PolicyAndValue(policy("opt"), None), None, None)
        evaluate(loop, models, POSTS, Judges(kl), None, update)
    return offered


RISING = [0.0, 1.0, 1.5, 1.6, 2.0, 2.4, 2.8]  # what a gamed reward says


@pytest.mark.parametrize(("curves", "guard", "kept"), [
    ([RISING], None, [0, 1, 2, 3, 4, 5, 6]),
    ([RISING], 1.0, [0, 1, 2, 3, 4, 5, 6]),
    ([RISING, [0.0, 1.0, 1.3, 1.3, 1.2, 1.0, 0.5]], 1.0, [0, 1, 2]),  # the second judge has seen enough
    ([RISING, RISING, [0.0, 1.0, 0.9, 1.6, 1.5, 1.4, 1.4]], 1.0, [0, 1, 3]),  # one of several heads turns
    ([[0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]], 1.0, [0, 3, 6]),  # slow but steady
    ([[0.0, 1.0, 1.02, 1.04, 1.0, 0.9, 0.8]], 1.0, [0, 1]),  # nothing but noise after 1
    ([RISING, [0.0, 1.0, 1.3, 1.3, 1.2, 1.0, 0.5]], None, [0, 1, 2, 3, 4, 5, 6]),
])
def test_which_policies_of_hand_made_curves_are_offered(curves, guard, kept):
    assert kept_of(curves, guard) == kept


def test_the_guard_comes_after_the_kl_budget():
    assert kept_of([RISING], 1.0, kl=100.0) == []


@torch.no_grad()
def test_each_head_and_the_guard_judge_greedy_summaries():
    """Against plain rows through stock models; a summary without EOS has the fixed score for each judge."""
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    heads = Heads(weight, torch.tensor([1.0, 0.0, -1.0]))
    reward, guard = scalar_model("opt"), scalar_model("opt", 3)
    reward.score = heads
    rewards = Rewards([ModelReward(ModelEntry(name="model"), None, reward)],
                      guard=ModelReward(ModelEntry(), None, guard))
    rewards.length_fits["model"] = LengthFit(0.25, 3.0)
    judge = Judge(policy("opt", 1), rewards, Tokenizer(), CONFIG)
    greedy, sampled = (judge.summaries(policy("opt", seed), POSTS, 2.0, "") for seed in (2, 3))
    judges, means = judge.opinions(POSTS, greedy, sampled)
    expected, spreads, scores = [[] for _ in range(4)], [], []
    for prompt, response, ended in zip(PROMPTS, greedy.tokens, greedy.ended, strict=True):
        row = torch.tensor([prompt + response])
        each = heads.weight @ reward.base_model(row).last_hidden_state[0, -1] + heads.bias
        controlled = each - 0.25 * (len(response) - 3)  # of the reward's heads, not of the guard
        second = guard(row).logits.item()
        spreads.append(each.std(correction=0).item())
        for column, score in zip(expected, [second, *controlled.tolist()], strict=True):
            column.append(score if ended else -1.0)
        scores.append(second if ended else -1.0)
    assert any(not ended for ended in greedy.ended) and any(greedy.ended)
    for ours, theirs in zip(judges, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert means["spread"] == pytest.approx(statistics.mean(spreads), abs=1e-4)
    assert means["guard_score"] == pytest.approx(statistics.mean(scores), abs=1e-4)
    assert set(means) == {"spread", "spread_sampled", "guard_score", "guard_score_sampled"}
