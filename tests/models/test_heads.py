"""Several reward heads on one trunk: bootstrap, one score of many, training against heads computed alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.nn.functional import softplus

import train_reward
from families import random_groups, scalar_model
from loops import epoch_loop
from utils.config import UserError
from utils.models.heads import (
    FILE,
    Heads,
    bootstrap_draws,
    ensemble_score,
    give_heads,
    head_scores,
    take_heads,
    use_heads,
)
from utils.models.loading import without_dropout
from utils.models.outputs import scores
from utils.models.prompt_groups import pack

PROMPTS, COMPLETIONS = random_groups([4, 6, 2, 5], [[3, 1, 5], [2, 4], [4, 2], [1, 3, 2]])
PAIRS = [[(0, 1), (2, 0), (2, 1)], [(1, 0)], [(0, 1)], [(2, 0)]]
HEADS = 3
SFT = SimpleNamespace(is_reward_model=False, folder=None)  # a parent without heads


def with_heads(seed: int = 0):
    model = without_dropout(scalar_model("opt"))
    give_heads(model, SFT, SimpleNamespace(reward_heads=HEADS, seed=seed))
    return model


@pytest.mark.parametrize(("ensemble", "coef", "expected"), [
    ("mean", 0.0, [2.0, -1.0]), ("worst", 0.0, [1.0, -4.0]),
    # variances of (1, 2, 3) and (-4, 0, 1): 2/3 and 14/3
    ("uncertainty", 0.0, [2.0, -1.0]), ("uncertainty", 3.0, [0.0, -15.0])])
def test_one_score_of_many_heads_by_hand(ensemble, coef, expected):
    each = torch.tensor([[1.0, 2.0, 3.0], [-4.0, 0.0, 1.0]])
    assert ensemble_score(each, ensemble, coef).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_bootstrap_draws_each_post_once_on_average_and_each_head_its_own():
    """Poisson with mean 1: mean and variance 1, no draw in 1/e of the cases; heads and seeds independent."""
    posts = [[post, 7] for post in range(4000)]
    draws = np.array([bootstrap_draws(post, HEADS, 0) for post in posts])  # (posts, heads)
    assert draws.mean(0) == pytest.approx([1, 1, 1], abs=0.06)
    assert draws.var(0) == pytest.approx([1, 1, 1], abs=0.12)
    assert (draws == 0).mean() == pytest.approx(np.exp(-1), abs=0.02)
    other = np.array([bootstrap_draws(post, HEADS, 1) for post in posts])
    together = np.corrcoef(np.concatenate([draws, other], 1).T)
    assert np.abs(together - np.eye(2 * HEADS)).max() < 0.07
    assert bootstrap_draws(posts[5], HEADS, 0) == draws[5].tolist(), "the same in every pass"
    assert bootstrap_draws(posts[5], 1, 0) == [1.0]


def test_heads_begin_apart_from_each_other():
    weight = with_heads().score.weight
    assert torch.corrcoef(weight.detach()).fill_diagonal_(0).abs().max() < 0.9
    assert not torch.equal(weight, with_heads(seed=1).score.weight)


def stock_state(model, tokens):
    """The trunk's last state of one plain row."""
    return model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0, -1]


def test_each_heads_gradient_is_that_of_the_head_alone_on_its_own_bootstrap(tmp_path, monkeypatch):
    """Plain rows, a head at a time, against a step of the stage in two micro-batches."""
    monkeypatch.setattr(train_reward, "evaluate", lambda *_: None)
    model, oracle = with_heads(), with_heads()
    rows = [{"prompt": p, "completions": c, "pairs": pairs, "length": len(p) + sum(map(len, c))}
            for p, c, pairs in zip(PROMPTS, COMPLETIONS, PAIRS, strict=True)]
    config = train_reward.RewardStageConfig(output_dir=str(tmp_path), reward_heads=HEADS, max_grad_norm=0.0,
                                            logging_steps=1, per_device_batch_size=2,
                                            gradient_accumulation_steps=2)
    loop = epoch_loop(config, model, len(rows))
    monkeypatch.setattr(loop.optimizer, "zero_grad", lambda: None)  # they stay, to be looked at
    train_reward.train(loop, Dataset.from_list(rows), None)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    losses = []
    for head in range(HEADS):
        for row in rows:
            drawn = bootstrap_draws(row["prompt"], HEADS, config.seed)[head]
            score = [stock_state(oracle, row["prompt"] + answer) @ oracle.score.weight[head]
                     for answer in row["completions"]]
            losses += [drawn * softplus(score[w] - score[b]) for b, w in row["pairs"]]
    loss = sum(losses) / (HEADS * sum(map(len, PAIRS)))
    loss.backward()
    assert gradients.pop("score.replaced.weight") is None, "the stock head waits for the end"
    for name in gradients:
        assert torch.allclose(gradients[name], oracle.get_parameter(name).grad, atol=1e-5), name
    [logged] = [row["reward/loss"] for row in loop.run.read_metrics() if "reward/loss" in row]
    assert len({tuple(bootstrap_draws(row["prompt"], HEADS, 0)) for row in rows}) > 1
    assert logged == pytest.approx(loss.item(), abs=1e-5)


@torch.no_grad()
def test_final_has_the_mean_and_the_file_each_head(tmp_path):
    """The file goes back into the stock model with the mean head: scores of plain rows, head by head."""
    model = with_heads()
    weight = model.score.weight.clone()
    heads = take_heads(model)
    assert model.score.weight.shape == (1, weight.shape[1]) and not isinstance(model.score, Heads)
    heads.bias.copy_(torch.tensor([0.5, -0.25, -0.25]))
    save_file(dict(heads.named_parameters()), tmp_path / FILE)
    parent = SimpleNamespace(key="reward_model", name="rm", folder=tmp_path, load=lambda loader: loader(""))
    model.config.score_shift = 2.0
    groups = pack(PROMPTS, COMPLETIONS, 0)
    mean = scores(model, groups)
    for ensemble in ("mean", "worst", "uncertainty"):
        use_heads(model, parent, SimpleNamespace(ensemble=ensemble, ensemble_coef=3.0))
        rows = [p + answer for p, c in zip(PROMPTS, COMPLETIONS, strict=True) for answer in c]
        states = torch.stack([stock_state(model, row) for row in rows])
        expected = states @ weight.T + heads.bias - 2.0
        assert torch.allclose(head_scores(model, groups), expected, atol=1e-5)
        combined = {"mean": expected.mean(1), "worst": expected.min(1).values,
                    "uncertainty": expected.mean(1) - 3 * expected.var(1, unbiased=False)}[ensemble]
        assert torch.allclose(scores(model, groups), combined, atol=1e-4)
    assert torch.allclose(expected.mean(1), mean, atol=1e-5), "final/ is the mean of the heads"


def test_heads_that_are_not_there_are_refused(tmp_path):
    """In one line each: an ensemble of one head, another number of heads, a file of another model."""
    model, stock = without_dropout(scalar_model("opt")), scalar_model("opt").score.weight
    parent = SimpleNamespace(key="reward_model", name="rm", folder=tmp_path, is_reward_model=True,
                             load=lambda loader: loader(""))
    worst = SimpleNamespace(ensemble="worst", ensemble_coef=1.0)
    with pytest.raises(UserError, match="^ensemble: 'rm' has one head"):
        use_heads(model, parent, worst)
    with pytest.raises(UserError, match="^reward_heads: 'rm' has one head, not 3"):
        give_heads(model, parent, SimpleNamespace(reward_heads=HEADS, seed=0))
    use_heads(model, parent, SimpleNamespace(ensemble="mean", ensemble_coef=1.0))
    give_heads(model, parent, SimpleNamespace(reward_heads=1, seed=0))
    assert torch.equal(model.score.weight, stock) and not isinstance(model.score, Heads)
    save_file({"weight": torch.zeros(2, 5), "bias": torch.zeros(2)}, tmp_path / FILE)
    with pytest.raises(UserError, match="^reward_heads: 'rm' has 2 heads, not 3"):
        give_heads(model, parent, SimpleNamespace(reward_heads=HEADS, seed=0))
    with pytest.raises(UserError, match="does not hold heads of this model"):
        use_heads(model, parent, worst)
