"""The three stages on real Reddit posts, and the reward stage on human-labelled dialogues.

    TLDR_DATA_DIR=... python tests/helpers/real_posts.py [--quick]

`TLDR_DATA_DIR` holds reddit_tldr.jsonl.gz, hh_rlhf/ and opt_tokenizer/ (see the README, "On real posts"). It
writes splits and rankings of these posts to outputs/reddit_mini/data, runs the scripts as a user would, and
prints the figures that the README records. Nothing of the posts is part of the project.
"""

import argparse
import gzip
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

QUICK = {
    "sft": "--max_steps 2 --eval_steps 2 --eval_rows 4 --test_rows 4",
    "reward": "--max_steps 2 --eval_steps 2 --eval_rows 4 --test_rows 4",
    "ppo": "--total_episodes 8 --prompts_per_update 4 --responses_per_prompt 2 --eval_rows 4 --test_rows 4",
}


def data_folder() -> Path | None:
    """Where the real posts are, or None."""
    for folder in (os.environ.get("TLDR_DATA_DIR"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "reddit_tldr.jsonl.gz").exists():
            return Path(folder)
    return None


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_splits(source: Path, target: Path) -> dict[str, list[dict]]:
    """Train, validation and test posts as the scripts take them."""
    with gzip.open(source / "reddit_tldr.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [{name: row[name] for name in ("subreddit", "title", "post", "summary")} for row in rows]
    random.Random(0).shuffle(rows)
    splits = {"validation": rows[:200], "test": rows[200:600], "train": rows[600:]}
    for name, part in splits.items():
        write_rows(target / f"{name}.jsonl", part)
    return splits


def write_rankings(rows: list[dict], policy: Path, target: Path, count: int) -> Path:
    """The real TL;DR above one that the policy sampled and one of another post; these two are not compared.
    """
    from utils.data.layouts import TLDR_TEMPLATE
    from utils.data.tokens import prompt_tokens
    from utils.models.generation import sample
    from utils.models.loading import load_policy
    from utils.models.parents import Parent

    rows = rows[-count:]
    parent = Parent("model", str(policy))
    tokenizer = parent.tokenizer
    prompts = [TLDR_TEMPLATE.format(**row) for row in rows]
    samples = sample(
        load_policy(parent), prompt_tokens(tokenizer, prompts, 304), k=1, max_new_tokens=64, temperature=1.0,
        seeds=list(range(count)), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        progress="rankings",
    )
    texts = tokenizer.batch_decode(samples.responses, skip_special_tokens=True)
    others = rows[1:] + rows[:1]
    return write_rows(target, [
        {"prompt": prompt, "completions": [row["summary"], text, other["summary"]], "ranks": [1, 2, 2]}
        for prompt, row, text, other in zip(prompts, rows, texts, others, strict=True)
        if text.strip() and len({row["summary"].strip(), text.strip(), other["summary"].strip()}) == 3
    ])


def write_small_opt(tokenizer: Path, target: Path) -> Path:
    """A small random OPT with the real OPT tokenizer, and with its projection (as OPT-350m)."""
    from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    config = OPTConfig(vocab_size=50272, hidden_size=192, word_embed_proj_dim=96, ffn_dim=384,
                       num_hidden_layers=4,
                       num_attention_heads=6, max_position_embeddings=640, dropout=0.0)
    OPTForCausalLM(config).save_pretrained(target)
    loaded.save_pretrained(target)
    return target


def baselines(rows: list[dict]) -> dict[str, dict]:
    """ROUGE of the title and of the post's first sentence as summaries."""
    from utils.judge.metrics import SummaryRouge

    references = [row["summary"] for row in rows]
    first = [re.split(r"(?<=[.?!])\s", row["post"].strip(), maxsplit=1)[0] for row in rows]
    return {name: SummaryRouge().compute(predictions=texts, references=references)
            for name, texts in (("title", [row["title"] for row in rows]), ("first sentence", first))}


def run_stage(stage: str, out: Path, words: str) -> dict:
    """Run a script as a user does; its summary."""
    script = ROOT / "scripts" / f"train_{stage}.py"
    config = ROOT / "configs" / "reddit_mini" / f"{stage}.yaml"
    subprocess.run([sys.executable, script, "--config", config, "--output_dir", out, *words.split()],
                   check=True)
    return json.loads((out / "summary.json").read_text())


def run_all(source: Path, out: Path, quick: bool) -> dict[str, dict]:
    """Every run; the figures by name."""
    more = QUICK if quick else dict.fromkeys(QUICK, "")
    data = out / "data"
    splits = write_splits(source, data)
    figures = baselines(splits["test"][:200])
    held = f"--actor_validation_data {data}/validation.jsonl --actor_test_data {data}/test.jsonl"
    figures["sft"] = run_stage("sft", out / "sft", f"--actor_training_data {data}/train.jsonl "
                                                   f"{held} {more['sft']}")
    rankings = write_rankings(splits["train"], out / "sft" / "final", data / "rankings.jsonl",
                              40 if quick else 2000)
    figures["reward"] = run_stage(
        "reward", out / "reward", f"--model {out}/sft/final --reward_training_data {rankings} "
        f"--centring_data {data}/validation.jsonl {more['reward']}")
    figures["ppo"] = run_stage(
        "ppo", out / "ppo", f"--model {out}/sft/final --reward_model {out}/reward/final --rlhf_training_data "
                            f"{data}/train.jsonl --rlhf_validation_data {data}/validation.jsonl "
                            f"--rlhf_test_data {data}/test.jsonl {more['ppo']}")
    dialogues = source / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    figures["hh-rlhf"] = run_stage(
        "reward", out / "hh", f"--model {out}/sft/final --reward_training_data {dialogues} "
                              f"--max_prompt_tokens 224 --max_completion_tokens 160 --centring_data "
                              f"none {more['reward']}")
    small = write_small_opt(source / "opt_tokenizer", out / "small_opt")
    figures["small random OPT, sft"] = run_stage(
        "sft", out / "small_opt_sft", f"--model {small} --max_prompt_tokens 512 --actor_training_data "
                                      f"{data}/train.jsonl {held} {more['sft']}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps of everything")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "outputs" / "reddit_mini")
    arguments = parser.parse_args()
    folder = data_folder()
    if folder is None:
        sys.exit("error: set TLDR_DATA_DIR to the folder that holds reddit_tldr.jsonl.gz")
    print(json.dumps(run_all(folder, arguments.output_dir, arguments.quick), indent=2))
