"""The three stages on models as people have them."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import PROJECT, parse_config

SHORT = "--max_steps 2 --logging_steps 1 --per_device_batch_size 4 --eval_steps 2 --eval_rows 4 --test_rows 8"
STAGES = {
    "sft": (train_sft.main, train_sft.SFTStageConfig, f"{SHORT} --max_new_tokens 8 --model {{0}}/base"),
    "reward": (train_reward.main, train_reward.RewardStageConfig, f"{SHORT} --model {{0}}/sft/final"),
    "ppo": (train_ppo.main, train_ppo.PPOStageConfig,
            "--total_episodes 16 --prompts_per_update 4 --responses_per_prompt 2 --eval_steps 2 "
            "--eval_rows 4 --test_rows 4 --max_new_tokens 8 "
            "--model {0}/sft/final --reward_model {0}/reward/final"),
}


def without_pad(folder):
    """A GPT-2 with a tokenizer that has no PAD, and as many rows as tokens."""
    mini_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<pad>"', '"<other>"'))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "pad_token"}))
    size = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=400, bos_token_id=2,
                        eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return size


@pytest.mark.slow
def test_a_model_without_pad_goes_through_all_stages(tmp_path, capsys):
    size = without_pad(tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").pad_token is None
    for stage, (main, kind, words) in STAGES.items():
        words = f"{words.format(tmp_path)} --output_dir {tmp_path / stage}"
        main(parse_config(kind, PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", words.split()))
        told = capsys.readouterr().err.count("has no PAD token of its own: a new token '<pad>'")
        assert told == (stage == "sft")
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / stage / "final")
        config = json.loads((tmp_path / stage / "final" / "config.json").read_text())
        assert tokenizer.pad_token_id == config["pad_token_id"] == size and config["vocab_size"] > size
    # stock tools read the same scores, of rows of different length in one batch
    rows = [json.loads(line) for line in (tmp_path / "reward" / "samples.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["posts"] == "test")  # of the model that is saved
    pipe = pipeline("text-classification", model=str(tmp_path / "reward" / "final"), batch_size=2)
    texts = [row["prompt"] + text + tokenizer.eos_token for text in row["completions"]]
    assert [found["score"] for found in pipe(texts)] == pytest.approx(
        [score + config_shift(tmp_path) for score in row["scores"]], abs=2e-3)


def config_shift(folder):
    return json.loads((folder / "reward" / "final" / "config.json").read_text())["score_shift"]
