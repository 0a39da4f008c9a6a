"""Part d: where the time of one training step goes, and what the host waits for in it.

The steps are those of the scripts: `train` of SFT and of the reward stage in the real loop, with random
weights. Only here a step has what the stages add to it: the loop, the check for NaN, the schedule.
"""

import tempfile
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from datasets import Dataset
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

import train_reward
import train_sft
from studies.gpu_checks.device import ON_CARD, gib, now, peak_since_reset, reset_peak
from studies.gpu_checks.ours import PASS_TOKENS, our_model, random_batch
from studies.gpu_checks.peers import small_tokenizer
from studies.gpu_checks.results import Outcome, Results
from studies.gpu_checks.speed import COMPLETIONS, POSTS, PROMPT, config_of
from utils.data.report import DataReport
from utils.loop import Loop
from utils.models import outputs
from utils.models.heads import head_scores
from utils.models.outputs import GroupModel, supervised_outputs
from utils.runs.run import Run

STEPS, WARM = (8, 3) if ON_CARD else (3, 1)  # steps of a run; those before the profile
SHOWN = 25  # kernels
PARTS = ("forward", "head", "optimizer")  # the head is a part of `forward`
STAGES = {"sft": (train_sft, train_sft.SFTStageConfig, supervised_outputs, 1),
          "reward": (train_reward, train_reward.RewardStageConfig, head_scores, 4)}


def run(results: Results, shape: str, folder: Path) -> None:
    torch.set_float32_matmul_precision("high")
    for stage in STAGES:
        name = f"{stage}, {shape}, K = {STAGES[stage][-1]}, where the time goes"
        results.check(name, 8, partial(profiled, stage, shape, folder))


def profiled(stage: str, shape: str, folder: Path) -> Outcome:
    """Time and peak of a step, the waits of the host in it, time of its parts, and its longest kernels.

    The time of the backward pass is what the kernels take beside the other parts. `busy` is the share of a
    step's time in which kernels run; what is missing is the host's. Waits are a fault on a card.
    """
    script, kind, forward, k = STAGES[stage]
    config = config_of(shape)
    posts = POSTS[stage][k] if ON_CARD else 3
    batch = random_batch(posts, k, PROMPT, COMPLETIONS, config.vocab_size)
    module = GroupModel(our_model(config, scalar=stage == "reward"), _marked("forward", forward))
    loop = loop_of(kind, folder, module, posts)
    seconds, waits, steps = [], [], loop.steps
    profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * ON_CARD])

    def watched(batches):
        for number, places in steps(batches):
            if number == WARM:
                reset_peak()
            began = now()
            if number == STEPS:
                profiler.start()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                _warn_of_waits(True)
                yield number, places
                _warn_of_waits(False)
            waits.append([str(one.message) for one in caught if "synchronizing" in str(one.message)])
            seconds.append(now() - began)

    with (mock.patch.object(loop, "steps", watched),
          mock.patch.object(loop, "optimizer_step", _marked("optimizer", loop.optimizer_step)),
          mock.patch.object(outputs, "token_logprobs", _marked("head", outputs.token_logprobs)),
          mock.patch.object(loop, "logs", lambda step: False),
          mock.patch.object(loop, "evaluates", lambda step: False),
          mock.patch.object(loop, "save", lambda: None)):
        script.train(loop, Dataset.from_list(rows_of(stage, batch)), None)
    profiler.stop()
    times, kernels, own = times_of(profiler.key_averages())
    together = sum(getattr(one, own) for one in kernels)
    times["backward"] = together - times["forward"] - times["optimizer"]
    longest = sorted(kernels, key=lambda one: -getattr(one, own))[:SHOWN]
    step, waited = min(seconds[WARM:-1]), waits[-2]
    return Outcome({
        "ms a step": 1e3 * step, "busy": together / 1e6 / step if ON_CARD else None,
        "peak GiB": gib(peak_since_reset()), "waits": waited,
        **{f"{name}: ms": value / 1e3 for name, value in times.items()},
        "kernels: ms, calls": {one.key[:120]: [getattr(one, own) / 1e3, one.count] for one in longest},
    }, f"the host waits {len(waited)} times in a step: {waited[0]}" if waited else None)


def times_of(events) -> tuple[dict[str, float], list, str]:
    """Microseconds of each of PARTS; the events that are kernels; and the attribute with their time.

    On a card a call of torch's has the time of the kernels that it launched, and each kernel has an event of
    its own. A part counts by the former, kernels by the latter. On a CPU a call is its own kernel.
    """
    total, own = (("device_time_total", "self_device_time_total") if ON_CARD else
                  ("cpu_time_total", "self_cpu_time_total"))
    calls = [one for one in events if one.device_type == DeviceType.CPU]
    times = {name: sum(getattr(one, total) for one in calls if one.key == name) for name in PARTS}
    launched = [one for one in events if one.device_type != DeviceType.CPU] if ON_CARD else calls
    return times, [one for one in launched if one.key not in PARTS and getattr(one, own) > 0], own


def _marked(name: str, function):
    def marked(*args, **more):
        with record_function(name):
            return function(*args, **more)

    return marked


def _warn_of_waits(on: bool) -> None:
    if ON_CARD:
        torch.cuda.set_sync_debug_mode("warn" if on else "default")


def loop_of(kind, folder: Path, module, posts: int) -> Loop:
    """A stage's loop around a module, all posts in each step, bfloat16, nothing logged or saved between."""
    config = kind(output_dir=tempfile.mkdtemp(dir=folder), report_to=["none"], learning_rate=1e-5,
                  per_device_batch_size=posts, micro_batch_tokens=PASS_TOKENS, max_steps=STEPS,
                  mixed_precision="bf16", logging_steps=10**6, eval_steps=10**6, save_steps=10**6)
    run = Run(config, config.section, DataReport())
    return Loop(run, module, small_tokenizer(), config.schedule(posts))


def rows_of(stage: str, batch) -> list[dict]:
    """A batch as rows of the stage's data."""
    rows = []
    for prompt, group in zip(batch.prompts, batch.completions, strict=True):
        length = len(prompt) + sum(map(len, group))
        if stage == "sft":
            rows.append({"prompt": prompt, "completion": group[0], "length": length})
        else:
            pairs = [(a, b) for a in range(len(group)) for b in range(a + 1, len(group))]
            rows.append({"prompt": prompt, "completions": group, "pairs": pairs, "length": length})
    return rows
