"""Will it fit? The memory of each stage with each choice of ZeRO and offload, and how long it takes, before anything is loaded.

    python scripts/plan_memory.py --model facebook/opt-13b --gpus 8 --gpu_memory 80
    python scripts/plan_memory.py --model facebook/opt-66b --gpus 64 --stage ppo --zero zero3 zero3_offload --cpu_memory 1000
    python scripts/plan_memory.py --model outputs/mine/sft/final --gpus 1 --gpu_memory 24 --lora_rank 8
    python scripts/plan_memory.py --model facebook/opt-1.3b --gpus 0 --stage sft      # this machine's CPU, float32
    python scripts/plan_memory.py --output outputs/plan.json --figure outputs/plan.png

No weights are read, and the OPT models need no network: parameters, and what a forward pass keeps, are counted on a model
without memory (torch's meta device). Every term stands with its reason in planning/memory.py. 1 GiB is 2^30 bytes, which is
what cards mean by GB.

The choices are no DeepSpeed (`none`) and the files of configs/deepspeed/. The first that fits in this order is the fastest:
none, zero1, zero2, zero3, zero2_offload, zero3_offload, zero3_nvme.

It does not know of fragmentation, of a display on the card, or of other programs. Leave a tenth free.
"""

import json
import os
from dataclasses import dataclass

from planning.architectures import model_of
from planning.duration import duration
from planning.fit import STAGES, Setup, batches_of, cheapest, choices_of, plan, remedies
from planning.memory import CHOICES, GIB
from planning.report import plot_sizes, print_plans, print_verdict, row_of
from utils.config import UserError, key
from utils.launch import start
from utils.runs.run import output_file


@dataclass
class PlanConfig:
    """The models, the machine, and what is trained."""

    model: str = key("facebook/opt-1.3b", "The policy: a folder, a hub name, or facebook/opt-125m to -66b (no network).")
    reward_model: str | None = key(None, "Reward and value model; none: of the policy's size.")
    gpus: int = key(1, "GPUs in all; 0: processes on this machine's CPU.", unit="GPUs", low=0)
    gpus_per_node: int | None = key(None, "GPUs of a node; none: all, at most 8.", unit="GPUs", low=1)
    gpu_memory: float = key(80.0, "Memory of one GPU.", unit="GiB", low=0.1)
    cpu_memory: float | None = key(None, "Memory of a node; none: no limit, on a CPU that of this machine.", unit="GiB", low=0.1)
    processes: int = key(1, "With --gpus 0: processes on this machine.", unit="processes", low=1)
    stage: str = key("all", "What to plan.", choices=[*STAGES, "all"])
    zero: list[str] = key([], "Choices by name: none or a file of configs/deepspeed/, such as zero2; none named: all.")
    prompt_length: int = key(512, "Tokens of a prompt: max_prompt_tokens.", unit="tokens", low=1)
    completion_length: int = key(53, "Tokens of a completion: max_new_tokens.", unit="tokens", low=1)
    k: int = key(4, "Completions of a prompt in the reward stage and PPO.", unit="completions", low=1)
    micro_batch: int = key(8, "Prompts, with their completions, in a forward pass: per_device_batch_size.", unit="prompts", low=1)
    generation_batch: int = key(64, "Prompts sampled for, or rows scored, at once: eval_batch_size.", unit="prompts", low=1)
    ppo_epochs: int = key(4, "Passes over the episodes of an update.", unit="passes", low=1)
    value_model: str = key("separate", "PPO's value model: of its own, on the policy's trunk, or none (advantage rloo or grpo).",
                           choices=["separate", "shared", "none"])
    lora_rank: int = key(0, "Train adapters of this rank; 0: the weights.", low=0)
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass.")
    precision: str | None = key(None, "Arithmetic; none: bf16 on GPUs, fp32 on a CPU.")
    peak_tflops: float | None = key(None, "What one device can do; none: 312 on GPUs (A100, bf16), on a CPU no hours are said.",
                                    unit="TFLOPS", low=1e-6)
    utilisation: float = key(0.4, "Share of it that is reached.", low=1e-6, high=1.0)
    total: int = key(100_000, "Examples (sft), prompts (reward), episodes (ppo) of the whole stage.", low=1)
    output: str | None = key(None, "Every plan with its terms: a .json file.")
    figure: str | None = key(None, "Memory against the size of OPT models: a .png file.")


def refuse_impossible(config: PlanConfig) -> None:
    """Raise UserError for names that are none, and for keys that make no sense together."""
    names = [zero.name for zero in CHOICES]
    for name in config.zero:
        if name not in names:
            raise UserError(f"zero: '{name}' is none; there are: {' | '.join(names)}")
    if config.precision not in (None, "bf16", "fp16", "fp32"):
        raise UserError(f"precision: '{config.precision}' is none; there are: bf16 | fp16 | fp32")
    if config.gpus == 0 and config.precision == "fp16":
        raise UserError("precision: a CPU trains in fp32 or bf16, not in fp16; leave it out, or give --gpus 1")
    if config.gpus and config.processes != 1:
        raise UserError("processes: it is for --gpus 0; a GPU has one process")
    if config.gpus_per_node and config.gpus % config.gpus_per_node:
        raise UserError(f"gpus_per_node: {config.gpus} GPUs are no whole nodes of {config.gpus_per_node}; take a divisor")
    for name, field in ((config.model, "model"), (config.reward_model, "reward_model")):
        positions = model_of(name, field).positions if name else None
        if positions and config.prompt_length + config.completion_length > positions:
            raise UserError(f"prompt_length + completion_length: {config.prompt_length} + {config.completion_length} tokens are "
                            f"more than the {positions} positions of '{name}'; give fewer")


def setup_of(config: PlanConfig) -> Setup:
    """The configuration in bytes."""
    cpu = config.gpus == 0
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if cpu and config.cpu_memory is None else None
    return Setup(
        config.model, config.reward_model, config.value_model, config.lora_rank,
        processes=config.processes if cpu else config.gpus,
        per_node=config.processes if cpu else config.gpus_per_node or min(config.gpus, 8),
        device_memory=None if cpu else config.gpu_memory * GIB,
        host_memory=host if config.cpu_memory is None else config.cpu_memory * GIB,
        micro_batch=config.micro_batch, generation_batch=config.generation_batch, prompt=config.prompt_length,
        completion=config.completion_length, k=config.k, precision=config.precision or ("fp32" if cpu else "bf16"),
        checkpointing=config.gradient_checkpointing,
    )


def rate_of(config: PlanConfig) -> float | None:
    """FLOPs a second that a device reaches; None: not known."""
    peak = config.peak_tflops or (312.0 if config.gpus else None)
    return peak and peak * 1e12 * config.utilisation


def main(config: PlanConfig) -> None:
    output = output_file(config.output, "output", ".json") if config.output else None
    figure = output_file(config.figure, "figure", ".png") if config.figure else None
    refuse_impossible(config)
    setup, choices = setup_of(config), choices_of(config.zero)
    stages = STAGES if config.stage == "all" else [config.stage]
    plans = [plan(stage, zero, setup) for stage in stages for zero in choices]
    batches = [batches_of(one, setup) for one in plans]
    durations = {stage: duration(stage, setup, config.total, config.ppo_epochs, rate_of(config)) for stage in stages}
    print_plans(plans, batches, setup)
    for stage in stages:
        best = cheapest([one for one in plans if one.stage == stage])
        print_verdict(stage, best, durations[stage], remedies(stage, choices, setup) if best is None else [])
    if output:
        rows = [row_of(one, most, durations[one.stage]) for one, most in zip(plans, batches, strict=True)]
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if figure:
        plot_sizes(figure, stages, choices, setup)


if __name__ == "__main__":
    start(main, PlanConfig, None, __doc__)
