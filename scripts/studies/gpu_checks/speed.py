"""Part d: speed and memory of training one shape, ours beside trl or beside our own unshared rows, in turns.

Both sides are in one process and take turns on the same batch, step by step, so that both see the same card.
Models have OPT's architectures and random weights; prompts have 300 tokens, completions 35 to 50. Both sides
train float32 weights, under bfloat16 autocast or with TF32 products.

Our side is a plain loop over the functions that the stages use. It packs the batch in each step, as trl's
data loader does, and logs nothing.
"""

from functools import partial
from pathlib import Path
from statistics import median

import torch

from planning import flops
from planning.architectures import model_of, opt_config
from planning.fit import Setup, choices_of, plan
from studies.gpu_checks import ours, peers
from studies.gpu_checks.device import (
    ON_CARD,
    allocated,
    card_bytes,
    free_memory,
    gib,
    matmul_rate,
    now,
    peak_since_reset,
    reset_peak,
)
from studies.gpu_checks.ours import Batch, random_batch
from studies.gpu_checks.results import Outcome, Results

PROMPT, COMPLETIONS = (300, (35, 50)) if ON_CARD else (12, (3, 5))  # tokens
RESPONSE = 48 if ON_CARD else 4  # tokens sampled
MOST_TURNS, LEAST_TURNS = (7, 2) if ON_CARD else (2, 2)
POSTS = {"reward": {2: 32, 4: 16, 9: 8}, "sft": {1: 48}, "ppo": {1: 16, 4: 16},
         "sampling": {1: 64, 4: 16, 16: 4}}
# (stage, K, peer, precision), the most valuable first; the peer None: ours alone
COMPARISONS = [
    ("reward", 4, "trl", "bf16"),
    ("sft", 1, "trl", "bf16"),
    ("sft", 1, "trl, packed", "bf16"),
    ("ppo", 4, "unshared rows", "bf16"),
    ("reward", 9, "trl", "bf16"),
    ("reward", 2, "trl", "bf16"),
    ("ppo", 1, None, "bf16"),
    ("reward", 4, "trl", "fp32"),
    ("ppo", 4, "unshared rows", "fp32"),
    ("sft", 1, "compiled layers", "bf16"),  # last, because of the compiler's time
]
# seconds of a comparison's turns at most; and that it needs at least, with a start of 2 to 6 on an H200
SECONDS = {"125m": (3, 8), "350m": (4, 10), "1.3b": (7, 14), "mini": (60, 2)}
# bytes that the two sides need at most: for each weight, and besides
BYTES_A_WEIGHT = {"reward": 32, "sft": 32, "ppo": 2 * 40, "sampling": 12}
ACTIVATIONS = 24 * 2**30
# what ours does otherwise where it is its own peer
OWN = {
    "unshared rows": {"shared": False},
    "kernels launched one by one": {"recorded": False},
    "compiled layers": {"compiled": True},
}
UNITS = {"reward": "pairs", "sft": "tokens", "ppo": "episodes", "sampling": "tokens"}


def run(results: Results, shape: str, folder: Path) -> None:
    compare_all(results, shape, COMPARISONS, folder)


def compare_all(results: Results, shape: str, comparisons: list, folder: Path) -> None:
    """A check for each of the comparisons, which are like those of COMPARISONS."""
    torch.set_float32_matmul_precision("high")  # TF32 for what is not bfloat16, on both sides
    rates = {precision: matmul_rate(precision) for precision in ("bf16", "fp32")}
    figures = {f"TFLOP/s, {precision}": rate / 1e12 for precision, rate in rates.items()}
    results.check(f"matrix products ({shape})", 0, lambda: Outcome(figures))
    limit, least = SECONDS[shape]
    for stage, k, peer, precision in comparisons:
        if precision == "fp32" and shape not in ("125m", "mini"):
            continue
        name = f"{stage}, {shape}, K = {k}, {peer or 'alone'}, {precision}"
        short = _too_large(stage, shape)
        if short:
            results.skip(name, short)
            continue
        seconds, rate = min(limit, results.left()), rates["fp32" if precision == "fp32" else "bf16"]
        results.check(name, least, partial(compared, stage, shape, k, peer, precision, seconds, rate, folder))


def _too_large(stage: str, shape: str) -> str | None:
    """Why a comparison does not fit the card's free memory; None: it does, as far as can be told."""
    free_memory()
    free = card_bytes()
    if free is None:
        return None
    weights = model_of(f"facebook/opt-{shape}", "model").parameters
    needed = BYTES_A_WEIGHT[stage] * weights + ACTIVATIONS
    return f"needs about {needed >> 30} GiB, {free >> 30} GiB are free" if needed > free else None


def config_of(shape: str, positions: int = 2048):
    """OPT's configuration of this size without dropout; "mini" is for machines without a card."""
    config = opt_config("facebook/opt-125m" if shape == "mini" else f"facebook/opt-{shape}")
    if shape == "mini":
        config.hidden_size = config.word_embed_proj_dim = 64
        config.num_hidden_layers, config.num_attention_heads, config.ffn_dim, config.vocab_size = (
            2,
            2,
            128,
            512,
        )
    config.dropout = config.attention_dropout = config.layerdrop = 0.0
    config.max_position_embeddings, config.num_labels = positions, 1
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 1, 2, 2
    return config


def compared(stage, shape, k, peer, precision, seconds, rate, folder) -> Outcome:
    """One comparison: rates, their ratio by turn, peaks, share of the matrix-product rate, planned memory."""
    config = config_of(shape)
    posts = (POSTS[stage][k] // (2 if stage == "ppo" and shape == "1.3b" else 1)) if ON_CARD else 3
    batch = random_batch(posts, k, PROMPT, COMPLETIONS, config.vocab_size)
    build = {"reward": ours.Reward, "sft": ours.SFT, "ppo": ours.PPO, "sampling": ours.Sampling}[stage]
    more = {"length": RESPONSE} if stage in ("ppo", "sampling") else {}
    sides = {"ours": partial(build, config, batch, precision, **more)}
    if peer in OWN:
        sides[peer] = partial(build, config, batch, precision, **OWN[peer], **more)
    elif peer:
        sides[peer] = partial(peers.PEERS[peer, stage], config, batch, precision, folder=folder, **more)
    found = take_turns(sides, seconds)
    figures = {"unit": UNITS[stage], "posts": posts, **rates_of(found, unit_count(stage, batch, RESPONSE))}
    needed = needed_flops(stage, config, batch, RESPONSE)
    figures["share of the matrix-product rate"] = needed / median(found["ours"].seconds) / rate
    figures["planned GiB"] = planned_gib(stage, shape, k, posts, precision)
    wrong = None
    if peer and peer.startswith("trl") and "packed" not in peer:  # packed rows of OPT see each other
        first = {name: side.loss for name, side in found.items()}
        figures["first loss"] = first
        if not abs(first["ours"] - first[peer]) <= 0.02 * abs(first[peer]):
            wrong = f"the sides' first losses differ: {first}"
    return Outcome(figures, wrong)


# ------------------------------------------------------------------------------------------------------ turns


class Found:
    """What was measured of a side: seconds of each turn, bytes at rest and at the peak, the first loss."""

    def __init__(self):
        self.seconds, self.rest, self.peak, self.loss = [], 0, 0, None


def take_turns(builders: dict, seconds: float) -> dict[str, Found]:
    """Each side does a step after the other, after one that is not counted, until the seconds are over.

    The seconds begin after the first steps, which load kernels.
    A side's peak is that of its turns without what the other side holds meanwhile.
    """
    found, sides = {}, {}
    try:
        for name, build in builders.items():
            before = allocated()
            found[name], sides[name] = Found(), build()
            sides[name].step()
            found[name].loss = sides[name].first_loss()
            found[name].rest = allocated() - before
        ends = now() + seconds
        for turn in range(MOST_TURNS):
            if turn >= LEAST_TURNS and now() + sum(one.seconds[-1] for one in found.values()) > ends:
                break
            for name, side in sides.items():
                others = allocated() - found[name].rest
                reset_peak()
                began = now()
                side.step()
                found[name].seconds.append(now() - began)
                found[name].peak = max(found[name].peak, peak_since_reset() - others)
    finally:
        for side in sides.values():
            side.close()
    return found


def rates_of(found: dict[str, Found], count: int) -> dict:
    """Units a second of each side; the ratio is that of a turn's times, above 1 where ours is faster."""
    mine = found["ours"]
    figures = {
        "ours": count / median(mine.seconds),
        "turns": len(mine.seconds),
        "ours: peak GiB": gib(mine.peak),
    }
    for name, theirs in found.items():
        if name != "ours":
            ratios = [b / a for a, b in zip(mine.seconds, theirs.seconds, strict=True)]
            figures |= {
                "theirs": count / median(theirs.seconds),
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "theirs: peak GiB": gib(theirs.peak),
            }
    return figures


# ------------------------------------------------------------------------------------------ what it should be


def unit_count(stage: str, batch: Batch, length: int) -> int:
    """What a step works on, in the stage's unit."""
    if stage == "reward":
        return sum(len(group) * (len(group) - 1) // 2 for group in batch.completions)
    if stage == "sft":
        return sum(map(len, batch.prompts)) + sum(len(group[0]) for group in batch.completions)
    episodes = sum(map(len, batch.completions))
    return episodes if stage == "ppo" else episodes * length


def needed_flops(stage: str, config, batch: Batch, length: int) -> int:
    """Floating-point operations that a step needs (planning/flops.py)."""
    size = flops.Size(config.hidden_size, config.num_hidden_layers, config.ffn_dim, config.vocab_size)
    prompts, completions = (
        list(map(len, batch.prompts)),
        [list(map(len, group)) for group in batch.completions],
    )
    k = len(completions[0])
    if stage == "ppo":
        return flops.ppo(size, prompts, k, length, ours.PPO_EPOCHS)
    if stage == "sampling":
        return flops.generation(size, prompts, k, length)
    return {"sft": flops.sft, "reward": flops.reward}[stage](size, prompts, completions)


def planned_gib(stage: str, shape: str, k: int, posts: int, precision: str) -> float | None:
    """What plan_memory.py says of such a step, without the libraries' own share; None: it has no plan."""
    if stage == "sampling" or shape == "mini":
        return None
    setup = Setup(
        f"facebook/opt-{shape}",
        None,
        "separate",
        0,
        1,
        1,
        80 * 2.0**30,
        None,
        posts,
        posts,
        PROMPT,
        RESPONSE if stage == "ppo" else COMPLETIONS[1],
        k,
        precision,
        False,
    )
    planned = plan(stage, choices_of(["none"])[0], setup)
    base = sum(item.bytes for item in planned.items if item.name == "base" and item.place == "device")
    return (planned.device - base) / 2**30
