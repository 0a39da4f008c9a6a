"""On a GPU the host hands kernels to the device and must not wait for their results: a step of a stage asks
for none, but for what is logged.

Counted on a CPU, through the stages' own `train`: operations that bring a number from the device to the host.
"""

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

import train_ppo
import train_reward
import train_sft
from families import EOS, policy, random_groups, scalar_model
from loops import epoch_loop, ppo_loop, rolled_out, save_parents
from utils.models.loading import without_dropout

# operations whose result or whose shape depends on values
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique_consecutive",
           "_unique2", "unique_dim", "repeat_interleave", "bincount", "allclose"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # these too, with a boolean index


class Counted(TorchDispatchMode):
    """What the host would have waited for, by name."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = name in INDEXING and any(one is not None and one.dtype == torch.bool for one in args[1])
        if masks or (name in WAITING and function._schema.name != "aten::repeat_interleave.self_int"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def lists(monkeypatch):
    """Tensors that became lists or numbers of Python, which is no operation to torch."""
    made = []
    for name in ("tolist", "__bool__", "__float__", "__int__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name,
                            lambda self, name=name, real=real: (made.append(name), real(self))[1])
    return made


PROMPTS, COMPLETIONS = random_groups([5, 1, 8, 3, 6, 2], [[2, 3], [7, 1], [4, 2], [1, 5], [2, 2], [3, 1]])
KEYS = {"per_device_batch_size": 4, "max_steps": 3, "micro_batch_tokens": 20, "logging_steps": 99,
        "eval_steps": 99, "save_steps": 99}


def steps_of_sft(folder, **keys):
    rows = [{"prompt": p, "completion": [*c[0], EOS], "length": len(p) + len(c[0]) + 1}
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    loop = epoch_loop(train_sft.SFTStageConfig(output_dir=str(folder), **KEYS, **keys),
                      without_dropout(policy("opt")), len(rows))
    return loop, lambda: train_sft.train(loop, Dataset.from_list(rows), None)


def steps_of_reward(folder, **keys):
    rows = [{"prompt": p, "completions": c, "pairs": [(0, 1)], "length": len(p) + sum(map(len, c))}
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    loop = epoch_loop(train_reward.RewardStageConfig(output_dir=str(folder), **KEYS, **keys),
                      scalar_model("opt"), len(rows))
    return loop, lambda: train_reward.train(loop, Dataset.from_list(rows), None)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("stage", [steps_of_sft, steps_of_reward])
def test_a_step_waits_for_nothing(stage, precision, tmp_path, monkeypatch, lists):
    loop, train = stage(tmp_path, mixed_precision=precision)
    parts, waited, counted = [], [], Counted()
    optimizer_step, backward = loop.optimizer_step, loop.backward
    steps = loop.steps

    def watched(batches):  # the body of each step, from its batch to the end of it
        for item in steps(batches):
            lists.clear()
            with counted:
                yield item
            waited.append([*counted.found, *lists])
            counted.found.clear()

    monkeypatch.setattr(loop, "steps", watched)
    monkeypatch.setattr(loop, "backward", lambda *args: (parts.append(1), backward(*args)))
    monkeypatch.setattr(loop, "optimizer_step", lambda: (parts.append(0), optimizer_step()))
    monkeypatch.setattr(loop, "logs", lambda step: False)
    monkeypatch.setattr(loop, "evaluates", lambda step: False)
    train()
    assert waited == [[], [], []] and parts.count(0) == 3 and parts.count(1) > 3


@pytest.mark.parametrize(("keys", "readings", "counters"), [
    ({}, 1, 0), ({"value_model": "shared"}, 1, 0), ({"target_kl": 1e6}, 3, 0), ({"ema_decay": 0.5}, 1, 8)])
def test_the_optimizer_steps_of_an_update_wait_for_nothing(keys, readings, counters, tmp_path, monkeypatch,
                                                           lists):
    """Four steps; the figures are read once at the end. target_kl needs its figure after each of two passes;
    torch's average looks twice at its own counter in each step.
    """
    config = train_ppo.PPOStageConfig(
        **save_parents(tmp_path), output_dir=str(tmp_path), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=4, responses_per_prompt=2, total_episodes=8, ppo_epochs=2, num_minibatches=2,
        per_device_batch_size=2, **keys)
    loop, models = ppo_loop(config)
    made, counted = rolled_out(loop, models), Counted()
    means = train_ppo.TokenSums.means
    read = []
    monkeypatch.setattr(train_ppo.TokenSums, "means", lambda self: (read.append(1), means(self))[1])
    lists.clear()
    with counted:
        train_ppo.optimise(loop, models, *made, None)
    assert len(read) == readings
    # each reading is two lists, the sums and the maxima; the gradient's norm is logged once
    assert counted.found == ["_local_scalar_dense"] * (counters + 1)
    assert sorted(lists) == ["__bool__"] * counters + ["__float__"] + ["tolist"] * 2 * readings


def test_what_would_wait_is_counted(lists):
    x = torch.arange(3.0)
    with Counted() as counted:
        x[x > 1], x.masked_select(x > 1), x.nonzero(), x.sum().item(), x[torch.tensor([1])]
        x[x > 1] = 0
        bool(x.isfinite().all()), x.tolist()
    assert counted.found[:5] == ["index", "masked_select", "nonzero", "_local_scalar_dense", "index_put_"]
    assert lists == ["__bool__", "tolist"]
