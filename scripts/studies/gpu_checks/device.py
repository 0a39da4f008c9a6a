"""The device that is checked: its clock, its memory, its matrix-product rate, and what it calls itself."""

import datetime
import gc
import importlib.metadata
import os
import platform
import subprocess
import time
from contextlib import nullcontext
from statistics import median

import torch

from utils.paths import PROJECT

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "peft",
    "deepspeed",
    "datasets",
    "tokenizers",
    "numpy",
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_CARD = DEVICE.type == "cuda"


def now() -> float:
    """Seconds, after all that was given to the card is done."""
    if ON_CARD:
        torch.cuda.synchronize()
    return time.perf_counter()


def milliseconds(function) -> float:
    """Of a call, the median of seven after two."""
    seconds = []
    for _ in range(9):
        began = now()
        function()
        seconds.append(now() - began)
    return 1000 * median(seconds[2:])


def arithmetic(precision: str):
    """Autocast for bf16, nothing for fp32, as `mixed_precision` of the stages."""
    return torch.autocast(DEVICE.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def gib(count: int) -> float | None:
    """Bytes of the card in GiB; None without one."""
    return count / 2**30 if ON_CARD else None


def allocated() -> int:
    """Bytes of all tensors on the card; 0 without one."""
    return torch.cuda.memory_allocated() if ON_CARD else 0


def peak_since_reset() -> int:
    """The largest `allocated` since `reset_peak`; 0 without a card."""
    return torch.cuda.max_memory_allocated() if ON_CARD else 0


def reset_peak() -> None:
    if ON_CARD:
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Give back what no tensor uses."""
    gc.collect()
    if ON_CARD:
        torch.cuda.empty_cache()


def card_bytes() -> int | None:
    """Memory that is free on the card; None without one."""
    return torch.cuda.mem_get_info()[0] if ON_CARD else None


def matmul_rate(precision: str) -> float:
    """FLOPs a second of a square matrix product of random numbers: the median of ten after three.

    bf16, or fp32 as `torch.set_float32_matmul_precision` has it.
    """
    size = 8192 if ON_CARD else 512
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(size, size, device=DEVICE, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(13):
        began = now()
        a @ b
        seconds.append(now() - began)
    return 2 * size**3 / median(seconds[3:])


def machine() -> dict:
    """Card, driver, versions, date and commit, for the head of the result."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # with its build, such as +cu130
    return {
        "card": torch.cuda.get_device_name()
        if ON_CARD
        else f"no card ({platform.processor() or platform.machine()})",
        "card_memory_mib": torch.cuda.get_device_properties(0).total_memory // 2**20 if ON_CARD else None,
        "capability": torch.cuda.get_device_capability() if ON_CARD else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if ON_CARD
        else None,
        "cuda": torch.version.cuda if ON_CARD else None,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "libraries": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output("git", "-C", str(PROJECT), "rev-parse", "HEAD"),
    }


def _output(*command: str) -> str | None:
    """What a command prints; None when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
