"""Write the mini base model before its training: a model folder with its first weights and its tokenizer.

    python data/tldr_mini/base_model.py    # outputs/tldr_mini_base/first_weights, which `make base` trains

The weights are random, with induction heads sketched in (`induction_heads.py`), so that copying is learnt in
minutes. The same seed gives the same weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from induction_heads import sketch_induction_heads

ROOT = Path(__file__).resolve().parents[2]


def architecture(tokenizer) -> OPTConfig:
    """A small OPT for the tokenizer's vocabulary, without dropout. Rows have at most 384 tokens."""
    return OPTConfig(
        vocab_size=len(tokenizer), hidden_size=192, word_embed_proj_dim=192, ffn_dim=384, num_hidden_layers=6,
        num_attention_heads=3, max_position_embeddings=384, dropout=0.0, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def base_model(config: OPTConfig, seed: int) -> OPTForCausalLM:
    """A model with its first weights, float32. Seeds torch's global generator."""
    torch.manual_seed(seed)
    model = OPTForCausalLM(config)
    sketch_induction_heads(model)
    return model


def main(arguments: list[str] | None = None) -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "assets/opt-mini", help="its folder")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs/tldr_mini_base/first_weights")
    args = parser.parse_args(arguments)
    if (args.output_dir / "config.json").exists():
        parser.error(f"{args.output_dir} holds a model already; remove it, or give another --output_dir")
    config = architecture(AutoTokenizer.from_pretrained(args.tokenizer))
    base_model(config, args.seed).save_pretrained(args.output_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(args.tokenizer / name, args.output_dir / name)


if __name__ == "__main__":
    main()
