"""Runs under DeepSpeed for the tests: models, command lines, a launcher, and what a run leaves behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from run_folders import Tensors, metrics, weights
from tiny_models import save_heads, save_opt, save_other_vocabulary
from utils import zero
from utils.config import PROJECT

DEEPSPEED = PROJECT / "configs" / "deepspeed"
FILES = sorted(path.stem for path in DEEPSPEED.glob("*.json"))
STAGES = ("sft", "reward", "ppo")
ROWS = 8  # of an optimizer step, over all processes and micro-batches
CLIP = 0.01  # far below the norm of a gradient, and low enough for Adam's epsilon to show it
# compiling takes ten minutes, so the first run with zero3_nvme.json is not a test's
HAS_AIO = (zero._extensions_folder() / "async_io" / "async_io.so").exists()


def make_models(folder: Path) -> None:
    """A tiny OPT and a reward model; and both as OPT-350m: projections around layers, norms behind them."""
    # the first without biases
    for name, layers, width, before in (("usual", 1, 32, True), ("350m", 2, 16, False)):
        for kind in ("policy", "reward"):
            save_opt(folder / name / kind, kind, seed=len(kind), word_embed_proj_dim=width,
                     num_hidden_layers=layers,
                     dropout=0.0, do_layer_norm_before=before, enable_bias=not before)


def make_rewards(folder: Path) -> list[str]:
    """The words with which PPO has three ensembles, two of one model's heads, and one of a model with a
    vocabulary of its own, which reads the text; and a guard. The second process has no test prompt.
    """
    several = save_heads(Path(shutil.copytree(folder / "usual" / "reward", folder / "several")))
    other = save_heads(save_other_vocabulary(several, folder / "other"))
    rewards = [{"model": f"{several}", "name": "worst", "ensemble": "worst"},
               {"model": f"{several}", "name": "mean"},
               {"model": f"{other}", "name": "other", "ensemble": "uncertainty"}]
    return ["--rewards", json.dumps(rewards), "--reward_model", "none", "--test_rows", "1", "--guard", "0.5",
            "--guard_model", f"{folder}/350m/reward", "--missing_eos_score", "none"]


def words_of(folder: Path, stage: str, rows: int, accumulation: int, engine: str | None, steps: int,
             model: str = "usual") -> list[str]:
    """The command line of a stage: `rows` in a micro-batch of one process."""
    words = (f"--model {folder / model / 'policy'} --report_to none --eval_rows 3 --test_rows 3 "
             f"--per_device_batch_size {rows} --max_grad_norm {CLIP} --save_total_limit 1 ")
    if stage == "ppo":
        words += (f"--reward_model {folder / model / 'reward'} --prompts_per_update {ROWS} "
                  f"--responses_per_prompt 2 --ppo_epochs 4 --num_minibatches 1 --total_episodes "
                  f"{steps // 4 * ROWS * 2} --eval_steps 99 --save_steps {steps // 4} ")
    else:
        words += (f"--max_steps {steps} --logging_steps 1 --gradient_accumulation_steps {accumulation} "
                  f"--eval_steps {steps // 2} --save_steps {steps} ")
    if stage != "reward":
        words += "--max_new_tokens 8 "
    return (words + (f"--deepspeed {DEEPSPEED}/{engine}.json" if engine else "")).split()


def launch(folder: Path, processes: int, cases: list[tuple]) -> None:
    """Run (stage, output folder, words, step to stop at or None), one after the other, in so many processes;
    what they print goes to output<processes>.txt.

    Those without an engine come first: one that was there leaves traces.
    """
    path = folder / f"cases{processes}.json"
    path.write_text(json.dumps([[stage, str(out), words, stop] for stage, out, words, stop in cases]))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    words = [*(launcher if processes > 1 else []), str(Path(__file__).with_name("zero_runs.py")), str(path)]
    done = subprocess.run([sys.executable, *words],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          check=False, timeout=1800)
    (folder / f"output{processes}.txt").write_text(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def losses(run: Path) -> list[float]:
    """Of training, in the order of the steps."""
    return [row[name] for row in metrics(run) for name in sorted(row)
            if "loss" in name and not name.startswith(("eval/", "test/"))]


def weights_of(folder: Path) -> Tensors:
    """Of a model's folder, in one file or in several with an index that names the file of each."""
    files = sorted(path.name for path in folder.glob("model*.safetensors"))
    if len(files) > 1:
        index, parts = json.loads((folder / "model.safetensors.index.json").read_text()), {}
        for file in files:
            parts |= dict.fromkeys(weights(folder, file.removesuffix(".safetensors")), file)
        assert index["weight_map"] == parts
        assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights(folder).values())
    return weights(folder)
