"""Writes problems whose answers can be checked, and the small model that learns to solve them.

    python data/sorting/generate.py                   # into outputs/sorting, the same bytes each time

A problem is names to be put in alphabetical order. The SFT rows show the form of an answer, and not how it is
found: their names stand in random order. So the SFT model is right by chance alone, once in n! answers of n
names. The model (`model/`) has 0.45 million random weights and a tokenizer of its own.
"""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

NAMES = """Adam Ben Clara David Emma Felix George Helen Ivan Jack Kate Luke Maria Nina Oscar Paul Robert Susan
Tom Zoe""".split()
SIZES = (3, 4, 5)  # names of a problem, from easy to hard
HELD_OUT = {"sft_validation": 90, "sft_test": 90, "ppo_validation": 300, "ppo_test": 600}
TRAINING = {"sft_train": 24_000, "ppo_train": 6000}
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT


def problem(names: list[str]) -> str:
    """The prompt of a problem."""
    return f"Names: {' '.join(names)}\n\nIn order:"


def rows(seed: int) -> dict[str, list[dict]]:
    """The rows of each file. No set of names in a held-out row is in another row, of any file."""
    draw, held_out, made = random.Random(seed), set(), {}
    for name, count in (HELD_OUT | TRAINING).items():
        made[name] = []
        while len(made[name]) < count:
            names = draw.sample(NAMES, SIZES[len(made[name]) % len(SIZES)])
            if frozenset(names) in held_out:
                continue
            if name in HELD_OUT:
                held_out.add(frozenset(names))
            row = {"prompt": problem(names)}
            if name.startswith("sft"):
                row["completion"] = " ".join(draw.sample(names, len(names)))
            else:
                row["names"] = names
            made[name].append(row)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of the words of a problem. A name is one token with the space before it."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator([problem(NAMES)], trainers.BpeTrainer(
        min_frequency=1, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS]))
    # OPT puts </s> in front of a text and nothing behind it
    made.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="</s>", eos_token="</s>",
                                   pad_token="<pad>", unk_token="<unk>", model_max_length=64)


def base_model(words: PreTrainedTokenizerFast, seed: int) -> OPTForCausalLM:
    """A small OPT with random weights, without dropout, float32. Seeds torch's global generator."""
    torch.manual_seed(seed)
    return OPTForCausalLM(OPTConfig(
        vocab_size=len(words), hidden_size=128, word_embed_proj_dim=128, ffn_dim=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=64, dropout=0.0, tie_word_embeddings=True,
        init_std=0.06,  # OPT's .02 is for wide layers: with it SFT takes more than twice the steps
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, made in rows(seed=0).items():
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    words = tokenizer()
    words.save_pretrained(folder / "model")
    base_model(words, seed=0).save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("outputs/sorting"))
