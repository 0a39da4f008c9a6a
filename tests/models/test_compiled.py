"""Compiled layers compute the same, and as few of them are compiled as the module says.

What is compiled is counted with a compiler that leaves everything as it is. The real one runs where there is
one (g++ on a CPU).
"""

import copy
import shutil
from functools import partial
from unittest import mock

import pytest
import torch
from datasets import Dataset

import train_sft
from families import CONFIGS, FAMILIES, PAD, draw, policy, random_groups
from loops import epoch_loop
from utils.errors import UserError
from utils.models import compiled
from utils.models.compiled import Cost, compile_layers, layers_of
from utils.models.loading import in_blocks, trainable, without_dropout
from utils.models.outputs import response_logprobs
from utils.models.prompt_groups import pack
from utils.stage_keys import StageConfig

# rows and lengths of a run: several rows, one row, one completion a row, short and long ones
SIZES = [([20, 9], [[3, 5], [4, 4]]), ([30, 12, 14], [[3, 5], [4, 4], [1, 2]]), ([25], [[3, 5, 9]]),
         ([18], [[30]]), ([40, 37, 5], [[3], [5], [2]]), ([40, 37, 35, 30, 20], [[3]] * 5)]


@pytest.fixture
def graphs(monkeypatch):
    """What was compiled so far, by a compiler that leaves it as it is."""
    found = []

    def compiler(graph, inputs):
        found.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    monkeypatch.setattr(compiled, "refuse_without_compiler", lambda device: None)
    yield found
    torch.compiler.reset()


def measured(model, groups, outputs):
    """Outputs and the gradients of all weights, as a list."""
    model.zero_grad()
    found = outputs(model, groups)
    found.square().sum().backward()
    return [found.detach(), *(weight.grad.clone() for weight in model.parameters())]


def trained(family):
    return without_dropout(in_blocks(policy(family))).train()


@pytest.mark.parametrize("family", ["opt", pytest.param("llama-gqa", marks=pytest.mark.slow)])
def test_what_is_compiled_does_not_grow_with_lengths_and_rows(family, graphs):
    """Two parts of a layer, in front of attention and behind it; once more for a single row."""
    plain, model = trained(family), trained(family)
    compile_layers(model)
    counts = []
    for sizes in SIZES:
        groups = pack(*random_groups(*sizes), PAD)
        for x, y in zip(*(measured(one, groups, partial(response_logprobs, temperature=0.7))
                          for one in (plain, model)), strict=True):
            torch.testing.assert_close(x, y)
        counts.append(len(graphs))
    several, single = counts[0], counts[2]
    assert counts == [several] * 2 + [single] * 4 and single == 2 * several > 0


@pytest.mark.slow
def test_layers_share_what_is_compiled(graphs, monkeypatch):
    """Of four layers as much is compiled as of two."""
    counts = []
    for layers in (2, 4):
        torch.compiler.reset()
        graphs.clear()
        config = CONFIGS["opt"]()
        config.num_hidden_layers = layers
        monkeypatch.setitem(CONFIGS, "opt", lambda config=config: config)
        model = trained("opt")
        compile_layers(model)
        assert len(layers_of(model)) == layers
        measured(model, pack(*random_groups(*SIZES[0]), PAD), partial(response_logprobs, temperature=1.0))
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0


def test_sampling_a_copy_and_what_is_saved_are_as_without(graphs):
    plain, model = in_blocks(policy("opt")), in_blocks(policy("opt"))
    compile_layers(model)
    prompts = random_groups([5, 3], [[1]] * 2)[0]
    assert draw(model, prompts) == draw(plain, prompts)
    assert model.state_dict().keys() == plain.state_dict().keys()
    twin = copy.deepcopy(model)
    response_logprobs(twin, pack(*random_groups(*SIZES[0]), PAD), 1.0)
    assert graphs == []
    response_logprobs(model, pack(*random_groups(*SIZES[0]), PAD), 1.0)
    assert graphs


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_the_real_compiler_gives_the_same_outputs_and_gradients():
    """Of two lengths of several rows: more graphs would take it a minute."""
    torch.compiler.reset()
    plain, model = trained("opt"), trained("opt")
    compile_layers(model)
    for sizes in SIZES[:2]:
        groups = pack(*random_groups(*sizes), PAD)
        for x, y in zip(*(measured(one, groups, partial(response_logprobs, temperature=0.7))
                          for one in (plain, model)), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_a_stage_says_what_compiling_costs(graphs, tmp_path):
    rows = [{"prompt": prompt, "completion": group[0], "length": len(prompt) + len(group[0])}
            for prompt, group in zip(*random_groups(*SIZES[1]), strict=True)]
    config = train_sft.SFTStageConfig(
        output_dir=str(tmp_path), compile_trunk=True, max_steps=4, logging_steps=99, eval_steps=99)
    model = trainable(without_dropout(in_blocks(policy("opt"))), config)
    loop = epoch_loop(config, model, len(rows))
    with mock.patch.object(loop, "evaluates", lambda step: False):
        train_sft.train(loop, Dataset.from_list(rows), None)
    log = (loop.run.folder / "train.log").read_text()
    assert log.count("compile_trunk: compiling took") == 1 and graphs


def test_every_tested_family_has_marked_layers():
    assert {family: len(layers_of(policy(family))) for family in FAMILIES} == dict.fromkeys(FAMILIES, 2)


def test_a_model_without_marked_layers_and_a_machine_without_a_compiler_are_refused(monkeypatch):
    with pytest.raises(UserError, match="^compile_trunk: Linear has no layers"):
        monkeypatch.setattr(compiled, "trunk", lambda model: model)
        compile_layers(torch.nn.Linear(1, 1))

    def broken(function):
        raise RuntimeError("no working C++ compiler was found")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UserError, match=r"does not work on this machine \(RuntimeError: no working C\+\+"):
        compiled.refuse_without_compiler(torch.device("cpu"))


@pytest.mark.parametrize("other", [{"deepspeed": "zero2.json"}, {"load_in_4bit": True, "lora_rank": 4},
                                   {"gradient_checkpointing": True}])
def test_it_does_not_go_together_with(other):
    StageConfig(**other)
    with pytest.raises(UserError, match=f"^compile_trunk: it does not go together with {[*other][0]}"):
        StageConfig(compile_trunk=True, **other)


def test_the_cost_is_said_once(monkeypatch):
    """Steps of 10, 5 and 2 seconds: the first two took 8 and 3 longer."""
    clock, lines = iter([0.0, 10.0, 20.0, 25.0, 30.0, 32.0]), []
    monkeypatch.setattr(compiled.time, "perf_counter", lambda: next(clock))
    cost = Cost(lines.append)
    for _ in range(5):
        with cost.step():
            pass
    assert lines == ["compile_trunk: compiling took about 11 s (10.00, 5.00 s of the first steps, 2.00 s of "
                     "the next)"]
