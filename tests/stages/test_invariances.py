"""What must not change a number: padding, order, rows shared or apart, micro-batches, recomputing, processes.

To 1e-5 in float32, relative to the largest number. What other files hold and is not repeated here: the
layout of a prompt group and its mask by brute force (test_prompt_groups); log-probs, entropies, scores and
values with their gradients against plain rows of the stock forward (test_models); sampled tokens in one or
several batches, and their log-probs against the update's forward pass (test_generation); micro-batches of a
step against an oracle for tokens (test_loop); micro-batches of PPO (test_ppo_update).
"""

import json
import os
import random
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import modeling_utils

import train_ppo
import train_reward
import train_sft
from families import FAMILIES, PAD, VOCAB, draw, policy, random_groups, scalar_model
from oracle import TEMPERATURE, each_row, stock_logprobs, stock_scores
from run_folders import furthest, last_trained, metrics, weights
from tiny_models import save_opt, save_other_vocabulary
from utils.config import PROJECT, UserError, parse_config
from utils.distributed import world
from utils.loop import Loop
from utils.models.heads import head_scores
from utils.models.loading import without_dropout
from utils.models.outputs import (
    GroupModel,
    hidden_states,
    logprobs_and_entropy,
    response_values,
    scores,
    supervised_outputs,
)
from utils.models.policy_value import Models, PolicyAndValue
from utils.models.prompt_groups import PromptGroups, pack, response_states
from utils.ppo import Rollout
from utils.rollouts.episodes import Pass

every_family = pytest.mark.parametrize("family", FAMILIES)
PPO = train_ppo.PPOStageConfig(temperature=TEMPERATURE, vf_coef=0.5, ppo_epochs=1, prompts_per_update=3)
LOSSES = ("sft", "reward", "ppo")

PROMPTS, COMPLETIONS = random_groups([4, 1, 7], [[3, 1, 6], [2], [5, 4]])
PAIRS = [(0, 1), (2, 0), (2, 1), (5, 4)]  # (better, worse) of the six completions
SIZES = [len(completion) for group in COMPLETIONS for completion in group]


# ----------------------------------------------------------------------------- the losses of the three stages


def close(actual, expected, largest=None):
    limit = 1e-5 * (expected.abs().max().item() if largest is None else largest)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def models_of(family):
    """Policy, and a scalar model that is reward and value model."""
    return policy(family), scalar_model(family, seed=1)


@pytest.fixture(scope="module")
def numbers():
    """What a rollout holds of each completion, (R,) each, so that it can follow its completion anywhere."""
    generator = torch.Generator().manual_seed(2)
    columns = ("logprobs", "values", "advantages", "returns")
    drawn = [torch.randn(4, size, generator=generator) * 0.3 for size in SIZES]
    return [dict(zip(columns, rows, strict=True)) for rows in drawn]


def of_tokens(model, groups):
    """Log-probs and entropies, (N, R) each."""
    states = response_states(hidden_states(model, groups), groups)
    return logprobs_and_entropy(model, states, groups, TEMPERATURE)


class OneStep:
    """In place of a `Loop`: one optimizer step, whose loss is kept and not taken."""

    step, part_counts, grad_norm, learning_rate = 0, 1.0, 0.0, 0.0

    def __init__(self, config, model):
        self.config, self.model, self.run, self.loss = config, model, None, 0.0
        self.accelerator = SimpleNamespace(reduce=lambda number, how: number)
        self.total, self.share = torch.as_tensor, lambda rows: rows
        self.optimizer_step = self.logs = self.evaluates = lambda *_: False

    def steps(self, batches):
        return [(1, batches[0])]

    def parts(self, parts, spare):
        return parts

    def backward(self, loss, groups):
        self.loss = self.loss + loss


def loss_of(script, config, model, part):
    """The loss of one step of SFT or the reward stage by its own `train`, on a part as `collate` makes it."""
    loop = OneStep(config, model)
    with mock.patch.object(script, "collate", lambda *_: part):
        script.train(loop, Dataset.from_list([{"length": 1}]), None)
    return loop.loss


def losses(models, groups, pairs, numbers) -> dict:
    """Each stage's own loss on a batch."""
    chosen, scalar = models
    mask, width = groups.response_mask, groups.response_mask.shape[1]

    def padded(column):
        rows = [torch.nn.functional.pad(row[column], (0, width - len(row[column]))) for row in numbers]
        return torch.stack(rows)

    # the samples come from a policy near this one
    with torch.no_grad():
        old = of_tokens(chosen, groups)[0] + padded("logprobs")
    rollout = Rollout(mask, old, old, padded("values"), None, None, padded("advantages"), padded("returns"))
    models = Models(PolicyAndValue(chosen, scalar), None, None)
    ppo = OneStep(PPO, models.trained)
    episodes = SimpleNamespace(passes=[Pass(groups, torch.arange(len(numbers)))])
    train_ppo.optimise(ppo, models, episodes, rollout, None)
    completions = GroupModel(chosen, supervised_outputs)
    return {
        "sft": loss_of(train_sft, train_sft.SFTStageConfig(), completions, groups),
        "reward": loss_of(train_reward, train_reward.RewardStageConfig(), GroupModel(scalar, head_scores),
                          (groups, torch.tensor(pairs), torch.zeros(len(pairs)), torch.ones(len(pairs), 1),
                           torch.ones(len(pairs)))),
        "ppo": ppo.loss,
    }


def gradients(models, loss) -> dict:
    for model in models:
        model.zero_grad()
    loss.backward(retain_graph=True)
    return {f"{i}.{name}": p.grad.clone() for i, model in enumerate(models)
            for name, p in model.named_parameters() if p.grad is not None}


def same_losses(models, ours: dict, theirs: dict, their_models=None) -> None:
    """Losses, and the gradient of every weight."""
    for name in LOSSES:
        close(ours[name], theirs[name])
        found, expected = gradients(models, ours[name]), gradients(their_models or models, theirs[name])
        assert found.keys() == expected.keys()
        largest = max(gradient.abs().max().item() for gradient in expected.values())
        assert largest > 1e-3, name
        for weight, gradient in expected.items():
            close(found[weight], gradient, largest)


def wider(groups, columns: int, tokens: int) -> PromptGroups:
    """The same rows with more padding on the right, of positions and tokens that mean something elsewhere."""
    def pad(tensor, size, value):
        return torch.cat([tensor, torch.full((len(tensor), size), value)], 1)

    def moved(places, table, size):
        """Places in a flattened table after its rows have become longer."""
        return places + places // table.shape[1] * size

    return groups._replace(
        input_ids=pad(groups.input_ids, columns, VOCAB - 1),
        position_ids=pad(groups.position_ids, columns, 3),
        owners=pad(groups.owners, columns, -1), segments=pad(groups.segments, columns, -1),
        state_columns=pad(groups.state_columns, tokens, 1),
        responses=pad(groups.responses, tokens, VOCAB - 1),
        response_mask=pad(groups.response_mask, tokens, False),
        token_places=moved(groups.token_places, groups.responses, tokens),
        state_places=moved(groups.state_places, groups.input_ids, columns),
    )


# ------------------------------------------------------------------------------------------ padding and order


@every_family
def test_padding_on_the_right_changes_nothing_in_training_and_scoring(family, numbers):
    models, groups = models_of(family), pack(PROMPTS, COMPLETIONS, PAD)
    for columns, tokens in ((1, 0), (9, 4)):
        more = wider(groups, columns, tokens)
        for value, function in ((0, lambda g: scores(models[1], g)),
                                (1, lambda g: response_values(models[1], g)),
                                (1, lambda g: of_tokens(models[0], g)[0]),
                                (1, lambda g: of_tokens(models[0], g)[1])):
            with torch.no_grad():
                plain, padded = function(groups), function(more)
            close(padded[:, : plain.shape[1]] if value else padded, plain)
            assert not value or not padded[:, plain.shape[1] :].any(), "padding is 0"
        same_losses(models, losses(models, more, PAIRS, numbers), losses(models, groups, PAIRS, numbers))


@every_family
def test_groups_in_a_row_or_apart_are_the_same(family):
    """Three short groups share the batch's second row; apart each is a batch of its own."""
    models = models_of(family)
    prompts, completions = random_groups([9, 2, 3, 1], [[6, 4], [3], [2, 2], [4]], seed=7)
    shared = pack(prompts, completions, PAD)
    assert shared.input_ids.shape == (2, 19)
    apart = [pack([prompt], [group], PAD) for prompt, group in zip(prompts, completions, strict=True)]
    measures = (lambda g: scores(models[1], g), lambda g: response_values(models[1], g)[g.response_mask],
                lambda g: of_tokens(models[0], g)[0][g.response_mask],
                lambda g: of_tokens(models[0], g)[1][g.response_mask])
    for measure in measures:
        close(measure(shared), torch.cat([measure(groups) for groups in apart]))
    # squares, so that every number has a weight of its own in the gradient
    loss = sum((measure(shared) ** 2).sum() for measure in measures)
    single = sum((measure(groups) ** 2).sum() for measure in measures for groups in apart)
    found, expected = gradients(models, loss), gradients(models, single)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert found.keys() == expected.keys() and largest > 1e-3
    for weight, gradient in expected.items():
        close(found[weight], gradient, largest)


@every_family
def test_padding_on_the_left_and_the_batch_change_no_sample(family):
    """A long prompt in the batch pads the others on the left; a batch of their own pads them less or not."""
    model = policy(family)
    alone = [draw(model, [prompt], k=3, seeds=[10 * i, 10 * i + 1, 10 * i + 2])
             for i, prompt in enumerate(PROMPTS)]
    seeds = [10 * i + j for i in range(len(PROMPTS)) for j in range(3)]
    for longest in (8, 9, 24):
        more = random_groups([longest], [[1]], seed=5)[0]
        for batch_size in (1, 2, 4):
            found = draw(model, PROMPTS + more, k=3, seeds=[*seeds, 97, 98, 99], batch_size=batch_size)
            for i, one in enumerate(alone):
                part = slice(3 * i, 3 * i + 3)
                assert found.responses[part] == one.responses and found.ended[part] == one.ended
                close(torch.tensor(sum(found.logprobs[part], [])), torch.tensor(sum(one.logprobs, [])))


@every_family
def test_order_in_the_batch_changes_nothing(family, numbers):
    """Prompts and the completions of each turned round: the numbers turn with them, the losses stay."""
    models = models_of(family)
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    turned = pack(PROMPTS[::-1], [group[::-1] for group in COMPLETIONS[::-1]], PAD)
    with torch.no_grad():
        for function in (lambda g: scores(models[1], g), lambda g: response_values(models[1], g),
                         lambda g: of_tokens(models[0], g)[0]):
            close(function(turned).flip(0), function(groups))
    last = len(SIZES) - 1
    pairs = [(last - better, last - worse) for better, worse in PAIRS[::-1]]
    same_losses(models, losses(models, turned, pairs, numbers[::-1]), losses(models, groups, PAIRS, numbers))


@every_family
def test_order_of_prompts_and_branches_changes_no_sample(family):
    model, k = policy(family), 3
    seeds = list(range(len(PROMPTS) * k))
    plain = draw(model, PROMPTS, k=k, seeds=seeds)
    turned = draw(model, PROMPTS[::-1], k=k, seeds=seeds[::-1])
    assert turned.responses[::-1] == plain.responses and turned.ended[::-1] == plain.ended
    assert len(set(map(tuple, plain.responses))) > 3
    close(torch.tensor(sum(turned.logprobs[::-1], [])), torch.tensor(sum(plain.logprobs, [])))


# ------------------------------------------------------------------------ a prompt once, or once a completion


def stock_losses(models, numbers) -> dict:
    """The three losses from their definitions, each completion a plain row of the stock forward."""
    chosen, scalar = models
    rows = each_row(PROMPTS, COMPLETIONS)
    tokens = sum(SIZES)
    score = stock_scores(scalar, [prompt + completion for prompt, completion in rows])
    sft = ppo = 0.0
    for (prompt, completion), row in zip(rows, numbers, strict=True):
        logits = chosen(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        sft = sft - logits.log_softmax(-1)[torch.arange(len(completion)), completion].sum()
        new = stock_logprobs(chosen, prompt, completion)[0]
        values = stock_scores(scalar, [prompt + completion[:r] for r in range(len(completion))])
        for t in range(len(completion)):
            ratio = (new[t] - (new[t].detach() + row["logprobs"][t])).exp()
            advantage, value, target = row["advantages"][t], row["values"][t], row["returns"][t]
            gain = min(advantage * ratio, advantage * ratio.clamp(1 - PPO.cliprange, 1 + PPO.cliprange))
            near = value + (values[t] - value).clamp(-PPO.cliprange_value, PPO.cliprange_value)
            ppo = ppo - gain + PPO.vf_coef * max((values[t] - target) ** 2, (near - target) ** 2) / 2
    reward = sum(torch.log1p((score[worse] - score[better]).exp()) for better, worse in PAIRS)
    return {"sft": sft / tokens, "reward": reward / len(PAIRS), "ppo": ppo / tokens}


@every_family
def test_a_shared_prompt_trains_like_plain_rows_of_the_stock_forward(family, numbers):
    models = models_of(family)
    shared = losses(models, pack(PROMPTS, COMPLETIONS, PAD), PAIRS, numbers)
    same_losses(models, shared, stock_losses(models, numbers))


# ------------------------------------------------------------------------------------------------ recomputing


@every_family
def test_gradient_checkpointing_changes_nothing(family, numbers):
    models, recomputing = ([without_dropout(model).train() for model in models_of(family)] for _ in range(2))
    calls = []
    for model in recomputing:
        model.gradient_checkpointing_enable()
        kinds = ("DecoderLayer", "Block", "NeoXLayer")
        layer = next(module for module in model.modules() if type(module).__name__.endswith(kinds))
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    plain, again = (losses(both, groups, PAIRS, numbers) for both in (models, recomputing))
    before = len(calls)
    same_losses(recomputing, again, plain, models)
    assert len(calls) - before == 4, "SFT's policy, the reward model, PPO's policy and value model: once more"


# ----------------------------------------------------------- the real main() of each stage, split differently


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny OPT and a reward model, data whose lengths differ a lot, and a configuration for each stage."""
    folder = tmp_path_factory.mktemp("invariances")
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 24, "max_position_embeddings": 96,
             "dropout": 0.0, "std": 0.2}
    # responses end, and differ in length
    save_opt(folder / "base", eos_logit=6.0, **sizes)
    save_opt(folder / "reward_model", "reward", seed=1, **sizes)
    save_other_vocabulary(folder / "reward_model", folder / "other")
    (folder / "own.py").write_text(OWN)
    write_data(folder)
    for stage, more in STAGES.items():
        shared = {"adam_eps": 1.0, "learning_rate": 0.3, "per_device_batch_size": 8, "eval_rows": 5,
                  "test_rows": 5, "seed": 3, "max_prompt_tokens": 32, "report_to": ["none"]}
        named = {key: str(folder / value) if key.endswith("_data") or "model" in key else value
                 for key, value in more.items()}
        (folder / f"{stage}.yaml").write_text(yaml.safe_dump({**shared, **named}))
    return folder


# Adam's first steps are the gradient's sign, which rounding may turn: with an eps of 1 they are the gradient
STAGES = {
    "sft": {"model": "base", "actor_training_data": "train.jsonl",
            "actor_validation_data": "validation.jsonl", "actor_test_data": "test.jsonl", "max_new_tokens": 8,
            "max_steps": 8, "eval_steps": 4, "save_steps": 4, "logging_steps": 1, "eval_temperature": 1.0},
    "reward": {"model": "base", "reward_training_data": "rankings.jsonl",
               "reward_validation_data": "rankings_validation.jsonl",
               "reward_test_data": "rankings_test.jsonl", "centring_data": "validation.jsonl",
               "max_completion_tokens": 32, "max_steps": 8, "eval_steps": 4, "save_steps": 4,
               "logging_steps": 1},
    "ppo": {"model": "base", "reward_model": "reward_model", "rlhf_training_data": "train.jsonl",
            "rlhf_validation_data": "validation.jsonl", "rlhf_test_data": "test.jsonl", "max_new_tokens": 8,
            "prompts_per_update": 8, "responses_per_prompt": 3, "total_episodes": 72, "ppo_epochs": 2,
            "eval_steps": 1, "save_steps": 3, "eval_temperature": 1.0},
}
ROWS = 41  # to train on: five steps of 8, and one of a single row, of which a second process has none
KINDS = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
         "ppo": train_ppo.PPOStageConfig}
SCRIPTS = {"sft": train_sft, "reward": train_reward, "ppo": train_ppo}


def write_data(folder):
    """Prompts of 2 to 20 words with completions of 1 to 24, and rankings of 2 to 5 such completions."""
    drawn = random.Random(0)
    words = "the my a dog house friend work told me wants to go new old time day with what should i".split()

    def text(low, high):
        return " ".join(drawn.choices(words, k=drawn.randint(low, high)))

    for name, count in (("train", ROWS), ("validation", 5), ("test", 5)):
        rows = [{"prompt": f"{name} {i} {text(2, 20)}", "completion": text(1, 24)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"prompt": row["prompt"],
                 "completions": [f"{text(1, 12)} {j}" for j in range(drawn.randint(2, 5))]} for row in rows]
        file = "rankings.jsonl" if name == "train" else f"rankings_{name}.jsonl"
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_main(folder, stage, out, *words):
    """A stage in this process; its run directory."""
    run = folder / out / stage
    argv = ["--output_dir", str(run), *map(str, words)]
    SCRIPTS[stage].main(parse_config(KINDS[stage], folder / f"{stage}.yaml", argv))
    return run


@pytest.fixture(scope="module")
def alone(folder):
    """The run directory of a stage in one process, with micro-batches of 8 and one of them a step."""
    return cache(lambda stage: run_main(folder, stage, "alone"))


def same_runs(ours, theirs):
    """Every figure that was logged, and every weight."""
    assert len(metrics(ours)) == len(metrics(theirs)) > 3
    for found, expected in zip(metrics(ours), metrics(theirs), strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    for found, expected in ((weights(ours / "final"), weights(theirs / "final")),
                            (last_trained(ours), last_trained(theirs))):  # with the value model
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            close(found[name], weight)


class MeanOfMeans(Loop):
    """The wrong loss: the mean of the micro-batches' means."""

    def parts(self, parts, spare):
        self.count = len(parts)
        for part in super().parts(parts, spare):
            self.items = len(part[1]) if self.run.stage == "reward" else int(part.response_mask.sum())
            yield part

    def total(self, count):
        self.all = super().total(count)
        return self.all

    def backward(self, loss, groups):
        super().backward(loss * self.all / self.items / self.count, groups)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_micro_batches_of_a_step_change_nothing(stage, alone, folder, monkeypatch):
    """Detail 12, with the stages' own batches and collators; the mean of micro-batch means is another."""
    split = "--per_device_batch_size", 2, "--gradient_accumulation_steps", 4
    same_runs(run_main(folder, stage, "split", *split), alone(stage))
    monkeypatch.setattr(SCRIPTS[stage], "Loop", MeanOfMeans)
    wrong, right = (next(row for row in metrics(run) if f"{stage}/loss" in row)
                    for run in (run_main(folder, stage, "wrong", *split), alone(stage)))
    assert wrong["step"] == right["step"] == 1
    for name in ("loss", "grad_norm"):
        off = abs(wrong[f"{stage}/{name}"] / right[f"{stage}/{name}"] - 1)
        assert off > 1e-3, "the test would not see a wrong mean"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_gradient_checkpointing_in_a_run_changes_nothing(stage, alone, folder, monkeypatch):
    calls, checkpoint = [], modeling_utils.checkpoint
    monkeypatch.setattr(modeling_utils, "checkpoint",
                        lambda *args, **more: calls.append(1) or checkpoint(*args, **more))
    same_runs(run_main(folder, stage, "recomputed", "--gradient_checkpointing", "true"), alone(stage))
    assert len(calls) >= 6 * 2, "six steps or more of two layers"


def test_training_moves_the_weights_that_are_compared(alone, folder):
    start = weights(folder / "base")["model.decoder.layers.0.fc1.weight"]
    for stage in STAGES:
        prefix = "policy" if stage == "ppo" else "model"
        after = last_trained(alone(stage))[f"{prefix}.model.decoder.layers.0.fc1.weight"]
        assert (after - start).abs().max() > 1e-3, stage


# --------------------------------------------------------------------------------------- one or two processes


def torchrun(file, *words):
    """Two processes on this machine's CPU; a hang ends in an error."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, str(file), *map(str, words)]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               start_new_session=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"})
    try:
        output, _ = started.communicate(timeout=300)
    finally:
        if started.poll() is None:  # torchrun ends its processes when it is asked to end
            started.terminate()
            started.wait(60)
    return started.returncode, output


# what the processes must agree on from update to update
OPTIONS = ("--whiten_rewards true --kl_target 0.05 --kl_horizon 50 --ema_decay 0.5 --lora_rank 2 "
           "--value_model shared --target_kl 0.02 --reward_model none "
           '--rewards [{"model":"FOLDER/reward_model","length_control":true,"scale":"std"},'
           '{"model":"FOLDER/other","name":"other"},'
           '{"python":"FOLDER/own.py:mixed","processes":"main"},{"python":"FOLDER/own.py:mixed","name":"each"}]')
OWN = """
def mixed(prompts, completions):
    return [(len(prompt) + 3 * len(text)) % 7 for prompt, text in zip(prompts, completions)]
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "split", "options"), [
    ("reward", ("--per_device_batch_size", 2, "--gradient_accumulation_steps", 2), ""),
    ("ppo", ("--per_device_batch_size", 2), ""),  # two micro-batches on each
    ("ppo", ("--per_device_batch_size", 2), OPTIONS),
    # as many parts as the rows of each rank need
    ("sft", ("--per_device_batch_size", 4, "--micro_batch_tokens", 40), ""),
    # ranks whose posts have other numbers of pairs
    ("reward", ("--per_device_batch_size", 2, "--gradient_accumulation_steps", 2), "--pair_weighting post"),
])
def test_two_processes_make_the_run_of_one(stage, split, options, alone, folder):
    run, one = folder / f"two{bool(options)}{len(split)}" / stage, alone(stage)
    options = options.replace("FOLDER", str(folder))
    if options:
        one = run_main(folder, stage, "options", *options.split())
    status, output = torchrun(PROJECT / "scripts" / f"train_{stage}.py", "--config", folder / f"{stage}.yaml",
                              "--output_dir", run, *split, *options.split())
    assert status == 0, output[-3000:]
    same_runs(run, one)
    summaries = (json.loads((path / "summary.json").read_text()) for path in (run, one))
    found, expected = ({name: value for name, value in summary.items()
                        if value is not None and "second" not in name and "memory" not in name}
                       for summary in summaries)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5) and len(found) > 4
    assert output.count("RLHF in three stages") == 1, "one process speaks"


@pytest.mark.slow
def test_two_processes_share_out_every_epoch_stop_together_and_go_on(folder):
    """Dropout draws other numbers on each rank, and a signal comes to one of them: see two_processes.py."""
    status, output = torchrun(Path(__file__).parents[1] / "helpers" / "two_processes.py", folder)
    assert status == 0, output[-3000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(3):
        steps = slice(6 * epoch, 6 * epoch + 6)
        rows = [row for rank in ranks for step in rank["runs"][0][steps] for row in step]
        assert sorted(rows) == list(range(ROWS)), "a row twice or never"
    assert [min(map(len, rank["runs"][0])) for rank in ranks] == [1, 0], "of the last row"
    for rank in ranks:
        whole, stopped, resumed = rank["runs"]
        assert stopped + resumed == whole and len(stopped) == 13, "both stop after one step"
        assert rank["status"] == 128 + signal.SIGTERM
    whole, stopped = folder / "whole", folder / "stopped"
    assert metrics(stopped) == metrics(whole)
    assert furthest(last_trained(stopped), last_trained(whole)) == 0
    assert furthest(weights(stopped / "final"), weights(whole / "final")) == 0


def test_processes_that_form_no_group_are_refused(monkeypatch):
    """Else each of them would train the same thing."""
    assert world().num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="^WORLD_SIZE: it is 2 here, but LOCAL_RANK is not set; start with"):
        world()
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="^WORLD_SIZE: 2 processes were started, .* accelerate one of 1; "):
        world()
