"""A decoding step can be recorded. On a CPU that is shown by a trace of one step: like a CUDA graph, it holds
as a constant whatever the step took from Python.
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from families import FAMILIES, draw, policy, random_groups
from many_families import tiny
from utils.models import cuda_graphs, generation
from utils.models.cuda_graphs import Replayed

PROMPTS = random_groups([5, 1, 8, 3], [[1]] * 4)[0]
LONG = {"max_new_tokens": 20, "temperature": 1.5}


class Traced:
    """In place of `Replayed`: an ordinary call, a call that is traced, then the trace."""

    replays = 0

    def __init__(self, step, model):
        self.step, self.calls, self.trace = step, 0, None

    def __call__(self):
        self.calls += 1
        if self.calls == 1:
            self.step()
        elif self.calls == 2:
            self.trace = make_fx(self.step)()
        else:
            Traced.replays += 1
            self.trace()


def pace(monkeypatch, *values):
    monkeypatch.setattr(generation, "PACE", generation._Pace(*values))


@pytest.mark.parametrize("values", [(1, 1, 1, False), (2, 6, 16, False), (8, 64, 16, False)])
def test_the_length_of_a_stretch_changes_no_sample(values, monkeypatch):
    model = policy("llama-gqa")
    expected = draw(model, PROMPTS, **LONG)
    pace(monkeypatch, *values)
    found = draw(model, PROMPTS, **LONG)
    assert found.responses == expected.responses and found.ended == expected.ended
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("family", ["opt", "llama-gqa", "gemma3"])
def test_a_replayed_step_is_the_next_step(family, monkeypatch):
    """Over two stretches, the second with fewer rows. Gemma 3 has a window in one of its layers."""
    model = policy(family) if family in FAMILIES else tiny(family)
    prompts = PROMPTS + random_groups([7, 2], [[1]] * 2, seed=3)[0]
    settings = {"k": 2, "max_new_tokens": 16, "temperature": 1.5}
    tokens = sum(draw(model, prompts, eos_id=-1, **settings).responses, [])
    settings["eos_id"] = max(set(tokens), key=tokens.count)
    expected = draw(model, prompts, **settings)
    monkeypatch.setattr(generation, "Replayed", Traced)
    monkeypatch.setattr(Traced, "replays", 0)
    pace(monkeypatch, 2, 6, 16, True)
    found = draw(model, prompts, **settings)
    assert Traced.replays >= 6
    assert found.responses == expected.responses and found.ended == expected.ended
    for one, other in zip(found.logprobs, expected.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


class Graph:
    """In place of torch's: while it is recording, a step is kept and not run."""

    recording = None

    def __init__(self):
        self.steps = []

    def capture_begin(self, pool, capture_error_mode):
        Graph.recording = self

    def capture_end(self):
        Graph.recording = None

    def pool(self):
        return id(self)

    def replay(self):
        for step in self.steps:
            step()


@pytest.fixture
def card(monkeypatch):
    """torch.cuda as far as `Replayed` uses it; returns the modes of its debugging that were set."""
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(cuda_graphs, "_side_stream", nullcontext)
    return modes


def counting(card, fails_in=None):
    """A step that counts how often it ran, and its counts. `fails_in` "error": where it must not wait;
    "recording": while it is recorded.
    """
    count = [0]

    def run():
        count[0] += 1

    def step():
        if fails_in == card[-1] or (fails_in == "recording" and Graph.recording):
            raise RuntimeError("it waits for the device\nand more")
        if Graph.recording:
            Graph.recording.steps.append(run)
        else:
            run()

    return step, count


@pytest.mark.parametrize("fails_in", [None, "error", "recording"])
def test_each_call_makes_one_step_recorded_or_not(fails_in, card):
    model = torch.nn.Linear(1, 1)
    for turn in range(2):
        step, count = counting(card, fails_in)
        replayed = Replayed(step, model)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for number in range(1, 6):
                replayed()
                assert count[0] == number and card[-1] == "default" and Graph.recording is None
        assert (replayed.graph is None) == (fails_in is not None)
        assert len(said) == (fails_in is not None and turn == 0), "a model is tried and told of once"
        assert all("Linear cannot be recorded as a CUDA graph (it waits for the device)" in str(one.message)
                   for one in said)
