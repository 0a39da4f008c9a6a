"""Runs under DeepSpeed for the tests: models, command lines, a launcher, and what a run leaves behind."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.cpp_extension import _get_build_directory

from tiny_models import save_opt
from utils.config import PROJECT

DEEPSPEED = PROJECT / "configs" / "deepspeed"
FILES = sorted(path.stem for path in DEEPSPEED.glob("*.json"))
STAGES = ("sft", "reward", "ppo")
ROWS = 8  # of an optimizer step, over all processes and micro-batches
CLIP = 0.01  # far below the norm of a gradient, and low enough for Adam's epsilon to show it
# compiling takes ten minutes, so the first run with zero3_nvme.json is not a test's
HAS_AIO = Path(_get_build_directory("async_io", False), "async_io.so").exists()


def make_models(folder: Path) -> None:
    """A tiny OPT and a reward model, and an OPT with OPT-350m's ways: a projection around its layers, norms
    behind them.
    """
    # the first without biases
    for name, layers, width, before in (("usual", 1, 32, True), ("350m", 2, 16, False)):
        for kind in ("policy", "reward"):
            save_opt(folder / name / kind, kind, seed=len(kind), word_embed_proj_dim=width,
                     num_hidden_layers=layers,
                     dropout=0.0, do_layer_norm_before=before, enable_bias=not before)


def words_of(folder: Path, stage: str, rows: int, accumulation: int, engine: str | None, steps: int,
             model: str = "usual"):
    """The command line of a stage: `rows` in a micro-batch of one process."""
    words = (f"--model {folder / model / 'policy'} --report_to none --eval_rows 3 --test_rows 3 "
             f"--max_new_tokens 8 --per_device_batch_size {rows} --max_grad_norm {CLIP} ")
    if stage == "ppo":
        words += (f"--reward_model {folder / model / 'reward'} --prompts_per_update {ROWS} "
                  f"--responses_per_prompt 2 --ppo_epochs 4 --num_minibatches 1 --total_episodes "
                  f"{steps // 4 * ROWS * 2} --eval_steps 99 --save_steps {steps // 4} ")
    else:
        words += (f"--max_steps {steps} --logging_steps 1 --gradient_accumulation_steps {accumulation} "
                  f"--micro_batch_tokens none --save_total_limit 1 --eval_steps {steps} ")
    if stage == "reward":
        words = words.replace("--max_new_tokens 8 ", "") + f"--save_steps {steps} "
    return (words + (f"--deepspeed {DEEPSPEED}/{engine}.json" if engine else "")).split()


def launch(folder: Path, processes: int, cases: list[tuple]) -> None:
    """Run (stage, output folder, words, step to stop at or None), one after the other, in so many processes.

    Those without an engine come first: one that was there leaves traces.
    """
    path = folder / f"cases{processes}.json"
    path.write_text(json.dumps([[stage, str(out), words, stop] for stage, out, words, stop in cases]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*(launcher if processes > 1 else []), str(Path(__file__).with_name("zero_runs.py")), str(path)]
    done = subprocess.run([sys.executable, *words],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          check=False, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def metrics(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def losses(run: Path) -> list[float]:
    return [row[name] for row in metrics(run) for name in sorted(row) if "loss" in name]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Of a model's folder, in one file or in several with an index that names the file of each."""
    files = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, weights in files.items() for name in weights}
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weights in files.values()
                                                      for weight in weights.values())
    return {name: weight for weights in files.values() for name, weight in weights.items()}


def final_weights(run: Path, steps: int) -> dict[str, torch.Tensor]:
    """Those after the last step: the SFT stage puts its best checkpoint into final/."""
    checkpoint = run / "checkpoints" / f"checkpoint-{steps}"
    return weights_of(checkpoint if checkpoint.exists() else run / "final")


def furthest(a: dict, b: dict) -> float:
    assert set(a) == set(b)
    return max(float((a[name] - b[name]).abs().max()) for name in a)
