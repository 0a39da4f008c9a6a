"""The three stages on models as people have them."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, pipeline

import train_ppo
import train_reward
import train_sft
from chat_models import messages_of, save_chat_model, save_stock_tokenizer, write_rows
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
    size = save_stock_tokenizer(folder)
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


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_stock_pipeline_scores_conversations_as_the_reward_stage(family, tmp_path):
    """The base model is in bfloat16 and has no PAD; a batch has rows of many lengths, so they are padded."""
    base = save_chat_model(tmp_path / "base", family, dtype=torch.bfloat16)
    assert json.loads((base / "config.json").read_text())["dtype"] == "bfloat16"
    good = [f"They are {number} good dogs. " * (number % 4 + 1) + "Yes." for number in range(48)]
    rows = [{"prompt": messages_of(number), "chosen": [{"role": "assistant", "content": text}],
             "rejected": [{"role": "assistant", "content": "No."}]} for number, text in enumerate(good)]
    data, test = (write_rows(tmp_path / f"{name}.jsonl", part)
                  for name, part in (("pairs", rows[:40]), ("test", rows[40:])))
    references = write_rows(tmp_path / "good.jsonl", [
        {"messages": messages_of(number, text)} for number, text in enumerate(good[:40])])
    words = (f"{SHORT} --model {base} --chat_template {base}/template.jinja --output_dir {tmp_path}/reward "
             f"--reward_training_data {data} --reward_test_data {test} --centring_data {references} "
             "--learning_rate 1e-2")
    train_reward.main(parse_config(train_reward.RewardStageConfig,
                                   PROJECT / "configs" / "tldr_mini" / "reward.yaml", words.split()))
    final = str(tmp_path / "reward" / "final")
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.pad_token == "<pad>" and tokenizer.eos_token == "<|im_end|>"
    shift = json.loads((tmp_path / "reward" / "final" / "config.json").read_text())["score_shift"]
    samples = (tmp_path / "reward" / "samples.jsonl").read_text().splitlines()
    staged = [row for row in map(json.loads, samples) if row["posts"] == "test"]
    assert len(staged) == 8
    texts, scores = [], []
    for row, known in zip(rows[40:], staged, strict=True):
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        answers = [row[side][0]["content"] for side in ("chosen", "rejected")]
        assert [text.strip() for text in known["completions"]] == answers
        texts += [asked + answer + tokenizer.eos_token for answer in answers]
        scores += known["scores"]
    pipe = pipeline("text-classification", model=final, batch_size=5)
    found = pipe(texts, add_special_tokens=False, function_to_apply="none")
    assert [one["score"] - shift for one in found] == pytest.approx(scores, abs=1e-4)
    # the card's own code agrees
    [code] = re.findall(r"```python\n(.*?)```", (tmp_path / "reward/final/README.md").read_text(), re.DOTALL)
    names = {"folder": final, "messages": rows[40]["prompt"], "completion": good[40]}
    exec(code, names)  # noqa: S102
    assert names["score"] == pytest.approx(scores[0], abs=1e-4)
    assert len({len(tokenizer(text)["input_ids"]) for text in texts[:5]}) > 2
    assert max(scores) - min(scores) > 0.1 and (abs(shift) > 0.1) == (family == "llama")
