"""Part c: each stage under DeepSpeed's ZeRO 1, 2, 3 and with offload, one process, against the plain run.

All runs start from the same small random models, and at the same time: their losses are compared, their times
are not.
"""

import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig

from studies.gpu_checks.device import ON_CARD
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.stages import STAGES, start_stage, wait_for
from utils.paths import PROJECT

# with offload the optimizer is compiled at its first use, which takes a minute of a CPU
ENGINES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload") if ON_CARD else ("zero2",)
STEPS, LIMIT = 4, 1e-3  # optimizer steps, and the largest relative difference of a loss
THREADS = 2  # of each run
_COMMON = "--eval_rows 2 --test_rows 2 --per_device_batch_size 4 --learning_rate 1e-3"
WORDS = {
    "sft": f"{_COMMON} --max_steps {STEPS} --logging_steps 1 --eval_steps {STEPS} --max_new_tokens 8",
    "reward": f"{_COMMON} --max_steps {STEPS} --logging_steps 1 --eval_steps {STEPS} --centring_data none",
    "ppo": f"{_COMMON} --prompts_per_update 4 --responses_per_prompt 2 --ppo_epochs 2 --num_minibatches 1 "
    f"--total_episodes 16 --max_new_tokens 8 --eval_steps 9 --save_steps 9",
}


def run(results: Results, folder: Path) -> None:
    folder = folder / "engines"
    save_parents(folder)
    processes = {}
    for engine in (None, *ENGINES):
        for stage in STAGES:
            words = [f"--model={folder}/policy", *WORDS[stage].split()]
            if stage == "ppo":
                words.append(f"--reward_model={folder}/reward")
            if engine:
                words.append(f"--deepspeed={PROJECT}/configs/deepspeed/{engine}.json")
            processes[engine, stage] = process = start_stage(
                stage, folder / f"{engine or 'plain'}_{stage}", words, THREADS
            )
            if not ON_CARD:
                process.wait()
    ends = time.monotonic() + results.left()
    for engine in ENGINES:
        for stage in STAGES:
            results.check(
                f"{stage}, {engine}", 0, lambda e=engine, s=stage: compared(processes, folder, e, s, ends)
            )
    for process in processes.values():
        if process.poll() is None:
            process.kill()


def compared(processes: dict, folder: Path, engine: str, stage: str, ends: float) -> Outcome:
    """Wait for a run and its plain counterpart; the largest relative difference of their losses."""
    for name in (None, engine):
        if wrong := wait_for(processes[name, stage], ends - time.monotonic()):
            return Outcome({}, f"{name or 'the plain run'}: {wrong}")
    plain, found = (losses(folder / f"{name or 'plain'}_{stage}") for name in (None, engine))
    if len(plain) != len(found) or len(plain) < STEPS:
        return Outcome({}, f"{len(found)} losses, the plain run has {len(plain)}")
    # PPO's first losses are around 0: there what counts is the absolute difference
    off = max(abs(a - b) / max(abs(a), 0.1) for a, b in zip(plain, found, strict=True))
    return Outcome(
        {"largest difference": off, "losses": len(plain)},
        None if off <= LIMIT else f"losses {found}, of the plain run {plain}",
    )


def save_parents(folder: Path) -> None:
    """A small random policy and reward model with the tokenizer of the embedded ones."""
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    config = OPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=384,
        dropout=0.0,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    for name, auto_class in (
        ("policy", AutoModelForCausalLM),
        ("reward", AutoModelForSequenceClassification),
    ):
        torch.manual_seed(len(name))
        auto_class.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def losses(run_folder: Path) -> list[float]:
    """All losses that a run has logged, in order."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in sorted(row) if "loss" in name]
