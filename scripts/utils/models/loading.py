"""Loading models, and giving them what this project needs: our heads, attention in blocks, no dropout,
adapters.

Policies are stock `AutoModelForCausalLM` checkpoints, reward and value models stock
`AutoModelForSequenceClassification` checkpoints with one label. Any architecture of transformers will do that
`fitness.py` finds nothing against.
"""

import copy
import math

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GenerationConfig,
)

from utils.config import UserError
from utils.models.attention import CAUSAL_BLOCKS
from utils.models.compiled import compile_layers
from utils.models.four_bit import keep_exact, refuse_stored_quantised
from utils.models.lm_head import LMHead
from utils.models.lora import add_adapter, go_on_with_adapter, has_adapter, load_adapter, merge_adapter
from utils.models.parents import Parent
from utils.models.sanity import refuse_layers, refuse_not_finite
from utils.models.vocabulary import fit_rows, words_of
from utils.zero import gathered_weights

# Weights are float32 (mixed precision is autocast's work), and no code from outside is run. A .bin file is
# read by torch's loader that makes tensors only; transformers prefers safetensors where both are there.
_LOAD = {"dtype": torch.float32, "trust_remote_code": False, "weights_only": True}

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_RANDOM = ("drop", "jitter")  # parts of the names of probabilities and widths of noise


def load_policy(parent: Parent, storage: BitsAndBytesConfig | None = None):
    """A causal language model in float32.

    Args:
        storage: of its linear layers' weights (`four_bit.storage_of`); None: float32.

    Raises:
        UserError: when it cannot be loaded, or weights are missing.
    """
    return _pretrained(AutoModelForCausalLM, parent, storage)


def load_scalar_model(parent: Parent, new_head_seed: int | None = None, vocab_size: int | None = None,
                      storage: BitsAndBytesConfig | None = None):
    """A sequence classification model with one label: a reward or a value model.

    Args:
        new_head_seed: for a fresh head on a language model's trunk, weights N(0, 1/sqrt(d+1)), d being the
            width that reaches the head (detail 15; ST, N+). None: the checkpoint must have a head.
        vocab_size: of the policy whose tokens it is going to read; None: not known yet.
        storage: as in `load_policy`.

    Raises:
        UserError: before a weight is loaded when it is no such model; or when weights are missing.
    """
    if new_head_seed is None:
        labels = parent.config
        rows = labels.get_text_config().vocab_size
        if vocab_size not in (None, rows):
            raise UserError(f"{parent.key}: '{parent.name}' has {rows} tokens, the policy {vocab_size}; use "
                            "models of one family")
        if not parent.is_reward_model:
            kind = (labels.architectures or ["unknown"])[0]
            raise UserError(f"{parent.key}: '{parent.name}' is no reward model: {kind} with "
                            f"{labels.num_labels} labels, "
                            "needed is a sequence classification model with one (made by train_reward.py)")
    new = () if new_head_seed is None else ("score.weight",)
    if parent.adapter is not None:
        new = ("score.weight",)  # it stands with the adapters
    model = _pretrained(AutoModelForSequenceClassification, parent, storage, new, num_labels=1)
    if new_head_seed is not None:
        generator = torch.Generator().manual_seed(new_head_seed)
        with gathered_weights(model.score, change=True):
            std = 1 / math.sqrt(model.score.in_features + 1)
            # drawn on the CPU, for the same head on every device: under ZeRO-3 the weight is gathered on the
            # card
            model.score.weight.data.copy_(torch.empty(model.score.weight.shape).normal_(std=std,
                                                                                        generator=generator))
        model.config.score_shift = 0.0
    # of a model from elsewhere that goes on learning; a head that is taken over keeps its shift
    model.config.score_shift = getattr(model.config, "score_shift", 0.0)
    # a stock pipeline then shows the score as it is, and no sigmoid of it
    model.config.problem_type = "regression"
    return without_dropout(model)


def _pretrained(kind, parent: Parent, storage: BitsAndBytesConfig | None, new=(), **changes):
    """`kind.from_pretrained`, which without asking fills in random numbers for weights that it does not find.

    Args:
        storage: as in `load_policy`.
        new: names of weights that the checkpoint need not have.
        changes: keys of the config.
    """
    config = copy.deepcopy(parent.config)
    for key, value in changes.items():
        setattr(config, key, value)
    base = parent.base
    if parent.adapter is not None:  # a row for an added PAD is not in the base's files; `fit_rows` makes it
        config.get_text_config().vocab_size = base.config.get_text_config().vocab_size
    refuse_layers(base)
    refuse_stored_quantised(base)
    path = base.weights_path
    # a converted model's revision has weights only, and transformers stumbles over what is missing there
    generation = None if path == base.path else GenerationConfig.from_model_config(config)
    # only ours caps the scores of attention; torch's refuses models that add the mask
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    attention = CAUSAL_BLOCKS if capped else "sdpa"
    model, loaded = parent.load(lambda _: kind.from_pretrained(
        path, config=config, generation_config=generation, output_loading_info=True,
        ignore_mismatched_sizes=True, attn_implementation=attention, quantization_config=storage, **_LOAD,
    ))
    keep_exact(model)
    base.say_if_pickled()
    wrong = sorted({key for key, *_ in loaded["mismatched_keys"]})
    missing = sorted(set(loaded["missing_keys"]) - set(new))
    for what, names in (("of another shape than its config.json says", wrong), ("missing", missing)):
        if names:
            raise UserError(f"{parent.key}: '{parent.name}' cannot be loaded: {len(names)} "
                            f"weights are {what} ({names[0]}, ...)")
    refuse_not_finite(model, base)
    if parent.adapter is not None:
        load_adapter(model, parent)
        if storage is None:
            merge_adapter(model)
    if not parent.has_tokenizer:
        return with_our_heads(in_blocks(model))
    fit_rows(model, parent.tokenizer)
    model = with_our_heads(in_blocks(model))
    if (head := model.get_output_embeddings()) is not None:
        head.words = words_of(parent.tokenizer)
    return model


def in_blocks(model):
    """Attention in blocks, for models that let the attention function be chosen; the others (Falcon) keep
    SDPA.

    transformers refuses a model without SDPA before: most of these add the mask, which is boolean here.

    cuDNN's kernel is off: it builds a plan for each new shape, and here every decoding step and batch has its
    own. On an H200 256 responses of the mini model took 3.6 s with it in bfloat16, and 0.3 s without.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if model.is_backend_compatible():
        model.set_attn_implementation(CAUSAL_BLOCKS)
    return model


def with_our_heads(model):
    """Give the model's heads our forward, in place; its weights and what is saved stay stock."""
    for head, kind in ((model.get_output_embeddings(), LMHead), (getattr(model, "score", None), ScalarHead)):
        if head is not None:
            head.__class__ = kind
    head, config = model.get_output_embeddings(), model.config.get_text_config()
    if head is not None:
        head.softcap = getattr(config, "final_logit_softcapping", None)
        head.scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1.0)
    return model


def trainable(model, config):
    """The model as it is trained: with adapters when `lora_rank` is set, recomputing activations or with
    compiled layers when asked for.
    """
    if config.lora_rank and has_adapter(model):
        go_on_with_adapter(model, config)
    elif config.lora_rank:
        add_adapter(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.compile_trunk:
        compile_layers(model)
    return model


def without_dropout(model):
    """Switch off what is random in training, in the modules and in the config that is saved (detail 8).

    Dropout and the jitter of routers are found by what they are: a module of dropout, or a number of a module
    or of a config that is named so. `refuse_unfit` shows whether any is left.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for holder in (*configs.values(), *model.modules()):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and any(word in name for word in _RANDOM):
                setattr(holder, name, 0.0)
    for module in model.modules():
        if isinstance(module, _DROPOUTS):
            module.p = 0.0
    return model


class ScalarHead(nn.Linear):
    """A head whose output is float32 always: bfloat16 would round a score of 1 to steps of .008."""

    def forward(self, states):
        with torch.autocast(states.device.type, enabled=False):
            return linear(states.float(), self.weight.float(), None if self.bias is None
                          else self.bias.float())
