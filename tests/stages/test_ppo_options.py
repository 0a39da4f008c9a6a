"""Every option of the PPO stage does what it says, through the loop's own functions on tiny models.

The oracles loop over one episode at a time in plain Python; they start from what the models said (log-probs,
values, scores), which test_models.py holds against stock forward passes.
"""

import json
import math
import statistics
from dataclasses import replace

import pytest
import torch
from torch import nn

import train_ppo
from families import FAMILIES, PAD, policy, random_groups, scalar_model
from loops import PROMPTS, gradients_of_steps, posts_of, ppo_loop, rolled_out, save_parents, updated
from utils.config import UserError
from utils.contradictions import refuse_contradictions
from utils.data.prompts import supervised_examples
from utils.data.report import DataReport
from utils.data.rows import NamedSet, Tokenised, load_data
from utils.models.generation import sample
from utils.models.outputs import response_logprobs, response_values, scores
from utils.models.parents import Parent
from utils.models.prompt_groups import pack, unpack
from utils.ptx import add_supervised_gradients
from utils.rollouts import episodes as episodes_module
from utils.rollouts.advantages import correct_engine

K = 3


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """For each family PPO's keys for tiny saved models, and for a folder of runs."""
    folders = {family: tmp_path_factory.mktemp(family) for family in FAMILIES}
    return {family: {"output_dir": str(folder), **save_parents(folder, family)}
            for family, folder in folders.items()}


@pytest.fixture
def config(families):
    return config_of(families["opt"])


def config_of(keys):
    return train_ppo.PPOStageConfig(
        **keys, max_prompt_tokens=16, max_new_tokens=6, max_completion_tokens=8, prompts_per_update=7,
        responses_per_prompt=K, total_episodes=42, per_device_batch_size=2, ppo_epochs=1, learning_rate=1e-2,
        max_grad_norm=0.0,
    )


def episodes_of(rollout):
    """Each episode of a rollout as plain lists: logprobs, ref_logprobs, values, score, ..."""
    found = []
    for n, mask in enumerate(rollout.response_mask):
        episode = {"score": rollout.scores[n].item()}
        for name in ("logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            tensor = getattr(rollout, name)
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


def expected_rewards(episode, config):
    score = episode["score"]
    if config.score_clip is not None:
        score = max(-config.score_clip, min(config.score_clip, score))
    pairs = zip(episode["logprobs"], episode["ref_logprobs"], strict=True)
    rewards = [-config.kl_coef * ESTIMATES[config.kl_estimator](p - q) for p, q in pairs]
    rewards[-1] += score
    return rewards


# ---------------------------------------------------------------------------------------- rewards, advantages


def moved_episodes(config):
    """Episodes of a policy that is not the reference any more, so that the KL is not 0."""
    loop, models = ppo_loop(config)
    with torch.no_grad():
        for weight in models.policy.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3))
    return episodes_of(rolled_out(loop, models)[1])


REWARDS = [{}, {"kl_estimator": "k2"}, {"kl_estimator": "k3"}, {"score_clip": 0.1},
           {"missing_eos_score": -3.0}, {"score_clip": 0.5, "missing_eos_score": -3.0}]


@pytest.mark.parametrize("options", REWARDS, ids=str)
def test_rewards_are_the_score_at_the_end_and_the_kl_penalty_everywhere(options, config):
    config = replace(config, kl_coef=0.3, **options)
    episodes = moved_episodes(config)
    gaps = [p - q for e in episodes for p, q in zip(e["logprobs"], e["ref_logprobs"], strict=True)]
    assert max(map(abs, gaps)) > 0.01
    assert max(abs(e["score"]) for e in episodes) > 0.5, "the reward is clipped, the score is kept as it is"
    for episode in episodes:
        same(episode["rewards"], expected_rewards(episode, config))


def test_rewards_are_whitened_over_the_update_without_their_mean(config):
    plain, white = (moved_episodes(replace(config, whiten_rewards=asked)) for asked in (False, True))
    flat = [x for e in plain for x in e["rewards"]]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    for before, after in zip(plain, white, strict=True):
        same(after["rewards"], [(x - mean) / deviation + mean for x in before["rewards"]])


@pytest.mark.parametrize("size", [1, 2, 7])
def test_gae_whitened_over_the_whole_update(size, config):
    config = replace(config, per_device_batch_size=size, lam=0.7, gamma=0.9)
    episodes = moved_episodes(config)
    raw = [gae_of(e["rewards"], e["values"], config.gamma, config.lam) for e in episodes]
    flat = [x for advantages in raw for x in advantages]
    mean, deviation = statistics.fmean(flat), statistics.pstdev(flat)
    for episode, advantages in zip(episodes, raw, strict=True):
        same(episode["advantages"], [(x - mean) / deviation for x in advantages])
        same(episode["returns"], [a + v for a, v in zip(advantages, episode["values"], strict=True)])


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_responses_are_compared_with_those_of_their_own_prompt(advantage, config):
    loop, models = ppo_loop(replace(config, advantage=advantage))
    assert models.trained.value_model is None
    sampled, rollout = rolled_out(loop, models)
    episodes = episodes_of(rollout)
    assert not rollout.advantages[~rollout.response_mask].any()
    for first in range(0, len(episodes), K):
        group = episodes[first : first + K]
        totals = [sum(e["rewards"]) for e in group]
        for episode, total in zip(group, totals, strict=True):
            others = (sum(totals) - total) / (K - 1)
            expected = total - others if advantage == "rloo" else (
                (total - statistics.fmean(totals)) / (statistics.stdev(totals) + 1e-4))
            # some deviations are next to 0
            same(episode["advantages"], [expected] * len(episode["rewards"]), floor=1e-3)
            assert episode["values"] is None and episode["returns"] is None


# ------------------------------------------------------------------------------------------------- the update

KINDS = {"separate value model": {}, "shared trunk": {"value_model": "shared"}, "rloo": {"advantage": "rloo"},
         "grpo": {"advantage": "grpo"}, "LoRA": {"lora_rank": 2},
         "LoRA, shared trunk, recomputed": {"lora_rank": 2, "value_model": "shared",
                                            "gradient_checkpointing": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_in_the_first_inner_step_nothing_has_moved(family, kind, families):
    """Detail 27: sampling, packing by length and the update's forward pass agree on every log-prob."""
    figures, *_ = updated(replace(config_of(families[family]), **KINDS[kind]))
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert figures["policy/clipfrac"] == 0
    assert figures["policy/grad_norm"] > 0
    assert ("loss/value" in figures) == ("advantage" not in KINDS[kind])


def test_with_lora_the_reference_is_the_policy_without_its_adapter(config):
    """One update moves policy and value model; what is frozen shares their weights, and stays."""
    config = replace(config, lora_rank=2)
    loop, models = ppo_loop(config)
    train_ppo.optimise(loop, models, *rolled_out(loop, models), None)
    episodes, after = rolled_out(loop, models)
    sft, reward_model = policy("opt"), scalar_model("opt", seed=1)  # as they were saved
    groups = pack(episodes.queries, [episodes.responses[n : n + K] for n in range(0, 7 * K, K)], PAD)
    with torch.no_grad():
        ref_logprobs = response_logprobs(sft, groups, config.temperature)
        values = response_values(reward_model, groups)
        score = torch.where(episodes.ended, scores(reward_model, groups), config.missing_eos_score)
    torch.testing.assert_close(after.ref_logprobs, ref_logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.scores, score, rtol=1e-4, atol=1e-5)
    assert (after.values - values).abs().max() > 1e-3, "the value model has moved"
    assert (after.logprobs - ref_logprobs).abs().max() > 1e-3, "the policy has moved"


def test_a_shared_trunk_learns_from_the_value_loss(config):
    config = replace(config, value_model="shared")
    _, separate = ppo_loop(replace(config, value_model="separate"))
    gradients = {}
    for vf_coef in (0.0, 1.0):
        loop, models = ppo_loop(replace(config, vf_coef=vf_coef))
        assert count(models.trained) < 0.6 * count(separate.trained)
        episodes, rollout = rolled_out(loop, models)
        assert not rollout.values.any(), "a new head says 0"
        # a head of 0 passes no gradient on
        nn.init.normal_(models.trained.value_model.weight, generator=torch.Generator().manual_seed(0))
        steps = gradients_of_steps(loop)
        train_ppo.optimise(loop, models, episodes, rollout, None)
        [gradients[vf_coef]] = steps
    trunk = [name for name in gradients[0.0] if name.startswith("policy.")]
    assert not gradients[0.0]["value_model.weight"].any() and gradients[1.0]["value_model.weight"].any()
    assert max((gradients[1.0][name] - gradients[0.0][name]).abs().max() for name in trunk) > 1e-6


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_passes_stop_when_the_policy_has_moved_too_far(config):
    config = replace(config, ppo_epochs=4, num_minibatches=2)
    all_passes, _, steps, whole = updated(config)
    assert all_passes["policy/epochs"] == 4 and len(steps) == 8 and all_passes["policy/approx_kl"] > 1e-4
    free, _, steps, _ = updated(replace(config, target_kl=1e3))
    assert free["policy/epochs"] == 4 and len(steps) == 8
    cut, _, steps, cut_loop = updated(replace(config, num_minibatches=1, target_kl=1e-6))
    assert cut["policy/epochs"] == len(steps) == 2, "nothing has moved in the first pass, but in the second"
    cut, _, steps, cut_loop = updated(replace(config, target_kl=1e-6))
    assert cut["policy/epochs"] == 1 and len(steps) == 2, "here it moves between the first pass's steps"
    assert cut_loop.learning_rate == whole.learning_rate > 0, "the learning rate follows the updates"


SUPERVISED = Tokenised([], random_groups([5, 2, 9], [[4]] * 3, seed=9)[0],
                       [[4, 2], [5, 6, 7, 8, 2], [9, 3, 2]])


def stock_nll(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none")


@pytest.mark.parametrize("kind", ["separate", "shared"])
@pytest.mark.parametrize("size", [1, 7])
def test_ptx_adds_the_supervised_loss_and_its_gradient(size, kind, config):
    """In every step as many examples as prompts, one mean over their tokens whatever the rows of a pass."""
    config = replace(config, per_device_batch_size=size, ptx_coef=2.5, actor_training_data="x",
                     value_model=kind)
    _, _, [without], _ = updated(config)
    loop, models = ppo_loop(config)
    stock_model = policy("opt")
    seen, backward = [], loop.backward
    loop.backward = lambda loss, groups: (seen.append(groups), backward(loss, groups))
    steps = gradients_of_steps(loop)
    figures = train_ppo.optimise(loop, models, *rolled_out(loop, models), SUPERVISED)
    [gradients] = steps
    examples = [(prompt, completion) for groups in seen for prompt, [completion, *others] in unpack(groups)
                if not others]
    assert len(examples) == 7 and len({str(example) for example in examples}) > 1
    stock = torch.cat([stock_nll(stock_model, *example) for example in examples])
    same(figures["loss/ptx"], stock.mean().item())
    stock.mean().backward()
    for name, weight in stock_model.named_parameters():
        found = gradients[f"policy.{name}"] - without[f"policy.{name}"]
        torch.testing.assert_close(found, 2.5 * weight.grad, rtol=1e-3, atol=1e-4)
    for name in gradients:
        if name.startswith("value_model."):
            torch.testing.assert_close(gradients[name], without[name])


def test_ptx_examples_differ_between_updates_and_processes_and_come_again(config):
    """And between the optimizer steps of an update; two processes share out what one process would draw."""
    prompts, _ = random_groups([3] * 50, [[2]] * 50, seed=4)
    examples = Tokenised([], prompts, [[5, 2]] * 50)
    config = replace(config, ptx_coef=1.0, actor_training_data="x", per_device_batch_size=7)

    def drawn(step, seed=0, rank=0, ranks=1):
        loop, _ = ppo_loop(replace(config, seed=seed))
        loop.skip_optimizer_steps(step)
        loop.share = lambda rows: rows[rank::ranks]
        seen = []
        loop.backward = lambda loss, groups: seen.extend(str(prompt) for prompt, _ in unpack(groups))
        add_supervised_gradients(loop, examples, 7)
        return sorted(seen)

    assert drawn(0) == drawn(0) and len(drawn(0)) == 7
    assert len({str(found) for found in (drawn(0), drawn(1), drawn(0, seed=1))}) == 3
    halves = [drawn(0, rank=rank, ranks=2) for rank in (0, 1)]
    assert list(map(len, halves)) == [4, 3] and sorted(sum(halves, [])) == drawn(0)


def test_the_average_is_taken_after_every_step_and_starts_at_the_sft_model(config):
    config = replace(config, ema_decay=0.75, ppo_epochs=3)
    loop, models = ppo_loop(config)
    name, weight = next(iter(models.policy.named_parameters()))
    start = weight.detach().clone()
    places = [start]
    loop.optimizer.optimizer.register_step_post_hook(lambda *_: places.append(weight.detach().clone()))
    train_ppo.optimise(loop, models, *rolled_out(loop, models), None)
    expected = start
    for place in places[1:]:
        expected = 0.75 * expected + 0.25 * place
    average = dict(models.outcome.named_parameters())[name]
    assert len(places) == 4 and models.outcome is models.average.module
    torch.testing.assert_close(average.detach(), expected)
    assert (average - weight).abs().max() > 1e-4 and (average - start).abs().max() > 1e-4


def test_without_an_average_the_policy_itself_is_judged(config):
    _, models = ppo_loop(config)
    assert models.average is None and models.outcome is models.policy


def test_the_kl_coefficient_adapts_from_update_to_update(config, monkeypatch):
    monkeypatch.setattr(train_ppo, "evaluate", lambda *_: None)
    loop, models = ppo_loop(replace(config, kl_target=1.0, kl_horizon=100, total_episodes=63))
    train_ppo.train(loop, models, posts_of(PROMPTS), None, None)
    kl_coef, logged = config.kl_coef, loop.run.read_metrics()
    for figures in logged:
        assert figures["objective/kl_coef"] == pytest.approx(kl_coef)
        penalised = figures["objective/score"] - kl_coef * figures["objective/kl"]
        assert figures["objective/rlhf_reward"] == pytest.approx(penalised, abs=1e-4)
        kl_coef *= 1 + max(-0.2, min(0.2, figures["objective/kl"] / 1.0 - 1)) * 21 / 100
    assert logged[1]["objective/kl_coef"] != logged[2]["objective/kl_coef"] and len(logged) == 3
    assert loop.carried == {"kl_coef": pytest.approx(kl_coef), "reward_scales": {}, "length_fits": {}}


def test_held_out_posts_never_get_into_ptx(config, tmp_path):
    """From one source SFT and PPO hold out the same posts: the policy is not taught what it is judged on."""
    rows = [{"prompt": f"post {n}\n\nTL;DR:", "completion": f"summary {n}"} for n in range(6)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config, ptx_coef=0.1, actor_training_data=str(path), max_completion_tokens=64,
                     max_prompt_tokens=64)
    tokenizer = Parent("model", "assets/opt-mini").tokenizer
    report = DataReport()
    named = {"actor_training_data": NamedSet(str(path), "examples")}
    rows_found = load_data(config, named, tokenizer, report)["actor_training_data"]
    kept = supervised_examples(config, rows_found, [rows_found[2:3], rows_found[3:4]], report)
    assert [example.prompt for example in kept.examples] == [rows[n]["prompt"] for n in (0, 1, 4, 5)]
    assert len(kept.prompts) == len(kept.completions) == 4
    assert report.notes == ["actor_training_data: left out 2 of 6 examples, whose prompts are held out for "
                            "validation or test"]
    with pytest.raises(UserError, match="^actor_training_data: every prompt in .* is held out"):
        supervised_examples(config, rows_found, [rows_found], report)


CONTRADICTIONS = {
    "responses_per_prompt: advantage 'rloo' compares": {"advantage": "rloo", "responses_per_prompt": 1},
    "responses_per_prompt: advantage 'grpo' compares": {"advantage": "grpo", "responses_per_prompt": 1},
    "actor_training_data: it is for ptx_coef; give both": {"ptx_coef": 0.1},
    "actor_training_data: it is for ptx_coef; give both or": {"actor_training_data": "mine.jsonl"},
    "prompts_per_update: 1000000 prompts with 2 responses each are 2000000": {
        "prompts_per_update": 10**6, "responses_per_prompt": 2},
    "value_model: advantage 'rloo' has none": {"advantage": "rloo", "value_model": "shared"},
    "target_kl: it leaves out later passes": {"target_kl": 0.1, "ppo_epochs": 1},
    "rollout_engine: 'transformers' does not work": {"rollout_engine": "transformers", "deepspeed": "zero2"},
    "rollout_engine: 'vllm' does not work on weights that": {"rollout_engine": "vllm", "deepspeed": "zero3"},
    "rollout_engine: 'vllm' does not work on compiled": {"rollout_engine": "vllm", "compile_trunk": True},
    "rollout_engine: 'vllm' does not take weights in 4": {
        "rollout_engine": "vllm", "load_in_4bit": True, "lora_rank": 2},
    "kl_coef: 0 never adapts": {"kl_target": 1.0, "kl_coef": 0.0},
    "kl_horizon: with 21 episodes an update it must be above 4.2": {"kl_target": 1.0, "kl_horizon": 4},
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_keys_that_make_no_sense_together_are_refused(message, config):
    refuse_contradictions(config)
    with pytest.raises(UserError, match="^" + message):
        refuse_contradictions(replace(config, **CONTRADICTIONS[message]))


def test_responses_of_transformers_are_trained_on_as_ours(config):
    """In float32 its log-probs are those of the forward pass: no drift, weights and first ratios of 1."""
    loop, models = ppo_loop(replace(config, rollout_engine="transformers"))
    episodes, rollout = rolled_out(loop, models)
    assert len(episodes.responses) == 21 and 1 < rollout.response_mask.sum(1).float().mean() <= 6
    mask = rollout.response_mask
    torch.testing.assert_close(rollout.weights[mask], torch.ones(int(mask.sum())), rtol=0, atol=1e-4)
    assert correct_engine(loop, episodes)[1]["policy/sampling_drift"] < 1e-5
    figures = train_ppo.optimise(loop, models, episodes, rollout, None)
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5) and figures["policy/grad_norm"] > 0


def drifting_by(drift):
    """An engine that is ours with log-probs that are off."""
    def off(policy, queries, seed, **settings):
        seeds = [seed + i for i in range(len(queries) * settings["k"])]
        found = sample(policy, queries, seeds=seeds, **settings)
        return found._replace(logprobs=[[value + drift for value in row] for row in found.logprobs])

    return off


@pytest.mark.parametrize("drift", [-3.0, math.nan])
def test_an_engine_that_computes_another_model_ends_the_run(drift, config, monkeypatch):
    """Weights that never reach an engine would go unnoticed: the limit of importance weights hides them."""
    monkeypatch.setattr(episodes_module, "sample_continuously", drifting_by(drift))
    message = "^rollout_engine: the log-probs of 'transformers' are (3.00|nan) nats a token from those of a"
    with pytest.raises(UserError, match=message):
        rolled_out(*ppo_loop(replace(config, rollout_engine="transformers")))


@pytest.mark.parametrize(("drift", "limit", "weight"), [(-0.5, 2.0, math.exp(0.5)), (-1.0, 2.0, 2.0),
                                                        (0.5, 2.0, math.exp(-0.5)), (-1.0, 1.5, 1.5)])
def test_tokens_of_an_engine_that_drifts_are_weighted_in_the_policy_loss(drift, limit, weight, config,
                                                                         monkeypatch):
    """rloo has no other loss."""
    config = replace(config, advantage="rloo")
    monkeypatch.setattr(episodes_module, "sample_continuously", drifting_by(drift))
    *_, (ours,), _ = updated(config)
    drifting = replace(config, rollout_engine="transformers", importance_limit=limit)
    loop, models = ppo_loop(drifting)
    figures = correct_engine(loop, rolled_out(loop, models)[0])[1]
    assert figures["policy/sampling_drift"] == pytest.approx(abs(drift), abs=1e-4)
    *_, (theirs,), _ = updated(drifting)
    for name, gradient in ours.items():
        torch.testing.assert_close(theirs[name], weight * gradient, rtol=1e-3, atol=1e-6)


def test_our_sampler_has_no_weights(config):
    loop, models = ppo_loop(config)
    episodes, rollout = rolled_out(loop, models)
    assert rollout.weights is None and correct_engine(loop, episodes) == (None, {})
