"""Part d: tokens a second of sampling one shape, ours beside transformers' `generate` and `generate_batch`,
and beside ours without a recorded step; in turns, as in speed.py.
"""

from pathlib import Path

from studies.gpu_checks.device import ON_CARD
from studies.gpu_checks.results import Results
from studies.gpu_checks.speed import compare_all

KS = (4, 1, 16) if ON_CARD else (4,)
# as in speed.py; "bf16": float32 weights under autocast, as in training; `generate_batch` knows no autocast
COMPARISONS = [
    *(("sampling", k, "kernels launched one by one", "bf16") for k in KS),
    *(("sampling", k, "generate", "bf16") for k in KS),
    *(("sampling", k, "generate_batch", "bf16 weights") for k in KS),
    *(("sampling", k, "generate", "bf16 weights") for k in KS),
]


def run(results: Results, shape: str, folder: Path) -> None:
    compare_all(results, shape, COMPARISONS, folder)
