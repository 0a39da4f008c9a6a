"""Tiny random models of the architectures we support, for tests."""

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from utils.models.generation import sample
from utils.models.loading import with_our_heads

VOCAB, PAD, EOS = 31, 1, 2
_SPECIAL = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": EOS, "eos_token_id": EOS}
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}

# every config has dropout on, so that tests see whether loading switches it off
CONFIGS = {
    "opt": lambda: OPTConfig(
        **_SIZES, **_SPECIAL, ffn_dim=24, word_embed_proj_dim=16, dropout=0.5, attention_dropout=0.5
    ),
    "opt-350m": lambda: OPTConfig(
        **_SIZES, **_SPECIAL, ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False, dropout=0.5,
        attention_dropout=0.5,
    ),
    "gpt2": lambda: GPT2Config(
        **_SPECIAL, n_embd=16, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.5, embd_pdrop=0.5,
        attn_pdrop=0.5
    ),
    "gpt-neox": lambda: GPTNeoXConfig(
        **_SIZES, **_SPECIAL, intermediate_size=24, hidden_dropout=0.5, attention_dropout=0.5, rotary_pct=0.5
    ),
    "llama-gqa": lambda: LlamaConfig(
        **_SIZES, **_SPECIAL, intermediate_size=24, num_key_value_heads=2, attention_dropout=0.5
    ),
}
FAMILIES = list(CONFIGS)


def policy(family: str, seed: int = 0):
    """A causal language model in evaluation mode with weights N(0, .2), so that differences show."""
    return _random(AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32), seed)


def scalar_model(family: str, seed: int = 0):
    """A one-label sequence classification model, as `policy`."""
    config = CONFIGS[family]()
    config.num_labels = 1
    return _random(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), seed)


def _random(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        torch.nn.init.normal_(weight.data, std=0.2, generator=generator)
    return with_our_heads(model).eval()


def random_tokens(count: int, generator) -> list[int]:
    """Ordinary tokens, neither PAD nor EOS."""
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def random_groups(prompt_sizes, completion_sizes, seed=0):
    """Prompts of these sizes, each with completions of the sizes listed for it, as token ids."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [random_tokens(size, generator) for size in prompt_sizes]
    completions = [[random_tokens(size - 1, generator) + [EOS] for size in sizes]
                   for sizes in completion_sizes]
    return prompts, completions


def draw(model, prompts, k=3, seeds=None, **options):
    """Samples of eight tokens at most, the seeds counted from 0."""
    settings = {"max_new_tokens": 8, "temperature": 0.7, "eos_id": EOS, "pad_id": PAD, **options}
    return sample(model, prompts, k=k, seeds=seeds or list(range(len(prompts) * k)), **settings)
