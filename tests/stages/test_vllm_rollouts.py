"""PPO with `rollout_engine: vllm`, in an environment of its own:

    python3 -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install -r requirements-vllm.txt      # more in that file
    .venv/bin/python -m pytest tests/stages/test_vllm_rollouts.py      # or VLLM_PYTHON=another/bin/python
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from chat_models import CONFIGS, save_chat_model
from tiny_models import save_opt
from vllm_environment import NEEDS_VLLM, run

pytestmark = NEEDS_VLLM
HEADS = {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 2}  # vLLM has none below 32
FAMILIES = ["opt", *CONFIGS]
# one update changes the policy so much that weights of the update before would show
WORDS = ("--rollout_engine vllm --total_episodes 64 --prompts_per_update 4 --responses_per_prompt 4 "
         "--max_new_tokens 8 --learning_rate 1e-2 --kl_limit 1e9 --save_steps 2 --eval_steps 100 "
         "--eval_rows 4 --test_rows 4 --gold_rules none --report_to none")


def updates(folder: Path) -> list[dict]:
    """Metrics of each update but its seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")}
            for row in rows if "policy/sampling_drift" in row]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What vLLM sampled of each family."""
    folder = tmp_path_factory.mktemp("families")
    save_opt(folder / "opt", std=0.3, **HEADS)
    for family in CONFIGS:
        save_chat_model(folder / family, family)
    (folder / "families.json").write_text(json.dumps(FAMILIES))
    run("tests/helpers/vllm_rollouts.py", str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_its_logprobs_are_those_of_a_forward_pass(family, found):
    """Of each policy: also after its weights have changed, and with adapters."""
    assert all(found[family][name] < 1e-3 for name in ("apart", "long", "changed", "with_adapters"))
    assert found[family]["others"] and found[family]["alone"]


@pytest.mark.parametrize("family", FAMILIES)
def test_frequencies_follow_the_softmax(family, found):
    """Pearson's statistic over 20 bins of first tokens has mean 19 and variance 2 x 19."""
    first, probabilities = torch.tensor(found[family]["first"]), torch.tensor(found[family]["probabilities"])
    bins = torch.arange(len(probabilities)) % 20
    expected = torch.zeros(20).index_add(0, bins, probabilities) * len(first)
    observed = torch.bincount(first % 20, minlength=20)
    assert expected.min() > 5
    assert ((observed - expected).square() / expected).sum() < 19 + 4 * (2 * 19) ** 0.5


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four updates."""
    folder = tmp_path_factory.mktemp("ppo")
    save_opt(folder / "sft", std=0.1, eos_logit=3.0, **HEADS)
    save_opt(folder / "reward", "reward", seed=1, head_scale=30.0, **HEADS)
    words = f"--model {folder}/sft --reward_model {folder}/reward {WORDS} --output_dir {folder}"
    run("scripts/train_ppo.py", *f"{words}/ppo".split())
    return folder, words


def test_it_has_the_weights_of_each_update(trained):
    folder, _ = trained
    rows = updates(folder / "ppo")
    assert len(rows) == 4 and all(row["policy/sampling_drift"] < 1e-5 for row in rows)
    assert rows[-1]["objective/kl"] > 0.1  # the policy is not what it was


def test_a_resumed_run_ends_like_an_undisturbed_one(trained):
    folder, words = trained
    shutil.copytree(folder / "ppo", folder / "resumed", ignore=shutil.ignore_patterns("update-4", "final"))
    run("scripts/train_ppo.py", *f"{words}/resumed --resume".split())
    assert updates(folder / "resumed") == updates(folder / "ppo")
    assert (folder / "resumed/final/model.safetensors").read_bytes() == (
        folder / "ppo/final/model.safetensors").read_bytes()
