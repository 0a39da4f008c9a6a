"""Loading the models, and what each says of a batch of prompt groups.

Policies are stock `AutoModelForCausalLM` checkpoints, reward and value models stock
`AutoModelForSequenceClassification` checkpoints with one label. Any architecture of transformers that takes
a four-dimensional attention mask and position ids will do.

The language-model head is applied at response positions only: nothing of shape (B, T, vocabulary) is made.
"""

import math
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from utils.config import UserError
from utils.models.attention import CAUSAL_BLOCKS
from utils.models.initial_weights import sketch_induction_heads
from utils.models.lm_head import LMHead, token_logprobs, token_logprobs_and_entropy
from utils.models.prompt_groups import PromptGroups, attention_mask, end_states, response_states, spread
from utils.paths import find_local, is_hub_name
from utils.zero import whole

# Weights are float32 (mixed precision is autocast's work), safetensors only, and no code from outside is run.
_LOAD = {"dtype": torch.float32, "attn_implementation": "sdpa", "trust_remote_code": False}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def model_path(name: str, field: str) -> str:
    """A local model folder (looked up from the current folder, then the project's), or a hub name unchanged."""
    folder = find_local(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise UserError(f"{field}: '{folder}' is not a model folder (it has no config.json)")
        return str(folder)
    if not is_hub_name(name):
        raise UserError(f"{field}: no model folder at '{name}'; train that stage first or give another folder or hub name")
    return name


def _loading(field, name, load):
    try:
        return load()
    except Exception as error:  # a broken folder makes the libraries raise anything, their own kinds among them
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: '{name}' cannot be loaded: {reason}") from None


def _pretrained(kind, field, name, new=(), **more):
    """`kind.from_pretrained`, which without asking fills in random numbers for weights that it does not find.

    Args:
        new: names of weights that the checkpoint need not have.
    """
    path = model_path(name, field)
    model, found = _loading(field, name, lambda: kind.from_pretrained(
        path, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **_LOAD, **more
    ))
    wrong = sorted({key for key, *_ in found["mismatched_keys"]})
    missing = sorted(set(found["missing_keys"]) - set(new))
    for what, names in (("of another shape than its config.json says", wrong), ("missing", missing)):
        if names:
            raise UserError(f"{field}: '{name}' cannot be loaded: {len(names)} weights are {what} ({names[0]}, ...)")
    return with_our_heads(_in_blocks(model))


def _in_blocks(model):
    """Attention in blocks, for models that let the attention function be chosen; the others (Falcon) keep SDPA.

    A model without SDPA is refused before, by transformers: most of these add the mask, which is boolean here.
    """
    if model._supports_attention_backend:
        model.set_attn_implementation(CAUSAL_BLOCKS)
    return model


def with_our_heads(model):
    """Let the model's heads compute what is asked of them here, in place; its weights and what is saved stay stock ones."""
    for head, kind in ((model.get_output_embeddings(), LMHead), (getattr(model, "score", None), ScalarHead)):
        if head is not None:
            head.__class__ = kind
    return model


def load_tokenizer(name: str, field: str = "model"):
    """The tokenizer of a model; it must have an EOS token, and a PAD token that is not the EOS (detail 4)."""
    path = model_path(name, field)
    # without any of these transformers makes up an empty tokenizer
    if Path(path).is_dir() and not any((Path(path) / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(f"{field}: '{name}' holds a model but no tokenizer files ({', '.join(_TOKENIZER_FILES)}); copy those "
                        "of the model it was made from into it")
    tokenizer = _loading(field, name, lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    if tokenizer.eos_token_id is None:
        raise UserError(f"{field}: the tokenizer of '{name}' has no EOS token, so no summary could ever end")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        raise UserError(
            f"{field}: the tokenizer of '{name}' has no PAD token of its own (PAD must differ from EOS, or the EOS "
            "is masked away and generation never learns to stop); add one to the tokenizer and save it"
        )
    return tokenizer


def load_policy(name: str, field: str = "model", initial_weights: str = "pretrained"):
    """A causal language model in float32.

    Args:
        initial_weights: "pretrained", those in the checkpoint; "random", fresh ones for its architecture; "induction",
            fresh ones of an OPT arranged so that copying is learnt at once (`utils/models/initial_weights.py`).
    """
    path = model_path(name, field)
    config = _loading(field, name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
    for change in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
        if getattr(config, change, None) not in (None, 1, 1.0):
            raise UserError(f"{field}: '{name}' changes its logits behind the head ({change} in its config.json), which is not "
                            "built in here; use OPT, GPT-2, GPT-NeoX, Llama, Mistral, Qwen or another model without it")
    if initial_weights == "pretrained":
        return _pretrained(AutoModelForCausalLM, field, name)
    model = with_our_heads(_in_blocks(without_dropout(AutoModelForCausalLM.from_config(config, **_LOAD))))
    if initial_weights == "induction":
        usual = config.model_type == "opt" and config.do_layer_norm_before and config.word_embed_proj_dim == config.hidden_size
        if not usual or config.num_attention_heads < 2 or config.num_hidden_layers < 2:
            raise UserError("initial_weights: 'induction' is for OPT with norms before its layers, no projection, two heads and "
                            f"two layers or more, not for '{name}'; take 'random'")
        with whole(model, change=True):
            sketch_induction_heads(model)
    return model


def load_scalar_model(name: str, field: str, new_head_seed: int | None = None, vocab_size: int | None = None):
    """A sequence classification model with one label: a reward or a value model.

    Args:
        new_head_seed: for a fresh head on a language model's trunk, weights N(0, 1/sqrt(d+1)), d being the
            width that reaches the head (detail 15; ST, N+). None: the checkpoint must have a head.
        vocab_size: of the policy whose tokens it is going to read; None: not known yet.

    Raises:
        UserError: before a weight is loaded when it is no such model; or when weights are missing.
    """
    path = model_path(name, field)
    if new_head_seed is None:
        labels = _loading(field, name, lambda: AutoConfig.from_pretrained(path, trust_remote_code=False))
        if vocab_size not in (None, labels.vocab_size):
            raise UserError(f"{field}: '{name}' has {labels.vocab_size} tokens, the policy {vocab_size}; use models of one "
                            "family")
        kind = (labels.architectures or ["unknown"])[0]
        if labels.num_labels != 1 or "SequenceClassification" not in kind:
            raise UserError(f"{field}: '{name}' is no reward model: {kind} with {labels.num_labels} labels, needed is "
                            "a sequence classification model with one (made by train_reward.py)")
    new = () if new_head_seed is None else ("score.weight",)
    model = _pretrained(AutoModelForSequenceClassification, field, name, new, num_labels=1)
    if new_head_seed is not None:
        generator = torch.Generator().manual_seed(new_head_seed)
        with whole(model.score, change=True):
            nn.init.normal_(model.score.weight.data, std=1 / math.sqrt(model.score.in_features + 1), generator=generator)
        model.config.score_shift = 0.0
    return without_dropout(model)


def without_dropout(model):
    """Switch every dropout off, in the module and in the config that is saved (detail 8)."""
    for name in ("dropout", "attention_dropout", "activation_dropout", "layerdrop", "resid_pdrop", "embd_pdrop",
                 "attn_pdrop", "hidden_dropout", "classifier_dropout", "summary_first_dropout"):
        if getattr(model.config, name, None):
            setattr(model.config, name, 0.0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "layerdrop"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def hidden_states(model, groups: PromptGroups) -> torch.Tensor:
    """The trunk's last hidden states (B, T, D), each completion seeing its prompt and itself only."""
    return model.base_model(
        input_ids=groups.input_ids,
        attention_mask=attention_mask(groups),
        position_ids=groups.position_ids,
        use_cache=False,
    ).last_hidden_state


def response_logprobs(policy, groups: PromptGroups, temperature: float) -> torch.Tensor:
    """Log-probability of each response token, float32 (N, R). Padding is 0.

    The temperature divides the logits, as it does in sampling (detail 25).
    """
    states = response_states(hidden_states(policy, groups), groups)
    found = token_logprobs(policy.get_output_embeddings(), states, groups.responses[groups.response_mask], temperature)
    return spread(found, groups.response_mask)


def logprobs_and_entropy(policy, states, groups: PromptGroups, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`response_logprobs` from the policy's `response_states`, and each token's entropy without a gradient, both (N, R)."""
    tokens = groups.responses[groups.response_mask]
    found = token_logprobs_and_entropy(policy.get_output_embeddings(), states, tokens, temperature)
    return tuple(spread(values, groups.response_mask) for values in found)


def scores(reward_model, groups: PromptGroups) -> torch.Tensor:
    """The reward model's score of each completion, read at its last token, float32 (N,) (detail 16)."""
    states = end_states(hidden_states(reward_model, groups), groups)
    return reward_model.score(states)[:, 0] - getattr(reward_model.config, "score_shift", 0.0)


def response_values(value_model, groups: PromptGroups) -> torch.Tensor:
    """Value of the state before each response token, float32 (N, R). Padding is 0."""
    states = response_states(hidden_states(value_model, groups), groups)
    values = value_model.score(states)[:, 0] - getattr(value_model.config, "score_shift", 0.0)
    return spread(values, groups.response_mask)


class ScalarHead(nn.Linear):
    """A head whose output is float32 always: bfloat16 would round a score of 1 to steps of .008."""

    def forward(self, states):
        with torch.autocast(states.device.type, enabled=False):
            return linear(states.float(), self.weight.float(), None if self.bias is None else self.bias.float())


def centre_scores(reward_model, mean: float) -> None:
    """Shift the model so that what scored `mean` scores 0 (detail 19; ST, N+, IG).

    Stock classification heads have no bias. Where the trunk ends in a norm with a bias the shift is folded
    into it, and whoever loads the checkpoint gets centred scores; elsewhere (OPT-350m, Llama) it is kept in
    the config as `score_shift`, which `scores` subtracts.
    """
    trunk = getattr(reward_model.base_model, "decoder", reward_model.base_model)
    norms = [getattr(trunk, name, None) for name in ("final_layer_norm", "ln_f", "norm")]
    bias = next((norm.bias for norm in norms if getattr(norm, "bias", None) is not None), None)
    if bias is None:
        reward_model.config.score_shift = getattr(reward_model.config, "score_shift", 0.0) + mean
        return
    with torch.no_grad(), whole(reward_model, change=True):
        weight = reward_model.score.weight[0]
        bias -= mean * weight / weight.square().sum()


class PolicyAndValue(nn.Module):
    """What PPO trains, as one module, so that there is one engine and one optimizer.

    `value_model` is a scalar model of its own; or a linear layer (D, 1) on the policy's last hidden states, which
    share the trunk; or None, for advantages that need no values.
    """

    def __init__(self, policy, value_model: nn.Module | None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.frozen = nn.ModuleList()  # under DeepSpeed the models that are not trained, which its engine then shards, too

    def forward(self, groups: PromptGroups, temperature: float, examples: PromptGroups | None = None):
        """New log-probs, entropy and values of a batch, each (N, R), the values None without a value model.

        And the log-probs of `examples` (supervised ones, at temperature 1), None without. They are here because an
        engine wants one forward pass for each backward pass.
        """
        states = response_states(hidden_states(self.policy, groups), groups)
        logprobs, entropy = logprobs_and_entropy(self.policy, states, groups, temperature)
        values = self._values(groups, states)
        return logprobs, entropy, values, None if examples is None else response_logprobs(self.policy, examples, 1.0)

    def values(self, groups: PromptGroups) -> torch.Tensor | None:
        """Value of the state before each response token, float32 (N, R); None without a value model."""
        shares = isinstance(self.value_model, nn.Linear)
        return self._values(groups, response_states(hidden_states(self.policy, groups), groups) if shares else None)

    def _values(self, groups, states):
        if self.value_model is None:
            return None
        if isinstance(self.value_model, nn.Linear):
            return spread(self.value_model(states)[:, 0], groups.response_mask)
        return response_values(self.value_model, groups)


def new_value_head(policy) -> nn.Linear:
    """A value head for the policy's own trunk; it starts at 0, which is what reference summaries score."""
    head = ScalarHead(policy.get_output_embeddings().in_features, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head
