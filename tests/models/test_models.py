"""A prompt-group row says what separate plain rows say: five families against stock forward passes.

The oracle never sees our masks: each completion is a plain row of its own, run by the stock model.
"""

import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from families import CONFIGS, FAMILIES, PAD, VOCAB, policy, random_groups, scalar_model
from oracle import TEMPERATURE, each_row, stock_logprobs, stock_scores
from utils.config import UserError
from utils.models.centring import centre_scores
from utils.models.loading import ScalarHead, load_policy, load_scalar_model, without_dropout
from utils.models.outputs import (
    GroupModel,
    hidden_states,
    logprobs_and_entropy,
    response_logprobs,
    response_values,
    scores,
)
from utils.models.parents import Parent
from utils.models.policy_value import PolicyAndValue, new_value_head
from utils.models.prompt_groups import pack, response_states

SIZES = [4, 1, 7], [[3, 1, 5], [2], [4, 4]]
every_family = pytest.mark.parametrize("family", FAMILIES)


def close(actual, expected, tolerance=1e-4):
    """To `tolerance` relative to the largest number of the tensor."""
    limit = tolerance * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def padded(values):
    return pad_sequence(values, batch_first=True)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(model, ours, stock):
    ours, stock = gradients(model, ours), gradients(model, stock)
    assert ours.keys() == stock.keys()
    largest = max(gradient.abs().max() for gradient in stock.values())
    for name, gradient in stock.items():
        # keys' biases have no gradient in exact arithmetic, hence the floor
        limit = 1e-4 * max(gradient.abs().max(), 1e-2 * largest)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=float(limit),
                                   msg=lambda m, n=name: f"{n}: {m}")


@every_family
def test_logprobs_entropy_and_gradients(family):
    model = policy(family)
    prompts, completions = random_groups(*SIZES)
    groups = pack(prompts, completions, PAD)
    logprobs, entropy = logprobs_and_entropy(model, response_states(hidden_states(model, groups), groups),
                                             groups, TEMPERATURE)
    stock = [stock_logprobs(model, *row) for row in each_row(prompts, completions)]
    expected = padded([row[0] for row in stock])
    close(logprobs, expected)
    close(entropy, padded([row[1] for row in stock]))
    assert logprobs.dtype == torch.float32 and not entropy.requires_grad
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    same_gradients(model, (logprobs * weights).sum(), (expected * weights).sum())


@every_family
def test_scores_values_and_gradients(family):
    model = scalar_model(family)
    prompts, completions = random_groups(*SIZES)
    groups = pack(prompts, completions, PAD)
    score, values = scores(model, groups), response_values(model, groups)
    rows = each_row(prompts, completions)
    stock_score = stock_scores(model, [prompt + completion for prompt, completion in rows])
    # the value of the state before token r is the score of the text so far
    stock_values = padded([stock_scores(model, [p + c[:r] for r in range(len(c))]) for p, c in rows])
    close(score, stock_score)
    close(values, stock_values)
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    ours = score.square().sum() + (values * weights).sum()
    same_gradients(model, ours, stock_score.square().sum() + (stock_values * weights).sum())


@every_family
@torch.no_grad()
def test_padding_and_order_change_nothing(family):
    model, reward_model = policy(family), scalar_model(family)
    prompts, completions = random_groups(*SIZES)
    logprobs = response_logprobs(model, pack(prompts, completions, PAD), TEMPERATURE)
    score = scores(reward_model, pack(prompts, completions, PAD))
    more = random_groups([15], [[9, 9]], seed=5)  # a longer row: more padding for the others
    turned = pack(more[0] + prompts[::-1], more[1] + [group[::-1] for group in completions[::-1]], PAD)
    new_logprobs = response_logprobs(model, turned, TEMPERATURE)
    close(new_logprobs[2:].flip(0)[:, : logprobs.shape[1]], logprobs)
    close(scores(reward_model, turned)[2:].flip(0), score)


@torch.no_grad()
def test_temperature_divides_the_logits():
    model, groups = policy("opt"), pack(*random_groups(*SIZES), PAD)
    hot, cold = (response_logprobs(model, groups, temperature) for temperature in (1.0, TEMPERATURE))
    assert (hot - cold).abs().max() > 0.1


@torch.no_grad()
def test_policy_and_value_side_by_side():
    model, value_model = policy("opt"), scalar_model("opt", seed=1)
    groups = pack(*random_groups(*SIZES), PAD)
    both = PolicyAndValue(model, value_model)
    logprobs, entropy, values = both(groups, TEMPERATURE)
    assert torch.equal(logprobs, response_logprobs(model, groups, TEMPERATURE))
    assert entropy.shape == logprobs.shape and torch.equal(values, response_values(value_model, groups))
    assert torch.equal(values, both.values(groups))


@every_family
@torch.no_grad()
def test_a_value_head_on_the_policys_trunk(family):
    """Against the stock model's own last hidden states, a plain row each."""
    model = policy(family)
    prompts, completions = random_groups(*SIZES)
    groups = pack(prompts, completions, PAD)
    head = new_value_head(model)
    assert not PolicyAndValue(model, head).values(groups).any()  # it starts at 0
    head.weight.normal_()
    head.bias.fill_(0.5)
    expected = padded([
        head(model.base_model(torch.tensor([p + c])).last_hidden_state[0, len(p) - 1 : -1])[:, 0]
        for p, c in each_row(prompts, completions)
    ])
    close(PolicyAndValue(model, head).values(groups), expected)
    close(PolicyAndValue(model, head)(groups, TEMPERATURE)[2], expected)


@torch.no_grad()
def test_supervised_examples_go_through_the_same_forward():
    model, groups = policy("opt"), pack(*random_groups(*SIZES), PAD)
    both = PolicyAndValue(model, None)
    close(both(groups, 1.0, supervised=True), response_logprobs(model, groups, 1.0))
    logprobs, _, values = both(groups, TEMPERATURE)
    assert values is None and both.values(groups) is None
    close(logprobs, response_logprobs(model, groups, TEMPERATURE))


@torch.no_grad()
def test_a_wrapped_model_says_what_the_function_says_through_its_own_forward():
    """Engines hook the forward of the module that they are given."""
    model, groups, hooked = scalar_model("opt"), pack(*random_groups(*SIZES), PAD), []
    wrapped = GroupModel(model, scores)
    wrapped.register_forward_hook(lambda module, args, output: hooked.append(output))
    assert torch.equal(wrapped(groups), scores(model, groups)) and len(hooked) == 1
    assert wrapped.model is model


@every_family
@torch.no_grad()
def test_centred_scores_have_mean_zero_and_survive_saving(family, tmp_path):
    model, groups = scalar_model(family), pack(*random_groups(*SIZES), PAD)
    before, values = scores(model, groups), response_values(model, groups)
    mean = before.mean().item()
    assert abs(mean) > 1e-2
    centre_scores(model, mean)
    after = scores(model, groups)
    close(after, before - mean)
    close(response_values(model, groups)[groups.response_mask], (values - mean)[groups.response_mask])
    model.save_pretrained(tmp_path)
    close(scores(load_scalar_model(Parent("reward_model", str(tmp_path))), groups), after)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "gpt2", "gpt-neox"])
@torch.no_grad()
def test_plain_transformers_sees_the_centred_scores(family, tmp_path):
    model = scalar_model(family)
    prompts, completions = random_groups(*SIZES)
    centre_scores(model, scores(model, pack(prompts, completions, PAD)).mean().item())
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    found = stock_scores(stock,
                         [prompt + completion for prompt, completion in each_row(prompts, completions)])
    close(found, scores(model, pack(prompts, completions, PAD)))
    assert abs(found.mean()) < 1e-5


@torch.no_grad()
def test_centring_twice_adds_up():
    for family in ("opt", "opt-350m", "llama-gqa"):
        model, groups = scalar_model(family), pack(*random_groups(*SIZES), PAD)
        before = scores(model, groups)
        centre_scores(model, 2.0)
        centre_scores(model, -0.5)
        close(scores(model, groups), before - 1.5)


@torch.no_grad()
def test_scores_and_values_are_float32_under_bf16():
    """The head reads the trunk's bfloat16 states, but what it says of them is not rounded again."""
    model, groups = scalar_model("opt"), pack(*random_groups(*SIZES), PAD)
    head = new_value_head(policy("opt"))
    head.weight.normal_()
    with torch.autocast("cpu", torch.bfloat16):
        found = [scores(model, groups), response_values(model, groups),
                 PolicyAndValue(policy("opt"), head).values(groups)]
    for numbers in found:
        assert numbers.dtype == torch.float32
        assert (numbers != numbers.bfloat16().float()).any(), "all of them are numbers that bfloat16 has"
    close(found[0], scores(model, groups), tolerance=0.05)


@torch.no_grad()
def test_a_head_in_16_bits_says_float32():
    """As in DeepSpeed's engine. Its weights are rounded there; their sum of products is not."""
    head = ScalarHead(32, 1).bfloat16()
    states = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = head(states)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0].double(), states.double() @ head.weight[0].double()
                               + head.bias.double())


@pytest.mark.parametrize(("family", "width"), [("opt", 512), ("opt-350m", 256)])
def test_new_head_is_small_and_of_the_projected_width(family, width, tmp_path):
    config = CONFIGS[family]()
    config.hidden_size, config.word_embed_proj_dim = 512, width
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    parent = Parent("model", str(tmp_path))
    heads = [load_scalar_model(parent, new_head_seed=seed).score for seed in (0, 0, 1, 2, 3)]
    assert heads[0].weight.shape == (1, width) and heads[0].bias is None
    assert torch.equal(heads[0].weight, heads[1].weight) and not torch.equal(heads[0].weight, heads[2].weight)
    spread = torch.cat([head.weight for head in heads[1:]]).std().item() * (width + 1) ** 0.5
    assert 0.93 < spread < 1.07  # 1024 draws or more: two standard errors are .045


def test_a_reward_model_from_elsewhere_gets_a_shift_of_0_and_keeps_one_that_it_has(tmp_path):
    """What it is saved as says how its scores are read."""
    for shift in (None, 1.25):
        config = CONFIGS["opt"]()
        config.num_labels = 1
        if shift is not None:
            config.score_shift = shift
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
        loaded = load_scalar_model(Parent("model", str(tmp_path))).config
        assert (loaded.score_shift, loaded.problem_type) == (shift or 0.0, "regression")


@every_family
def test_dropout_is_off_after_loading(family, tmp_path):
    scalar = CONFIGS[family]()
    scalar.num_labels = 1
    AutoModelForSequenceClassification.from_config(scalar).save_pretrained(tmp_path / "scalar")
    policy(family).save_pretrained(tmp_path / "policy")
    groups = pack(*random_groups(*SIZES), PAD)
    language_model = Parent("model", str(tmp_path / "policy"))
    untouched = load_policy(language_model).train()
    first, second = (response_logprobs(untouched, groups, 1.0) for _ in range(2))
    assert not torch.equal(first, second), "the test's model has no dropout to switch off"
    loaded = {
        "reward or value": load_scalar_model(Parent("reward_model", str(tmp_path / "scalar"))),
        "new head": load_scalar_model(language_model, new_head_seed=0),
    }
    for name, model in loaded.items():
        model.train()
        assert torch.equal(scores(model, groups), scores(model, groups)), name
    model = without_dropout(untouched)
    assert torch.equal(*(response_logprobs(model, groups, 1.0) for _ in range(2)))
    # the config too: whoever loads the checkpoint gets none either
    assert not any(value for name, value in model.config.to_dict().items() if "drop" in name)


def test_models_that_do_not_fit_are_refused(tmp_path):
    policy("opt").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reward_model: .*is no reward model"):
        load_scalar_model(Parent("reward_model", str(tmp_path)))


def rewritten(folder, change):
    """The weights of a model folder after `change(weights)`."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def first_matrix(weights):
    return next(name for name in sorted(weights) if name.endswith("fc1.weight"))


BROKEN = {
    "garbage": lambda folder: (folder / "model.safetensors").write_bytes(b"garbage" * 99),
    "empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "cut off": lambda folder: os.truncate(folder / "model.safetensors", 5000),
    "another shape": lambda folder: rewritten(folder,
                                              lambda w: w.update({first_matrix(w): torch.zeros(3, 3)})),
    "missing": lambda folder: rewritten(folder, lambda w: w.pop(first_matrix(w))),
    "config.json a list": lambda folder: (folder / "config.json").write_text("[1]"),
    "config.json null": lambda folder: (folder / "config.json").write_text("null"),
    "config.json no JSON": lambda folder: (folder / "config.json").write_text("{"),
}


@pytest.mark.parametrize(("made", "load"), [(scalar_model, load_scalar_model), (policy, load_policy)],
                         ids=["scalar", "policy"])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_model_folder_is_one_line(how, made, load, tmp_path):
    made("opt").save_pretrained(tmp_path)
    load(Parent("some_key", str(tmp_path)))
    BROKEN[how](tmp_path)
    with pytest.raises(UserError, match="^some_key: '.*' cannot be loaded: .") as caught:
        load(Parent("some_key", str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_only_a_new_head_may_be_missing(tmp_path):
    """transformers fills in random numbers for whatever a checkpoint lacks."""
    policy("opt").save_pretrained(tmp_path)
    parent = Parent("model", str(tmp_path))
    load_scalar_model(parent, new_head_seed=0)
    rewritten(tmp_path, lambda weights: weights.pop(first_matrix(weights)))
    with pytest.raises(UserError, match="^model: .*1 weights are missing .*fc1.weight"):
        load_scalar_model(parent, new_head_seed=0)


def test_a_reward_model_of_another_vocabulary_is_refused(tmp_path):
    scalar_model("opt").save_pretrained(tmp_path)
    parent = Parent("reward_model", str(tmp_path))
    load_scalar_model(parent, vocab_size=VOCAB)
    with pytest.raises(UserError, match=f"^reward_model: .* has {VOCAB} tokens, the policy 40"):
        load_scalar_model(parent, vocab_size=40)
