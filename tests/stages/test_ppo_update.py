"""The PPO stage's own functions on tiny models: what an update starts from, what its steps are made of."""

import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import train_ppo
from families import EOS, PAD, policy, scalar_model
from loops import PROMPTS, posts_of, ppo_loop, rolled_out, save_parents, step_by_sgd, updated, weights_of
from utils.config import UserError
from utils.data.batches import PromptBatches
from utils.judge.evaluation import Summaries
from utils.judge.held_out import outcome_weights
from utils.models.outputs import response_logprobs, response_values, scores
from utils.models.prompt_groups import pack, unpack
from utils.ppo import Rollout
from utils.rewards.rewards import Scores
from utils.rollouts.episodes import Episodes, Pass, minibatches, passes_of
from utils.rollouts.figures import refuse_collapse, rollout_metrics


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A small run; its parents are tiny OPTs with dropout, saved in float32."""
    folder = tmp_path_factory.mktemp("ppo")
    return train_ppo.PPOStageConfig(
        **save_parents(folder), output_dir=str(folder), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=7, responses_per_prompt=3, total_episodes=42, per_device_batch_size=1,
        ppo_epochs=1, learning_rate=1e-2, max_grad_norm=0.0,
    )


@torch.no_grad()
def test_a_rollout_starts_from_the_parents_as_they_were_saved(config):
    """Reference log-probs at the sampling temperature, scores, and values that are the reward model's own."""
    sft, reward_model = policy("opt"), scalar_model("opt", seed=1)
    episodes, rollout = rolled_out(*ppo_loop(config))
    assert config.temperature == 0.7 and not episodes.ended.all() and len(episodes.passes) == 7
    groups = pack(episodes.queries, [episodes.responses[n : n + 3] for n in range(0, 21, 3)], PAD)
    assert torch.equal(groups.response_mask, rollout.response_mask)
    assert episodes.queries != PROMPTS and sorted(episodes.queries) == sorted(PROMPTS), "in another order"
    for ours, theirs in (
        (rollout.scores, torch.where(episodes.ended, scores(reward_model, groups), config.missing_eos_score)),
        (rollout.logprobs, response_logprobs(sft, groups, 0.7)),
        (rollout.ref_logprobs, response_logprobs(sft, groups, 0.7)),
        (rollout.values, response_values(reward_model, groups)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_every_update_draws_its_own_responses(config):
    loop, models = ppo_loop(replace(config, prompts_per_update=1, total_episodes=9))
    one = PROMPTS[:1]
    drawn = [str(rolled_out(loop, models, update, one)[0].responses) for update in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len({*drawn}) == 3


def test_prompts_come_once_a_pass_in_another_order_in_each_pass_and_for_each_seed():
    def drawn(seed):
        return sum((PromptBatches(10, 4, seed)[update] for update in range(5)), [])

    passes = [drawn(seed)[first : first + 10] for seed in (0, 1) for first in (0, 10)]
    assert all(sorted(order) == list(range(10)) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert drawn(0) == drawn(0)


def test_the_optimizer_is_the_configured_one(config):
    """Over policy and value model; what its numbers do is in test_loop.py."""
    loop, models = ppo_loop(replace(config, adam_eps=3e-4, adam_beta2=0.9, weight_decay=0.01))
    decay = {}
    for group in loop.optimizer.param_groups:
        assert (group["eps"], group["betas"]) == (3e-4, (0.9, 0.9))
        decay |= dict.fromkeys(map(id, group["params"]), group["weight_decay"])
    assert decay == {id(w): 0.01 if w.dim() > 1 else 0.0 for w in models.trained.parameters()}


LENGTHS = [3, 1, 2]


def numbers(seed, scale):
    """(N, R) numbers, 0 at padding as the loop has them, and the same as lists of the real ones."""
    drawn = scale * torch.randn(3, 3, generator=torch.Generator().manual_seed(seed))
    drawn = torch.where(MASK, drawn, 0.0)
    return drawn, [row[:n].tolist() for row, n in zip(drawn, LENGTHS, strict=True)]


MASK = torch.tensor([[t < n for t in range(3)] for n in LENGTHS])


class Said(nn.Module):
    """In place of policy and value model: says what it is given for each micro-batch, one after the other."""

    def __init__(self, *answers):
        super().__init__()
        self.answers = iter(answers)

    def forward(self, groups, temperature):
        return next(self.answers)


def test_the_loss_of_a_micro_batch_by_definition(config):
    """Two micro-batches of other widths: each clip from its own key, vf_coef, metrics over real tokens.

    Each loss is divided by the tokens of the whole step.
    """
    config = replace(config, prompts_per_update=3, responses_per_prompt=1, cliprange=0.1, cliprange_value=0.4,
                     vf_coef=0.3)
    (new, n), (old, o), (advantages, a), (new_values, v), (values, w), (returns, r) = (
        numbers(seed, scale) for seed, scale in enumerate((0.3, 0.3, 1.0, 1.0, 1.0, 1.0)))
    policy_losses, value_losses, clips, value_clips, ratios = [], [], 0, 0, []
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = math.exp(n[i][t] - o[i][t])
            held = min(max(ratio, 0.9), 1.1)
            policy_losses.append(max(-a[i][t] * ratio, -a[i][t] * held))
            clips += -a[i][t] * held > -a[i][t] * ratio
            near = min(max(v[i][t], w[i][t] - 0.4), w[i][t] + 0.4)
            value_losses.append(0.5 * max((v[i][t] - r[i][t]) ** 2, (near - r[i][t]) ** 2))
            value_clips += (near - r[i][t]) ** 2 > (v[i][t] - r[i][t]) ** 2
            ratios.append(ratio)
    assert 0 < clips < 6 and 0 < value_clips < 6
    loop, models = ppo_loop(config)
    entropy = torch.where(MASK, 2.0, 0.0)
    parts = [torch.tensor([0]), torch.tensor([2, 1])]
    loop.model = Said(*((new[rows, :width], entropy[rows, :width], new_values[rows, :width])
                        for rows, width in zip(parts, (3, 2), strict=True)))
    losses = []
    loop.backward = lambda loss, groups: losses.append(loss.item())
    episodes = Episodes([[3]] * 3, [[4] * length for length in LENGTHS], MASK, old, MASK[:, 0], [
        Pass(pack([[3]] * len(rows), [[[4] * LENGTHS[row]] for row in rows], PAD), rows) for rows in parts])
    rollout = Rollout(MASK, old, old, values, MASK[:, 0].float(), values, advantages, returns)
    figures = train_ppo.optimise(loop, models, episodes, rollout, None)
    each = [p + 0.3 * q for p, q in zip(policy_losses, value_losses, strict=True)]
    assert losses == pytest.approx([sum(each[:3]) / 6, sum(each[3:]) / 6], rel=1e-5)
    expected = {"loss/policy": sum(policy_losses), "loss/value": sum(value_losses), "policy/clipfrac": clips,
                "value/clipfrac": value_clips, "objective/entropy": 12.0, "policy/ratio": sum(ratios),
                "policy/approx_kl": sum(x - 1 - math.log(x) for x in ratios)}
    assert {name: figures[name] for name in expected} == pytest.approx(
        {name: total / 6 for name, total in expected.items()}, rel=1e-4)
    assert figures["policy/ratio_max"] == pytest.approx(max(ratios))


def test_figures_of_a_rollout_by_definition(config):
    """Sums over a response, means over responses, explained variance over tokens."""
    (old, o), (ref, q), (rewards, x), (values, w), (returns, r) = (numbers(n, 1.0) for n in range(10, 15))
    loop, _ = ppo_loop(replace(config, prompts_per_update=3, responses_per_prompt=1, kl_coef=0.4))
    loop.step = 4  # the fifth update
    scored, advantages = torch.tensor([4.0, -1.0, 0.5]), torch.full((3, 3), 9.0)
    rollout = Rollout(MASK, old, ref, values, scored, rewards, advantages, returns)
    found = rollout_metrics(loop, rollout, torch.tensor([True, False, True]))
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
        "objective/kl_coef": 0.4,
        "objective/episodes": 15,
        "value/explained_variance": 1 - statistics.pvariance(residual) / statistics.pvariance(flat),
    }, rel=1e-5)


def test_before_the_first_step_the_policy_is_the_one_that_sampled(config):
    """Detail 27 through the real loop: sampling, grouping by length and the update's forward pass agree."""
    figures, *_ = updated(config)
    assert figures["policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert figures["policy/approx_kl"] == pytest.approx(0, abs=1e-7)
    assert figures["policy/clipfrac"] == 0


# ----------------------------------------------------------------------------------------- one optimizer step


def largest_difference(weights, others):
    return max((a - b).abs().max().item() for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("num_minibatches", [1, 3])
def test_micro_batches_change_nothing(num_minibatches, config):
    """Detail 12: responses differ in length, so a mean of micro-batch means would be another gradient.

    Nor may the rows of a pass say which prompts are in which optimizer step. Weights are around 0.2 and move
    by .01 and more; they must agree to 3e-6.
    """
    config = replace(config, num_minibatches=num_minibatches, ppo_epochs=2, adam_eps=1e-3)
    start = weights_of(ppo_loop(config)[0])
    whole, weights, *_ = updated(replace(config, per_device_batch_size=7))
    assert whole["policy/grad_norm"] > 0 and largest_difference(weights, start) > 0.01
    for size in (1, 2):
        split, split_weights, *_ = updated(replace(config, per_device_batch_size=size))
        assert whole == pytest.approx(split, rel=1e-4, abs=1e-6)
        assert largest_difference(weights, split_weights) < 3e-6


@pytest.mark.parametrize(("count", "asked"), [(7, 1), (7, 3), (8, 4), (7, 9)])
def test_minibatches_share_out_the_prompts_of_the_whole_update(count, asked, config):
    """Each prompt once a pass, all its responses with it, in another order in each pass, update and run."""
    config = replace(config, prompts_per_update=count, num_minibatches=asked, seed=0)

    def drawn(epoch, update=1, seed=0):
        return minibatches(SimpleNamespace(config=replace(config, seed=seed), step=update - 1), epoch)

    parts = drawn(1)
    assert len(parts) == min(count, asked) and sorted(sum(parts, [])) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    others = {str(drawn(2)), str(drawn(1, update=2)), str(drawn(1, seed=1))}
    assert drawn(1) == parts and (asked == 1 or len(others - {str(parts)}) == 3)


@pytest.mark.parametrize("ranks", [1, 7])
def test_each_rank_computes_its_own_prompts_of_a_minibatch(ranks, config):
    """What the ranks compute together is the minibatch: here each rank has one prompt, or one rank all."""
    config = replace(config, num_minibatches=2, per_device_batch_size=2)
    loop, models = ppo_loop(config)
    episodes, rollout = rolled_out(loop, models)
    for prompts in minibatches(loop, 1):
        computed = []
        for rank in range(ranks):
            size = 7 // ranks
            mine = slice(rank * size, (rank + 1) * size)
            accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, device="cpu")
            of_rank = SimpleNamespace(config=config, accelerator=accelerator, device="cpu",
                                      tokenizer=loop.tokenizer)
            own = episodes._replace(queries=episodes.queries[mine],
                                    responses=episodes.responses[3 * mine.start : 3 * mine.stop])
            for groups, members in passes_of(of_rank, own, prompts):
                computed += (3 * mine.start + members).tolist()
                packed = [completion for _, group in unpack(groups) for completion in group]
                assert packed == [own.responses[member] for member in members]
        assert sorted(computed) == sorted(3 * prompt + k for prompt in prompts for k in range(3))


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_gradient_is_that_of_the_mean_over_real_tokens(size, config):
    """Where nothing has moved yet the gradient is that of -advantage x log-prob: one mean over the update."""
    config = replace(config, per_device_batch_size=size, vf_coef=0.0)
    loop, models = ppo_loop(config)
    episodes, rollout = rolled_out(loop, models)
    mask = rollout.response_mask
    assert not mask.all(), "the test wants padding"
    groups = pack(episodes.queries, [episodes.responses[n : n + 3] for n in range(0, 21, 3)], PAD)
    logprobs = response_logprobs(models.policy, groups, config.temperature)
    (-(rollout.advantages * logprobs)[mask].mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in models.policy.parameters()]).norm().item()
    models.trained.zero_grad()
    figures = train_ppo.optimise(loop, models, episodes, rollout, None)
    assert figures["policy/grad_norm"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("asked", "made_steps"), [(1, 1), (3, 3), (4, 4), (7, 7), (9, 7)])
def test_a_pass_makes_as_many_steps_as_minibatches_and_the_scheduler_knows(asked, made_steps, config):
    _, _, steps, loop = updated(replace(config, num_minibatches=asked, ppo_epochs=2, total_episodes=21))
    assert len(steps) == 2 * made_steps
    assert loop.learning_rate == 0, "one update is the whole run: the rate ends at 0"


def test_a_gradient_norm_of_0_is_no_clipping(config):
    _, moved, _, loop = updated(replace(config, max_grad_norm=0.0))
    _, free, *_ = updated(replace(config, max_grad_norm=1e9))
    assert all(map(torch.equal, moved, free))
    assert largest_difference(moved, weights_of(ppo_loop(config)[0])) > 0


def test_a_step_takes_this_steps_gradient_clipped_to_the_norm(config):
    """AdamW hides the gradient's size, so SGD takes its place: each step is rate x max_grad_norm long."""
    loop, models = ppo_loop(replace(config, max_grad_norm=0.01, num_minibatches=2))
    step_by_sgd(loop, 1.0)
    places = [torch.cat([weight.flatten() for weight in weights_of(loop)])]
    loop.optimizer.optimizer.register_step_post_hook(
        lambda *_: places.append(torch.cat([weight.flatten() for weight in weights_of(loop)])))
    figures = train_ppo.optimise(loop, models, *rolled_out(loop, models), None)
    assert figures["policy/grad_norm"] > 0.01, "as it was before clipping"
    lengths = [(after - before).norm().item() for before, after in zip(places, places[1:], strict=False)]
    assert lengths == pytest.approx([0.01, 0.01], rel=1e-2)
    left = [p.grad for p in loop.module.parameters() if p.grad is not None and p.grad.any()]
    assert not left, "nothing is left over for the next step"


# ---------------------------------------------------------------------------------------------- the whole run


@pytest.mark.parametrize(("kl", "score", "stops"), [
    (4.9, 1.0, None), (5.1, 1.0, "the KL .* above kl_limit"),
    (math.nan, 1.0, "the KL or the score is not finite"),
    (0.0, math.inf, "the KL or the score is not finite")])
def test_an_update_that_has_gone_too_far_is_not_trained_on(kl, score, stops, config):
    loop, _ = ppo_loop(replace(config, kl_limit=5.0))
    figures = {"objective/kl": kl, "objective/score": score}
    if stops is None:
        refuse_collapse(loop, figures, 3)
    else:
        with pytest.raises(UserError, match=f"^{stops}.*; the last checkpoint is intact$"):
            refuse_collapse(loop, figures, 3)
    logged = [row for row in loop.run.read_metrics() if row["step"] == 3]
    assert len(logged) == (stops is not None), "what stopped it is in the metrics"


def test_a_run_stops_at_such_an_update_before_it_trains_on_it(config, monkeypatch):
    loop, models = ppo_loop(replace(config, kl_limit=0.0))
    figures = {"objective/kl": 0.1, "objective/score": 0.0}
    monkeypatch.setattr(train_ppo, "rollout_metrics", lambda *_: figures)
    start = weights_of(loop)
    with pytest.raises(UserError, match="above kl_limit"):
        train_ppo.train(loop, models, posts_of(PROMPTS), None, None)
    assert all(map(torch.equal, start, weights_of(loop)))


def test_evaluations_judge_the_average_where_there_is_one(config):
    judged, written = [], Summaries([[EOS]], [""], [True], [[0.0]])
    judge = SimpleNamespace(summaries=lambda policy, *_: (judged.append(policy), written)[1],
                            scores=lambda *_: [Scores([0.0], {})] * 2, kls=lambda *_: [0.0],
                            rouge=lambda *_: None, opinions=lambda *_: ([], {}))
    loop, models = ppo_loop(replace(config, ema_decay=0.5, eval_steps=1))
    train_ppo.train(loop, models, posts_of(PROMPTS), judge, None)
    assert len(judged) == 2 * loop.config.updates, "greedy and sampled, after each update"
    assert all(outcome is models.average.module for outcome in judged)
    kept, average = outcome_weights(models), models.average.module
    assert kept.keys() == {name for name, _ in models.policy.named_parameters()}
    assert all(weight is average.get_parameter(name) for name, weight in kept.items()), "and it is kept"


def test_gradient_checkpointing_recomputes_in_the_update(config, monkeypatch):
    loop, models = ppo_loop(replace(config, gradient_checkpointing=True))
    calls = []
    for model in (models.policy, models.trained.value_model):
        for layer in model.base_model.decoder.layers:
            inner = layer._gradient_checkpointing_func
            monkeypatch.setattr(layer, "_gradient_checkpointing_func", lambda *a, inner=inner, **k: (
                calls.append(torch.is_grad_enabled()), inner(*a, **k))[1])
    episodes, rollout = rolled_out(loop, models)
    train_ppo.optimise(loop, models, episodes, rollout, None)
    assert sum(calls) == len(episodes.passes) * 2 * 2, "two models of two layers in each micro-batch"


def test_bf16_sampling_sees_the_weights_after_a_step(config, monkeypatch):
    """torch's autocast keeps cast weights until its block ends: a block around the loop would hide steps."""
    monkeypatch.setattr(train_ppo, "evaluate", lambda *_: None)
    loop, models = ppo_loop(replace(config, mixed_precision="bf16", learning_rate=0.1))
    train_ppo.train(loop, models, posts_of(PROMPTS), None, None)
    before, after = (abs(row["objective/kl"]) for row in loop.run.read_metrics())
    assert before < 0.01 and after > 0.5, "the second update's samples come from the policy after a step"
