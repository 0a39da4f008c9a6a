"""Small random models of five architectures, and prompts with completions for them."""

import copy

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from studies.gpu_checks.device import DEVICE
from utils.models.loading import in_blocks, with_our_heads

VOCABULARY, PAD, EOS = 211, 1, 2
_SPECIAL = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
_SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
_OPT = {"ffn_dim": 128, "dropout": 0.0, "attention_dropout": 0.0}
CONFIGS = {
    "OPT": OPTConfig(**_SIZES, **_SPECIAL, **_OPT, word_embed_proj_dim=64),
    "OPT-350m": OPTConfig(**_SIZES, **_SPECIAL, **_OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "GPT-2": GPT2Config(
        **_SPECIAL,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    ),
    "GPT-NeoX": GPTNeoXConfig(**_SIZES, **_SPECIAL, intermediate_size=128, rotary_pct=0.5),
    "Llama, grouped queries": LlamaConfig(**_SIZES, **_SPECIAL, intermediate_size=128, num_key_value_heads=2),
}
# tokens; the first needs several blocks of queries; beside the last a completion counts much
PROMPTS = (300, 90, 5)
COMPLETIONS = (35, 50)  # the shortest and the longest


def stock_model(family: str, scalar: bool):
    """A stock model in evaluation mode with weights N(0, .1), so that differences show."""
    config = copy.deepcopy(CONFIGS[family])
    config.num_labels = 1
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(int(scalar))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.1, generator=generator)
    return model.eval().to(DEVICE)


def our_model(stock):
    """A copy of a stock model with the same weights, our attention and our heads."""
    return with_our_heads(in_blocks(copy.deepcopy(stock)))


def random_tokens(count: int, generator: torch.Generator, vocabulary: int = VOCABULARY) -> list[int]:
    """Ordinary tokens, neither PAD nor EOS."""
    return torch.randint(3, vocabulary, (count,), generator=generator).tolist()


def random_groups(k: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts, each with K completions that end with the EOS, as token ids."""
    generator = torch.Generator().manual_seed(k)
    low, high = COMPLETIONS
    prompts = [random_tokens(size, generator) for size in PROMPTS]
    sizes = torch.randint(low, high + 1, (len(prompts), k), generator=generator).tolist()
    return prompts, [[[*random_tokens(size - 1, generator), EOS] for size in row] for row in sizes]
