"""Tiny random models as people have them: a stock family, no PAD token, a chat template."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig, Qwen2Config

from tiny_models import mini_tokenizer

TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 1, "max_position_embeddings": 384}  # heads of 32: the smallest that vLLM has
CONFIGS = {
    "llama": lambda rows: LlamaConfig(vocab_size=rows, **_SIZES),
    "qwen2": lambda rows: Qwen2Config(vocab_size=rows, **_SIZES),
    "gpt2": lambda rows: GPT2Config(vocab_size=rows, n_embd=64, n_layer=2, n_head=2, n_positions=384),
}


def save_stock_tokenizer(folder: Path) -> int:
    """Write the mini tokenizer with the tokens of the template and without a PAD; returns its size."""
    tokenizer = mini_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<other>"'))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "pad_token"}))
    return len(AutoTokenizer.from_pretrained(folder))


def save_chat_model(folder: Path, family: str, dtype=torch.float32, more_rows: int = 0) -> Path:
    """Write a random model, its tokenizer, and beside them its template, `template.jinja`.

    Args:
        more_rows: of the embeddings behind the last word. They are likelier than any word.
    """
    size = save_stock_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](size + more_rows), dtype=dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
        if more_rows:
            model.get_output_embeddings().weight[size:] *= 4
    model.save_pretrained(folder)
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def messages_of(number: int, answer: str | None = None) -> list[dict]:
    """A short conversation, the same one for the same number; with an answer, or up to it."""
    text = " ".join([f"How are the {number} dogs? They sleep in the garden."] * (1 + number % 3))
    turns = [{"role": "user", "content": text}]
    return turns + ([] if answer is None else [{"role": "assistant", "content": answer}])


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
