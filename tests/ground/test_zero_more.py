"""DeepSpeed beside test_zero.py's table: adapters, parts, shared trunks, bfloat16, best weights, resume; and
several reward heads.
"""

import gzip
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from run_folders import furthest, metrics, weights
from utils.config import PROJECT
from zero_cases import STAGES, launch, losses, make_models, make_rewards, weights_of, words_of

pytestmark = pytest.mark.slow
STEPS = 8
WORDS = {"lora": ["--lora_rank", "4"], "350m": [], "bf16": ["--mixed_precision", "bf16"]}
# every second step has one row, of which the second process has none
IN_PARTS = {"sft": "--micro_batch_tokens 200 --actor_training_data {0}/actor_train.jsonl",
            "reward": "--micro_batch_tokens 200 --reward_training_data {0}/reward_train.jsonl",
            "ppo": "--value_model shared"}
ENGINES = {"lora": ["zero2", "zero3"], "350m": ["zero3"], "bf16": ["zero2", "zero3"]}
# stage with several heads, rank of the adapters, engine, processes: the strongest, or with ALL_SPLITS=1 all
SEVERAL = [("reward", 0, "zero3", 1), ("reward", 0, "zero2", 2), ("reward", 4, "zero3", 2),
           ("ppo", 0, "zero2", 1), ("ppo", 0, "zero3", 2), ("ppo", 4, "zero3", 2)]
if os.environ.get("ALL_SPLITS"):
    SEVERAL = [(stage, rank, engine, processes) for stage in ("reward", "ppo") for rank in (0, 4)
               for engine in ("zero2", "zero3") for processes in (1, 2)]
FAILS = """
import os

def fails(completions):
    if os.environ["RANK"] == "1":
        raise ValueError("no luck")
    return [0.0] * len(completions)
"""
RESUMED = [("zero1", 2), ("zero2_offload", 1), ("zero3_offload", 1), ("zero3", 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    make_models(folder)
    for name in ("actor_train", "reward_train"):
        with gzip.open(PROJECT / "data" / "tldr_mini" / f"{name}.jsonl.gz", "rt") as rows:
            (folder / f"{name}.jsonl").write_text("".join(next(rows) for _ in range(9)))
    return folder


@pytest.fixture(scope="module")
def others(models):
    """Each with and without an engine, two processes."""
    launch(models, 2, [
        (stage, models / f"{kind}-{stage}-{engine}",
         [*words_of(models, stage, 4, 1, engine, STEPS, "350m" if kind == "350m" else "usual"), *WORDS[kind],
          *(IN_PARTS[stage].format(models).split() if kind == "350m" else []),
          *(["--gradient_checkpointing", "true"] if kind == "350m" and engine else [])], None)
        for engine in (None, "zero2", "zero3") for kind in WORDS if engine in [None, *ENGINES[kind]]
        for stage in STAGES
    ])
    return models


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("kind", "engine"), [("lora", "zero2"), ("lora", "zero3"), ("350m", "zero3")])
def test_adapters_projections_parts_and_shared_trunks(others, stage, kind, engine):
    """Of the OPT-350m the engine's runs recompute their activations, and the plain ones do not."""
    plain, ours = others / f"{kind}-{stage}-None", others / f"{kind}-{stage}-{engine}"
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-5)
    assert furthest(weights_of(ours / "final"), weights_of(plain / "final")) < 1e-4


def test_a_large_model_becomes_files_that_transformers_reads(others):
    """`zero_runs.py` makes the files of sharded weights small."""
    final = others / "350m-sft-zero3" / "final"
    assert len(list(final.glob("*.safetensors"))) > 2 and not (final / "part").exists()
    loaded = dict(AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32).named_parameters())
    assert furthest(loaded, weights_of(final)) == 0


@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@pytest.mark.parametrize("stage", STAGES)
def test_an_engines_16_bit_weights_stay_close_to_autocast(others, stage, engine):
    """Two ways to compute in bfloat16: weights cast for a product, or cast ones and a float32 optimizer."""
    plain, ours = others / f"bf16-{stage}-None", others / f"bf16-{stage}-{engine}"
    assert losses(ours) == pytest.approx(losses(plain), rel=0.05, abs=5e-3)
    assert all(weight.isfinite().all() for weight in weights_of(ours / "final").values())


@pytest.mark.parametrize(("kind", "engine"), [(kind, engine) for kind in ENGINES for engine in ENGINES[kind]])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_the_best_weights_come_back_exactly(others, stage, kind, engine):
    """PPO's are those before the first update. zero_runs.py writes them, what was put back, and the last."""
    [best] = (others / f"{kind}-{stage}-{engine}" / "checkpoints").glob("best-*")
    kept, restored, last = (weights(best, name) for name in ("best", "restored", "last"))
    assert kept.keys() == restored.keys() and all(torch.equal(kept[name], restored[name]) for name in kept)
    assert stage == "sft" or best.name == "best-0" and furthest(kept, last) > 0


@pytest.fixture(scope="module")
def stopped(models):
    """Each run undisturbed, and once more stopped by a signal in its middle and resumed. And those with
    several heads, which share the processes: each start of Python takes seconds.
    """
    several = {"reward": ["--reward_heads", "3"], "ppo": make_rewards(models)}
    (models / "own.py").write_text(FAILS)
    failing = [*words_of(models, "ppo", 4, 1, None, STEPS), "--reward_model", "none", "--rewards",
               f"[{{python: '{models}/own.py:fails'}}]"]
    for processes in (1, 2):
        plain = [(stage, rank, None, 2) for stage in several for rank in (0, 4)]
        cases = [(stage, models / f"several-{stage}-{rank}-{engine}-{processes}",
                  [*words_of(models, stage, 8 // processes, 1, engine, STEPS), *several[stage],
                   *(["--lora_rank", f"{rank}"] if rank else [])], None)
                 for stage, rank, engine, count in [*plain, *SEVERAL] if count == processes]
        if processes == 2:
            cases.insert(0, ("ppo", models / "failing", failing, None))
        for stage in STAGES:
            for engine in [engine for engine, count in RESUMED if count == processes]:
                words = words_of(models, stage, 8 // processes, 1, engine, STEPS)
                for name, more, stop in (("whole", [], None), ("stopped", [], 1 if stage == "ppo" else 3),
                                         ("stopped", ["--resume"], None)):
                    cases.append((stage, models / f"{name}-{stage}-{engine}", [*words, *more], stop))
        launch(models, processes, cases)
    return models


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("engine", [engine for engine, _ in RESUMED])
def test_stop_and_resume_end_like_an_undisturbed_run(stopped, stage, engine):
    whole, ours = stopped / f"whole-{stage}-{engine}", stopped / f"stopped-{stage}-{engine}"
    assert "stopped; go on with" in (ours / "train.log").read_text()
    assert metrics(ours) == metrics(whole)
    assert furthest(weights_of(ours / "final"), weights_of(whole / "final")) == 0


@pytest.mark.parametrize(("stage", "rank", "engine", "processes"), SEVERAL)
def test_several_heads_end_like_a_run_without_an_engine(stopped, stage, rank, engine, processes):
    """PPO: worst, mean and uncertainty, of the policy's tokens and of the text; a process without a row."""
    plain, ours = (stopped / f"several-{stage}-{rank}-{kind}" for kind in ("None-2", f"{engine}-{processes}"))
    for now, then in zip(metrics(ours), metrics(plain), strict=True):
        assert now == pytest.approx(then, abs=1e-4, nan_ok=True)
    assert furthest(weights_of(ours / "final"), weights_of(plain / "final")) < 1e-4
    if stage == "reward":
        heads = [weights(run / "final", "reward_heads") for run in (ours, plain)]
        assert furthest(*heads) < 1e-4
        own = weights_of(ours / "final")["score.weight"]
        assert torch.allclose(own, heads[0]["weight"].mean(0, keepdim=True), atol=1e-6)
        assert (heads[0]["weight"] - own).abs().max() > 0.1
    else:
        row = next(row for row in metrics(ours) if "rewards/worst" in row)
        assert row["rewards/worst"] < row["rewards/mean"] != row["rewards/other"]


def test_a_function_that_raises_on_one_process_stops_both_with_its_line(stopped):
    """Before the next runs, which are those of the other tests."""
    assert (stopped / "output2.txt").read_text().count("own.py:fails' raised ValueError: no luck, for ") == 2
