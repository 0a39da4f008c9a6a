"""Part d: a policy's update on one prompt of 8,192 tokens with 32 answers, shared and unshared rows."""

from functools import partial
from statistics import median
from unittest import mock

import torch

from planning import flops
from studies.gpu_checks.device import ON_CARD, card_bytes, matmul_rate
from studies.gpu_checks.ours import LongPrompt, random_batch
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.speed import config_of, rates_of, take_turns
from utils.models import flex

PROMPT, ANSWERS, ANSWER, SHAPE = (8192, 32, 48, "125m") if ON_CARD else (200, 4, 6, "mini")
NEEDED_GIB = 40
# what the other side does otherwise
PEERS = {"unshared rows": {"shared": False}, "a mask in place of FlexAttention": {"fewest": 10**9}}


def run(results: Results) -> None:
    torch.set_float32_matmul_precision("high")
    for peer, more in PEERS.items():
        name = f"policy update, {SHAPE}, P = {PROMPT}, N = {ANSWERS}, {peer}, bf16"
        free = card_bytes()
        if free is not None and free < NEEDED_GIB * 2**30:
            results.skip(name, f"needs about {NEEDED_GIB} GiB, {free >> 30} GiB are free")
            continue
        results.check(name, 10, partial(compared, peer, more, min(15, results.left())))


def compared(peer: str, more: dict, seconds: float) -> Outcome:
    """As in speed.py. On a card it is wrong when FlexAttention was not used."""
    config = config_of(SHAPE, positions=2 * PROMPT)
    batch = random_batch(1, ANSWERS, PROMPT, (ANSWER, ANSWER), config.vocab_size)
    sides = {
        "ours": partial(LongPrompt, config, batch, "bf16"),
        peer: partial(LongPrompt, config, batch, "bf16", **more),
    }
    said = []
    with mock.patch.object(flex, "say_once", said.append):
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
        },
        "; ".join(said) or None,
    )
