"""Models that a stage cannot train rightly end it in one line, before its folder is there."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Lfm2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen3_5TextConfig,
)

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer, save_opt
from utils.config import PROJECT, UserError, parse_config

STAGES = {"sft": (train_sft, train_sft.SFTStageConfig),
          "reward": (train_reward, train_reward.RewardStageConfig),
          "ppo": (train_ppo, train_ppo.PPOStageConfig)}
_SIZES = {"vocab_size": 2434, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 32, "pad_token_id": 1, "bos_token_id": 2,
          "eos_token_id": 2, "num_labels": 1, "max_position_embeddings": 512}
_LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "head_dim": 8,
           "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4,
             "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
CONFIGS = {
    "linear": lambda: Qwen3_5TextConfig(**_SIZES, **_LINEAR),
    "convolution": lambda: Lfm2Config(**_SIZES, layer_types=["conv", "full_attention"]),
    "longrope": lambda: LlamaConfig(**_SIZES, rope_parameters=_LONGROPE),
    "few rows": lambda: LlamaConfig(**{**_SIZES, "vocab_size": 2300}),
}
LINEAR = "in model.layers.0.linear_attn (Qwen3_5GatedDeltaNet)"
ROWS = "has 2300 embedding rows, but the tokenizer has ids up to 2433;"


def saved(folder, config, kind=AutoModelForCausalLM):
    torch.manual_seed(0)
    kind.from_config(config).save_pretrained(folder)
    mini_tokenizer().save_pretrained(folder)
    return folder


def run(stage, words, folder):
    script, kind = STAGES[stage]
    default = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    script.main(parse_config(kind, default, [*words, "--output_dir", str(folder)]))


@pytest.mark.parametrize(("stage", "bad", "model", "message"), [
    ("sft", "model", "linear", LINEAR),
    ("sft", "model", "convolution", "in model.layers.0.conv (Lfm2ShortConv)"),
    ("sft", "model", "longrope", "actor_training_data makes rows of "),
    ("sft", "model", "few rows", ROWS),
    ("reward", "model", "linear", LINEAR),
    ("reward", "model", "longrope", "max_prompt_tokens + max_completion_tokens makes rows of "),
    ("reward", "model", "few rows", ROWS),
    ("ppo", "model", "linear", LINEAR),
    ("ppo", "reward_model", "linear", LINEAR),
    ("ppo", "reward_model", "longrope", "max_prompt_tokens + max_new_tokens makes rows of "),
    ("ppo", "model", "few rows", ROWS),
])
def test_refused_in_one_line_and_no_folder(stage, bad, model, message, tmp_path):
    made = AutoModelForSequenceClassification if bad == "reward_model" else AutoModelForCausalLM
    folders = {"model": None, "reward_model": None} if stage == "ppo" else {"model": None}
    for name in folders:
        role = "reward" if name == "reward_model" else "policy"
        folders[name] = (saved(tmp_path / name, CONFIGS[model](), made) if name == bad
                         else save_opt(tmp_path / name, role))
    words = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
    with pytest.raises(UserError) as caught:
        run(stage, words, tmp_path / "run")
    said = str(caught.value)
    assert said.startswith(f"{bad}: '{folders[bad]}' ") and message in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_a_reward_model_with_fewer_rows_than_the_policy_has_tokens(tmp_path):
    policy = save_opt(tmp_path / "policy")
    config = LlamaConfig(**{**_SIZES, "vocab_size": 2300})
    reward = saved(tmp_path / "reward", config, AutoModelForSequenceClassification)
    with pytest.raises(UserError, match="^reward_model: '.*' has 2300 "):
        run("ppo", ["--model", str(policy), "--reward_model", str(reward)], tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("make", [
    lambda: MistralConfig(**_SIZES, sliding_window=16),
    lambda: OPTConfig(vocab_size=2434, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=32,
                      word_embed_proj_dim=16, do_layer_norm_before=True, pad_token_id=1, eos_token_id=2,
                      max_position_embeddings=512),
], ids=["window", "norms first and a projection"])
def test_models_that_were_computed_wrongly_go_through_all_stages(make, tmp_path):
    """The second one ended in a traceback after its reward model was trained."""
    saved(tmp_path / "base", make())
    short = ["--max_steps", "2", "--logging_steps", "1", "--per_device_batch_size", "4", "--eval_steps", "2",
             "--eval_rows", "4", "--test_rows", "4"]
    words = {
        "sft": ["--model", f"{tmp_path}/base", "--max_new_tokens", "8", *short],
        "reward": ["--model", f"{tmp_path}/sft/final", *short],
        "ppo": ["--model", f"{tmp_path}/sft/final", "--reward_model", f"{tmp_path}/reward/final",
                "--total_episodes", "16", "--prompts_per_update", "4", "--responses_per_prompt", "2",
                "--eval_steps", "2", "--eval_rows", "4", "--test_rows", "4", "--max_new_tokens", "8"],
    }
    for stage in STAGES:
        run(stage, words[stage], tmp_path / stage)
        assert (tmp_path / stage / "final" / "config.json").is_file()
