"""The stages under DeepSpeed end like runs without it: ZeRO stages, offload, processes, accumulation."""

import os

import pytest

from run_folders import furthest
from zero_cases import FILES, HAS_AIO, ROWS, STAGES, launch, losses, make_models, weights_of, words_of

pytestmark = pytest.mark.slow
STEPS = 20
# processes, and micro-batches of each in an optimizer step: both ends, or with ALL_SPLITS=1 all
SPLITS = [(1, 1), (1, 4), (2, 1), (2, 4)] if os.environ.get("ALL_SPLITS") else [(1, 1), (2, 4)]
TABLE = [(stage, engine, *split) for engine in [None, *FILES] for stage in STAGES for split in
         (SPLITS if engine != "zero3_nvme" else [(2, 1)])]
aio = pytest.mark.skipif(not HAS_AIO, reason="DeepSpeed's file access has not been compiled here")


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    make_models(folder)
    unclipped = [(stage, folder / f"{stage}-unclipped", [*words_of(folder, stage, ROWS, 1, None, STEPS),
                                                         "--max_grad_norm", "9e9"],
                  None) for stage in STAGES]
    for processes in (1, 2):
        launch(folder, processes, unclipped * (processes == 1) + [
            (stage, folder / f"{stage}-{engine}-{processes}-{accumulation}",
             words_of(folder, stage, ROWS // processes // accumulation, accumulation, engine, STEPS), None)
            for stage, engine, count, accumulation in TABLE
            if count == processes and (HAS_AIO or engine != "zero3_nvme")
        ])
    return folder


@pytest.mark.parametrize(("stage", "engine", "processes", "accumulation"), [
    pytest.param(*case, marks=aio) if case[1] == "zero3_nvme" else case for case in TABLE])
def test_the_same_losses_and_weights(table, stage, engine, processes, accumulation):
    plain, ours = table / f"{stage}-None-1-1", table / f"{stage}-{engine}-{processes}-{accumulation}"
    # PPO: policy and value loss of five updates of four steps
    assert len(losses(plain)) == (10 if stage == "ppo" else STEPS)
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    after = weights_of(plain / "final")
    assert furthest(weights_of(ours / "final"), after) < 1e-4
    before = weights_of(table / "usual" / "policy")
    moved = max(float((after[name] - before[name]).abs().max()) for name in before.keys() & after.keys())
    assert moved > 1e-3, "20 steps must have changed something"


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_clipped_nothing_would_be_another(table, stage):
    finals = [weights_of(table / f"{stage}-{kind}" / "final") for kind in ("unclipped", "None-1-1")]
    assert furthest(*finals) > 1e-3
