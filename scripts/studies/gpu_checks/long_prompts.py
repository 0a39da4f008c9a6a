"""Part d, last: a policy's update on one prompt of 8,192 tokens with 32 answers, shared and unshared rows."""

from functools import partial
from statistics import median

import torch

from planning import flops
from studies.gpu_checks.device import ON_CARD, card_bytes, matmul_rate
from studies.gpu_checks.ours import LongPrompt, random_batch
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.speed import config_of, rates_of, take_turns

PROMPT, ANSWERS, ANSWER, SHAPE = (8192, 32, 48, "125m") if ON_CARD else (200, 4, 6, "mini")
NEEDED_GIB = 40


def run(results: Results) -> None:
    torch.set_float32_matmul_precision("high")
    name = f"policy update, {SHAPE}, P = {PROMPT}, N = {ANSWERS}, unshared rows, bf16"
    free = card_bytes()
    if free is not None and free < NEEDED_GIB * 2**30:
        results.skip(name, f"needs about {NEEDED_GIB} GiB, {free >> 30} GiB are free")
        return
    results.check(name, 10, lambda: compared(min(20, results.left())))


def compared(seconds: float) -> Outcome:
    config = config_of(SHAPE, positions=2 * PROMPT)
    batch = random_batch(1, ANSWERS, PROMPT, (ANSWER, ANSWER), config.vocab_size)
    sides = {
        "ours": partial(LongPrompt, config, batch, "bf16"),
        "unshared rows": partial(LongPrompt, config, batch, "bf16", shared=False),
    }
    found = take_turns(sides, seconds)
    size = flops.Size(config.hidden_size, config.num_hidden_layers, config.ffn_dim, config.vocab_size)
    needed = flops.sft(size, [PROMPT], [[ANSWER] * ANSWERS])
    share = needed / median(found["ours"].seconds) / matmul_rate("bf16")
    return Outcome(
        {
            "unit": "episodes",
            "posts": 1,
            **rates_of(found, ANSWERS),
            "share of the matrix-product rate": share,
        }
    )
