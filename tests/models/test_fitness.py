"""The check at load: which models are refused, by what they do, and that it leaves no trace."""

from types import SimpleNamespace

import pytest
import torch

from families import FAMILIES, VOCAB, policy, scalar_model
from utils.config import UserError
from utils.models.fitness import refuse_unfit
from utils.models.loading import without_dropout

PARENT = SimpleNamespace(key="some_key", name="some/model")
TOKENIZER = SimpleNamespace(get_vocab=lambda: {"first": 0, "last": VOCAB - 1})


def check(model, tokens=20, tokenizer=TOKENIZER, **more):
    refuse_unfit(model, PARENT, tokenizer, tokens, "what_makes_rows", **more)


def refusal(model, **more) -> str:
    with pytest.raises(UserError, match="^some_key: 'some/model' ") as caught:
        check(model, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("made", [policy, scalar_model])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_pass_and_nothing_is_left_behind(family, made):
    model = without_dropout(made(family)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    check(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
