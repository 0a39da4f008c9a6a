"""LoRA (Hu et al., 2106.09685): small trainable matrices beside frozen weights, with peft's layers.

The layers are put into the stock model, whose class and forward stay, and are merged into its weights at the
end: every checkpoint in final/ is a stock one.
"""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils.errors import UserError
from utils.models.four_bit import layers_of, stored_weight
from utils.models.parents import Parent
from utils.zero import gathered_weights

_ADAPTERS = "adapter_model.safetensors"  # peft's name


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
    """A second model on the same weights, since what is frozen needs no second copy. A scalar head is copied,
    and so are adapters.
    """
    kept = [weight for name, weight in model.named_parameters() if "lora_" not in name]
    kept += [layer.weight.quant_state for _, layer in layers_of(model)]
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


# -------------------------------------------------------------------------------- adapters as files, for peft


def _saved(model) -> dict[str, torch.Tensor]:
    """The adapters and a scalar head, by the names that peft's files have for them."""
    return {f"base_model.model.{name.replace('.default.', '.')}": weight
            for name, weight in model.named_parameters() if "lora_" in name or name == "score.weight"}


def save_adapter(model, base: Parent, folder: Path) -> None:
    """Write what peft's `PeftModel.from_pretrained(base model, folder)` reads, and the model's configs."""
    folder.mkdir()
    state = {name: weight.detach().cpu().contiguous() for name, weight in _saved(model).items()}
    save_file(state, folder / _ADAPTERS, {"format": "pt"})
    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = base.name if base.folder is None else str(base.folder.resolve())
    scalar = hasattr(model, "score")
    config.task_type = TaskType.SEQ_CLS if scalar else TaskType.CAUSAL_LM
    config.modules_to_save = ["score"] if scalar else None
    config.inference_mode = True
    config.save_pretrained(folder)
    model.hf_quantizer.remove_quantization_config(model)  # of the config that says what the whole model is
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def load_adapter(model, parent: Parent) -> None:
    """Put a parent's adapters, and its scalar head if it has one, into its base model, frozen.

    Raises:
        UserError: when they do not fit.
    """
    config = copy.copy(parent.adapter)
    config.modules_to_save = config.task_type = None
    parent.load(lambda _: inject_adapter_in_model(config, model))
    state, weights = parent.load(lambda path: load_file(Path(path) / _ADAPTERS)), _saved(model)
    wrong = [name for name, weight in weights.items() if "lora_" in name
             and (name not in state or state[name].shape != weight.shape)]
    wrong += sorted(state.keys() - weights.keys())
    if wrong and set(wrong) != {"base_model.model.score.weight"}:  # a policy has no use for a scalar head
        raise UserError(f"{parent.key}: the adapters of '{parent.name}' do not fit its base model: "
                        f"{wrong[0]}; train that stage again")
    with torch.no_grad():
        for name in weights.keys() & state.keys():
            weights[name].copy_(state[name])
    model.requires_grad_(False)


def has_adapter(model) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def go_on_with_adapter(model, config) -> None:
    """Train the adapters that a parent came with, and a scalar head.

    Raises:
        UserError: when they are of another size than the configuration says.
    """
    theirs = model.peft_config["default"]
    if (theirs.r, theirs.lora_alpha) != (config.lora_rank, config.lora_alpha):
        raise UserError(f"lora_rank: the adapters of the stage before go on being trained, and are of rank "
                        f"{theirs.r} and alpha {theirs.lora_alpha}; give --lora_rank {theirs.r} --lora_alpha "
                        f"{theirs.lora_alpha}")
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name or name == "score.weight")


def join_weights(second, first) -> None:
    """Let the trunk of `second` use the weights of `first` wherever both have the same bytes: one base model
    under the adapters of several.
    """
    weights, layers = dict(first.base_model.named_parameters()), dict(layers_of(first.base_model))
    rounded = dict(layers_of(second.base_model))
    for name, weight in list(second.base_model.named_parameters()):
        other, (parent, _, last) = weights.get(name), name.rpartition(".")
        if other is None or "lora_" in name or weight.shape != other.shape or not torch.equal(weight, other):
            continue
        module = second.base_model.get_submodule(parent)
        if parent in rounded and last == "weight":
            if not torch.equal(stored_weight(rounded[parent]), stored_weight(layers[parent])):
                continue
            module.quant_state = other.quant_state
        setattr(module, last, other)
