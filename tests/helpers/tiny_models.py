"""A tiny OPT with the mini tokenizer, for runs of whole stages. families.py has models for functions."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig

from utils.config import PROJECT
from utils.models.heads import FILE

KINDS = {"policy": AutoModelForCausalLM, "reward": AutoModelForSequenceClassification}


def mini_tokenizer():
    """The tokenizer of the mini base model: 1,000 words, PAD 1, BOS and EOS 2."""
    return AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")


def opt_config(tokenizer, **changes) -> OPTConfig:
    """An OPT of two layers and 32 dimensions; `changes` are keys of OPTConfig."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 384,
             "dropout": 0.1, "num_labels": 1}
    special = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id,
               "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return OPTConfig(**sizes | special | changes)


def save_opt(folder: Path, kind: str = "policy", seed: int = 0, eos_logit: float = 0.0,
             head_scale: float = 1.0, std: float | None = None, **changes) -> Path:
    """Write a random model and its tokenizer to `folder`, and return it.

    Args:
        kind: a key of `KINDS`.
        eos_logit: added to the logit of EOS everywhere, so that some responses end.
        head_scale: of the weights of a reward model's head, so that scores differ.
        std: of all weights, with biases and norms; None: OPT's own first weights.
    """
    tokenizer = mini_tokenizer()
    torch.manual_seed(seed)
    model = KINDS[kind].from_config(opt_config(tokenizer, **changes))
    with torch.no_grad():
        for weight in model.parameters() if std else ():
            weight.normal_(std=std)
        if kind == "reward":
            model.score.weight *= head_scale
        if eos_logit:
            eos = model.get_input_embeddings().weight[tokenizer.eos_token_id]
            model.base_model.decoder.final_layer_norm.bias += eos_logit * eos / eos.square().sum()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_heads(folder: Path, count: int = 3) -> Path:
    """Give the reward model in `folder` so many heads, whose mean is its own one; returns the folder."""
    own = load_file(folder / "model.safetensors")["score.weight"]
    apart = torch.randn(count, own.shape[1], generator=torch.Generator().manual_seed(count)) * own.std()
    save_file({"weight": own + apart - apart.mean(0), "bias": torch.zeros(count)}, folder / FILE)
    return folder


def save_other_vocabulary(source: Path, folder: Path) -> Path:
    """Write the reward model in `source` with one word more to `folder`, and return it.

    The mini data has the same tokens in both vocabularies, but the stage cannot know that.
    """
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["zzzz"])
    model = KINDS["reward"].from_pretrained(source)
    model.resize_token_embeddings(len(tokenizer))
    for saved in (tokenizer, model):
        saved.save_pretrained(folder)
    return folder
