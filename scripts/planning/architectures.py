"""Sizes of a model without its weights.

The model is built on torch's meta device, which allocates no memory. Parameters are counted on it. A forward
pass on it shows what autograd would keep.
"""

import copy
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
)
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from planning.flops import Size
from utils.config import UserError
from utils.models.loading import without_dropout
from utils.models.lora import add_adapter
from utils.models.parents import Parent
from utils.paths import find_local

# name: (hidden size, layers, heads), Zhang et al., arXiv 2205.01068, table 1. The MLP width is 4 x the hidden
# size.
OPT = {
    "facebook/opt-125m": (768, 12, 12), "facebook/opt-350m": (1024, 24, 16),
    "facebook/opt-1.3b": (2048, 24, 32), "facebook/opt-2.7b": (2560, 32, 32),
    "facebook/opt-6.7b": (4096, 32, 32), "facebook/opt-13b": (5120, 40, 40),
    "facebook/opt-30b": (7168, 48, 56), "facebook/opt-66b": (9216, 64, 72),
}
_COUNTED = "counted"  # the name under which `_counted_attention` is registered
_BLOCK = 128  # queries that attend at once, as in utils/models/attention.py


class Model(NamedTuple):
    """The sizes of one model."""

    name: str
    scalar: bool  # a reward or value model: a head with one output replaces the language-model head
    lora_rank: int
    trained: tuple[int, ...]  # parameters of each trainable tensor, in order
    frozen: int  # parameters that LoRA freezes
    largest: int  # parameters of the largest tensor
    head: int  # parameters of the language-model head; 0: there is none, or it is frozen
    hidden: int
    layers: int
    vocabulary: int
    positions: int | None  # tokens of the longest prompt with its completion; None: no limit
    cached: int  # numbers in the key-value cache for each token
    size: Size
    rounded: int = 0  # parameters of the linear layers that are stored in 4 bits (utils/models/four_bit.py)
    widest: int = 0  # of the largest of these

    @property
    def parameters(self) -> int:
        """All parameters, trained and frozen."""
        return sum(self.trained) + self.frozen


def opt_config(name: str) -> OPTConfig:
    """The configuration of a model in `OPT`."""
    hidden, layers, heads = OPT[name]
    # OPT-350m alone has LayerNorm after its layers, and embeddings narrower than the hidden size
    post_norm = name == "facebook/opt-350m"
    return OPTConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * hidden,
        word_embed_proj_dim=512 if post_norm else hidden, do_layer_norm_before=not post_norm,
        vocab_size=50272, max_position_embeddings=2048, tie_word_embeddings=True,
    )


@lru_cache
def config_of(name: str, field: str):
    """The configuration of a model: a name in `OPT` (no network needed), a folder, or a hub name.

    Args:
        field: key that names the model, for error messages.

    Raises:
        UserError: when there is no such model, or the hub cannot be reached.
    """
    if name in OPT and find_local(name) is None:
        return opt_config(name)
    path = Parent(field, name).path
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _build(config, scalar=False)
        return config
    except Exception as error:  # a broken folder can make transformers raise any exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: the architecture of '{name}' cannot be read: {reason}; give a model "
                        f"folder, a hub name (needs a network), or one of {', '.join(OPT)}") from None


def _build(config, scalar: bool, dtype=torch.float32):
    """The model on the meta device."""
    config = copy.deepcopy(config)
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    if scalar:
        config.num_labels = 1
    with torch.device("meta"):
        return without_dropout(auto_class.from_config(
            config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False))


@lru_cache
def model_of(name: str, field: str, scalar: bool = False, lora_rank: int = 0,
             load_in_4bit: bool = False) -> Model:
    """The sizes of a model. Raises UserError as `config_of` does."""
    config = config_of(name, field)
    model = _build(config, scalar)
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.base_model.modules()
                 if type(module).__name__ in ("Linear", "Conv1D"))  # Conv1D: GPT-2's linear layers
    kept = {id(part) for part in (head, getattr(model, "score", None))}
    rounded = [module.weight.numel() for module in model.modules()  # as transformers chooses them
               if load_in_4bit and type(module) in (nn.Linear, Conv1D) and id(module) not in kept]
    if lora_rank:
        with torch.device("meta"):
            add_adapter(model, SimpleNamespace(lora_rank=lora_rank, lora_alpha=16))  # alpha changes no size
    weights = list(model.parameters())
    hidden, layers, heads = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or hidden // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    return Model(
        name, scalar, lora_rank,
        trained=tuple(w.numel() for w in weights if w.requires_grad),
        frozen=sum(w.numel() for w in weights if not w.requires_grad),
        largest=max(w.numel() for w in weights),
        head=head.weight.numel() if head is not None and head.weight.requires_grad else 0,
        hidden=hidden, layers=layers, vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        cached=2 * layers * key_value_heads * head_width, size=_size(config, linear),
        rounded=sum(rounded), widest=max(rounded, default=0),
    )


def _size(config, linear: int) -> Size:
    """Sizes for `planning/flops.py`.

    It knows two-layer MLPs only. The MLP width is chosen so that the layers have the right number of linear
    weights.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    return Size(hidden, layers, (linear // layers - 4 * hidden**2) // (2 * hidden), config.vocab_size)


class _KeptByAttention(torch.autograd.Function):
    """Saves tensors as large as those that a fused attention kernel saves.

    These are queries, keys, values, the output (all (B, H, T, D / H)), the softmax normalisers (B, H, T), and
    the mask as numbers.
    """

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        batch, heads, length, _ = query.shape
        blocks = max(1, length // _BLOCK)
        # entries of the mask: a block of queries has the columns up to its own end
        seen = length * length * (blocks + 1) // (2 * blocks)
        normalisers = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, normalisers, query.new_empty(batch, seen))
        return out

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("the forward pass is only counted, never differentiated")


def _counted_attention(module, query, key, value, attention_mask, **unused):
    out = _KeptByAttention.apply(query, key, value).transpose(1, 2)
    return out.clone() if query.shape[2] >= 2 * _BLOCK else out, None  # several blocks are joined by a copy


AttentionInterface.register(_COUNTED, _counted_attention)
AttentionMaskInterface.register(_COUNTED, sdpa_mask)


@lru_cache
def kept_bytes(name: str, field: str, scalar: bool, length: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps of one row of `length` tokens in the trunk, without the weights."""
    model = _build(config_of(name, field), scalar, dtype).train()
    if model.is_backend_compatible():
        model.set_attn_implementation(_COUNTED)
    # on the meta device every data_ptr() is 0, so storages are told apart by references to them
    weights = {StorageWeakRef(weight.untyped_storage()) for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        # holds a reference, because the address of a freed storage could be given to another one
        saved[StorageWeakRef(tensor.untyped_storage())] = tensor
        return tensor

    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=ids, use_cache=False)
    return sum(tensor.untyped_storage().nbytes()
               for storage, tensor in saved.items() if storage not in weights)
