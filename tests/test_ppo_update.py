"""The PPO loop's own functions on tiny models: what an update starts from, what it is made of, what precision it sees."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from families import EOS, PAD, policy, random_groups, scalar_model

import train_ppo
from utils.rollout import Carried

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
    figures = train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, random.Random(0))
    return figures, [p.detach().clone() for p in models.trained.parameters()], len(steps), scheduler


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
    train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, random.Random(0))
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
