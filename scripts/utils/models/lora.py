"""LoRA (Hu et al., 2106.09685): small trainable matrices beside frozen weights, with peft's layers.

The layers are put into the stock model, whose class and forward stay, and are merged into its weights at the
end: every checkpoint in final/ is a stock one.
"""

import copy

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.models.four_bit import layers_of
from utils.zero import gathered_weights


def add_adapter(model, config):
    """Freeze `model`, and give every linear layer that reads text, but its heads, a trainable adapter of rank
    `config.lora_rank`, in place.

    The fresh adapter changes nothing: one of its two matrices is 0. A scalar head is trained whole.
    """
    heads = {id(head) for head in (model.get_output_embeddings(), getattr(model, "score", None))
             if head is not None}
    text = set(model.get_decoder().modules())  # an adapter of what reads images would get no gradient
    targets = [name for name, module in model.named_modules()
               if _is_linear(module) and module in text and id(module) not in heads]
    model.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha,
                                       target_modules=targets), model)
    if hasattr(model, "score"):
        model.score.requires_grad_(True)
    return model


def _is_linear(module) -> bool:
    """A linear layer, also of a class of its own (FalconLinear), in GPT-2's spelling (Conv1D) or in 4 bits. A
    router is none, although its class extends `nn.Linear` in some families: it returns more than a product.
    """
    kinds = ("Linear", "Conv1D", "Linear4bit")
    return isinstance(module, (nn.Linear, Conv1D)) and type(module).__name__.endswith(kinds)


def share_weights(model):
    """A second model on the same weights, since what is frozen needs no second copy. A scalar head is copied.
    """
    kept = [*model.parameters(), *(layer.weight.quant_state for _, layer in layers_of(model))]
    second = copy.deepcopy(model, {id(one): one for one in kept})
    if hasattr(model, "score"):
        with gathered_weights(model.score):
            second.score = copy.deepcopy(model.score)
    return second


def merge_adapter(model):
    """Add the adapters to the weights and take their layers out, in place: a stock model. Without adapters
    nothing happens.
    """
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in layers:
        with gathered_weights(module, change=True):
            module.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    return model
