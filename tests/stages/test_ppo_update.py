"""The PPO loop's own functions on tiny models: what an update starts from, what it is made of, what precision it sees."""

import math
import random
import re
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import train_ppo
from families import EOS, PAD, policy, random_groups, scalar_model
from utils.models.loading import response_logprobs, response_values, scores
from utils.ppo import Rollout
from utils.rollout import Carried, MicroBatch, rollout_metrics
from utils.runs.divergence import Divergence

TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=PAD)
PROMPTS = random_groups([5, 1, 8, 3, 6, 4, 7], [[1]] * 7)[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small run; its parents are tiny OPTs with dropout, saved in float32."""
    folder = tmp_path_factory.mktemp("parents")
    policy("opt").save_pretrained(folder / "sft")
    scalar_model("opt", seed=1).save_pretrained(folder / "reward")
    return train_ppo.PPOStageConfig(
        model=str(folder / "sft"), reward_model=str(folder / "reward"), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=7, responses_per_prompt=3, total_episodes=42, per_device_batch_size=1, ppo_epochs=1,
        learning_rate=1e-2, max_grad_norm=0.0,
    )


def made(config):
    """Models, optimizer, scheduler and accelerator as `main` makes them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the test before
    accelerator = Accelerator(cpu=True, mixed_precision=config.mixed_precision)
    return *train_ppo.prepare(train_ppo.load_models(config), config, accelerator), accelerator


def rollout(models, config, accelerator, update=0):
    with accelerator.autocast():
        return train_ppo.collect_rollout(models, TOKENIZER, PROMPTS, config, update, accelerator, Carried(config.kl_coef))


def updated(config):
    """Figures of one update, the weights after it and the number of optimizer steps."""
    models, optimizer, scheduler, accelerator = made(config)
    steps = []
    step = optimizer.step
    optimizer.step = lambda: (steps.append(1), step())
    batches = rollout(models, config, accelerator)
    figures = train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator,
                                   Divergence(None, None, accelerator), random.Random(0))
    return figures, [p.detach().clone() for p in models.trained.parameters()], len(steps), scheduler


@torch.no_grad()
def test_a_rollout_starts_from_the_parents_as_they_were_saved(config):
    """Reference log-probs at the sampling temperature, scores, and values that are the reward model's own."""
    models, _, _, accelerator = made(config)
    sft, reward_model = policy("opt"), scalar_model("opt", seed=1)
    batches = rollout(models, config, accelerator)
    assert config.temperature == 0.7 and not all(b.ended.all() for b in batches)
    for batch in batches:
        expected = torch.where(batch.ended, scores(reward_model, batch.groups), config.missing_eos_score)
        torch.testing.assert_close(batch.rollout.scores, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.rollout.ref_logprobs, response_logprobs(sft, batch.groups, 0.7), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.rollout.values, response_values(reward_model, batch.groups), rtol=1e-4, atol=1e-5)


def test_every_update_draws_its_own_responses(config):
    models, _, _, accelerator = made(config)
    first, again, second = ([b.groups.responses.tolist() for b in rollout(models, config, accelerator, update=update)]
                            for update in (0, 0, 1))
    assert first == again != second


def test_prompts_come_once_a_pass_in_another_order_in_each_pass_and_for_each_seed(config):
    config = replace(config, prompts_per_update=4)
    one = SimpleNamespace(num_processes=1, process_index=0)

    def drawn(seed):
        return [p for update in range(5) for p in train_ppo.prompts_of(update, list(range(10)), replace(config, seed=seed), one)]

    passes = [drawn(seed)[first : first + 10] for seed in (0, 1) for first in (0, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert drawn(0) == drawn(0)


def test_the_optimizer_is_the_configured_one(config):
    config = replace(config, adam_eps=3e-4, adam_beta2=0.9, weight_decay=0.01)
    _, optimizer, *_ = made(config)
    for group in optimizer.param_groups:
        assert (group["eps"], group["betas"], group["weight_decay"]) == (3e-4, (0.9, 0.9), 0.01)


LENGTHS = [3, 1, 2]


def numbers(seed, scale):
    """(N, R) numbers, 0 at padding as the loop has them, and the same as lists of the real ones."""
    drawn = scale * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    drawn = torch.where(MASK, drawn, 0.0)
    return drawn, [row[:n].tolist() for row, n in zip(drawn, LENGTHS, strict=True)]


MASK = torch.tensor([[t < n for t in range(3)] for n in LENGTHS])


def test_the_loss_of_a_micro_batch_by_definition(config):
    """Each clip from its own key, vf_coef, all divided by the tokens of the whole step; sums over real tokens for metrics."""
    config = replace(config, cliprange=0.1, cliprange_value=0.4, vf_coef=0.3)
    (new, n), (old, o), (advantages, a), (new_values, v), (values, w), (returns, r) = (
        numbers(seed, scale) for seed, scale in enumerate((0.3, 0.3, 1.0, 1.0, 1.0, 1.0)))
    policy_sum = value_sum = clips = value_clips = 0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = math.exp(n[i][t] - o[i][t])
            held = min(max(ratio, 0.9), 1.1)
            policy_sum += max(-a[i][t] * ratio, -a[i][t] * held)
            clips += -a[i][t] * held > -a[i][t] * ratio
            near = min(max(v[i][t], w[i][t] - 0.4), w[i][t] + 0.4)
            value_sum += 0.5 * max((v[i][t] - r[i][t]) ** 2, (near - r[i][t]) ** 2)
            value_clips += (near - r[i][t]) ** 2 > (v[i][t] - r[i][t]) ** 2
    assert 0 < clips < 6 and 0 < value_clips < 6
    batch = MicroBatch(None, Rollout(MASK, old, None, values, None, None, advantages, returns), None)
    entropy = torch.where(MASK, 2.0, 0.0)
    loss, sums = train_ppo.batch_loss(lambda *_: (new, entropy, new_values, None), batch, torch.tensor(20), config)
    assert loss.item() == pytest.approx((policy_sum + 0.3 * value_sum) / 20, rel=1e-5)
    expected = {"loss/policy": policy_sum, "loss/value": value_sum, "policy/clipfrac": clips, "value/clipfrac": value_clips,
                "objective/entropy": 12.0, "tokens": 6}
    assert {name: sums[name].item() for name in expected} == pytest.approx(expected, rel=1e-4)


def test_figures_of_a_rollout_by_definition():
    """Two micro-batches of other widths; sums over a response, means over responses, explained variance over tokens."""
    (old, o), (ref, q), (rewards, x), (values, w), (returns, r) = (numbers(seed, 1.0) for seed in range(10, 15))
    parts = []
    for rows, width in ((slice(0, 1), 3), (slice(1, 3), 2)):
        data = Rollout(*(t[rows, :width] for t in (MASK, old, ref, values)), torch.tensor([4.0, -1.0, 0.5])[rows],
                       *(t[rows, :width] for t in (rewards, torch.full((3, 3), 9.0), returns)))
        parts.append(MicroBatch(None, data, torch.tensor([True, False, True])[rows]))
    found = rollout_metrics(parts, Accelerator(cpu=True))
    gaps = [p - s for i in range(3) for p, s in zip(o[i], q[i], strict=True)]
    flat = [y for row in r for y in row]
    residual = [y - z for i in range(3) for y, z in zip(r[i], w[i], strict=True)]
    assert found == pytest.approx({
        "objective/kl": sum(gaps) / 3,
        "objective/kl_k3": sum(math.exp(-d) - 1 + d for d in gaps) / 3,
        "objective/score": 3.5 / 3,
        "objective/rlhf_reward": sum(map(sum, x)) / 3,
        "objective/length": 2.0,
        "objective/ended": 2 / 3,
        "value/explained_variance": 1 - statistics.pvariance(residual) / statistics.pvariance(flat),
    }, rel=1e-5)


def test_before_the_first_step_the_policy_is_the_one_that_sampled(config):
    """Detail 27 through the real loop: sampling, grouping by length, shuffling and the update's forward pass agree."""
    figures, *_ = updated(config)
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert figures["policy/clipfrac"] == 0


def test_micro_batches_change_nothing(config):
    """Detail 12: responses differ in length, so a mean of micro-batch means would be another gradient."""
    whole, weights, *_ = updated(replace(config, per_device_batch_size=7))
    split, split_weights, *_ = updated(replace(config, per_device_batch_size=2))
    assert whole == pytest.approx(split, rel=1e-4, abs=1e-6)
    assert whole["policy/grad_norm"] > 0
    for ours, theirs in zip(weights, split_weights, strict=True):
        # AdamW's first step is the gradient's sign, so what is next to 0 may differ
        assert ((ours - theirs).abs() < 1e-3).float().mean() > 0.99


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_gradient_is_that_of_the_mean_over_real_tokens(size, config):
    """Where nothing has moved yet the objective's gradient is that of -advantage x log-prob: one mean over the update."""
    config = replace(config, per_device_batch_size=size, vf_coef=0.0)
    models, optimizer, scheduler, accelerator = made(config)
    batches = rollout(models, config, accelerator)
    masks = [batch.rollout.response_mask for batch in batches]
    assert sum(mask.sum() for mask in masks) < sum(mask.numel() for mask in masks), "the test wants padding"
    total = sum(-(b.rollout.advantages * response_logprobs(models.policy, b.groups, config.temperature))[mask].sum()
                for b, mask in zip(batches, masks, strict=True))
    (total / sum(mask.sum() for mask in masks)).backward()
    expected = torch.cat([p.grad.flatten() for p in models.policy.parameters()]).norm().item()
    models.trained.zero_grad()
    figures = train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator,
                                   Divergence(None, None, accelerator), random.Random(0))
    assert figures["policy/grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("asked", "made_steps"), [(1, 1), (3, 3), (4, 4), (7, 7), (9, 7)])
def test_a_pass_makes_as_many_steps_as_minibatches_and_the_scheduler_knows(asked, made_steps, config):
    _, _, steps, scheduler = updated(replace(config, num_minibatches=asked, ppo_epochs=2, total_episodes=21))
    assert steps == 2 * made_steps
    assert scheduler.get_last_lr()[0] == 0, "one update is the whole run: the rate ends at 0"


def test_a_gradient_norm_of_0_is_no_clipping(config):
    _, moved, *_ = updated(replace(config, max_grad_norm=0.0))
    _, free, *_ = updated(replace(config, max_grad_norm=1e9))
    assert all(torch.equal(a, b) for a, b in zip(moved, free, strict=True))
    start = [p.detach() for p in made(config)[0].trained.parameters()]
    assert any(not torch.equal(a, b) for a, b in zip(moved, start, strict=True))


def test_a_step_takes_this_steps_gradient_clipped_to_the_norm(config):
    """AdamW hides the gradient's size, so SGD steps in its place: each step is as long as rate x max_grad_norm."""
    config = replace(config, max_grad_norm=0.01, num_minibatches=2)
    models, _, scheduler, accelerator = made(config)
    weights = list(models.trained.parameters())
    optimizer = torch.optim.SGD(weights, lr=1.0)
    places, step = [torch.cat([p.detach().flatten().clone() for p in weights])], optimizer.step

    def watched():
        step()
        places.append(torch.cat([p.detach().flatten().clone() for p in weights]))

    optimizer.step = watched
    batches = rollout(models, config, accelerator)
    figures = train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator,
                                   Divergence(None, None, accelerator), random.Random(0))
    assert figures["policy/grad_norm"] > 0.01, "as it was before clipping"
    lengths = [(after - before).norm().item() for before, after in zip(places, places[1:], strict=False)]
    assert lengths == pytest.approx([0.01, 0.01], rel=1e-2)
    assert all(p.grad is None or not p.grad.any() for p in weights), "nothing is left over for the next step"


@pytest.mark.parametrize(("kl", "score", "stops"), [(4.9, 1.0, None), (5.1, 1.0, "the KL .* above kl_limit"),
                                                    (math.nan, 1.0, "objective/kl"), (0.0, math.inf, "objective/score")])
def test_an_update_that_has_gone_too_far_is_not_trained_on(kl, score, stops, config):
    reason = train_ppo.collapse({"objective/kl": kl, "objective/score": score}, replace(config, kl_limit=5.0))
    assert (reason is None) if stops is None else re.match(stops, reason or "")


def test_evaluations_judge_the_average_where_there_is_one(config, monkeypatch):
    judged = []
    monkeypatch.setattr(train_ppo, "evaluate", lambda outcome, *_: judged.append(outcome))
    config = replace(config, ema_decay=0.5, eval_steps=1)
    models, optimizer, scheduler, accelerator = made(config)
    run = SimpleNamespace(metrics=lambda *_: None, stop_signal=None)
    train_ppo.train(models, TOKENIZER, PROMPTS, None, None, None, config, run, None, optimizer, scheduler, accelerator)
    assert len(judged) == config.updates + 1 and all(outcome is models.average.module for outcome in judged)


def test_gold_figures_are_those_of_ppo_over_sft():
    gold = {("before", "sampled"): [0.0, 0.5, 0.5, 1.0], ("after", "sampled"): [1.0, 0.5, 0.75, 0.75],
            ("before", "greedy"): [0.5] * 4, ("after", "greedy"): [1.0, 1.0, 1.0, 0.5]}
    found = train_ppo.gold_figures(gold, seed=0)
    assert (found["gold_before"], found["gold_after"]) == (0.5, 0.75)
    assert found["gold_win_rate"] == (2 + 0.5) / 4 and found["gold_win_rate_greedy"] == 3.5 / 4


def test_gradient_checkpointing_recomputes_in_the_update(config, monkeypatch):
    config = replace(config, gradient_checkpointing=True)
    models, optimizer, scheduler, accelerator = made(config)
    calls = []
    for model in (models.policy, models.inside.value_model):
        for layer in model.base_model.decoder.layers:
            inner = layer._gradient_checkpointing_func
            monkeypatch.setattr(layer, "_gradient_checkpointing_func",
                                lambda *a, inner=inner, **k: (calls.append(torch.is_grad_enabled()), inner(*a, **k))[1])
    batches = rollout(models, config, accelerator)
    train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, Divergence(None, None, accelerator),
                         random.Random(0))
    assert sum(calls) == len(batches) * 2 * 2, "two models of two layers in each micro-batch"


def test_bf16_sampling_sees_the_weights_after_a_step(config, monkeypatch):
    """torch's autocast keeps cast weights until its block ends: a block around the whole loop would hide every step."""
    monkeypatch.setattr(train_ppo, "evaluate", lambda *_: None)
    config = replace(config, mixed_precision="bf16", learning_rate=0.1)
    models, optimizer, scheduler, accelerator = made(config)
    said = []
    run = SimpleNamespace(metrics=lambda step, figures: said.append(figures), stop_signal=None)
    train_ppo.train(models, TOKENIZER, PROMPTS, None, None, None, config, run, None, optimizer, scheduler, accelerator)
    before, after = (abs(figures["objective/kl"]) for figures in said)
    assert before < 0.01 and after > 0.5, "the second update's samples come from the policy after a step"
