"""Steps whose loss or gradient is not finite, in each stage: one is left out, three end the run."""

import json
import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.optim.swa_utils import AveragedModel

import kill_test
import train_ppo
import train_reward
import train_sft
from families import PAD, random_groups
from run_folders import checkpoints, metrics, weights
from utils.config import PROJECT, UserError, parse_config
from utils.loop import Loop
from utils.models.prompt_groups import pack
from utils.runs.divergence import Divergence

STAGES = {
    "sft": (train_sft, train_sft.SFTStageConfig,
            "--max_steps 6 --eval_steps 1 --save_steps 1 --logging_steps 1"),
    "reward": (train_reward, train_reward.RewardStageConfig,
               "--max_steps 6 --eval_steps 2 --save_steps 1 --logging_steps 1"),
    "ppo": (train_ppo, train_ppo.PPOStageConfig,
            "--total_episodes 24 --ppo_epochs 1 --num_minibatches 2 --save_steps 1"),
}
BAD = 4  # the optimizer step that breaks first; in PPO it is the second of update 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kill_test.make_models(folder)
    return folder


@pytest.fixture
def steps(monkeypatch):
    """Of each optimizer step so far whether it moved a weight."""
    moved, step = [], torch.optim.AdamW.step

    def recorded(self, *args, **kwargs):
        weights = [weight for group in self.param_groups for weight in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        step(self, *args, **kwargs)
        moved.append(any(not torch.equal(*pair) for pair in zip(before, weights, strict=True)))

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return moved


def broken_gradients(monkeypatch, steps, bad):
    backward = Accelerator.backward
    monkeypatch.setattr(Accelerator, "backward", lambda self, loss, **more: backward(
        self, loss * (math.nan if len(steps) + 1 in bad else 1.0), **more))


def run(stage, models, out):
    script, kind, more = STAGES[stage]
    words = (f"{kill_test.STAGES[stage].format(models=models)} {more} --output_dir {out} --report_to none "
             "--eval_rows 4 --test_rows 8 --per_device_batch_size 2 --warmup_steps 0")
    default = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    script.main(parse_config(kind, default, words.split()))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("stage", list(STAGES))
def test_one_bad_step_is_left_out_and_the_run_goes_on(stage, models, steps, tmp_path, monkeypatch):
    averaged, update = [], AveragedModel.update_parameters
    monkeypatch.setattr(AveragedModel, "update_parameters",
                        lambda self, model: (averaged.append(1), update(self, model)))
    broken_gradients(monkeypatch, steps, {BAD})
    run(stage, models, tmp_path)
    assert steps == [number != BAD for number in range(1, 7)]
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "final").values())
    # the average copies the SFT model, then takes in each finite step
    assert len(averaged) == (1 + 5 if stage == "ppo" else 0)
    logged = metrics(tmp_path)
    [norm] = {name for row in logged for name in row if name.endswith("grad_norm")}
    norms = [row[norm] for row in logged if norm in row]
    broken = BAD if stage != "ppo" else 2
    assert [number for number, found in enumerate(norms, start=1) if found is None] == [broken]
    rows = rows_of(tmp_path / "broken_batch.jsonl")
    assert rows and {row["step"] for row in rows} == {broken}
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert all("TL;DR:" in row["prompt"] and row["completions"] for row in rows)


def test_the_losses_logged_after_a_broken_one_are_their_own(models, steps, tmp_path, monkeypatch):
    backward = Loop.backward
    monkeypatch.setattr(Loop, "backward", lambda self, loss, groups: backward(
        self, loss * (math.nan if len(steps) + 1 == BAD else 1.0), groups))
    run("reward", models, tmp_path)
    logged = [row["reward/loss"] for row in metrics(tmp_path) if "reward/loss" in row]
    assert [loss is None for loss in logged] == [number == BAD for number in range(1, 7)]


@pytest.mark.parametrize("stage", list(STAGES))
def test_three_bad_steps_end_the_run_before_it_saves_them(stage, models, steps, tmp_path, monkeypatch):
    """From the bad step on a weight is infinite."""
    step = torch.optim.AdamW.step

    def breaking(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if len(steps) == BAD - 1:
            self.param_groups[0]["params"][-1].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.AdamW, "step", breaking)
    unit = "update" if stage == "ppo" else "step"
    message = (rf"^{unit} \d: the loss or the gradient is not finite .*, as in 2 before it: lower "
               "learning_rate, .*broken_batch.jsonl'; the last checkpoint is intact$")
    with pytest.raises(UserError, match=message):
        run(stage, models, tmp_path)
    assert not (tmp_path / "final").exists() and len(steps) == BAD + 1
    saved = [int(path.name.split("-")[1]) for path in checkpoints(tmp_path)]
    assert max(saved) == (BAD - 1 if stage != "ppo" else 1), "none since the first of them"
    rows = rows_of(tmp_path / "broken_batch.jsonl")
    assert any(not math.isfinite(float(row["loss"])) for row in rows)
    assert {row["step"] for row in rows} == ({BAD, BAD + 1, BAD + 2} if stage != "ppo" else {2, 3})


def divergence(folder, precision="no", kind=DistributedType.NO):
    class Run:
        is_main, unit, lines = True, "step", []

        def log(self, line):
            self.lines.append(line)

    class Tokenizer:
        decode = staticmethod(str)

    class Machine:
        mixed_precision, distributed_type = precision, kind

    ours = Divergence(Run(), Tokenizer(), Machine())
    ours.run.folder = folder
    return ours


PROMPTS, COMPLETIONS = random_groups([3, 2], [[2], [1, 4]])
GROUPS = pack(PROMPTS, COMPLETIONS, PAD)


def seen(ours, loss, norm=1.0):
    ours.watch(torch.tensor(loss), GROUPS)
    return bool(ours.leaves_out(torch.tensor(norm)))


def test_a_whole_step_in_between_starts_the_count_again(tmp_path):
    ours = divergence(tmp_path)
    losses = [math.nan, math.inf, 1.0, math.nan, 1.0, math.nan, -math.inf]
    assert [seen(ours, loss) for loss in losses] == [not math.isfinite(loss) for loss in losses]
    assert len(ours.run.lines) == 5
    with pytest.raises(UserError, match="as in 2 before it"):
        seen(ours, 1.0, math.inf)
    rows = rows_of(tmp_path / "broken_batch.jsonl")
    assert [row["loss"] for row in rows] == ["nan"] * 2 + ["-inf"] * 2 + ["1.0"] * 2, "the last three"
    assert [(row["prompt"], row["completions"]) for row in rows[:2]] == [
        (str(prompt), list(map(str, group))) for prompt, group in zip(PROMPTS, COMPLETIONS, strict=True)]


def test_on_a_gpu_the_host_reads_one_step_later(tmp_path, monkeypatch):
    """The steps are left out all the same: their kernels know. Looking or saving asks for the newest."""
    ours = divergence(tmp_path)
    read, losses = ours._read, [math.nan, math.nan, 1.0, math.nan, math.nan, math.nan]
    monkeypatch.setattr(ours, "_read", lambda all_but=None: read(1 if all_but == 0 else 0))
    rows = []
    for number, loss in enumerate(losses, start=1):
        ours.step = number
        assert seen(ours, loss) == math.isnan(loss)
        rows.append(ours.row)
    assert rows == [0, 1, 2, 0, 1, 2]
    with pytest.raises(UserError, match="^step 6: .* as in 2 before it"):
        ours.left_out_now()
    assert {row["step"] for row in rows_of(tmp_path / "broken_batch.jsonl")} == {4, 5, 6}


def test_two_bad_steps_at_the_end_are_no_result(tmp_path):
    ours = divergence(tmp_path)
    assert seen(ours, math.nan)
    ours.end()
    assert seen(ours, math.nan)
    with pytest.raises(UserError, match="as in 1 before it: lower learning_rate"):
        ours.end()


def test_a_gradient_that_overflows_is_how_fp16_finds_its_scale(tmp_path):
    ours = divergence(tmp_path, "fp16")
    assert not any(seen(ours, 1.0, math.inf) for _ in range(9))
    assert seen(ours, math.nan)


@pytest.mark.parametrize("kind", [DistributedType.NO, DistributedType.DEEPSPEED])
def test_a_rank_whose_own_numbers_are_whole_decides_like_the_others(kind, tmp_path, monkeypatch):
    """Else it would wait for ever for those that leave the step out."""
    ours = divergence(tmp_path, kind=kind)
    # another rank found a NaN
    monkeypatch.setattr("utils.runs.divergence.true_anywhere", torch.ones_like)
    if kind == DistributedType.NO:
        assert seen(ours, 1.0)
    else:
        with pytest.raises(UserError, match="^step 0: the loss or the gradient is not finite"):
            ours.watch(torch.tensor(1.0), GROUPS)


def test_under_deepspeed_the_first_loss_ends_the_run_before_the_engine_steps(tmp_path):
    ours = divergence(tmp_path, kind=DistributedType.DEEPSPEED)
    assert not seen(ours, 1.0)
    with pytest.raises(UserError, match=r"^step 0: the loss .* is not finite \(NaN or infinite\): lower"):
        ours.watch(torch.tensor(math.nan), GROUPS)
    assert rows_of(tmp_path / "broken_batch.jsonl")[0]["loss"] == "nan"
