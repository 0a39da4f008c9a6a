"""The average of the policy (ema_decay) under DeepSpeed is one of the optimizer's float32 weights."""

import pytest
import torch

from run_folders import furthest, weights
from zero_cases import launch, make_models, words_of

pytestmark = pytest.mark.slow
BF16 = ["--mixed_precision", "bf16"]
CASES = {"plain": (None, []), "zero1": ("zero1", []), "zero2": ("zero2", []), "bf16": ("zero2", BF16)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 16 steps with a learning rate whose steps are far below those of bfloat16."""
    folder = tmp_path_factory.mktemp("average")
    make_models(folder)
    launch(folder, 2, [
        ("ppo", folder / name, [*words_of(folder, "ppo", 4, 1, engine, 16), "--ema_decay", "0.9",
                                "--learning_rate", "3e-6", "--kl_coef", "0", *more], None)
        for name, (engine, more) in CASES.items()])
    return folder


def average_of(run):
    [*_, newest] = sorted(run.glob("checkpoints/update-*"))
    return weights(newest, "average")


@pytest.mark.parametrize("name", list(CASES))
def test_the_average_moves_as_much_as_without_an_engine(runs, name):
    before = weights(runs / "usual" / "policy")
    if name == "bf16":  # there DeepSpeed makes the optimizer's weights of the rounded ones
        before = {key: weight.bfloat16().float() for key, weight in before.items()}
    ours = average_of(runs / name)
    assert all(weight.dtype == torch.float32 for weight in ours.values())
    kept = sum(int((weight == before[key]).sum()) for key, weight in ours.items() if key in before)
    share = kept / sum(weight.numel() for key, weight in ours.items() if key in before)
    assert share < 0.5, "rounded to bfloat16, almost all weights are those of the SFT model"


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_in_float32_the_average_is_that_of_a_run_without_an_engine(runs, name):
    assert furthest(average_of(runs / name), average_of(runs / "plain")) < 1e-7
