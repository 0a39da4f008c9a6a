"""What a model is made of, without its weights: it is built on torch's meta device, which allocates nothing.

Parameters are counted on that model, and what autograd keeps of a forward pass is counted by running it there.
"""

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
)
from transformers.masking_utils import sdpa_mask

from planning.flops import Size
from utils.config import UserError
from utils.models.loading import without_dropout
from utils.models.lora import add_adapter
from utils.models.parents import Parent
from utils.paths import find_local

# hidden size, layers, heads (Zhang et al., 2205.01068, table 1); two-layer MLPs of four times the hidden size
OPT = {
    "facebook/opt-125m": (768, 12, 12), "facebook/opt-350m": (1024, 24, 16), "facebook/opt-1.3b": (2048, 24, 32),
    "facebook/opt-2.7b": (2560, 32, 32), "facebook/opt-6.7b": (4096, 32, 32), "facebook/opt-13b": (5120, 40, 40),
    "facebook/opt-30b": (7168, 48, 56), "facebook/opt-66b": (9216, 64, 72),
}
_COUNTED = "counted"  # the attention of the models here
_BLOCK = 128  # queries, as in utils/models/attention.py


class Model(NamedTuple):
    """One model by its numbers of parameters."""

    name: str
    scalar: bool  # a head of one output in place of the language-model head
    lora_rank: int
    trained: tuple[int, ...]  # parameters of each trainable tensor, in order
    frozen: int  # parameters that LoRA freezes
    largest: int  # parameters of the largest tensor
    head: int  # parameters of the language-model head; 0 where there is none, or it is frozen
    hidden: int
    layers: int
    vocabulary: int
    positions: int | None  # longest prompt with completion; None: any
    cached: int  # numbers that a token leaves in the key-value cache
    size: Size

    @property
    def parameters(self) -> int:
        return sum(self.trained) + self.frozen


def opt_config(name: str) -> OPTConfig:
    """One of the table; OPT-350m alone has norms behind its layers, and narrower embeddings."""
    hidden, layers, heads = OPT[name]
    small = name == "facebook/opt-350m"
    return OPTConfig(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * hidden,
                     word_embed_proj_dim=512 if small else hidden, do_layer_norm_before=not small, vocab_size=50272,
                     max_position_embeddings=2048, tie_word_embeddings=True)


@lru_cache
def config_of(name: str, field: str):
    """The configuration of a model: one of the table, a folder, or a hub name.

    Raises:
        UserError: when there is none, or no network to ask for it.
    """
    if name in OPT and find_local(name) is None:
        return opt_config(name)
    path = Parent(field, name).path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _build(config, scalar=False)
        return config
    except Exception as error:  # whatever is wrong with it, the libraries raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: the architecture of '{name}' cannot be read: {reason}; give the folder of a model, a hub name "
                        f"(which needs a network), or one of {', '.join(OPT)}") from None


def _build(config, scalar: bool, dtype=torch.float32):
    config = copy.deepcopy(config)
    kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    if scalar:
        config.num_labels = 1
    with torch.device("meta"):
        return without_dropout(kind.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False))


@lru_cache
def model_of(name: str, field: str, scalar: bool = False, lora_rank: int = 0) -> Model:
    """The numbers of a model. Raises UserError as `config_of`."""
    config = config_of(name, field)
    model = _build(config, scalar)
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.base_model.modules() if type(module).__name__ in ("Linear", "Conv1D"))
    if lora_rank:
        with torch.device("meta"):
            add_adapter(model, SimpleNamespace(lora_rank=lora_rank, lora_alpha=16))
    weights = list(model.parameters())
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    return Model(
        name, scalar, lora_rank, tuple(w.numel() for w in weights if w.requires_grad),
        sum(w.numel() for w in weights if not w.requires_grad), max(w.numel() for w in weights),
        head.weight.numel() if head is not None and head.weight.requires_grad else 0,
        hidden, layers, config.vocab_size, getattr(config, "max_position_embeddings", None),
        2 * layers * (getattr(config, "num_key_value_heads", None) or heads) * width, _size(config, linear),
    )


def _size(config, linear: int) -> Size:
    """For `planning/flops.py`, which knows two-layer MLPs: one of such a width that the layers have as many linear weights."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    return Size(hidden, layers, (linear // layers - 4 * hidden**2) // (2 * hidden), config.vocab_size)


class _Kept(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps: queries, keys, values, its output, the normalisers, and the mask as numbers."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        batch, heads, length, _ = query.shape
        blocks = max(1, length // _BLOCK)
        seen = length * length * (blocks + 1) // (2 * blocks)  # a block of queries has the columns up to its own end
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32),
                              query.new_empty(batch, seen))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("it is counted, never trained")


def _counted(module, query, key, value, attention_mask, **more):
    out = _Kept.apply(query, key, value).transpose(1, 2)
    return out.clone() if query.shape[2] >= 2 * _BLOCK else out, None  # blocks are joined by a copy


AttentionInterface.register(_COUNTED, _counted)
AttentionMaskInterface.register(_COUNTED, sdpa_mask)


@lru_cache
def kept_bytes(name: str, field: str, scalar: bool, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one row of `length` tokens in the trunk, weights not counted."""
    model = _build(config_of(name, field), scalar, dtype).train()
    if model._supports_attention_backend:
        model.set_attn_implementation(_COUNTED)
    weights = {weight.untyped_storage()._cdata for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor  # which keeps it, so that no other gets its number
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for number, tensor in saved.items() if number not in weights)
