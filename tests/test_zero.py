"""The three stages under DeepSpeed end like runs without it: every ZeRO stage and offload, processes, accumulation."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig

from utils.config import PROJECT

pytestmark = pytest.mark.slow
DEEPSPEED = PROJECT / "configs" / "deepspeed"
FILES = sorted(path.stem for path in DEEPSPEED.glob("*.json"))
STAGES = ("sft", "reward", "ppo")
STEPS, ROWS = 20, 8  # optimizer steps, and rows of one of them over all processes and micro-batches
aio = pytest.mark.skipif(not Path("/usr/include/libaio.h").exists(), reason="NVMe offload needs Debian's libaio-dev")
# ZeRO 0, the engine without sharding, has no file: without an engine is faster
ENGINES = ["zero0", *[pytest.param(name, marks=aio) if "nvme" in name else name for name in FILES]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny OPT and a reward model, and an OPT with OPT-350m's ways: a projection around its layers, norms behind them."""
    folder = tmp_path_factory.mktemp("zero")
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    for name, width, before in (("usual", 32, True), ("350m", 16, False)):
        config = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=width, ffn_dim=64, num_hidden_layers=2,
                           num_attention_heads=4, max_position_embeddings=384, dropout=0.0, num_labels=1,
                           do_layer_norm_before=before, pad_token_id=tokenizer.pad_token_id)
        for kind, model in (("policy", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
            torch.manual_seed(len(kind))
            model.from_config(config).save_pretrained(folder / name / kind)
            tokenizer.save_pretrained(folder / name / kind)
    settings = json.loads((DEEPSPEED / "zero1.json").read_text())
    settings["zero_optimization"]["stage"] = 0
    (folder / "zero0.json").write_text(json.dumps(settings))
    return folder


def words_of(folder, stage, rows, accumulation, engine, model="usual"):
    words = (f"--model {folder / model / 'policy'} --report_to none --eval_rows 3 --test_rows 3 "
             f"--per_device_batch_size {rows} ")
    if stage == "ppo":
        words += (f"--reward_model {folder / model / 'reward'} --max_new_tokens 8 --prompts_per_update {ROWS} "
                  f"--responses_per_prompt 2 --ppo_epochs 2 --num_minibatches 1 --total_episodes {STEPS * ROWS} "
                  f"--eval_steps 10 --save_steps 10 ")
    else:
        words += (f"--max_steps {STEPS} --logging_steps 1 --eval_steps {STEPS} --gradient_accumulation_steps {accumulation} "
                  f"--micro_batch_tokens none --save_total_limit 1 ")
        words += "--max_new_tokens 8 " if stage == "sft" else f"--save_steps {STEPS} "
    place = folder if engine == "zero0" else DEEPSPEED
    return (words + (f"--deepspeed {place}/{engine}.json" if engine else "")).split()


def launch(folder, processes, cases):
    """Run the cases one after the other in so many processes, those without an engine first: one that was there leaves traces."""
    path = folder / f"cases{processes}.json"
    path.write_text(json.dumps([[stage, str(out), words] for stage, out, words in cases]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    done = subprocess.run([sys.executable, *launcher, str(Path(__file__).with_name("zero_runs.py")), str(path)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def available():
    return [name for name in ("zero0", *FILES) if "nvme" not in name or Path("/usr/include/libaio.h").exists()]


@pytest.fixture(scope="module")
def table(folder):
    """All runs of the table: each stage with each file and without, 1 and 2 processes, accumulation 1 and 4."""
    for processes in (1, 2):
        launch(folder, processes, [
            (stage, folder / f"{stage}-{engine}-{processes}-{accumulation}",
             words_of(folder, stage, ROWS // processes // accumulation, accumulation, engine))
            for engine in [None, *available()] for stage in STAGES for accumulation in (1, 4)
        ])
    return folder


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in sorted(row) if "loss" in name]


def final_weights(run):
    """Those after the last step: the SFT stage puts its best checkpoint into final/."""
    checkpoint = run / "checkpoints" / f"checkpoint-{STEPS}" / "model.safetensors"
    return load_file(checkpoint if checkpoint.exists() else run / "final" / "model.safetensors")


def furthest(a, b):
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", [None, *ENGINES])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_same_losses_and_weights(table, stage, engine, processes, accumulation):
    plain, ours = table / f"{stage}-None-1-1", table / f"{stage}-{engine}-{processes}-{accumulation}"
    assert len(losses(plain)) == STEPS  # of PPO two for each of ten updates: the policy's and the value model's
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert furthest(final_weights(ours), final_weights(plain)) < 1e-4
    before, after = load_file(table / "usual" / "policy" / "model.safetensors"), final_weights(plain)
    moved = max(float((after[name] - before[name]).abs().max()) for name in before.keys() & after.keys())
    assert moved > 1e-3, "20 steps must have changed something"


@pytest.fixture(scope="module")
def others(folder):
    """What the table does not show, each with and without an engine, two processes."""
    cases = []
    for name, engine in (("none", None), ("zero3", "zero3"), ("zero2", "zero2")):
        for stage in STAGES:
            plain = words_of(folder, stage, 4, 1, engine)
            cases += [
                (stage, folder / f"lora-{stage}-{name}", [*plain, "--lora_rank", "4"]),
                (stage, folder / f"350m-{stage}-{name}", words_of(folder, stage, 4, 1, engine, "350m")),
                (stage, folder / f"bf16-{stage}-{name}", [*plain, "--mixed_precision", "bf16"]),
            ]
            if stage != "ppo":
                cases.append((stage, folder / f"parts-{stage}-{name}", [*plain, "--micro_batch_tokens", "200"]))
            else:
                cases.append((stage, folder / f"shared-{stage}-{name}", [*plain, "--value_model", "shared"]))
    launch(folder, 2, cases)
    return folder


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize(("kind", "stage"), [
    *itertools.product(["lora", "350m"], STAGES), ("parts", "sft"), ("parts", "reward"), ("shared", "ppo"),
])
def test_adapters_projections_parts_and_shared_trunks(others, stage, kind, engine):
    plain, ours = others / f"{kind}-{stage}-none", others / f"{kind}-{stage}-{engine}"
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert furthest(load_file(ours / "final" / "model.safetensors"), load_file(plain / "final" / "model.safetensors")) < 1e-4


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_engines_16_bit_weights_stay_close_to_autocast(others, stage, engine):
    """Two ways to compute in bfloat16: float32 weights that are cast for a product, or cast weights and a float32 optimizer."""
    plain, ours = others / f"bf16-{stage}-none", others / f"bf16-{stage}-{engine}"
    assert losses(ours) == pytest.approx(losses(plain), rel=0.05, abs=5e-3)
    weights = load_file(ours / "final" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
