"""LoRA: what is frozen, what is shared, and that a merged model is the stock model with other weights."""

from types import SimpleNamespace

import pytest
import torch

from families import FAMILIES, PAD, policy, random_groups, scalar_model
from utils.models.loading import with_our_heads
from utils.models.lora import add_adapter, merge_adapter, share_weights
from utils.models.outputs import response_logprobs, scores
from utils.models.prompt_groups import pack

CONFIG = SimpleNamespace(lora_rank=2, lora_alpha=3)
GROUPS = pack(*random_groups([4, 1, 7], [[3, 1, 5], [2], [4, 4]]), PAD)
every_family = pytest.mark.parametrize("family", FAMILIES)


def adapters(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


def moved(model):
    """After training steps, say: adapters that are not 0."""
    for weight in adapters(model).values():
        torch.nn.init.normal_(weight.data, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@every_family
@torch.no_grad()
def test_a_fresh_adapter_changes_nothing_and_only_adapters_and_the_head_are_trained(family):
    for make, measure in ((policy, lambda m: response_logprobs(m, GROUPS, 0.7)),
                          (scalar_model, lambda m: scores(m, GROUPS))):
        model = add_adapter(make(family), CONFIG)
        assert torch.equal(measure(model), measure(make(family)))
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        head = {"score.weight"} if hasattr(model, "score") else set()
        assert trained == set(adapters(model)) | head and len(trained) > 8
        assert not any("lm_head" in name or "embed_out" in name for name in adapters(model))
        assert (measure(moved(model)) - measure(make(family))).abs().max() > 1e-2


@every_family
@torch.no_grad()
def test_a_merged_model_is_a_stock_model_that_says_the_same(family, tmp_path):
    for make, measure in ((policy, lambda m: response_logprobs(m, GROUPS, 0.7)),
                          (scalar_model, lambda m: scores(m, GROUPS))):
        model, stock = moved(add_adapter(make(family), CONFIG)), make(family)
        before = measure(model)
        assert merge_adapter(model) is model
        assert model.state_dict().keys() == stock.state_dict().keys()
        torch.testing.assert_close(measure(model), before, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / family)
        loaded = with_our_heads(type(stock).from_pretrained(tmp_path / family)).eval()
        torch.testing.assert_close(measure(loaded), before, rtol=1e-4, atol=1e-4)
    assert merge_adapter(make(family)).state_dict().keys() == stock.state_dict().keys()


def test_the_scale_is_alpha_over_rank():
    """W + alpha / rank B A, worked out by hand for one layer."""
    model = moved(add_adapter(policy("opt"), CONFIG))
    layer = model.model.decoder.layers[0].fc1
    expected = (layer.base_layer.weight + 3 / 2 * layer.lora_B["default"].weight
                @ layer.lora_A["default"].weight)
    torch.testing.assert_close(merge_adapter(model).model.decoder.layers[0].fc1.weight, expected)


@every_family
@torch.no_grad()
def test_a_second_model_shares_the_weights_and_sees_no_adapter(family):
    model = policy(family)
    second = share_weights(model)
    add_adapter(model, CONFIG)
    assert not torch.equal(response_logprobs(moved(model), GROUPS, 1.0),
                           response_logprobs(second, GROUPS, 1.0))
    assert torch.equal(response_logprobs(second, GROUPS, 1.0), response_logprobs(policy(family), GROUPS, 1.0))
    ours = {weight.data_ptr() for weight in model.parameters()}
    assert all(weight.data_ptr() in ours for weight in second.parameters())
    scalar = scalar_model(family)
    head = share_weights(scalar).score.weight
    assert torch.equal(head, scalar.score.weight) and head.data_ptr() != scalar.score.weight.data_ptr()
