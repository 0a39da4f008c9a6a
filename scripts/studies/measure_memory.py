"""Measure a stage on this machine's CPU: peak memory beside plan_memory.py's plan, and seconds a step.

    python scripts/studies/measure_memory.py --model facebook/opt-125m --stage sft --zero none
    python scripts/studies/measure_memory.py --model facebook/opt-1.3b --stage sft --zero zero3_nvme
    python scripts/studies/measure_memory.py --model facebook/opt-1.3b --stage ppo --zero zero3_offload \\
        --lora_rank 8

The model has random weights and OPT's vocabulary. The texts are the embedded ones, one prompt in a forward
pass. The stage's own script runs to its end and writes final/. The peak is that of its process, without file
pages: the system can drop the pages of a checkpoint that is being read. Without DeepSpeed a run keeps freed
memory (`keep_freed_memory` in utils/launch.py), which the plan does not count. Linux only.
"""

import multiprocessing
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from planning.architectures import OPT, opt_config
from planning.fit import STAGES, Setup, choices_of, plan
from planning.memory import CHOICES, GIB
from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start

PROMPT, COMPLETION = 100, 30  # tokens; about the lengths of the embedded posts and summaries
RESPONSE, K = 8, 2  # tokens of a response, and responses for each prompt, in PPO


@dataclass
class MeasureConfig:
    """What to run."""

    model: str = key("facebook/opt-125m", "Size of the model.", choices=list(OPT))
    stage: str = key("sft", "Stage to run.", choices=list(STAGES))
    zero: str = key("none", "none: without DeepSpeed; else a file of configs/deepspeed/.",
                    choices=[zero.name for zero in CHOICES])
    mixed_precision: str = key("no", "As in the stages: float32 (no) or bfloat16.", choices=["no", "bf16"])
    lora_rank: int = key(0, "Train LoRA adapters of this rank; 0: train the weights.", low=0, high=4096)
    value_model: str = key("separate", "PPO's value model.", choices=["separate", "shared"])
    steps: int = key(3, "Optimizer steps; the first is not timed.", unit="steps", low=2, high=1000)
    folder: str | None = key(None, "Folder for models and runs, which are removed at the end; none: the "
                             "system's temporary folder.")


def write_models(name: str, stage: str, folder: Path) -> None:
    """Write a random policy of this size in bfloat16, and for PPO a reward model, with the mini tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    config = opt_config(name)
    config.num_labels, config.dropout, config.pad_token_id = 1, 0.0, tokenizer.pad_token_id
    torch.manual_seed(0)
    classes = {"policy": AutoModelForCausalLM}
    if stage == "ppo":
        classes["reward"] = AutoModelForSequenceClassification
    for role, auto_class in classes.items():
        model = auto_class.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / role, max_shard_size="1GB")
        tokenizer.save_pretrained(folder / role)


def command(config: MeasureConfig, folder: Path) -> list[str]:
    """The stage's command line."""
    words = [f"--model '{folder / 'policy'}' --output_dir '{folder / 'run'}' --report_to none "
             "--per_device_batch_size 1 --eval_batch_size 1 --eval_rows 1 --test_rows 1 --max_prompt_tokens "
             f"{PROMPT} --eval_steps 999 --mixed_precision {config.mixed_precision} --lora_rank "
             f"{config.lora_rank}"]
    if config.stage != "ppo":
        words.append(f"--max_steps {config.steps} --logging_steps 1 --micro_batch_tokens none")
    words.append({"sft": f"--max_new_tokens {RESPONSE}", "reward": "--save_steps 999 --centring_data none",
                  "ppo": f"--reward_model '{folder / 'reward'}' --max_new_tokens {RESPONSE} "
                         f"--prompts_per_update 1 --save_steps 999 --responses_per_prompt {K} "
                         f"--total_episodes {config.steps * K} --ppo_epochs 1 --num_minibatches 1 "
                         f"--value_model {config.value_model}"}[config.stage])
    if config.zero != "none":
        words.append(f"--deepspeed configs/deepspeed/{config.zero}.json")
    script = PROJECT / "scripts" / f"train_{config.stage}.py"
    return [sys.executable, str(script), *shlex.split(" ".join(words))]


def run(words: list[str], metrics: Path) -> tuple[float, list[float]]:
    """Run a command.

    Args:
        metrics: the run's metrics.jsonl, which is watched for the end of each step.

    Returns:
        Peak memory in bytes, and the seconds between one logged step and the next.
    """
    step_times, peak = [], 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            # each logged step has one learning rate
            steps = metrics.read_text().count('_rate"') if metrics.exists() else 0
            step_times += [time.time()] * (steps - len(step_times))
            time.sleep(0.05)
        if process.returncode:
            output.seek(0)
            raise UserError(f"the run ended with status {process.returncode}: {output.read()[-1000:]}")
    return peak, [end - begin for begin, end in pairwise(step_times)]


def memory_of(pid: int) -> int:
    """Resident bytes of a process without its file pages; 0 if it has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def main(config: MeasureConfig) -> None:
    zero = choices_of([config.zero])[0]
    setup = Setup(
        config.model, None, config.value_model, config.lora_rank, processes=1, per_node=1, device_memory=None,
        host_memory=None, micro_batch=1, generation_batch=1, prompt=PROMPT,
        completion=RESPONSE if config.stage == "ppo" else COMPLETION,
        k=K if config.stage == "ppo" else 4,  # the embedded rankings have 4 completions
        precision="fp32" if config.mixed_precision == "no" else config.mixed_precision, checkpointing=False,
    )
    planned = plan(config.stage, zero, setup).host
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        # in a process of its own, because this one would keep the memory while the run is measured
        models = (config.model, config.stage, Path(folder))
        writer = multiprocessing.get_context("spawn").Process(target=write_models, args=models)
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"folder: the models could not be written into '{folder}' (status "
                            f"{writer.exitcode}); is there enough memory and disk space?")
        peak, seconds = run(command(config, Path(folder)), Path(folder) / "run" / "metrics.jsonl")
    print(f"{config.model}, {config.stage}, {config.zero}: peak {peak / GIB:.1f} GiB, planned "
          f"{planned / GIB:.1f} ({planned / peak - 1:+.0%}); {median(seconds):.1f} s a step ({len(seconds)} "
          "timed)")


if __name__ == "__main__":
    start(main, read_config(MeasureConfig, None, __doc__))
