"""What must not change a number: padding, order, rows shared or apart, micro-batches, recomputing, number of processes.

To 1e-5 in float32, relative to the largest number. What other files hold and is not repeated here: the layout of a
prompt group and its mask by brute force (test_prompt_groups); log-probs, entropies, scores and values with their
gradients against plain rows of the stock forward (test_models); sampled tokens in one or several batches, and their
log-probs against the update's forward pass (test_generation); micro-batches of the `Trainer` against an oracle for
tokens (test_trainer); micro-batches of PPO (test_ppo_update).
"""

import pytest
import torch
from families import FAMILIES, PAD, VOCAB, policy, random_groups, scalar_model
from test_generation import draw
from test_models import TEMPERATURE, each_row, stock_logprobs, stock_scores

import train_ppo
from train_reward import pairwise_loss_sum
from train_sft import completion_loss_sum
from utils.models import PolicyAndValue, response_logprobs_and_entropy, response_values, scores, without_dropout
from utils.ppo import Rollout
from utils.prompt_groups import PromptGroups, pack

every_family = pytest.mark.parametrize("family", FAMILIES)
PPO = train_ppo.PPOStageConfig(temperature=TEMPERATURE, vf_coef=0.5)
LOSSES = ("sft", "reward", "ppo")

PROMPTS, COMPLETIONS = random_groups([4, 1, 7], [[3, 1, 6], [2], [5, 4]])
PAIRS = [(0, 1), (2, 0), (2, 1), (5, 4)]  # (better, worse) of the six completions
SIZES = [len(completion) for group in COMPLETIONS for completion in group]


# ------------------------------------------------------------------------------------- the losses of the three stages


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
    return [dict(zip(columns, torch.randn(4, size, generator=generator) * 0.3, strict=True)) for size in SIZES]


def losses(models, groups, pairs, numbers) -> dict:
    """Each stage's own loss function on a batch."""
    chosen, scalar = models
    mask, width = groups.response_mask, groups.response_mask.shape[1]

    def padded(column):
        return torch.stack([torch.nn.functional.pad(row[column], (0, width - len(row[column]))) for row in numbers])

    # the samples come from a policy near this one
    with torch.no_grad():
        old = response_logprobs_and_entropy(chosen, groups, TEMPERATURE)[0] + padded("logprobs")
    rollout = Rollout(mask, old, old, padded("values"), None, padded("advantages"), padded("returns"))
    trained = PolicyAndValue(chosen, scalar)
    better, worse = torch.tensor(pairs).T
    return {
        "sft": completion_loss_sum(chosen, groups) / mask.sum(),
        "reward": pairwise_loss_sum(scalar, groups, better, worse) / len(pairs),
        "ppo": train_ppo.batch_loss(trained, train_ppo.MicroBatch(groups, rollout, None), mask.sum(), PPO)[0],
    }


def gradients(models, loss) -> dict:
    for model in models:
        model.zero_grad()
    loss.backward(retain_graph=True)
    return {f"{i}.{name}": p.grad.clone() for i, model in enumerate(models) for name, p in model.named_parameters()
            if p.grad is not None}


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

    return groups._replace(
        input_ids=pad(groups.input_ids, columns, VOCAB - 1), position_ids=pad(groups.position_ids, columns, 3),
        segments=pad(groups.segments, columns, -1), states=pad(groups.states, tokens, 1),
        responses=pad(groups.responses, tokens, VOCAB - 1), response_mask=pad(groups.response_mask, tokens, False),
    )


# ------------------------------------------------------------------------------------------------- padding and order


@every_family
def test_padding_on_the_right_changes_nothing_in_training_and_scoring(family, numbers):
    models, groups = models_of(family), pack(PROMPTS, COMPLETIONS, PAD)
    for columns, tokens in ((1, 0), (9, 4)):
        more = wider(groups, columns, tokens)
        for value, function in ((0, lambda g: scores(models[1], g)), (1, lambda g: response_values(models[1], g)),
                                (1, lambda g: response_logprobs_and_entropy(models[0], g, TEMPERATURE)[0]),
                                (1, lambda g: response_logprobs_and_entropy(models[0], g, TEMPERATURE)[1])):
            with torch.no_grad():
                plain, padded = function(groups), function(more)
            close(padded[:, : plain.shape[1]] if value else padded, plain)
            assert not value or not padded[:, plain.shape[1] :].any(), "padding is 0"
        same_losses(models, losses(models, more, PAIRS, numbers), losses(models, groups, PAIRS, numbers))


@every_family
def test_padding_on_the_left_and_the_batch_change_no_sample(family):
    """A long prompt in the batch pads the others on the left; a batch of their own pads them less, or not at all."""
    model = policy(family)
    alone = [draw(model, [prompt], k=3, seeds=[10 * i, 10 * i + 1, 10 * i + 2]) for i, prompt in enumerate(PROMPTS)]
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
                         lambda g: response_logprobs_and_entropy(models[0], g, TEMPERATURE)[0]):
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


# -------------------------------------------------------------------------------- a prompt once, or once a completion


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
    same_losses(models, losses(models, pack(PROMPTS, COMPLETIONS, PAD), PAIRS, numbers), stock_losses(models, numbers))


# -------------------------------------------------------------------------------------------------------- recomputing


@every_family
def test_gradient_checkpointing_changes_nothing(family, numbers):
    models, recomputing = ([without_dropout(model).train() for model in models_of(family)] for _ in range(2))
    calls = []
    for model in recomputing:
        model.gradient_checkpointing_enable()
        layer = next(m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "Block", "NeoXLayer")))
        next(layer.children()).register_forward_pre_hook(lambda *_: calls.append(1))
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    plain, again = (losses(both, groups, PAIRS, numbers) for both in (models, recomputing))
    before = len(calls)
    same_losses(recomputing, again, plain, models)
    assert len(calls) - before == 4, "one policy in SFT, one reward model, policy and value model in PPO: each once more"
