"""The loop of all stages: one mean a step, AdamW, rates, what is left out, when a stage looks and saves."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.nn.functional import cross_entropy

import train_ppo
import train_reward
import train_sft
from families import EOS, PAD, policy, random_groups, scalar_model
from loops import PROMPTS as PPO_PROMPTS
from loops import bare_loop, epoch_loop, posts_of, ppo_loop, save_parents, step_by_sgd, weights_of
from utils.config import UserError
from utils.loop import Loop, Schedule
from utils.models.loading import without_dropout
from utils.models.prompt_groups import pack, unpack

PROMPTS, COMPLETIONS = random_groups([5, 1, 8, 3], [[2], [7], [4], [1]])
ROWS = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])}
        for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
EQUAL = {"rouge_avg": 1.0, "loss": 1.0}  # what every evaluation finds


def sft_loop(folder, model=None, **keys) -> Loop:
    """A loop of the SFT stage on `ROWS`, all four of them in a step; nothing is clipped."""
    keys = {"max_grad_norm": 0.0, "logging_steps": 1, **keys}
    config = train_sft.SFTStageConfig(output_dir=str(folder), **keys)
    return epoch_loop(config, without_dropout(policy("opt")) if model is None else model, len(ROWS))


@pytest.fixture(autouse=True)
def no_summaries(monkeypatch):
    """Evaluations of SFT, which would take most of the time."""
    monkeypatch.setattr(train_sft, "evaluate", lambda *_: EQUAL)


def logged(loop, name):
    return [row[name] for row in loop.run.read_metrics() if name in row]


# ----------------------------------------------------------------------------------------- one mean of a step


def token_losses(model):
    """-log p of every completion token of all rows, by stock forward passes on single rows."""
    losses = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["prompt"] + row["completion"]])).logits[0]
        losses.append(cross_entropy(logits[len(row["prompt"]) - 1 : -1], torch.tensor(row["completion"]),
                                    reduction="none"))
    return torch.cat(losses)


def assert_one_sgd_step(loop):
    """The weights are those after one step of plain SGD at .1 on the mean over all tokens of `ROWS`."""
    oracle = without_dropout(policy("opt"))
    loss = token_losses(oracle).mean()
    loss.backward()
    for ours, theirs in zip(loop.module.model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=0, atol=1e-5)
    assert logged(loop, "sft/loss") == [pytest.approx(loss.item(), rel=1e-5)]
    assert logged(loop, "sft/grad_norm") == [pytest.approx(
        math.sqrt(sum(weight.grad.square().sum().item() for weight in oracle.parameters())), rel=1e-4)]


@pytest.mark.parametrize(("batch_size", "accumulation", "max_tokens"),
                         [(4, 1, None), (2, 2, None), (1, 4, None), (4, 1, 24), (4, 1, 1), (2, 2, 15)])
def test_a_step_follows_the_mean_over_all_its_tokens(batch_size, accumulation, max_tokens, tmp_path):
    """Detail 12: rows of 2, 7, 4 and 1 tokens; a mean of micro-batch means is another gradient."""
    loop = sft_loop(tmp_path, per_device_batch_size=batch_size, gradient_accumulation_steps=accumulation,
                    micro_batch_tokens=max_tokens)
    step_by_sgd(loop, 0.1)
    train_sft.train(loop, Dataset.from_list(ROWS), None)
    assert loop.step == 1
    assert_one_sgd_step(loop)
    assert all(row["completion"][-1] == EOS for row in ROWS), "the EOS is learnt as well"


def test_a_spare_part_counts_nothing(tmp_path, monkeypatch):
    """As on a rank with two parts fewer than another one; all ranks compute as often as that one."""
    loop = sft_loop(tmp_path, per_device_batch_size=2, gradient_accumulation_steps=2)
    step_by_sgd(loop, 0.1)
    monkeypatch.setattr("utils.loop.max_over_ranks", lambda number: number and number + 2)
    counts, backward = [], loop.backward
    loop.backward = lambda loss, groups: (counts.append(loop.part_counts), backward(loss, groups))
    train_sft.train(loop, Dataset.from_list(ROWS), None)
    assert counts == [1, 1, 0, 0]
    assert_one_sgd_step(loop)


# ------------------------------------------------------------------------------------------- AdamW, its rates


def rate_at(step, steps, warmup, decay):
    """Share of the peak learning rate in optimizer step 0, 1, ...: a linear rise, then a fall to 0."""
    if step < warmup:
        return step / warmup
    left = (step - warmup) / (steps - warmup)
    return 1 - left if decay == "linear" else (1 + math.cos(math.pi * left)) / 2


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_optimizer_steps_by_their_definition(decay, limit, tmp_path):
    """AdamW (1711.05101, algorithm 2) in float64. Weight decay spares the vector; both make the clipped norm.

    The gradient of the fourth step is not finite: it is left out as if it had never been, but for the rate.
    So are two steps that are skipped after the fifth.
    """
    peak, eps, beta2, weight_decay, steps, warmup = 0.1, 0.03, 0.7, 0.4, 9, 2
    config = train_sft.SFTStageConfig(
        output_dir=str(tmp_path), learning_rate=peak, adam_eps=eps, adam_beta2=beta2,
        weight_decay=weight_decay, warmup_steps=warmup, max_grad_norm=limit)
    layer = nn.Linear(3, 2)
    loop = bare_loop(config, layer, Schedule(steps, steps, decay))
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    weights = [weight.detach().double().numpy().copy() for weight in (layer.weight, layer.bias)]
    first, second, count = [0.0, 0.0], [0.0, 0.0], 0
    draw = np.random.default_rng(0)
    for number in [0, 1, 2, 3, 4, 7, 8]:
        x, y = draw.normal(size=3), draw.normal(size=2)
        loss = (loop.model(torch.tensor(x).float()) * torch.tensor(y).float()).sum()
        loop.backward(loss * (math.nan if number == 3 else 1.0), groups)
        gradients = [np.outer(y, x), y]
        norm = math.sqrt(sum((gradient**2).sum() for gradient in gradients))
        loop.optimizer_step()
        assert loop.made_step() == (number != 3)
        if number != 3:
            assert loop.grad_norm == pytest.approx(norm, rel=1e-5), "as it was before clipping"
            count += 1
            for i, gradient in enumerate(gradients):
                gradient = gradient * (min(1, limit / norm) if limit else 1)
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = beta2 * second[i] + (1 - beta2) * gradient**2
                rate = peak * rate_at(number, steps, warmup, decay)
                direction = first[i] / (1 - 0.9**count) / (np.sqrt(second[i] / (1 - beta2**count)) + eps)
                decayed = rate * weight_decay * weights[i] if i == 0 else 0
                weights[i] = weights[i] - rate * direction - decayed
        for weight, expected in zip((layer.weight, layer.bias), weights, strict=True):
            np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
        if number == 4:
            loop.skip_optimizer_steps(2)
        done = number + (3 if number == 4 else 1)
        assert loop.learning_rate == pytest.approx(peak * rate_at(done, steps, warmup, decay), abs=1e-12)
    assert loop.learning_rate == pytest.approx(0, abs=1e-12), "the run ends at a rate of 0"


def test_the_length_of_a_run(tmp_path):
    """Ten rows are three steps of four; one epoch and a half are five (4.5 rounded up); `max_steps` wins."""
    config = train_sft.SFTStageConfig(per_device_batch_size=2, gradient_accumulation_steps=2,
                                      num_train_epochs=1.5)
    sft_loop(tmp_path)  # accelerate as in one process
    assert config.schedule(10) == (5, 5, "cosine")
    assert replace(config, max_steps=7).schedule(10) == (7, 7, "cosine")
    config = train_ppo.PPOStageConfig(
        **save_parents(tmp_path), output_dir=str(tmp_path), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=4, responses_per_prompt=2, total_episodes=20, ppo_epochs=3, num_minibatches=2)
    assert ppo_loop(config)[0].schedule == (3, 3 * 3 * 2, "linear")


# ----------------------------------------------------------------------------------------- what is not finite


def test_a_loss_that_is_not_finite_stops_the_run_after_it_is_logged(tmp_path):
    """The first step breaks the weights; the losses of the two left out after it are logged, not hidden."""
    loop = sft_loop(tmp_path, per_device_batch_size=4, max_steps=9)
    step_by_sgd(loop, 1e30)
    with pytest.raises(UserError, match="^step 4: the loss or the gradient is not finite .* lower learning"):
        train_sft.train(loop, Dataset.from_list(ROWS), None)
    assert [loss is None for loss in logged(loop, "sft/loss")] == [False, True, True]


# --------------------------------------------------------------------------------------------- steps of a run


def stage_loops(folder, **keys):
    """A function that trains seven steps of a stage, and the loop, for each stage."""
    sft = sft_loop(folder, per_device_batch_size=4, max_steps=7, **keys)
    yield "sft", sft, lambda: train_sft.train(sft, Dataset.from_list(ROWS), None)
    pairs = [{"prompt": row["prompt"], "completions": [row["completion"], [5, EOS]], "pairs": [(0, 1)],
              "length": row["length"] + 2} for row in ROWS]
    config = train_reward.RewardStageConfig(output_dir=str(folder), per_device_batch_size=4, max_steps=7,
                                            **keys)
    reward = epoch_loop(config, scalar_model("opt"), len(pairs))
    yield "reward", reward, lambda: train_reward.train(reward, Dataset.from_list(pairs), None)
    del keys["logging_steps"]  # PPO logs every update
    config = train_ppo.PPOStageConfig(
        **save_parents(folder), output_dir=str(folder), max_prompt_tokens=16, max_new_tokens=2,
        prompts_per_update=2, responses_per_prompt=1, total_episodes=14, ppo_epochs=1, **keys)
    ppo, models = ppo_loop(config)
    yield "ppo", ppo, lambda: train_ppo.train(ppo, models, posts_of(PPO_PROMPTS), None, None)


def test_a_stage_looks_and_saves_when_it_is_due_and_after_its_last_step(tmp_path, monkeypatch):
    looked = []
    for script in (train_sft, train_reward, train_ppo):  # the step is the last argument
        monkeypatch.setattr(script, "evaluate", lambda *args: looked.append(args[-1]) or EQUAL)
    keys = {"eval_steps": 3, "save_steps": 2, "logging_steps": 5, "save_total_limit": 2}
    for stage, loop, train in stage_loops(tmp_path, **keys):
        saved, save = [], loop.save
        loop.save = lambda loop=loop, saved=saved, save=save: (saved.append(loop.step), save())
        looked.clear()
        train()
        assert (looked, saved) == ([3, 6, 7], [2, 4, 6, 7]), stage
        unit = "update" if stage == "ppo" else "step"
        assert [path.name for path in loop.checkpoints.paths(unit)] == [f"{unit}-6", f"{unit}-7"]
        rows = [row["step"] for row in loop.run.read_metrics()]
        assert rows == (list(range(1, 8)) if stage == "ppo" else [5, 7]), stage


def test_between_left_out_steps_a_stage_neither_looks_nor_saves(tmp_path, monkeypatch):
    """There the weights may be broken: the last two of four steps are left out, and two stop no run yet."""
    looked = []
    monkeypatch.setattr(train_sft, "evaluate", lambda *args: looked.append(args[2]) or EQUAL)
    loop = sft_loop(tmp_path, per_device_batch_size=4, max_steps=4, eval_steps=1, save_steps=1)
    backward = loop.backward
    loop.backward = lambda loss, groups: backward(loss * (math.nan if loop.step >= 2 else 1.0), groups)
    with pytest.raises(UserError, match="^step 4: .* as in 1 before it"):
        train_sft.train(loop, Dataset.from_list(ROWS), None)
    assert looked == [1, 2]
    assert [path.name for path in loop.checkpoints.paths("step")] == ["step-1", "step-2"]


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path):
    """With dropout and AdamW; its own steps are those after the checkpoint."""
    keys = {"per_device_batch_size": 2, "num_train_epochs": 2, "learning_rate": 1e-2}
    undisturbed = sft_loop(tmp_path, policy("opt"), **keys)
    train_sft.train(undisturbed, Dataset.from_list(ROWS), None)
    assert undisturbed.steps_done == 4
    stopped = sft_loop(tmp_path, policy("opt"), **keys)
    backward = stopped.backward

    def signalled(loss, groups):
        stopped.run.stop_signal = 15 if stopped.step == 1 else None  # in the second step
        backward(loss, groups)

    stopped.backward = signalled
    with pytest.raises(SystemExit, match="143"):
        train_sft.train(stopped, Dataset.from_list(ROWS), None)
    resumed = sft_loop(stopped.run.folder, policy("opt", seed=5), resume=True, **keys)
    resumed.resume()
    assert resumed.step == 2
    train_sft.train(resumed, Dataset.from_list(ROWS), None)
    assert (resumed.step, resumed.steps_done) == (4, 2)
    assert all(map(torch.equal, weights_of(resumed), weights_of(undisturbed)))
    assert logged(resumed, "sft/loss") == logged(undisturbed, "sft/loss")


def test_dropout_is_another_one_in_each_step_and_on_each_rank_and_comes_again(tmp_path):
    layer = nn.Dropout(0.5)
    config = train_sft.SFTStageConfig(output_dir=str(tmp_path), save_steps=100)

    def kept(seed=0, rank=0):
        model = nn.Sequential(nn.Linear(1, 1), layer)
        loop = bare_loop(replace(config, seed=seed), model, Schedule(4, 4, "linear"))
        loop.accelerator = SimpleNamespace(process_index=rank, is_main_process=False)
        loop._end_of_step = lambda: None
        return [tuple(layer(torch.ones(64)).tolist()) for _ in loop.steps(range(4))]

    assert kept() == kept()
    assert len({*kept(), *kept(seed=1), *kept(rank=1)}) == 12


# -------------------------------------------------------------------------------------------- SFT's own parts


def test_on_the_sequence_the_loss_is_taken_on_all_but_the_first_token():
    rows = [{"prompt": [5, 6, 7], "completion": [8, EOS]}, {"prompt": [9], "completion": [4, 3, EOS]}]

    def learnt(loss_on):
        loop = SimpleNamespace(config=train_sft.SFTStageConfig(loss_on=loss_on), device="cpu",
                               tokenizer=SimpleNamespace(pad_token_id=PAD))
        return unpack(train_sft.collate(rows, loop))

    assert learnt("sequence") == [([5], [[6, 7, 8, EOS]]), ([9], [[4, 3, EOS]])]
    assert learnt("completion") == [([5, 6, 7], [[8, EOS]]), ([9], [[4, 3, EOS]])]


def test_rouge_is_that_of_summaries_sampled_at_the_evaluations_temperature(tmp_path, monkeypatch):
    asked = []

    def summarise(model, tokenizer, prompts, config, temperature, title):
        asked.append(temperature)
        return SimpleNamespace(texts=[" my cat ran away", " no"], tokens=[[3, 4, EOS], [5]],
                               ended=[True, False])

    monkeypatch.setattr(train_sft, "summarise", summarise)
    posts = SimpleNamespace(prompts=[[1], [1]], examples=[SimpleNamespace(completion=" my cats ran away"),
                                                          SimpleNamespace(completion=" yes")])
    figures, _ = train_sft.rouge_of(sft_loop(tmp_path, eval_temperature=0.02), posts, "")
    assert asked == [0.02]
    rouge = dict.fromkeys(("rouge1", "rouge2", "rougeL", "rouge_avg"), 0.5)
    assert figures == pytest.approx({**rouge, "ended": 0.5, "tokens": 2.0})
