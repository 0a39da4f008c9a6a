"""Parameters counted without weights, and the learning rate where none is given."""

import json
import math

import pytest
from transformers import AutoModelForCausalLM

from tiny_models import save_opt
from utils.config import PROJECT
from utils.errors import UserError
from utils.models.parents import Parent
from utils.models.size import learning_rate, parameters

STAGES = ("sft", "reward", "ppo")


def test_parameters_are_those_of_the_loaded_model(tmp_path):
    for folder in (PROJECT / "assets" / "opt-mini", save_opt(tmp_path / "tiny")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = sum(weight.numel() for weight in model.parameters())
        assert parameters(Parent("model", str(folder))) == expected
        assert all(weight.device.type == "cpu" for weight in model.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_from_1b_on_the_rate_is_the_published_one(stage):
    """N+: 3e-6 for Pythia 1B, 2.8B and 6.9B, in all three stages."""
    for count in (1e9, 1.3e9, 2.8e9, 6.9e9, 66e9):
        assert learning_rate(stage, int(count), False) == 3e-6


@pytest.mark.parametrize("stage", STAGES)
def test_a_smaller_model_has_a_higher_rate_up_to_the_demos(stage):
    rates = [learning_rate(stage, count, False) for count in (10**4, 2_300_000, 10**7, 125 * 10**6, 10**9)]
    assert rates == sorted(rates, reverse=True) and rates[0] == rates[1] > rates[2] > rates[3] > rates[4]
    # half way in the logarithm of the size is half way in that of the rate
    middle = learning_rate(stage, round(math.sqrt(2.3e6 * 1e9)), False)
    assert middle == pytest.approx(math.sqrt(rates[1] * 3e-6), rel=0.05)
    demo = (PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml").read_text()
    [tuned] = [line.split()[1] for line in demo.splitlines() if line.startswith("learning_rate:")]
    assert rates[1] == float(tuned), "the two are one choice"


def test_adapters_want_a_higher_rate():
    assert learning_rate("sft", 7 * 10**9, True) == pytest.approx(5 * 3e-6)


@pytest.mark.parametrize("layers", [10**6, 1001, "many"])
def test_layers_out_of_all_sense_are_refused_before_they_are_built(layers, tmp_path):
    folder = save_opt(tmp_path / "deep")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(UserError, match="^model: .*(layers; at most 1000|cannot be loaded)"):
        parameters(Parent("model", str(folder)))
