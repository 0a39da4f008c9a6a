"""Frozen weights in 4 bits under adapters: QLoRA (Dettmers et al., 2305.14314), with bitsandbytes' layers.

As in the paper the weights are NF4 (its section 3) in blocks of 64, and the scale of each block is rounded to
8 bits in its turn (double quantisation): 4.127 bits a weight. Only linear layers of the model are stored so.
Its heads, embeddings, norms and biases stay as they are. A product is computed with a layer's weights turned
back into the number type of `mixed_precision`, one layer at a time.
"""

import sys

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError
from utils.models.parents import Parent

_COMPUTED_IN = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by mixed_precision


def storage_of(config) -> BitsAndBytesConfig | None:
    """How the frozen weights of a stage are to be stored; None: as numbers of 32 bits."""
    if not config.load_in_4bit:
        return None
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                              bnb_4bit_compute_dtype=_COMPUTED_IN[config.mixed_precision])


def refuse_stored_quantised(parent: Parent) -> None:
    """Raise UserError for a model whose files hold rounded weights: they cannot be trained or rounded again.
    """
    stored = getattr(parent.config, "quantization_config", None)
    if stored is not None:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        raise UserError(f"{parent.key}: '{parent.name}' is stored quantised ({stored.get('quant_method')}); "
                        "take the model in 16 or 32 bits that it was made from, and load_in_4bit")


def layers_of(model) -> list[tuple[str, nn.Module]]:
    """The layers in 4 bits, by name."""
    if "bitsandbytes" not in sys.modules:  # transformers imports it when it rounds a model; few runs need it
        return []
    from bitsandbytes.nn import Linear4bit

    return [(name, module) for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def keep_exact(model) -> None:
    """Keep bitsandbytes from rounding the weights once more, in place.

    On a CPU with AVX512-BF16 its layers would do that at the first call in evaluation mode, for a faster
    product in bfloat16. Sampling would then see another model than training.
    """
    for _, layer in layers_of(model):
        layer.support_avx512bf16_for_cpu = False


def arithmetic_of(model) -> torch.dtype:
    """The number type in which the model's products are computed, outside of autocast."""
    layers = layers_of(model)
    return layers[0][1].compute_dtype if layers else model.get_input_embeddings().weight.dtype


def stored_weight(layer: nn.Module) -> torch.Tensor:
    """The weight (out, in) of a layer as it is computed with, float32."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


@torch.no_grad()
def merge_dense(model, dtype: torch.dtype) -> None:
    """Turn a model in 4 bits with adapters into a stock one in `dtype`, in place and in the CPU's memory.

    A weight becomes what was trained with: the rounded weight, and the adapter's product added in float32.
    (peft's own merge would round the sum to 4 bits, which loses most of the adapter.)
    """
    adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    rounded = {layer for _, layer in layers_of(model)}
    for name, module in adapters:
        if module.get_base_layer() in rounded:
            change = sum(module.get_delta_weight(adapter) for adapter in module.lora_A)
            model.set_submodule(name, _dense(module.get_base_layer(), dtype, change))
    for name, layer in layers_of(model):
        model.set_submodule(name, _dense(layer, dtype))
    model.hf_quantizer.remove_quantization_config(model)
    model.is_loaded_in_4bit = False
    model.to("cpu", dtype)
    model.config.dtype = dtype


def _dense(layer: nn.Module, dtype: torch.dtype, change: torch.Tensor | float = 0.0) -> nn.Module:
    """The layer that `layer` was made from, with its rounded weight + `change` (out, in)."""
    weight = (stored_weight(layer) + change).to("cpu", dtype)
    out, width = weight.shape
    with torch.device("meta"):
        if layer.source_cls is Conv1D:  # GPT-2's, which has the weight (in, out)
            dense, weight = Conv1D(out, width), weight.T.contiguous()
        else:
            dense = nn.Linear(width, out, bias=layer.bias is not None)
    dense.weight, dense.bias = nn.Parameter(weight), layer.bias
    return dense
