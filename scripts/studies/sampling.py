"""Tokens a CPU second of sampling with the demo's base model: ours, `generate` and `generate_batch`.

    OMP_NUM_THREADS=1 python scripts/studies/sampling.py

Float32 on one thread. CPU seconds of the process, so that other jobs on the machine count little; the least
of two turns after one that is not counted. Each row is printed as it comes.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import key
from utils.launch import read_config, start
from utils.paths import PROJECT


@dataclass
class SamplingConfig:
    """How much is sampled."""

    posts: int = key(2, "Prompts of a turn.", low=1, high=1000)
    prompt: int = key(300, "Tokens of a prompt.", unit="tokens", low=1, high=450)
    response: int = key(40, "Tokens of a response.", unit="tokens", low=1, high=50)
    k: list[int] = key([1, 4, 16], "Responses to each prompt.")


def rows(config: SamplingConfig) -> Iterator[tuple[int, str, float]]:
    """K, the side's name, and its tokens a CPU second."""
    from transformers import AutoConfig

    from studies.gpu_checks import ours, peers

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = AutoConfig.from_pretrained(PROJECT / "assets" / "opt-mini")
    kinds = {"ours": ours.Sampling, "generate": peers.Generate, "generate_batch": peers.GenerateBatch}
    for k in config.k:
        batch = ours.random_batch(config.posts, k, config.prompt, (1, 1), model.vocab_size)
        for name, kind in kinds.items():
            more = {"folder": None} if name != "ours" else {}
            side, seconds = kind(model, batch, "fp32", length=config.response, **more), []
            for _ in range(3):
                began = time.process_time()
                side.step()
                seconds.append(time.process_time() - began)
            yield k, name, config.posts * k * config.response / min(seconds[1:])


def main(config: SamplingConfig) -> None:
    for k, name, rate in rows(config):
        print(f"K = {k}, {name}: {rate:.0f} tokens a CPU second", flush=True)


if __name__ == "__main__":
    start(main, read_config(SamplingConfig, None, __doc__))
