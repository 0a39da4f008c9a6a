"""The benchmark: its count of operations, its statistics, its refusals, and a short run of all of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from families import CONFIGS, PAD, random_groups
from planning import flops
from studies import benchmark
from studies.benchmarks import clock
from studies.benchmarks.cost import BASE, MODEL, Point, settings
from studies.benchmarks.pairing import Turn, figures, product_rate, refuse_unequal_work
from studies.benchmarks.plan import GOALS, KS, PEERS, POSTS, REPETITIONS, comparisons
from studies.benchmarks.posts import COMPLETION_QUANTILES, PROMPT_QUANTILES, batch_of, synthetic_posts
from studies.benchmarks.report import plot_costs, print_profile
from studies.benchmarks.shapes import SHAPES, config_of
from studies.benchmarks.tasks import all_pairs, whole_share
from utils.config import UserError

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------- operations


def test_operations_by_hand():
    """hidden 2, one layer, MLP 3, 5 words; a prompt of 2 tokens with completions of 1 and 2 tokens."""
    size = flops.Size(2, 1, 3, 5)
    # sees: prompt 1 + 2, first completion 3, second 3 + 4
    assert flops.seen(2, [1, 2]) == 13
    # weights: q, k, v, o 2 x 2 each, MLP 2 x 3 twice: 28; 5 tokens; scores and sums over 13 pairs, 2 x 2
    # numbers each, 2 FLOPs
    bare = 2 * 28 * 5 + 2 * 2 * 2 * 13
    words = 2 * 2 * 5 * 3  # at 3 response tokens
    assert flops.groups_trunk(size, [2], [[1, 2]]) == bare
    assert flops.sft(size, [2], [[1, 2]]) == 3 * (bare + words)
    assert flops.reward(size, [2], [[1, 2]]) == 3 * bare
    # 2 samples of 2 tokens: prompt 2 and one token of each fed, which sees 3; logits after the prompt and
    # after each
    sampling = 2 * 28 * 4 + 2 * 2 * 2 * (3 + 2 * 3) + 2 * 2 * 5 * 3
    assert flops.generation(size, [2], 2, 2) == sampling
    whole = 2 * 28 * 6 + 2 * 2 * 2 * (3 + 2 * (3 + 4))
    policy = whole + 2 * 2 * 5 * 4
    assert flops.ppo(size, [2], 2, 2, 4) == sampling + policy + 2 * whole + 4 * 3 * (policy + whole)


@pytest.mark.parametrize("train", [False, True])
def test_operations_as_torch_counts_them(train):
    """One ordinary row. Torch counts attention over all pairs, and the head at every position."""
    config = CONFIGS["opt"]()
    size = flops.Size(config.hidden_size, config.num_hidden_layers, config.ffn_dim, config.vocab_size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train(train)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.randint(3, 30, (1, 9))).logits
        if train:
            logits.sum().backward()
    ours = flops.groups_policy(size, [4], [[5]])
    unseen = 9 * 9 - flops.seen(4, [5])
    ours += 4 * size.hidden * size.layers * unseen + flops.head(size, 4)
    assert counter.get_total_flops() == ours * (flops.TRAIN if train else 1)


def test_the_shapes_have_the_parameters_that_they_are_named_after():
    with torch.device("meta"):
        count = {name: sum(p.numel()
                           for p in AutoModelForCausalLM.from_config(config_of(**shape)).parameters())
                 for name, shape in SHAPES.items()}
    assert count["125m"] == 125_239_296  # the published OPT-125m
    assert 30e6 < count["30m"] < 31e6 and 11e6 < count["mini"] < 12e6


# ------------------------------------------------------------------------------------------------- statistics


def turn(ours, theirs, rate=1e9, memory=(100, 400), **more):
    return Turn({"seconds": ours, "memory": memory[0], "pairs": 6, **more},
                {"seconds": theirs, "memory": memory[1], "pairs": 6, **more}, rate)


def test_the_ratio_is_that_of_turns_taken_together():
    """The second turn fell into a slow minute for both: its ratio is as good as the others, its speed is not.
    """
    found = figures([turn(1, 4), turn(10, 50), turn(2, 6)], "pairs", 3 * 10**8)
    assert (found.ratio, found.ratio_low, found.ratio_high) == (4, 3, 5)
    assert (found.ours, found.theirs) == (3, 1)
    assert found.memory_ratio == 0.25
    assert found.utilisation == pytest.approx(0.15)


def test_memory_is_that_of_the_last_turn_for_a_peak_only_grows():
    assert figures([turn(1, 1), turn(1, 1, memory=(300, 400))], "pairs", 1).memory_ratio == 0.75


def test_the_product_rate_is_a_rate():
    assert 1e8 < product_rate() < 1e16


def test_the_time_in_a_function_is_not_that_of_its_caller_too(monkeypatch):
    """Hands of a made-up clock: outer runs 10 s, of which inner 3 s twice; 5 s belong to nobody."""
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    class Work:
        def inner(self):
            now[0] += 3

        def outer(self):
            now[0] += 4
            self.inner()
            self.inner()

        def failing(self):
            now[0] += 1
            raise ValueError

    work, watch, stage = Work(), clock.Clock(), ["scoring"]
    watch.watch(work, "inner", lambda: stage[0])
    watch.watch(work, "outer", "update")
    watch.watch(work, "failing", "data")
    work.outer()
    now[0] += 5
    assert watch.take(15.0) == {"generation": 0, "scoring": 6, "update": 4, "data": 0, "other": 5}
    stage[0] = "generation"
    work.inner()
    with pytest.raises(ValueError):
        work.failing()
    work.inner()
    assert watch.take(7.0) == {"generation": 6, "scoring": 0, "update": 0, "data": 1, "other": 0}


# -------------------------------------------------------------------------------------------------- same work


@pytest.mark.parametrize(("ours", "theirs"), [
    ({"pairs": 6}, {"pairs": 7}), ({"pairs": 6, "tokens": 48}, {"pairs": 6, "tokens": 47}),
    ({"pairs": 6}, {}), ({}, {}),
    ({"pairs": 6, "scored": True}, {"pairs": 6, "scored": False}),
    ({"pairs": 6, "loss": 0.7}, {"pairs": 6, "loss": 0.7002}), ({"pairs": 6, "loss": float("nan")},
                                                                {"pairs": 6, "loss": 0.7}),
])
def test_unequal_work_is_no_row(ours, theirs):
    sides = [{"seconds": 1.0, "memory": 1.0, **side} for side in (ours, theirs)]
    with pytest.raises(UserError, match="the same work|losses"):
        refuse_unequal_work(Turn(*sides, 1.0), compare_losses="loss" in ours)


@pytest.mark.parametrize(("loss", "compare"), [(0.70001, True), (0.9, False)])
def test_equal_work_is_a_row(loss, compare):
    """In other seconds and memory. A loss is not compared where the peer computes another."""
    sides = ({"seconds": 1.0, "memory": 2.0, "pairs": 6, "loss": 0.7},
             {"seconds": 9.0, "memory": 3.0, "pairs": 6, "loss": loss})
    refuse_unequal_work(Turn(*sides, 1.0), compare_losses=compare)


def test_micro_batches_of_one_size():
    assert [whole_share(*pair) for pair in ((36, 8), (48, 8), (7, 8), (11, 8))] == [6, 8, 7, 1]
    assert all_pairs(3) == [(0, 1), (0, 2), (1, 2)]


# ------------------------------------------------------------------------------------------------ posts, plan


def test_synthetic_posts_have_the_lengths_of_real_ones():
    posts = synthetic_posts(4000, seed=0)
    for lengths, quantiles in zip(zip(*[(len(p), len(c)) for p, c in posts], strict=True),
                                  (PROMPT_QUANTILES, COMPLETION_QUANTILES), strict=True):
        found = sorted(lengths)
        assert found[0] >= quantiles[0] and found[-1] <= quantiles[-1]
        assert found[len(found) // 2] == pytest.approx(quantiles[10], rel=0.03)
        assert found[len(found) // 4] == pytest.approx(quantiles[5], rel=0.03)


def test_a_batch_stands_for_all_posts():
    """One post of each share: with as many posts as there are, the batch is all of them."""
    prompts, completions = random_groups([5, 9, 2, 7], [[3], [4], [2], [3]])
    posts = [(prompt, group[0]) for prompt, group in zip(prompts, completions, strict=True)]
    batch = batch_of(posts, 4, 2)
    assert sorted(batch.prompts) == sorted(prompts)
    assert ([(p, c[0]) for p, c in zip(batch.prompts, batch.completions, strict=True) if (p, c[0]) in posts]
            == \
        list(zip(batch.prompts, (group[0] for group in batch.completions), strict=True)))
    assert all(len(group) == 2 for group in batch.completions)
    [middle] = batch_of(posts[:3], 1, 1).prompts
    assert len(middle) == 5
    fixed = batch_of(posts, 2, 2, prompt_length=11, completion_length=6)
    assert fixed.lengths == ([11, 11], [[6, 6], [6, 6]])
    [short], [long] = batch_of([([3, 4, 5], [6])], 1, 1,
                               prompt_length=2).prompts, batch_of([([3, 4, 5], [6])], 1, 1, 7).prompts
    assert (short, long) == ([3, 4], [3, 4, 5, 3, 4, 5, 3])
    assert PAD not in {token for prompt in batch.prompts for token in prompt}


def test_every_comparison_has_its_amount_of_work():
    for shape in SHAPES:
        assert {(stage, k) for stage, ks in KS.items() for k in ks} == POSTS[shape].keys()
        assert shape in REPETITIONS
    plan = comparisons(list(PEERS), list(SHAPES), [], [], None, quick=False)
    assert {(c.stage, c.peer, c.k) for c in plan} >= GOALS.keys()
    assert len(plan) == 3 * 9 == len(set(plan))
    assert ({(c.goal, c.shape) for c in plan if c.stage == "ppo" and c.k == 4}
            == {(6.0, "mini"), (None, "30m"), (4.0, "125m")})
    quick = comparisons(list(PEERS), list(SHAPES), [], [], None, quick=True)
    assert {c.shape for c in quick} == {"mini"} and {(c.stage, c.k) for c in quick} == {
        ("sft", 1), ("reward", 4), ("ppo", 4), ("generation", 4)}


def test_a_sweep_changes_one_quantity():
    found = settings("reward", ["mini", "30m"])
    for quantity, x, shape, values in found:
        changed = {name: value for name, value in values.items() if value != BASE[name]}
        assert changed in ({}, {quantity: x})
        assert shape == "mini" or (quantity == MODEL and not changed)
    assert {x for quantity, x, *_ in found if quantity == "K"} == {2, 4, 8}  # one completion has no pair
    # layers: 4 of 12 x 192^2 weights, 6 of 12 x 384^2
    assert [x for quantity, x, *_ in found if quantity == MODEL] == [1_769_472, 10_616_832]
    assert {quantity for quantity, *_ in settings("sft", ["mini"])} == {"prompt [tokens]", "posts"}
    assert all(values["K"] == 1 for *_, values in settings("sft", ["mini"]))


def test_the_figure_of_costs(tmp_path):
    """A stage that was not measured against a quantity leaves its panel empty."""
    points = ([Point("sft", "posts", x, 0.1 * x, 900 + x, 0.05 * x) for x in (4, 2)]
              + [Point("reward", "K", 2, 1.0, 900, 0.5)])
    plot_costs(tmp_path / "costs.png", points)
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_of_a_profile(capsys):
    """Means over the turns and shares of the whole, for each side: by hand 2 s and 4 s of sampling are 3 of 4
    s.
    """
    [plan] = comparisons(["generation"], ["mini"], [], [4], 2, quick=False)
    parts = [dict.fromkeys(clock.PARTS, 0.0) | {"generation": seconds, "other": 1.0}
             for seconds in (2.0, 4.0)]
    print_profile([plan], [[turn(3, 9, parts=part) for part in parts]])
    shown = capsys.readouterr().out
    assert shown.count("3.00 (75%)") == shown.count("1.00 (25%)") == 2 and "4.00" in shown


# -------------------------------------------------------------------------------------------------- all of it


def run(*words):
    script = ROOT / "scripts" / "studies" / "benchmark.py"
    return subprocess.run([sys.executable, script, *map(str, words)], capture_output=True, text=True,
                          check=False)


@pytest.mark.parametrize("words", [["--stage", "dpo"], ["--shape", "large"], ["--peer", "DPOTrainer"],
                                   ["--k", "3"],
                                   ["--output", "rows.txt"], ["--stage", "reward", "--k", "1"],
                                   ["--output", "rows.json", "--cost"], ["--figure", "a.png", "--profile"],
                                   ["--processes", "999"]])
def test_mistakes(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *words])
    with pytest.raises(SystemExit) as left:
        benchmark.start(benchmark.main, benchmark.read_config(benchmark.BenchmarkConfig, None, ""))
    assert left.value.code == 2
    error = capsys.readouterr().err
    named = [word.removeprefix("--") for word in words if word in ("--stage", "--shape", "--peer", "--k",
                                                                   "--output", "--figure",
                                                            "--processes")]
    assert error.startswith(f"error: {named[-1]}: ") and error.count("\n") == 1


@pytest.mark.slow
def test_a_row_from_outside(tmp_path):
    done = run("--stage", "reward", "--shape", "mini", "--k", 2, "--repetitions", 1, "--output",
               tmp_path / "rows.json",
               "--figure", tmp_path / "ratios.png")
    assert done.returncode == 0, done.stderr
    assert "RewardTrainer" in done.stdout and "torch" in done.stdout
    [row] = json.loads((tmp_path / "rows.json").read_text())
    assert list(row) == ["stage", "shape", "k", "peer", "unit", "ours", "theirs", "ratio", "ratio_low",
                         "ratio_high",
                         "memory_ratio", "utilisation"]
    assert ((row["stage"], row["shape"], row["k"], row["peer"], row["unit"])
            == ("reward", "mini", 2, "RewardTrainer", "pairs"))
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == pytest.approx(row["ours"] / row["theirs"])
    assert 0 < row["utilisation"] < 1.2 and row["memory_ratio"] > 0
    assert (tmp_path / "ratios.png").read_bytes().startswith(b"\x89PNG")
