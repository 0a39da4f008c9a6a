"""The check of a card: it finds what is wrong and says what it skipped; each part runs without a card."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from studies import gpu_check
from studies.gpu_check import CheckConfig, Job, Phase, Running, phases_of, refuse_unknown, run_phases
from studies.gpu_checks import equalities, kernels, ours, resume, speed, stages, where
from studies.gpu_checks.report import markdown
from studies.gpu_checks.results import Outcome, Results
from utils.config import UserError
from utils.models import flex, lm_head, outputs
from utils.runs.records import read_objects

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "studies" / "gpu_check.py"

# ------------------------------------------------------------------------------- what is wrong is found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_completions_that_see_each_other_are_found(precision, monkeypatch):
    real = outputs.branches

    def without_segments(groups):
        found = real(groups)
        return replace(found, branch=found.group)

    monkeypatch.setattr(outputs, "branches", without_segments)
    wrong = equalities.prompt_groups("OPT", precision).wrong
    for name in ("log-probs", "gradients", "scores", "values", "value_gradients"):
        assert f"{name}, K = 4" in wrong and f"{name}, K = 1" not in wrong


def test_flexattention_that_is_not_used_is_found(monkeypatch):
    """Also where its fault was found, and said, before."""
    monkeypatch.setattr(flex, "_kernels", {})
    monkeypatch.setattr(flex, "_fault", lambda *args: "its kernel is 10% off")
    assert kernels.attention("FlexAttention", 300, "fp32").wrong.startswith("FlexAttention is not used (its")
    assert kernels.attention("FlexAttention", 300, "fp32").wrong == "FlexAttention is not used"


@pytest.mark.parametrize("kind", ["FlexAttention", "causal kernel"])
def test_attention_that_is_scaled_otherwise_is_found(kind, monkeypatch):
    real = kernels.AttentionInterface()["sdpa"]
    other = kernels.AttentionInterface()[kernels.CAUSAL_BLOCKS]

    def scaled(*args, **more):
        return other(*args, **{**more, "scaling": 0.3})

    table = {"sdpa": real, kernels.CAUSAL_BLOCKS: scaled}
    monkeypatch.setattr(kernels, "AttentionInterface", lambda: table)
    assert "outputs" in kernels.attention(kind, 300, "fp32").wrong


def test_a_sampler_with_another_temperature_is_found(monkeypatch):
    sample = kernels.sample

    def warmer(*args, **more):
        return sample(*args, **{**more, "temperature": 0.2})

    monkeypatch.setattr(kernels, "sample", warmer)
    assert "first tokens: z is " in kernels.distribution("own").wrong


def test_a_recorded_step_that_is_another_is_found(monkeypatch):
    sample, calls = kernels.sample, []

    def other(*args, **more):
        calls.append(None)
        return sample(*args, **{**more, "temperature": more["temperature"] + (len(calls) == 2) / 10})

    monkeypatch.setattr(kernels, "sample", other)
    assert "log-probs of the same tokens" in kernels.decoding("OPT", "fp32").wrong


def test_pearsons_statistic_by_hand():
    """24 and 16 of 40 words where 20 each are expected, and none of a rare one: (16 + 16) / 20 = 1.6."""
    found = kernels.pearson([0] * 24 + [1] * 16, torch.tensor([0.49995, 0.49995, 0.0001]))
    assert found == pytest.approx((1.6 - 1) / 2**0.5, rel=1e-2)


def test_a_temperature_that_only_sampling_has_is_found(monkeypatch):
    sample = equalities.sample
    monkeypatch.setattr(
        equalities, "sample", lambda *args, **more: sample(*args, **{**more, "temperature": 0.71})
    )
    assert equalities.sampling("GPT-2", "fp32").wrong.startswith("|ratio - 1|")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_with_a_wrong_gradient_is_found(precision, monkeypatch):
    right = lm_head._TokenLogprobs.backward

    def wrong(ctx, *gradients):
        return tuple(None if one is None else 1.1 * one for one in right(ctx, *gradients))

    monkeypatch.setattr(lm_head._TokenLogprobs, "backward", staticmethod(wrong))
    found = equalities.head(precision)
    assert "gradient" in found.wrong and "log-probs" not in found.wrong


def test_attention_that_drops_the_mask_is_found(monkeypatch):
    real = equalities.AttentionInterface()["sdpa"]

    def unmasked(module, query, key, value, mask, **more):
        return real(module, query, key, value, torch.ones_like(mask).tril(), **more)

    monkeypatch.setattr(
        equalities, "AttentionInterface", lambda: {"sdpa": real, equalities.CAUSAL_BLOCKS: unmasked}
    )
    assert "outputs" in equalities.attention(500, "fp32").wrong


def test_sides_that_do_not_train_on_the_same_are_found(tmp_path, monkeypatch):
    """Ours with the order of each pair the other way round."""
    logsigmoid = ours.logsigmoid
    monkeypatch.setattr(ours, "logsigmoid", lambda x: logsigmoid(-x))
    found = speed.compared("reward", "mini", 4, "trl", "fp32", 0, 1e9, tmp_path)
    assert found.wrong.startswith("the sides' first losses differ")


@pytest.mark.parametrize(
    ("stage", "summary"),
    [
        ("sft", {"base_rouge_avg": 0.3, "rouge_avg": 0.4}),
        ("reward", {"accuracy": 0.6}),
        ("ppo", {"gold_before": 0.6, "gold_after": 0.6}),
        ("reward", {"accuracy": float("nan")}),
    ],
)
def test_a_stage_that_learns_nothing_is_found(stage, summary):
    assert "not above" in stages.nothing_learnt(stage, summary)


def test_the_distance_of_weights_by_hand():
    """A tied head that only one of the two has stored is left out."""
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([5.0])}
    assert (
        resume.distance(a, {"x": torch.tensor([1.0, 5.0]), "y": torch.tensor([1.0]), "head": torch.ones(9)})
        == 5
    )


# -------------------------------------------------------------------------------- what is recorded


def test_a_check_that_raises_is_recorded_and_the_next_one_runs(tmp_path):
    results = Results(tmp_path / "rows.jsonl", "a", 60)
    results.check("broken", 0, lambda: [][1])
    results.check("wrong", 0, lambda: Outcome({"off": 2.0}, "off by 2"))
    results.check("right", 0, lambda: Outcome({"off": 0.0}))
    results.check("long", 120, lambda: pytest.fail("there was no time for it"))
    rows = read_objects(tmp_path / "rows.jsonl")
    assert [row["status"] for row in rows] == ["failed", "failed", "passed", "skipped"]
    assert rows[0]["why"].endswith("IndexError: list index out of range")
    assert rows[1]["figures"] == {"off": 2.0} and rows[1]["why"] == "off by 2"
    assert rows[3]["why"].startswith("needs about 120 s, ")


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"name": "whole"}\n{"name": "cut')
    assert read_objects(tmp_path / "rows.jsonl") == [{"name": "whole"}]
    assert read_objects(tmp_path / "none.jsonl") == []


def test_a_job_that_dies_is_a_failed_check(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.PARTS, "no_such_job", "d")
    written = []
    rows = run_phases([Phase([Job("no_such_job")], 0, 60)], tmp_path, time.monotonic() + 60, written.append)
    assert [(row["status"], row["name"]) for row in rows] == [("failed", "job no_such_job")]
    assert rows[0]["why"].endswith("ended with status 1") and "No module named" in rows[0]["why"]
    assert written[-1] == rows


@pytest.mark.parametrize(("short", "status"), [(True, "skipped"), (False, "failed")])
def test_a_job_that_is_late_is_killed(short, status, tmp_path):
    """It is a failure unless the time of the whole check was over."""
    running = Running(Job("equalities"), tmp_path)
    running.go(60, short)
    running.wait(time.monotonic() + 0.2, lambda rows: None)
    assert running.process.returncode == -9
    assert [(row["status"], row["why"].splitlines()[-1]) for row in running.rows()] == [
        (status, "stopped when the time was over")
    ]


def test_jobs_without_time_are_skipped(tmp_path):
    rows = run_phases(
        [Phase([Job("speed", "350m")], 20, 60)], tmp_path, time.monotonic() + 5, lambda rows: None
    )
    assert rows[0]["status"] == "skipped" and rows[0]["why"].startswith("needs about 20 s, ")
    assert not (tmp_path / "speed_350m.log").exists()


def test_what_a_job_has_found_is_written_before_it_ends(tmp_path, monkeypatch):
    """A kill then loses nothing but the check that runs."""
    monkeypatch.setattr(gpu_check, "POLL", 0.05)
    running = Running(Job("equalities"), tmp_path)
    results, written = Results(tmp_path / "equalities.jsonl", "a", 60), []
    results.check("first", 0, lambda: Outcome({"off": 0.0}))

    def on_check(rows):
        assert running.process.poll() is None
        written.append([row["name"] for row in rows])
        if len(rows) == 1:
            results.check("second", 0, lambda: Outcome({"off": 0.0}))
        else:
            running.process.kill()

    running.wait(time.monotonic() + 60, on_check)
    assert written == [["first"], ["first", "second"]]


@pytest.mark.parametrize("on_card", [True, False])
def test_jobs_import_early_but_never_beside_the_first_phase(on_card, tmp_path, monkeypatch):
    events = []

    class Told:
        def __init__(self, job, folder):
            self.job, self.process = job, subprocess.Popen(["sleep", "60"], start_new_session=True)
            events.append(f"start {job.label}")

        def go(self, seconds, short):
            events.append(f"go {self.job.label}, {short}")

        def wait(self, ends, on_check):
            gpu_check.kill_group(self.process)
            events.append(f"end {self.job.label}")

        def rows(self):
            return [{"name": self.job.label}]

    monkeypatch.setattr(gpu_check, "ON_CARD", on_card)
    monkeypatch.setattr(gpu_check, "Running", Told)
    phases = [Phase([Job("a")], 0, 50), Phase([Job("b"), Job("c")], 0, 50), Phase([Job("d")], 0, 5000)]
    rows = run_phases(phases, tmp_path, time.monotonic() + 500, lambda rows: None)
    assert [row["name"] for row in rows] == ["a", "b", "c", "d"]
    first = ["start a", "go a, False", "end a", "start b", "start c"]
    together = ["go b, False", "go c, False", "end b", "end c"]
    last = ["go d, True", "end d"]
    early, late = (["start d"], []) if on_card else ([], ["start d"])
    assert events == [*first, *early, *together, *late, *last]


def test_the_most_valuable_come_first_and_share_the_card_where_nothing_is_timed(monkeypatch):
    monkeypatch.setattr(gpu_check, "ON_CARD", True)
    phases = [[job.label for job in phase.jobs] for phase in phases_of(CheckConfig())]
    assert phases == [
        ["equalities", "kernels", "resume", "engines"],
        ["speed_125m"],
        ["long_prompts"],
        ["sampling_125m"],
        ["speed_1.3b"],
        ["where_1.3b"],
        ["stages"],
        ["sampling_1.3b"],
        ["where_125m"],
        ["speed_350m"],
        ["sampling_350m"],
    ]
    most = sum(phase.most for phase in phases_of(CheckConfig())[:7])
    assert most == 595  # seconds: what a call of ten minutes has, when no job ends before its time
    assert [[job.label for job in phase.jobs] for phase in phases_of(CheckConfig(parts=["c"]))] == [
        ["engines"]
    ]


@pytest.mark.parametrize(
    ("config", "key"), [(CheckConfig(parts=["e"]), "parts"), (CheckConfig(shapes=["2b"]), "shapes")]
)
def test_unknown_names_are_refused(config, key):
    with pytest.raises(UserError, match=f"^{key}: '.*' is unknown; there are: "):
        refuse_unknown(config)


# --------------------------------------------------------------------------------------------- figures


class Counted:
    """A side that takes so many seconds a step."""

    def __init__(self, seconds, loss):
        self.seconds, self.loss, self.steps, self.closed = seconds, loss, 0, False

    def step(self):
        self.steps += 1
        time.sleep(self.seconds)

    def first_loss(self):
        return self.loss

    def close(self):
        self.closed = True


def test_turns_and_their_ratio():
    sides = {"ours": Counted(0.01, 1.0), "theirs": Counted(0.05, 2.0)}
    found = speed.take_turns({name: lambda name=name: sides[name] for name in sides}, 60)
    assert all(
        side.steps == speed.MOST_TURNS + 1 and side.closed for side in sides.values()
    )  # one is not counted
    assert [one.loss for one in found.values()] == [1.0, 2.0]
    figures = speed.rates_of(found, 10)
    assert 3 < figures["lowest"] <= figures["ratio"] <= figures["highest"] < 6
    assert 100 < figures["theirs"] < 200 < figures["ours"] < 1000
    assert figures["ours: peak GiB"] is None  # without a card


def test_time_on_a_card_is_that_of_kernels_and_counts_once(monkeypatch):
    """A call has the time of its kernels, which are events, too; so is a part's stretch on the card."""
    def event(key, kind, total, own):
        return SimpleNamespace(key=key, device_type=kind, device_time_total=total, self_device_time_total=own)

    monkeypatch.setattr(where, "ON_CARD", True)
    cpu, card = where.DeviceType.CPU, where.DeviceType.CUDA
    events = [event("forward", cpu, 7, 0), event("aten::mm", cpu, 7, 7), event("forward", card, 9, 9),
              event("gemm", card, 7, 7), event("adam", card, 2, 2), event("optimizer", cpu, 2, 0)]
    times, kernels, own = where.times_of(events)
    assert times == {"forward": 7, "head": 0, "optimizer": 2}
    assert [(one.key, getattr(one, own)) for one in kernels] == [("gemm", 7), ("adam", 2)]


def test_sides_are_closed_when_one_fails():
    ours_side = Counted(0.0, None)
    with pytest.raises(ZeroDivisionError):
        speed.take_turns({"ours": lambda: ours_side, "theirs": lambda: 1 / 0}, 60)
    assert ours_side.closed


def test_units_and_operations():
    batch = ours.random_batch(2, 3, 5, (4, 4), 100)
    assert [speed.unit_count(stage, batch, 7) for stage in ("reward", "sft", "ppo", "sampling")] == [
        6,
        18,
        6,
        42,
    ]
    config = speed.config_of("125m")
    flops = {
        stage: speed.needed_flops(stage, config, batch, 7) for stage in ("reward", "sft", "ppo", "sampling")
    }
    assert 0 < flops["sampling"] < flops["reward"] < flops["sft"] < flops["ppo"]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_the_plan_stands_beside_the_peak(stage):
    weights, adam = speed.model_of("facebook/opt-125m", "model").parameters, 4
    trained = 2 if stage == "ppo" else 1
    assert speed.planned_gib(stage, "125m", 4, 8, "bf16") > trained * adam * 4 * weights * 0.6 / 2**30
    assert speed.planned_gib("sampling", "125m", 4, 8, "bf16") is None


def test_the_table_says_what_was_found_failed_and_skipped():
    machine = {
        "card": "A card",
        "card_memory_mib": 81559,
        "driver": "580.1",
        "cores": 16,
        "date": "2026-11-27",
        "commit": "abc",
        "libraries": {"torch": "2.11.0", "peft": None},
    }
    found = {
        "unit": "pairs",
        "ours": 100.0,
        "theirs": 25.0,
        "ratio": 4.0,
        "lowest": 3.9,
        "highest": 4.1,
        "ours: peak GiB": 3.0,
        "theirs: peak GiB": 12.0,
        "planned GiB": 3.3,
        "share of the matrix-product rate": 0.451,
    }
    rows = [
        {"part": "d", "name": "reward, 125m", "status": "passed", "figures": found},
        {
            "part": "d",
            "name": "sft, 125m",
            "status": "failed",
            "figures": {},
            "why": "Traceback\nOutOfMemoryError: 1\n[W] left",
        },
        {"part": "d", "name": "sft, where", "status": "passed", "figures": {
            "ms a step": 20.0, "busy": 0.9, "peak GiB": None, "waits": ["aten::item"], "forward: ms": 5.0,
            "head: ms": 1.0, "backward: ms": 10.0, "optimizer: ms": 3.0, "kernels: ms, calls": {}}},
        {"part": "a", "name": "FlexAttention", "status": "passed", "figures": {
            "outputs": {"ours": 2e-3, "stock": 1e-3}, "ours: ms": 1.0, "sdpa with a mask: ms": 4.0,
            "first call: s": 9.0}},
        {"part": "c", "name": "job engines", "status": "skipped", "figures": {}, "why": "needs about 30 s"},
    ]
    text = markdown(machine, rows)
    assert text.startswith(
        "A card, 81559 MiB, driver 580.1, 16 cores; 2026-11-27; commit abc; torch 2.11.0\n"
    )
    assert "| reward, 125m | 100 pairs/s | 25 | 4.00 (3.90 - 4.10) | 3.0 | 12.0 | 3.3 | 45% |" in text
    assert "| sft, where | 20.0 | 5.0 | 1.0 | 10.0 | 3.0 | 90% | 1 | - |" in text
    assert "| FlexAttention | 2.0e-03 | 1.0e-03 |" in text
    assert "| FlexAttention | 1.00 | 4.00 | 9.00 |" in text
    assert "- sft, 125m: failed: OutOfMemoryError: 1\n" in text and "2 passed, 1 failed" in text
    assert "- job engines: skipped: needs about 30 s" in text and "stages on the embedded" not in text


# ----------------------------------------------------------------------------------- each part, shrunken


@pytest.mark.slow
@pytest.mark.parametrize(("part", "count"), [("a", 38), ("b", 5), ("c", 3), ("d", 20)])
def test_each_part_runs_without_a_card(part, count, tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--output",
        str(tmp_path / "out"),
        "--minutes",
        "20",
        "--parts",
        part,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500)
    result = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [row for row in result["checks"] if row["status"] != "passed"] == []
    assert len(result["checks"]) == count and {row["part"] for row in result["checks"]} == {part}
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.strip() == (tmp_path / "out" / "table.md").read_text().strip()
    assert result["machine"]["libraries"]["trl"] and result["machine"]["commit"]
