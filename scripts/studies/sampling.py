"""Tokens a CPU second of sampling: ours, `generate`, `generate_batch`, and vLLM where it is installed.

    OMP_NUM_THREADS=1 python scripts/studies/sampling.py
    OMP_NUM_THREADS=1 .venv-vllm/bin/python scripts/studies/sampling.py --model facebook/opt-125m

Float32 on one thread. CPU seconds of the process, so that other jobs on the machine count little; the least
of two turns after one that is not counted. Each row is printed as it comes. Weights are random: a model's
config.json says its shape, and all responses have the same length.
"""

import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import find_input, key
from utils.launch import read_config, start


@dataclass
class SamplingConfig:
    """What is sampled, and how much."""

    model: str = key("assets/opt-mini", "Folder with a config.json, or the hub's name of an OPT.")
    posts: int = key(2, "Prompts of a turn.", low=1, high=1000)
    prompt: int = key(300, "Tokens of a prompt.", unit="tokens", low=1, high=450)
    response: int = key(40, "Tokens of a response.", unit="tokens", low=1, high=50)
    k: list[int] = key([1, 4, 16], "Responses to each prompt.")


def rows(config: SamplingConfig) -> Iterator[tuple[int, str, float]]:
    """K, the side's name, and its tokens a CPU second."""
    from transformers import AutoConfig

    from planning.architectures import OPT, opt_config
    from studies.gpu_checks import ours, peers

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    model = opt_config(config.model) if config.model in OPT else (
        AutoConfig.from_pretrained(find_input(config.model, "model")))
    kinds = {"ours": ours.Sampling, "generate": peers.Generate, "generate_batch": peers.GenerateBatch}
    if find_spec("vllm"):
        kinds["vllm"] = peers.Vllm
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
