"""What a stage says when it begins, and the learning rate that it chooses."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_ppo
import train_reward
import train_sft
from tiny_models import save_opt
from utils.models.parents import Parent
from utils.runs import opening
from utils.runs.opening import open_stage, plan_of, spelled

CONFIGS = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
           "ppo": train_ppo.PPOStageConfig}
TUNED = {"sft": "0.001", "reward": "0.0003", "ppo": "0.0002"}


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_first_lines_name_model_size_machine_and_rate(stage, tmp_path, capsys):
    parent = Parent("model", str(save_opt(tmp_path / "tiny")))
    config = CONFIGS[stage](model=parent.name)
    capsys.readouterr()  # what saving said
    open_stage(config, parent)
    first, second = capsys.readouterr().out.splitlines()
    model = AutoModelForCausalLM.from_pretrained(parent.path)
    count = sum(weight.numel() for weight in model.parameters())
    assert first.startswith(f"{stage}: {parent.name}, {count:,} parameters, on ")
    assert first.endswith(f"; learning rate {TUNED[stage]} (by its size, as none is given)")
    assert config.learning_rate == float(TUNED[stage]) and second == f"{stage}: reading the data"
    given = replace(config, learning_rate=5e-5)
    open_stage(given, parent)
    assert given.learning_rate == 5e-5
    assert capsys.readouterr().out.splitlines()[0].endswith("; learning rate 5e-05")


def test_adapters_get_a_rate_of_their_own(tmp_path, capsys):
    parent = Parent("model", str(save_opt(tmp_path / "tiny")))
    config = CONFIGS["sft"](model=parent.name, lora_rank=4)
    open_stage(config, parent)
    assert config.learning_rate == 5e-3


@pytest.mark.parametrize(("tf32", "card", "asked"), [
    (False, True, []), (True, True, ["high"]), (True, False, [])])
def test_tf32_is_for_a_gpu_and_for_those_who_ask(tf32, card, asked, tmp_path, monkeypatch):
    parent, found = Parent("model", str(save_opt(tmp_path / "tiny"))), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", found.append)
    monkeypatch.setattr(opening, "world", lambda: SimpleNamespace(is_main_process=False))
    open_stage(CONFIGS["sft"](model=parent.name, tf32=tf32), parent)
    assert found == asked


def test_the_plan_names_rows_steps_and_a_warm_up_that_does_not_end():
    config = CONFIGS["sft"](warmup_steps=10, output_dir="outputs/x")
    assert plan_of(config, 4000, 250, "step") == (
        "sft: 4,000 rows to learn from, 250 steps, evaluated every 100, saved every 100, into outputs/x")
    assert "3 steps (a warm-up of 10 does not end)" in plan_of(config, 4000, 3, "step")


@pytest.mark.parametrize(("count", "text"), [
    (2_304_000, "2.3 million"), (125_239_296, "125 million"), (6_658_473_984, "6.66 billion"),
    (63_136, "63,136"),
    (999_999_999, "1 billion"), (66_000_000_000, "66 billion"),
])
def test_counts_are_spelled_for_people(count, text):
    assert spelled(count) == text
