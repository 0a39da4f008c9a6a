"""Every option of the PPO stage does what it says, through the loop's own functions on tiny models.

The oracles loop over one episode at a time in plain Python; they start from what the models said (log-probs, values,
scores), which test_models.py holds against stock forward passes.
"""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from test_ppo_update import PROMPTS, TOKENIZER, made, rollout, updated

import train_ppo
from families import FAMILIES, PAD, policy, random_groups, scalar_model
from utils.config import UserError
from utils.data.report import DataReport
from utils.data.rows import Tokenised, load_data
from utils.models.loading import load_tokenizer, response_logprobs, response_values, scores
from utils.models.prompt_groups import pack
from utils.ppo import Rollout
from utils.rollout import Carried, collect_rollout, score_scale
from utils.runs.divergence import Divergence

K = 3


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A folder of tiny saved models for each family."""
    folder = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        policy(family).save_pretrained(folder / family / "sft")
        scalar_model(family, seed=1).save_pretrained(folder / family / "reward")
    return folder


@pytest.fixture
def config(parents):
    return config_of(parents, "opt")


def config_of(parents, family):
    return train_ppo.PPOStageConfig(
        model=str(parents / family / "sft"), reward_model=str(parents / family / "reward"), max_prompt_tokens=16,
        max_new_tokens=6, prompts_per_update=7, responses_per_prompt=K, total_episodes=42, per_device_batch_size=2,
        ppo_epochs=1, learning_rate=1e-2, max_grad_norm=0.0,
    )


def episodes_of(batches):
    """Each episode of a rollout as plain lists, prompts together: logprobs, ref_logprobs, values, score, ..."""
    found = []
    for batch in batches:
        data = batch.rollout
        for n, mask in enumerate(data.response_mask):
            episode = {"score": data.scores[n].item()}
            for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
                tensor = getattr(data, name)
                episode[name] = None if tensor is None else tensor[n][mask].tolist()
            found.append(episode)
    return found


def same(found, expected, floor=1e-5):
    assert found == pytest.approx(expected, rel=1e-4, abs=floor)


def gae_of(rewards, values, gamma, lam):
    advantages = []
    for t in range(len(rewards)):
        deltas = [rewards[u] + gamma * ([*values, 0.0])[u + 1] - values[u] for u in range(t, len(rewards))]
        advantages.append(sum((gamma * lam) ** n * delta for n, delta in enumerate(deltas)))
    return advantages


ESTIMATES = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: math.exp(-d) - 1 + d}


def expected_rewards(episode, config, scale=1.0):
    score = episode["score"] / scale
    if config.score_clip is not None:
        score = max(-config.score_clip, min(config.score_clip, score))
    pairs = zip(episode["logprobs"], episode["ref_logprobs"], strict=True)
    rewards = [-config.kl_coef * ESTIMATES[config.kl_estimator](p - q) for p, q in pairs]
    rewards[-1] += score
    return rewards


# ---------------------------------------------------------------------------------------------- rewards, advantages


@pytest.fixture
def moved(config):
    """Models whose policy is not the reference any more, so that the KL is not 0; with what belongs to them."""
    models, optimizer, scheduler, accelerator = made(config)
    with torch.no_grad():
        for weight in models.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return models, accelerator


REWARDS = [{}, {"kl_estimator": "k2"}, {"kl_estimator": "k3"}, {"score_clip": 0.1}, {"scale_scores": True},
           {"scale_scores": True, "score_clip": 0.5, "missing_eos_score": -3.0}, {"missing_eos_score": -3.0}]


@pytest.mark.parametrize("options", REWARDS, ids=str)
def test_rewards_are_the_score_at_the_end_and_the_kl_penalty_everywhere(options, config, moved):
    config = replace(config, kl_coef=0.3, **options)
    episodes = episodes_of(rollout(*moved_rollout(moved, config)))
    scale = statistics.pstdev(e["score"] for e in episodes) if config.scale_scores else 1.0
    assert any(abs(p - q) > 0.01 for e in episodes for p, q in zip(e["logprobs"], e["ref_logprobs"], strict=True))
    for episode in episodes:
        same(episode["rewards"], expected_rewards(episode, config, scale))


def moved_rollout(moved, config):
    models, accelerator = moved
    return models, config, accelerator


def test_rewards_are_whitened_over_the_update_without_their_mean(config, moved):
    plain, white = (episodes_of(rollout(*moved_rollout(moved, replace(config, whiten_rewards=asked)))) for asked in (False, True))
    flat = [x for e in plain for x in e["rewards"]]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    for before, after in zip(plain, white, strict=True):
        same(after["rewards"], [(x - mean) / deviation + mean for x in before["rewards"]])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_gae_whitened_over_the_whole_update(size, config, moved):
    config = replace(config, per_device_batch_size=size, lam=0.7, gamma=0.9)
    episodes = episodes_of(rollout(*moved_rollout(moved, config)))
    raw = [gae_of(e["rewards"], e["values"], config.gamma, config.lam) for e in episodes]
    flat = [x for advantages in raw for x in advantages]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    for episode, advantages in zip(episodes, raw, strict=True):
        same(episode["advantages"], [(x - mean) / deviation for x in advantages])
        same(episode["returns"], [a + v for a, v in zip(advantages, episode["values"], strict=True)])


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_responses_are_compared_with_those_of_their_own_prompt(advantage, config):
    config = replace(config, advantage=advantage)
    models, _, _, accelerator = made(config)
    assert models.inside.value_model is None
    episodes = episodes_of(rollout(models, config, accelerator))
    for first in range(0, len(episodes), K):
        group = episodes[first : first + K]
        totals = [sum(e["rewards"]) for e in group]
        for episode, total in zip(group, totals, strict=True):
            others = (sum(totals) - total) / (K - 1)
            expected = total - others if advantage == "rloo" else (
                (total - statistics.fmean(totals)) / (statistics.stdev(totals) + 1e-4))
            same(episode["advantages"], [expected] * len(episode["rewards"]), floor=1e-3)  # some deviations are next to 0
            assert episode["values"] is None and episode["returns"] is None


def test_scores_are_scaled_by_all_that_came_before(config, moved):
    models, accelerator = moved
    config, carried, scores = replace(config, scale_scores=True), Carried(config.kl_coef), []
    for update in range(3):
        batches = collect_rollout(models, TOKENIZER, PROMPTS, config, update, accelerator, carried)
        episodes = episodes_of(batches)
        scores += [e["score"] for e in episodes]
        for episode in episodes:
            same(episode["rewards"], expected_rewards(episode, config, statistics.pstdev(scores)))
    assert carried.score_moments[0] == 3 * 7 * K


def test_scores_that_do_not_differ_are_not_scaled(config, monkeypatch):
    monkeypatch.setattr("utils.rollout.scores", lambda model, groups: torch.full((len(groups.ends),), 5.0))
    config = replace(config, scale_scores=True, missing_eos_score=5.0)
    models, _, _, accelerator = made(config)
    assert {round(sum(e["rewards"]), 3) for e in episodes_of(rollout(models, config, accelerator))} == {5.0}


@pytest.mark.parametrize("score", [-0.3, -0.1, 1e-3, 7.7])
def test_the_rounding_of_equal_scores_is_no_spread(score):
    """E[x^2] - E[x]^2 of many equal numbers leaves 1e-17 or so, and its root would blow the scores up."""
    rollouts, carried = [Rollout(None, None, None, None, torch.full((400,), score))], Carried(0.1)
    assert {score_scale(rollouts, Accelerator(cpu=True), carried) for _ in range(40)} == {1.0}


# ------------------------------------------------------------------------------------------------------- the update

KINDS = {"separate value model": {}, "shared trunk": {"value_model": "shared"}, "rloo": {"advantage": "rloo"},
         "grpo": {"advantage": "grpo"}, "LoRA": {"lora_rank": 2},
         "LoRA, shared trunk, recomputed": {"lora_rank": 2, "value_model": "shared", "gradient_checkpointing": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_first_inner_step_nothing_has_moved(family, kind, parents):
    """Detail 27: sampling, packing by length, shuffling and the update's forward pass agree on every log-prob."""
    figures, weights, *_ = updated(replace(config_of(parents, family), **KINDS[kind]))
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert figures["policy/clipfrac"] == 0
    assert figures["policy/grad_norm"] > 0
    assert ("loss/value" in figures) == ("advantage" not in KINDS[kind])


def test_with_lora_the_reference_is_the_policy_without_its_adapter(config):
    """One update moves policy and value model; what is frozen shares their weights, and stays."""
    config = replace(config, lora_rank=2)
    models, optimizer, scheduler, accelerator = made(config)
    batches = rollout(models, config, accelerator)
    train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, Divergence(None, None, accelerator),
                         train_ppo.random.Random(0))
    after = rollout(models, config, accelerator, update=0)
    sft, reward_model = policy("opt"), scalar_model("opt", seed=1)  # as they were saved
    for batch in after:
        with torch.no_grad():
            ref_logprobs = response_logprobs(sft, batch.groups, config.temperature)
            values = response_values(reward_model, batch.groups)
            score = torch.where(batch.ended, scores(reward_model, batch.groups), config.missing_eos_score)
        torch.testing.assert_close(batch.rollout.ref_logprobs, ref_logprobs, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(batch.rollout.scores, score, rtol=1e-4, atol=1e-5)
        assert (batch.rollout.values - values).abs().max() > 1e-3, "the value model has moved"
        assert (batch.rollout.logprobs - ref_logprobs).abs().max() > 1e-3, "the policy has moved"


def test_a_shared_trunk_learns_from_the_value_loss(config):
    config = replace(config, value_model="shared")
    models, *_, accelerator = made(config)
    separate = made(replace(config, value_model="separate"))[0]
    assert count(models.trained) < 0.6 * count(separate.trained)
    batches = rollout(models, config, accelerator)
    assert not batches[0].rollout.values.any(), "a new head says 0"
    tokens = sum(b.rollout.response_mask.sum() for b in batches)
    head = models.inside.value_model
    head.weight.data.normal_()  # a head of 0 passes no gradient on
    for vf_coef in (0.0, 1.0):
        models.trained.zero_grad()
        loss, _ = train_ppo.batch_loss(models.trained, batches[0], tokens, replace(config, vf_coef=vf_coef))
        loss.backward()
        trunk = torch.cat([p.grad.flatten() for p in models.policy.base_model.parameters() if p.grad is not None])
        if vf_coef == 0.0:
            alone = trunk.clone()
            assert not head.weight.grad.any()
    assert (trunk - alone).abs().max() > 1e-6 and head.weight.grad.any()


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_passes_stop_when_the_policy_has_moved_too_far(config):
    config = replace(config, ppo_epochs=4, total_episodes=42)
    all_passes, _, steps, scheduler = updated(config)
    assert all_passes["policy/epochs"] == steps == 4 and all_passes["policy/approx_kl"] > 1e-4
    free, _, steps, _ = updated(replace(config, target_kl=1e3))
    assert free["policy/epochs"] == steps == 4
    cut, _, steps, cut_scheduler = updated(replace(config, target_kl=1e-6))
    assert cut["policy/epochs"] == steps == 2, "in the first pass nothing has moved yet; after the second it has"
    assert cut_scheduler.get_last_lr() == scheduler.get_last_lr(), "the learning rate follows the updates"


SUPERVISED = random_groups([5, 2, 9], [[4], [6], [3]], seed=9)


def test_ptx_adds_the_supervised_loss_and_its_gradient(config):
    config = replace(config, per_device_batch_size=7, vf_coef=0.0)
    models, *_, accelerator = made(config)
    [batch] = rollout(models, config, accelerator)
    tokens, examples = batch.rollout.response_mask.sum(), pack(*SUPERVISED, PAD)
    gradients = {}
    for ptx_coef in (0.0, 2.5):
        models.trained.zero_grad()
        loss, figures = train_ppo.batch_loss(models.trained, batch, tokens, replace(config, ptx_coef=ptx_coef), examples,
                                             examples.response_mask.sum())
        loss.backward()
        gradients[ptx_coef] = {name: p.grad.clone() for name, p in models.policy.named_parameters()}
    models.policy.zero_grad()
    stock = torch.cat([stock_nll(models.policy, p, c) for p, [c] in zip(*SUPERVISED, strict=True)])
    same((figures["loss/ptx"] / figures["ptx_tokens"]).item(), stock.mean().item())
    stock.mean().backward()
    for name, weight in models.policy.named_parameters():
        found = gradients[2.5][name] - gradients[0.0][name]
        torch.testing.assert_close(found, 2.5 * weight.grad, rtol=1e-3, atol=1e-4)


def stock_nll(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none")


def test_ptx_examples_differ_between_updates_and_processes_and_come_again(config):
    prompts, completions = random_groups([3] * 50, [[2]] * 50, seed=4)
    examples = Tokenised([], prompts, [c for [c] in completions])

    def drawn(update, rank, seed=0):
        accelerator = type("Rank", (), {"process_index": rank, "device": "cpu"})
        batches = train_ppo.supervised_batches(examples, PAD, update, replace(config, seed=seed), accelerator)
        return [next(batches).input_ids.tolist() for _ in range(3)]

    assert drawn(0, 0) == drawn(0, 0)
    assert len({str(drawn(*place)) for place in [(0, 0), (1, 0), (0, 1), (0, 0, 1)]}) == 4


def test_the_average_is_taken_after_every_step_and_starts_at_the_sft_model(config):
    config = replace(config, ema_decay=0.75, ppo_epochs=3)
    models, optimizer, scheduler, accelerator = made(config)
    name, weight = next(iter(models.policy.named_parameters()))
    expected, step = weight.detach().clone(), optimizer.step

    def watched():
        nonlocal expected
        step()
        expected = 0.75 * expected + 0.25 * weight.detach()

    optimizer.step = watched
    batches = rollout(models, config, accelerator)
    start = weight.detach().clone()
    train_ppo.ppo_update(models, batches, optimizer, scheduler, config, accelerator, Divergence(None, None, accelerator),
                         train_ppo.random.Random(0))
    average = dict(models.outcome.named_parameters())[name]
    torch.testing.assert_close(average.detach(), expected)
    assert (average - weight).abs().max() > 1e-4 and (average - start).abs().max() > 1e-4
    assert made(replace(config, ema_decay=0.0))[0].outcome is not models.outcome


def test_without_an_average_the_policy_itself_is_judged(config):
    models, *_ = made(config)
    assert models.average is None and models.outcome is models.policy


def test_the_kl_coefficient_adapts_from_update_to_update(config, monkeypatch):
    monkeypatch.setattr(train_ppo, "evaluate", lambda *_: None)
    config = replace(config, kl_target=1.0, kl_horizon=100, total_episodes=63)
    models, optimizer, scheduler, accelerator = made(config)
    said = []
    run = type("Run", (), {"stop_signal": None, "metrics": lambda self, step, figures: said.append(figures)})()
    train_ppo.train(models, TOKENIZER, PROMPTS, None, None, None, config, run, None, optimizer, scheduler, accelerator)
    kl_coef = config.kl_coef
    for figures in said:
        assert figures["objective/kl_coef"] == pytest.approx(kl_coef)
        assert figures["objective/rlhf_reward"] == pytest.approx(figures["objective/score"] - kl_coef * figures["objective/kl"],
                                                                 abs=1e-4)
        kl_coef *= 1 + max(-0.2, min(0.2, figures["objective/kl"] / 1.0 - 1)) * 21 / 100
    assert said[1]["objective/kl_coef"] != said[2]["objective/kl_coef"]


def test_held_out_posts_never_get_into_ptx(config, tmp_path):
    """From one source SFT and PPO hold out the same posts: the policy must not be taught what it is judged on."""
    rows = [{"prompt": f"post {n}\n\nTL;DR:", "completion": f"summary {n}"} for n in range(6)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, ptx_coef=0.1, actor_training_data=str(path), max_completion_tokens=64, max_prompt_tokens=64)
    tokenizer = load_tokenizer("assets/opt-mini")
    report = DataReport()
    rows_found = load_data(config, {"actor_training_data": "examples"}, tokenizer, report)["actor_training_data"]
    kept = train_ppo.supervised_examples(config, rows_found, [rows_found[2:3], rows_found[3:4]], report)
    assert [example.prompt for example in kept.examples] == [rows[n]["prompt"] for n in (0, 1, 4, 5)]
    assert len(kept.prompts) == len(kept.completions) == 4
    assert report.notes == ["actor_training_data: left out 2 of 6 examples, whose prompts are held out for validation or test"]
    with pytest.raises(UserError, match="^actor_training_data: every prompt in .* is held out"):
        train_ppo.supervised_examples(config, rows_found, [rows_found], report)


CONTRADICTIONS = {
    "responses_per_prompt: advantage 'rloo' compares": {"advantage": "rloo", "responses_per_prompt": 1},
    "responses_per_prompt: advantage 'grpo' compares": {"advantage": "grpo", "responses_per_prompt": 1},
    "actor_training_data: it is for ptx_coef; give both": {"ptx_coef": 0.1},
    "actor_training_data: it is for ptx_coef; give both or": {"actor_training_data": "mine.jsonl"},
    "value_model: advantage 'rloo' has none": {"advantage": "rloo", "value_model": "shared"},
    "target_kl: it leaves out later passes": {"target_kl": 0.1, "ppo_epochs": 1},
    "kl_coef: 0 never adapts": {"kl_target": 1.0, "kl_coef": 0.0},
    "kl_horizon: with 21 episodes an update it must be above 4.2": {"kl_target": 1.0, "kl_horizon": 4},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_keys_that_make_no_sense_together_are_refused(message, config):
    train_ppo.refuse_contradictions(config)
    with pytest.raises(UserError, match="^" + message):
        train_ppo.refuse_contradictions(replace(config, **CONTRADICTIONS[message]))
