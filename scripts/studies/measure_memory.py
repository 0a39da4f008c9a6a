"""What a stage really takes on this machine's CPU, beside what plan_memory.py says: peak memory and seconds a step.

    python scripts/studies/measure_memory.py --model facebook/opt-125m --stage sft --zero none
    python scripts/studies/measure_memory.py --model facebook/opt-1.3b --stage sft --zero zero3_nvme
    python scripts/studies/measure_memory.py --model facebook/opt-1.3b --stage ppo --zero zero3_offload --lora_rank 8

The model has random weights and OPT's vocabulary, the texts are the embedded ones: one prompt in a forward pass. The stage's own
script runs to its end, final/ included. Its peak is that of the process, but for pages of files: those of a checkpoint that is
read are the system's to drop. Without an engine a run keeps freed memory (`keep_freed_memory` in utils/launch.py), which the
plan does not count. Linux only.
"""

import multiprocessing
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from planning.architectures import OPT, opt_config
from planning.fit import STAGES, Setup, choices_of, plan
from planning.memory import CHOICES, GIB
from utils.config import PROJECT, UserError, key
from utils.launch import start

PROMPT, COMPLETION, RESPONSE, K = 100, 30, 8, 2  # tokens, and responses in PPO; the embedded posts are about as long


@dataclass
class MeasureConfig:
    """What to run."""

    model: str = key("facebook/opt-125m", "A size of OPT.", choices=list(OPT))
    stage: str = key("sft", "The stage.", choices=list(STAGES))
    zero: str = key("none", "No engine, or a file of configs/deepspeed/.", choices=[zero.name for zero in CHOICES])
    mixed_precision: str = key("no", "As in the stages; float32 or bfloat16.", choices=["no", "bf16"])
    lora_rank: int = key(0, "Train adapters of this rank; 0: the weights.", low=0)
    value_model: str = key("separate", "PPO's value model.", choices=["separate", "shared"])
    steps: int = key(3, "Optimizer steps; the first is not timed.", unit="steps", low=2)
    folder: str | None = key(None, "Where models and runs are written, and removed; none: the system's temporary folder.")


def write_models(name: str, stage: str, folder: Path) -> None:
    """A random policy of this size, and for PPO a reward model, in 16 bits on the disk, with the mini tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    config = opt_config(name)
    config.num_labels, config.dropout, config.pad_token_id = 1, 0.0, tokenizer.pad_token_id
    torch.manual_seed(0)
    kinds = {"policy": AutoModelForCausalLM} | ({"reward": AutoModelForSequenceClassification} if stage == "ppo" else {})
    for kind, model in kinds.items():
        model.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / kind, max_shard_size="1GB")
        tokenizer.save_pretrained(folder / kind)


def command(config: MeasureConfig, folder: Path) -> list[str]:
    """The stage's command line."""
    words = [f"--model {folder / 'policy'} --output_dir {folder / 'run'} --report_to none --per_device_batch_size 1 "
             f"--eval_batch_size 1 --eval_rows 1 --test_rows 1 --max_prompt_tokens {PROMPT} --eval_steps 999 "
             f"--mixed_precision {config.mixed_precision} --lora_rank {config.lora_rank}"]
    if config.stage != "ppo":
        words.append(f"--max_steps {config.steps} --logging_steps 1 --micro_batch_tokens none")
    words.append({"sft": f"--max_new_tokens {RESPONSE}", "reward": "--save_steps 999 --centring_data none",
                  "ppo": f"--reward_model {folder / 'reward'} --max_new_tokens {RESPONSE} --prompts_per_update 1 "
                         f"--save_steps 999 --responses_per_prompt {K} --total_episodes {config.steps * K} "
                         f"--ppo_epochs 1 --num_minibatches 1 --value_model {config.value_model}"}[config.stage])
    if config.zero != "none":
        words.append(f"--deepspeed {PROJECT}/configs/deepspeed/{config.zero}.json")
    return [sys.executable, str(PROJECT / "scripts" / f"train_{config.stage}.py"), *" ".join(words).split()]


def run(words: list[str], metrics: Path) -> tuple[float, list[float]]:
    """Peak memory in bytes, and the seconds between one logged step and the next."""
    seen, peak = [], 0
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(words, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            steps = metrics.read_text().count('_rate"') if metrics.exists() else 0
            seen += [time.time()] * (steps - len(seen))
            time.sleep(0.05)
        if process.returncode:
            said.seek(0)
            raise UserError(f"the run ended with status {process.returncode}: {said.read()[-1000:]}")
    return peak, [b - a for a, b in zip(seen, seen[1:], strict=False)]


def memory_of(process: int) -> int:
    """Bytes that it has in memory, pages of files left out; 0 of one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def main(config: MeasureConfig) -> None:
    zero = choices_of([config.zero])[0]
    setup = Setup(config.model, None, config.value_model, config.lora_rank, 1, 1, None, None, 1, 1, PROMPT,
                  RESPONSE if config.stage == "ppo" else COMPLETION, K if config.stage == "ppo" else 4,
                  "fp32" if config.mixed_precision == "no" else config.mixed_precision, False)
    planned = plan(config.stage, zero, setup).host
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        # in a process of its own: what it takes would stay with this one, beside the run
        models = (config.model, config.stage, Path(folder))
        writer = multiprocessing.get_context("spawn").Process(target=write_models, args=models)
        writer.start()
        writer.join()
        if writer.exitcode:
            raise UserError(f"the models could not be written into '{folder}' (status {writer.exitcode})")
        peak, seconds = run(command(config, Path(folder)), Path(folder) / "run" / "metrics.jsonl")
    print(f"{config.model}, {config.stage}, {config.zero}: peak {peak / GIB:.1f} GiB, planned {planned / GIB:.1f} "
          f"({planned / peak - 1:+.0%}); {median(seconds):.1f} s a step ({len(seconds)} timed)")


if __name__ == "__main__":
    start(main, MeasureConfig, None, __doc__)
