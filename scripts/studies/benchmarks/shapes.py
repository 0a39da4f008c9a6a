"""The models that are measured: OPT with its real vocabulary and random weights, in three sizes. Nothing is
downloaded.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    OPTConfig,
    PreTrainedTokenizerFast,
)

from planning.flops import Size

VOCABULARY, PAD, EOS = 50272, 1, 2
# parameters with the embedding: 11.8 million, 30.7 million, 125.2 million (that of the published OPT-125m)
SHAPES = {
    "mini": {"size": Size(192, 4, 768, VOCABULARY), "heads": 3},
    "30m": {"size": Size(384, 6, 1536, VOCABULARY), "heads": 6},
    "125m": {"size": Size(768, 12, 3072, VOCABULARY), "heads": 12},
}


def config_of(size: Size, heads: int) -> OPTConfig:
    """OPT without dropout, one label where it is a classifier."""
    return OPTConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, word_embed_proj_dim=size.hidden,
        ffn_dim=size.ffn,
        num_hidden_layers=size.layers, num_attention_heads=heads, max_position_embeddings=2048, dropout=0.0,
        attention_dropout=0.0, layerdrop=0.0, pad_token_id=PAD, bos_token_id=EOS, eos_token_id=EOS,
        num_labels=1,
    )


def save_models(shape: str, folder: Path) -> None:
    """`policy/` and `reward/`, the same random trunk, each with the same small tokenizer."""
    torch.manual_seed(0)
    config = config_of(**SHAPES[shape])
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    reward_model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    reward_model.base_model.load_state_dict(policy.base_model.state_dict())
    for name, model in (("policy", policy), ("reward", reward_model)):
        model.save_pretrained(folder / name)
        small_tokenizer().save_pretrained(folder / name)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens alone: all data is given as token ids, and trainers ask for nothing else."""
    words = {"<s>": 0, "<pad>": PAD, "</s>": EOS}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<s>")),
                                   pad_token="<pad>",
                                   eos_token="</s>", padding_side="left")
