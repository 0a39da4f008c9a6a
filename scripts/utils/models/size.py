"""The size of a model, counted before its weights are loaded, and the learning rate that fits it."""

import math

import torch
from transformers import AutoModelForCausalLM

from utils.errors import UserError
from utils.models.parents import Parent

_MOST_LAYERS = 1000  # eight times the deepest published model; building a million of them takes hours
# two sizes whose rates are known: N+ takes 3e-6 from 1B to 6.9B in all stages; the demo's are tuned here
_PUBLISHED_SIZE, _PUBLISHED = 1e9, 3e-6
_TUNED_SIZE, _TUNED = 2.3e6, {"sft": 1e-3, "reward": 3e-4, "ppo": 2e-4}
_ADAPTERS = 5  # times the rate of the weights themselves (measured: docs/options.md)


def parameters(parent: Parent) -> int:
    """Number of weights, of the model without memory (torch's meta device).

    Raises:
        UserError: when the config names no causal language model, or one that nobody has.
    """
    layers = getattr(parent.config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > _MOST_LAYERS:
        raise UserError(f"{parent.key}: the config.json of '{parent.name}' says {layers} layers; at most "
                        f"{_MOST_LAYERS} are taken")
    with torch.device("meta"):
        model = parent.load(lambda _: AutoModelForCausalLM.from_config(parent.config))
    return sum(weight.numel() for weight in model.parameters())


def learning_rate(stage: str, count: int, adapters: bool) -> float:
    """The peak learning rate of a stage where none is given, to two digits.

    From 1B parameters on it is N+'s. At the demo's 2.3 million it is the demo's, and between the two the
    logarithms of rate and size are on a line.

    Args:
        stage: "sft", "reward" or "ppo".
        count: parameters of the model.
        adapters: whether LoRA adapters are trained in place of the weights.
    """
    whole = math.log(_PUBLISHED_SIZE / _TUNED_SIZE)
    share = min(1.0, max(0.0, math.log(max(count, 1) / _TUNED_SIZE) / whole))
    rate = _TUNED[stage] ** (1 - share) * _PUBLISHED ** share
    return float(f"{rate * (_ADAPTERS if adapters else 1):.1e}")
