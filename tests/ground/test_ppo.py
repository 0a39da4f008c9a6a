"""PPO's mathematics against definitions written out in plain Python, closed forms, and properties.

The oracles loop over one episode at a time and never see padding; the functions meet `JUNK` there.
"""

import ast
import math
import statistics
from pathlib import Path

import pytest
import torch

from utils import ppo

CLIP = 0.2
JUNK = float("nan")
LENGTHS = [5, 1, 3, 7, 2]  # real tokens per episode, R = 7


def random_batch(seed, names, lengths=LENGTHS):
    """Per name a tensor (N, R) of normal numbers with JUNK at padding, and the mask (N, R)."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    mask = torch.tensor([[t < n for t in range(width)] for n in lengths])
    draw = {name: torch.randn(len(lengths), width, generator=generator) for name in names}
    return {name: torch.where(mask, x, JUNK) for name, x in draw.items()}, mask


def real_tokens(x, mask):
    """Episodes as lists of plain numbers, without padding."""
    return [row[keep].tolist() for row, keep in zip(x, mask, strict=True)]


def flat(x, mask):
    return [v for episode in real_tokens(x, mask) for v in episode]


def close(actual, expected, tol=1e-5):
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def test_module_is_pure():
    tree = ast.parse(Path(ppo.__file__).read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports <= {"torch", "typing"}


# ------------------------------------------------------------------------------------------ means and moments


def test_moments_are_those_of_the_real_numbers_and_add_up():
    batch, mask = random_batch(0, ["x"])
    x, values = batch["x"], flat(batch["x"], mask)
    moments = ppo.masked_moments(x, mask)
    assert moments.dtype == torch.float64 and moments.shape == (3,)
    close(moments, [len(values), sum(values), sum(v * v for v in values)])
    close(ppo.masked_moments(x[:2], mask[:2]) + ppo.masked_moments(x[2:], mask[2:]), moments)

    mean, var = ppo.mean_var(moments)
    expected = sum(values) / len(values)
    close(mean, expected)
    close(var, sum((v - expected) ** 2 for v in values) / len(values))


def test_variance_survives_a_large_mean():
    x = torch.tensor([[3000.1, 3000.6, 3001.1]])  # float32 sums of squares would lose it
    close(ppo.mean_var(ppo.masked_moments(x, torch.ones_like(x, dtype=bool)))[1], 1 / 6, tol=1e-3)
    # rounding alone would give -4e-16, and whitening a NaN for larger numbers
    equal = torch.full((1, 49), 1.9)
    assert ppo.mean_var(ppo.masked_moments(equal, torch.ones_like(equal, dtype=bool)))[1] >= 0


# ----------------------------------------------------------------------------------------------------- whiten


def test_whiten_uses_the_population_variance():
    x = torch.tensor([[1.0, 3.0, JUNK]])
    mask = torch.tensor([[True, True, False]])
    close(ppo.whiten(x, mask), [[-1.0, 1.0, 0.0]])  # the sample variance would give +-0.707
    close(ppo.whiten(x, mask, shift_mean=False), [[1.0, 3.0, 0.0]])  # variance 1 already, and the mean stays
    close(ppo.whiten(10 * x, mask, shift_mean=False), [[19.0, 21.0, 0.0]])


def test_whitened_numbers_have_mean_0_and_variance_1():
    batch, mask = random_batch(1, ["x"])
    whitened = ppo.whiten(5 + 3 * batch["x"], mask)
    assert whitened.dtype == torch.float32
    assert (whitened[~mask] == 0).all()
    values = flat(whitened, mask)
    close(sum(values) / len(values), 0.0)
    close(sum(v * v for v in values) / len(values), 1.0)


def test_ranks_that_share_their_moments_whiten_as_one():
    batch, mask = random_batch(2, ["x"])
    x = batch["x"]
    ranks = [slice(0, 2), slice(2, 5)]
    mean, var = ppo.mean_var(sum(ppo.masked_moments(x[rank], mask[rank]) for rank in ranks))
    together = torch.cat([ppo.whiten(x[rank], mask[rank], mean, var) for rank in ranks])
    close(together, ppo.whiten(x, mask))
    alone = torch.cat([ppo.whiten(x[rank], mask[rank]) for rank in ranks])
    assert (alone - together).abs().max() > 0.1  # so the test would see a per-rank whitening


def test_whiten_of_equal_numbers_is_0_and_half_the_statistics_are_refused():
    x = torch.full((2, 3), 7.0)
    mask = torch.ones_like(x, dtype=bool)
    close(ppo.whiten(x, mask), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="both"):
        ppo.whiten(x, mask, mean=torch.tensor(1.0))
    with pytest.raises(ValueError, match="both"):
        ppo.whiten(x, mask, var=torch.tensor(1.0))


# --------------------------------------------------------------------------------------------------------- KL


def test_kl_estimators_by_hand():
    logprobs, ref_logprobs = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    close(ppo.kl_estimate(logprobs, ref_logprobs), [0.5, -1.0, 0.0])
    close(ppo.kl_estimate(logprobs, ref_logprobs, "k2"), [0.125, 0.5, 0.0])
    close(ppo.kl_estimate(logprobs, ref_logprobs, "k3"), [math.exp(-0.5) - 0.5, math.e - 2, 0.0])


def test_kl_k3_is_never_negative_nor_rounded_away():
    d = torch.linspace(-4, 4, 2001)
    assert (ppo.kl_estimate(d, torch.zeros_like(d), "k3") >= 0).all()
    tiny = torch.tensor([2e-4])
    # k3 = d^2 / 2 + O(d^3)
    close(ppo.kl_estimate(tiny, torch.zeros(1), "k3") / (tiny**2 / 2), [1.0], tol=1e-2)


def test_both_kl_estimators_are_unbiased():
    logits = torch.randn(2, 11, generator=torch.Generator().manual_seed(3))
    policy, reference = logits.log_softmax(-1)
    exact = sum(math.exp(p) * (p - q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    assert exact > 0.1
    for estimator in ("k1", "k3"):
        close((policy.exp() * ppo.kl_estimate(policy, reference, estimator)).sum(), exact)


def test_an_unknown_kl_estimator_is_refused():
    with pytest.raises(ValueError, match="k1, k2 and k3"):
        ppo.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


@pytest.mark.parametrize(("kl", "expected"), [
    (6.0, 0.1),  # at the target
    (6.6, 0.1 * (1 + 0.1 * 512 / 10_000)),  # 10 % above
    (4.8, 0.1 * (1 - 0.2 * 512 / 10_000)),  # 20 % below
    (60.0, 0.1 * (1 + 0.2 * 512 / 10_000)),  # the error is clipped at 20 %
    (-3.0, 0.1 * (1 - 0.2 * 512 / 10_000)),
])
def test_adaptive_kl_coefficient_table(kl, expected):
    assert ppo.adapted_kl_coef(0.1, kl, target=6.0, episodes=512, horizon=10_000) == pytest.approx(expected)


def test_adaptive_kl_coefficient_brings_the_kl_to_its_target():
    """On a plant whose KL is inversely proportional to the coefficient."""
    kl_coef = 0.5
    for _ in range(2000):
        kl_coef = ppo.adapted_kl_coef(kl_coef, 1.2 / kl_coef, target=6.0, episodes=512, horizon=10_000)
    assert kl_coef == pytest.approx(0.2, rel=1e-3)


# ------------------------------------------------------------------ advantages from the responses to a prompt

GROUPS = [[1.0, 2.0, 6.0], [-1.0, -1.0, -1.0], [0.5, -3.0, 4.0]]  # K = 3


def test_rloo_by_hand_and_by_definition():
    found = ppo.rloo_advantages(torch.tensor(GROUPS).flatten(), 3)
    close(found[:3], [1.0 - 4.0, 2.0 - 3.5, 6.0 - 1.5])
    expected = [r - sum(others) / len(others) for group in GROUPS
                for i, r in enumerate(group) for others in [group[:i] + group[i + 1 :]]]
    close(found, expected)


def test_grpo_by_definition():
    expected = [(r - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
                for group in GROUPS for r in group]
    close(ppo.grpo_advantages(torch.tensor(GROUPS).flatten(), 3), expected)
    close(ppo.grpo_advantages(torch.tensor([7.0, 7.0]), 2), [0.0, 0.0])


@pytest.mark.parametrize("compare", [ppo.rloo_advantages, ppo.grpo_advantages])
def test_a_prompts_own_level_does_not_count(compare):
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(14))
    levels = torch.tensor([3.0, -8.0, 0.1]).repeat_interleave(4)
    close(compare(rewards + levels, 4), compare(rewards, 4))
    close(compare(rewards, 4).view(3, 4).sum(1), torch.zeros(3))
    with pytest.raises(ValueError, match="no others"):
        compare(rewards, 1)


def test_rloo_is_an_unbiased_gradient():
    """The exact expectation over both samples of a bandit is the gradient of the expected reward."""
    reward = torch.tensor([1.0, 3.0, -2.0])
    logits = torch.tensor([0.2, -0.4, 0.9], requires_grad=True)
    (logits.softmax(0) * reward).sum().backward()
    expected, logits.grad = logits.grad, None
    logprobs = logits.log_softmax(0)
    total = 0
    for a in range(3):
        for b in range(3):
            first, second = ppo.rloo_advantages(torch.stack([reward[a], reward[b]]), 2)
            chance = (logprobs[a] + logprobs[b]).exp().detach()
            total = total + chance * (first * logprobs[a] + second * logprobs[b]) / 2
    total.backward()
    close(logits.grad, expected)


# ---------------------------------------------------------------------------------------------------- rewards


def test_token_rewards_by_hand():
    kl = torch.tensor([[1.0, 2.0, JUNK], [4.0, JUNK, JUNK], [-1.0, 0.0, 2.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0, -3.0]), kl, mask, kl_coef=0.5)
    close(rewards, [[-0.5, 9.0, 0.0], [18.0, 0.0, 0.0], [0.5, 0.0, -4.0]])


def test_an_episodes_rewards_sum_to_score_minus_penalty():
    batch, mask = random_batch(4, ["kl"])
    scores = torch.arange(5.0)
    rewards = ppo.token_rewards(scores, batch["kl"], mask, kl_coef=0.05)
    penalties = [0.05 * sum(kl) for kl in real_tokens(batch["kl"], mask)]
    close(rewards.sum(1), [s - p for s, p in zip(scores.tolist(), penalties, strict=True)])


def test_token_rewards_refuse_an_episode_without_tokens():
    mask = torch.tensor([[True, True], [False, False]])
    with pytest.raises(ValueError, match="no real token"):
        ppo.token_rewards(torch.ones(2), torch.zeros(2, 2), mask, kl_coef=0.05)


def test_missing_eos_gets_the_fixed_score():
    scores = torch.tensor([3.0, -5.0, 0.5])
    ended = torch.tensor([True, False, False])
    # in place of the score, not added to it
    close(ppo.missing_eos_penalty(scores, ended, -1.0), [3.0, -1.0, -1.0])


# -------------------------------------------------------------------------------------------------------- GAE


def gae_by_definition(rewards, values, gamma, lam):
    """One episode: A_t = sum_l (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V_T = 0."""
    length = len(rewards)
    advantages = []
    for t in range(length):
        advantage = 0.0
        for future in range(t, length):
            next_value = values[future + 1] if future + 1 < length else 0.0
            delta = rewards[future] + gamma * next_value - values[future]
            advantage += (gamma * lam) ** (future - t) * delta
        advantages.append(advantage)
    return advantages


def test_gae_by_hand():
    # delta = .9*.4-.5, .9*.3-.4, 1-.3 = -.14, -.13, .7; A = -.14+.45*.185, -.13+.45*.7, .7
    rewards, values = torch.tensor([[0.0, 0.0, 1.0, JUNK]]), torch.tensor([[0.5, 0.4, 0.3, JUNK]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = ppo.gae(rewards, values, mask, gamma=0.9, lam=0.5)
    close(advantages, [[-0.05675, 0.185, 0.7, 0.0]])
    close(returns, [[0.44325, 0.585, 1.0, 0.0]])


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.8, 0.0)])
def test_gae_equals_the_double_sum(gamma, lam):
    batch, mask = random_batch(5, ["rewards", "values"])
    advantages, returns = ppo.gae(batch["rewards"], batch["values"], mask, gamma, lam)
    rows = zip(real_tokens(batch["rewards"], mask), real_tokens(batch["values"], mask), strict=True)
    for i, (rewards, values) in enumerate(rows):
        expected = gae_by_definition(rewards, values, gamma, lam)
        close(advantages[i, : len(expected)], expected)
        close(returns[i, : len(expected)], [a + v for a, v in zip(expected, values, strict=True)])
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_gae_limits():
    batch, mask = random_batch(6, ["rewards", "values"])
    _, returns = ppo.gae(batch["rewards"], batch["values"], mask, gamma=1.0, lam=1.0)
    # lam 1: the rewards still to come, no value
    for i, rewards in enumerate(real_tokens(batch["rewards"], mask)):
        close(returns[i, : len(rewards)], [sum(rewards[t:]) for t in range(len(rewards))])
    _, returns = ppo.gae(batch["rewards"], batch["values"], mask, gamma=0.5, lam=0.0)
    rows = zip(real_tokens(batch["rewards"], mask), real_tokens(batch["values"], mask), strict=True)
    for i, (rewards, values) in enumerate(rows):  # lam 0: one step, then the value
        expected = [r + 0.5 * v for r, v in zip(rewards, values[1:] + [0.0], strict=True)]
        close(returns[i, : len(rewards)], expected)


def test_gae_knows_neither_padding_nor_order():
    batch, mask = random_batch(7, ["rewards", "values"])
    whole = ppo.gae(batch["rewards"], batch["values"], mask, 1.0, 0.95)
    order = [3, 0, 4, 2, 1]
    shuffled = ppo.gae(batch["rewards"][order], batch["values"][order], mask[order], 1.0, 0.95)
    extra = torch.full((5, 4), 1e6)
    wider = ppo.gae(
        torch.cat([batch["rewards"], extra], 1), torch.cat([batch["values"], extra], 1),
        torch.cat([mask, torch.zeros(5, 4, dtype=bool)], 1), 1.0, 0.95,
    )
    for x, x_shuffled, x_wider in zip(whole, shuffled, wider, strict=True):
        assert torch.equal(x[order], x_shuffled)
        assert torch.equal(x, x_wider[:, :7])
        assert (x_wider[:, 7:] == 0).all()


# ----------------------------------------------------------------------------------------------------- losses

POLICY_TABLE = [  # ratio, advantage, loss, clipped
    (1.5, 1.0, -1.2, True),
    (1.5, -1.0, 1.5, False),  # moving back must stay possible
    (0.5, 1.0, -0.5, False),
    (0.5, -1.0, 0.8, True),
    (1.1, 2.0, -2.2, False),
    (0.9, -2.0, 1.8, False),
    (1.0, 3.0, -3.0, False),
]


def test_policy_loss_table_and_gradient():
    ratio, advantages, expected, expected_clipped = map(torch.tensor, zip(*POLICY_TABLE, strict=True))
    logprobs = torch.linspace(-3, -1, len(ratio))
    new_logprobs = (logprobs + ratio.log()).requires_grad_()
    loss, clipped = ppo.policy_loss(new_logprobs[None], logprobs[None], advantages[None], CLIP)
    close(loss[0], expected)
    assert torch.equal(clipped[0], expected_clipped)
    loss.sum().backward()
    close(new_logprobs.grad, torch.where(expected_clipped, 0.0, -advantages * ratio))


def test_first_policy_gradient_is_that_of_the_expected_reward():
    reward = torch.tensor([1.0, -2.0, 0.5, 3.0])
    logits = torch.tensor([0.3, -0.2, 0.9, 0.0], requires_grad=True)
    (logits.softmax(0) * reward).sum().backward()
    expected_reward_grad, logits.grad = logits.grad, None

    logprobs = logits.detach().log_softmax(0)
    loss, _ = ppo.policy_loss(logits.log_softmax(0), logprobs, reward, CLIP)
    (loss * logprobs.exp()).sum().backward()  # the expectation over actions of the behaviour policy
    close(logits.grad, -expected_reward_grad)


VALUE_TABLE = [  # new value, old value, return, loss, clipped
    (1.0, 0.0, 2.0, 1.62, True),  # held at .2: .5 * 1.8^2, worse than .5 * 1^2
    (1.0, 0.0, -1.0, 2.0, False),  # moved away: .5 * 2^2, worse than .5 * 1.2^2
    (-1.0, 0.0, -2.0, 1.62, True),
    (0.1, 0.0, 1.0, 0.405, False),
    (3.1, 3.0, 3.1, 0.0, False),
]


def test_value_loss_table_and_gradient():
    new, values, returns, expected, expected_clipped = map(torch.tensor, zip(*VALUE_TABLE, strict=True))
    new.requires_grad_()
    loss, clipped = ppo.value_loss(new[None], values[None], returns[None], CLIP)
    close(loss[0], expected)
    assert torch.equal(clipped[0], expected_clipped)
    loss.sum().backward()
    close(new.grad, torch.where(expected_clipped, 0.0, new.detach() - returns))


def test_micro_batches_add_up_to_the_whole_loss():
    batch, mask = random_batch(8, ["new", "old", "advantages"])
    new, old, advantages = (torch.where(mask, x, 0.5) for x in batch.values())  # finite at padding, as asked

    def gradient(parts):
        leaf = new.clone().requires_grad_()
        for part in parts:
            loss, _ = ppo.policy_loss(leaf[part], old[part], advantages[part], CLIP)
            (torch.where(mask[part], loss, 0.0).sum() / mask.sum()).backward()
        return leaf.grad

    whole = gradient([slice(0, 5)])
    assert whole.isfinite().all() and (whole[~mask] == 0).all()
    close(gradient([slice(0, 1), slice(1, 3), slice(3, 5)]), whole)


# ------------------------------------------------------------------------------------------------- statistics


def test_policy_statistics_equal_sums_over_real_tokens():
    batch, mask = random_batch(9, ["new", "old", "entropy"])
    clipped = torch.rand(mask.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    stats = ppo.policy_statistics(batch["new"], batch["old"], batch["entropy"], clipped, mask)
    pairs = zip(flat(batch["new"], mask), flat(batch["old"], mask), strict=True)
    ratios = [math.exp(n - o) for n, o in pairs]
    expected = {
        "ratio": sum(ratios),
        "approx_kl": sum(ratio - 1 - math.log(ratio) for ratio in ratios),
        "clipfrac": sum(flat(clipped, mask)),
        "entropy": sum(flat(batch["entropy"], mask)),
        "tokens": sum(LENGTHS),
        "ratio_max": max(ratios),
    }
    assert stats.keys() == expected.keys()
    for name, value in expected.items():
        close(stats[name], value)


def test_policy_statistics_of_micro_batches_add_up():
    batch, mask = random_batch(10, ["new", "old", "entropy"])
    arguments = (*batch.values(), torch.ones_like(mask), mask)
    whole = ppo.policy_statistics(*arguments)
    parts = [ppo.policy_statistics(*(x[part] for x in arguments)) for part in (slice(0, 2), slice(2, 5))]
    for name, value in whole.items():
        close(max(p[name] for p in parts) if name == "ratio_max" else sum(p[name] for p in parts), value)


def test_before_the_first_step_nothing_has_moved():
    batch, mask = random_batch(11, ["logprobs", "entropy", "advantages"])
    new = batch["logprobs"].clone().requires_grad_()
    _, clipped = ppo.policy_loss(new, batch["logprobs"], batch["advantages"], CLIP)
    stats = ppo.policy_statistics(new, batch["logprobs"], batch["entropy"], clipped, mask)
    assert stats["approx_kl"] == 0 and stats["clipfrac"] == 0
    assert stats["ratio"] == stats["tokens"] and stats["ratio_max"] == 1
    assert not any(x.requires_grad for x in stats.values())


def test_approx_kl_is_the_kl_of_the_behaviour_policy_to_the_new_one():
    new, old = torch.randn(2, 11, generator=torch.Generator().manual_seed(12)).log_softmax(-1)
    exact = sum(math.exp(o) * (o - n) for o, n in zip(old.tolist(), new.tolist(), strict=True))
    mask = torch.ones(1, 1, dtype=bool)
    per_action = [
        ppo.policy_statistics(n.view(1, 1), o.view(1, 1), mask.float(), mask, mask)["approx_kl"]
        for n, o in zip(new, old, strict=True)
    ]
    close((old.exp() * torch.stack(per_action)).sum(), exact)


def test_explained_variance():
    def explained_variance(values, returns, mask):
        residual = returns - values
        return ppo.explained_variance(ppo.masked_moments(residual, mask), ppo.masked_moments(returns, mask))

    batch, mask = random_batch(13, ["values", "returns"])
    values, returns = batch["values"], batch["returns"]
    close(explained_variance(returns + 4.0, returns, mask), 1.0)  # a constant is no variance
    close(explained_variance(torch.zeros_like(returns), returns, mask), 0.0)
    close(explained_variance(returns / 2, returns, mask), 0.75)
    close(explained_variance(-returns, returns, mask), -3.0)

    def variance(numbers):
        mean = sum(numbers) / len(numbers)
        return sum((x - mean) ** 2 for x in numbers) / len(numbers)

    pairs = list(zip(flat(values, mask), flat(returns, mask), strict=True))
    expected = 1 - variance([r - v for v, r in pairs]) / variance([r for _, r in pairs])
    close(explained_variance(values, returns, mask), expected)
