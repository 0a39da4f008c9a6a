"""Will it fit? The memory and duration of each stage, for each ZeRO configuration, before anything is loaded.

    python scripts/plan_memory.py --model facebook/opt-13b --gpus 8 --gpu_memory 80
    python scripts/plan_memory.py --model facebook/opt-66b --gpus 64 --stage ppo --zero zero3 zero3_offload \\
        --cpu_memory 1000
    python scripts/plan_memory.py --model outputs/mine/sft/final --gpus 1 --gpu_memory 24 --lora_rank 8
    python scripts/plan_memory.py --model facebook/opt-6.7b --gpu_memory 24 --stage ppo --lora_rank 64 \\
        --load_in_4bit true --gradient_checkpointing true --micro_batch 1 --generation_batch 16
    python scripts/plan_memory.py --model facebook/opt-1.3b --gpus 0 --stage sft    # this CPU, float32
    python scripts/plan_memory.py --output outputs/plan.json --figure outputs/plan.png

No weights are read, and the OPT models need no network. Parameters are counted on a model without memory
(torch's meta device), and so is what autograd keeps of a forward pass. planning/memory.py has a function with
a reason for each term. 1 GiB is 2^30 bytes, which is what GPU vendors call a GB.

The configurations are no DeepSpeed (`none`) and the files of configs/deepspeed/. From the fastest to the
slowest they are none, zero1, zero2, zero3, zero2_offload, zero3_offload, zero3_nvme.

Fragmentation, a display on the GPU and other programs are not counted. Leave a tenth of the memory free.
"""

import json
import os
from dataclasses import dataclass

from utils.config import SECTIONS, UserError, key
from utils.launch import read_config, start


@dataclass
class PlanConfig:
    """The models, the machine, and the training."""

    model: str = key("facebook/opt-1.3b", "The policy: a model folder, a hub name, or one of "
                     "facebook/opt-125m to -66b (these need no network).")
    reward_model: str | None = key(None, "Reward and value model; none: of the policy's size.")
    gpus: int = key(1, "Number of GPUs; 0: train on this machine's CPU.", unit="GPUs", low=0, high=10**6)
    gpus_per_node: int | None = key(None, "GPUs of a node; none: all, but at most 8.", unit="GPUs",
                                    low=1, high=1000)
    gpu_memory: float = key(80.0, "Memory of one GPU.", unit="GiB", low=0.1, high=1e6)
    cpu_memory: float | None = key(None, "Host memory of a node; none: no limit with GPUs, this machine's "
                                   "without.",
                                   unit="GiB", low=0.1, high=1e9)
    processes: int = key(1, "With --gpus 0: processes on this machine.", unit="processes", low=1, high=10_000)
    stage: str = key("all", "Stage to plan.", choices=[*SECTIONS, "all"])
    zero: list[str] = key([], "ZeRO configurations by name: none, or a file of configs/deepspeed/ such as "
                          "zero2; left out: all.")
    prompt_length: int = key(512, "Length of a prompt: max_prompt_tokens.", unit="tokens",
                             low=1, high=10_000_000)
    completion_length: int = key(53, "Length of a completion: max_new_tokens.", unit="tokens",
                                 low=1, high=10_000_000)
    k: int = key(4, "Completions of a prompt in the reward stage and in PPO.", unit="completions",
                 low=1, high=1000)
    micro_batch: int = key(8, "Prompts, with their completions, in a forward pass: per_device_batch_size.",
                           unit="prompts", low=1, high=100_000)
    generation_batch: int = key(64, "Prompts sampled for, or rows scored, at once: eval_batch_size.",
                                unit="prompts", low=1, high=100_000)
    ppo_epochs: int = key(4, "Passes over the episodes of an update.", unit="passes", low=1, high=1000)
    value_model: str = key("separate", "PPO's value model: a model of its own, a head on the policy's trunk, "
                           "or none (with advantage rloo or grpo).",
                           choices=["separate", "shared", "none"])
    lora_rank: int = key(0, "Train LoRA adapters of this rank; 0: train the weights.", low=0, high=4096)
    load_in_4bit: bool = key(False, "With lora_rank: store the frozen weights in 4 bits (QLoRA).")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass.")
    precision: str | None = key(None, "Number format: bf16, fp16 or fp32; none: bf16 on GPUs, fp32 on a CPU.")
    peak_tflops: float | None = key(None, "Peak speed of one device; none: 312 for GPUs (A100, bf16), "
                                    "unknown for a CPU (then no hours are printed).",
                                    unit="TFLOP/s", low=1e-6, high=1e9)
    utilisation: float = key(0.4, "Share of peak_tflops that training reaches.", low=1e-6, high=1.0)
    total: int = key(100_000, "Examples (sft), prompts (reward) or episodes (ppo) of the whole stage.",
                     low=1, high=10**12)
    output: str | None = key(None, "Write every plan with its terms to this .json file.")
    figure: str | None = key(None, "Plot memory against the size of the OPT models into this .png file.")


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(PlanConfig, None, __doc__)

from planning.architectures import model_of
from planning.duration import duration
from planning.fit import STAGES, Setup, batches_of, cheapest, choices_of, plan, remedies
from planning.memory import CHOICES, GIB
from planning.report import plot_sizes, print_plans, print_verdict, row_of
from utils.runs.run import output_file


def refuse_impossible(config: PlanConfig) -> None:
    """Raise UserError for unknown names, and for keys that contradict each other."""
    names = [zero.name for zero in CHOICES]
    for name in config.zero:
        if name not in names:
            raise UserError(f"zero: unknown configuration '{name}'; choose from: {' | '.join(names)}")
    if config.load_in_4bit and not config.lora_rank:
        raise UserError("load_in_4bit: weights in 4 bits are trained by adapters alone; give --lora_rank too")
    if config.load_in_4bit and config.zero and not choices_of(config.zero, True):
        raise UserError("zero: ZeRO-3 does not shard weights in 4 bits; name none, zero1 or zero2, or leave "
                        "load_in_4bit out")
    if config.precision not in (None, "bf16", "fp16", "fp32"):
        raise UserError(f"precision: unknown precision '{config.precision}'; choose from: bf16 | fp16 | fp32")
    if config.gpus == 0 and config.precision == "fp16":
        raise UserError("precision: a CPU trains in fp32 or bf16, not in fp16; leave precision out, or give "
                        "--gpus 1")
    if config.gpus and config.processes != 1:
        raise UserError("processes: with GPUs there is one process for each GPU; leave processes out, or "
                        "give --gpus 0")
    if config.gpus_per_node and config.gpus % config.gpus_per_node:
        raise UserError(f"gpus_per_node: {config.gpus} GPUs do not divide into nodes of "
                        f"{config.gpus_per_node}; give a divisor")
    for name, field in ((config.model, "model"), (config.reward_model, "reward_model")):
        positions = model_of(name, field).positions if name else None
        if positions and config.prompt_length + config.completion_length > positions:
            raise UserError(f"prompt_length + completion_length: {config.prompt_length} + "
                            f"{config.completion_length} tokens are more than the {positions} positions of "
                            f"'{name}'; give fewer")


def setup_of(config: PlanConfig) -> Setup:
    """The configuration with every default filled in and sizes in bytes."""
    cpu = config.gpus == 0
    host_memory = None if config.cpu_memory is None else config.cpu_memory * GIB
    if cpu and host_memory is None:
        host_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Setup(
        config.model, config.reward_model, config.value_model, config.lora_rank,
        processes=config.processes if cpu else config.gpus,
        per_node=config.processes if cpu else config.gpus_per_node or min(config.gpus, 8),
        device_memory=None if cpu else config.gpu_memory * GIB,
        host_memory=host_memory,
        micro_batch=config.micro_batch, generation_batch=config.generation_batch,
        prompt=config.prompt_length, completion=config.completion_length, k=config.k,
        precision=config.precision or ("fp32" if cpu else "bf16"),
        checkpointing=config.gradient_checkpointing, load_in_4bit=config.load_in_4bit,
    )


def rate_of(config: PlanConfig) -> float | None:
    """FLOP/s that a device reaches; None: unknown."""
    peak_tflops = config.peak_tflops or (312.0 if config.gpus else None)
    return peak_tflops and peak_tflops * 1e12 * config.utilisation


def main(config: PlanConfig) -> None:
    output = output_file(config.output, "output", ".json") if config.output else None
    figure = output_file(config.figure, "figure", ".png") if config.figure else None
    refuse_impossible(config)
    setup, choices = setup_of(config), choices_of(config.zero, config.load_in_4bit)
    stages = STAGES if config.stage == "all" else [config.stage]
    plans = [plan(stage, zero, setup) for stage in stages for zero in choices]
    batches = [batches_of(one, setup) for one in plans]
    durations = {stage: duration(stage, setup, config.total, config.ppo_epochs, rate_of(config))
                 for stage in stages}
    print_plans(plans, batches, setup)
    for stage in stages:
        best = cheapest([one for one in plans if one.stage == stage])
        advice = remedies(stage, choices, setup) if best is None else []
        print_verdict(stage, best, durations[stage], advice)
    if output:
        rows = [row_of(one, largest, durations[one.stage])
                for one, largest in zip(plans, batches, strict=True)]
        output.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if figure:
        plot_sizes(figure, stages, choices, setup)


if __name__ == "__main__":
    start(main, CONFIG)
