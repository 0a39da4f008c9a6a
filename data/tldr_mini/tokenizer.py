"""Train the mini model's tokenizer: byte-level BPE, with OPT's special tokens and its </s> before a text."""

import gzip
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCABULARY_SIZE = 3072
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # ids 0 to 3, as in OPT
# Rows of each file: enough to see every word often, few enough to take seconds.
TRAINING_FILES = {"actor_train": 4000, "reward_train": 2000, "pretraining_train": 4000}


def training_texts(directory: Path) -> Iterator[str]:
    """Prompts and completions of the first rows of each file."""
    for name, count in TRAINING_FILES.items():
        with gzip.open(directory / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
            for line in islice(file, count):
                row = json.loads(line)
                yield row["prompt"]
                yield from row.get("completions") or [row["completion"]]


def train_tokenizer(data_dir: Path, output_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json. The same data give the same bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(data_dir), trainer)
    # OPT puts </s> in front of a text and nothing behind it.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", SPECIAL_TOKENS.index("</s>"))]
    )
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (output_dir / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
