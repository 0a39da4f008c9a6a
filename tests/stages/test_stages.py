"""The real `main()` of each stage on a tiny model: the files it leaves, the keys it writes, stop and resume.

Training goes over six rows in steps of four: a pass ends within an update of PPO, or with half a step.
"""

import gzip
import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    pipeline,
)

import train_ppo
import train_reward
import train_sft
from run_folders import checkpoints, furthest, last_trained, metrics, weights
from studies import compare_seeds, over_optimisation
from tiny_models import save_opt
from utils.config import PROJECT, UserError, parse_config
from utils.models.four_bit import layers_of, storage_of
from utils.models.loading import load_policy, load_scalar_model
from utils.models.parents import Parent
from utils.models.policy_value import load_models
from utils.rewards.rewards import open_rewards
from utils.runs.checkpoints import Best

SFT_KEYS = {"rouge1", "rouge2", "rougeL", "rouge_avg", "base_rouge_avg", "tokens_per_second", "best_step"}
REWARD_KEYS = {"accuracy", "accuracy_low", "accuracy_high", "ece", "label_ceiling", "longest_accuracy",
               "pairs", "pairs_per_second"}
PPO_KEYS = {"score_before", "score_after", "score_after_length_controlled", "score_slope",
            "gold_before", "gold_after", "gold_win_rate", "gold_win_rate_low",
            "gold_win_rate_high", "gold_win_rate_greedy", "gold_win_rate_length_controlled", "kl",
            "rouge_avg", "episodes", "episodes_per_second", "best_step"}
EVERY_STAGE = {"seconds", "peak_memory_mb", "seed"}
FILES = {"config.yaml", "data.json", "metrics.jsonl", "samples.jsonl", "train.log", "summary.json", "plots",
         "checkpoints", "final", "tensorboard", "run.lock"}

DATA = "data/tldr_mini"


def held_out(role):
    """The demo's, which a configuration gives with its own training data only."""
    return " ".join(f"--{role}_{part}_data {DATA}/{role}_{part}.jsonl.gz" for part in ("validation", "test"))


EPOCHS = ("--max_steps 4 --logging_steps 1 --per_device_batch_size 4 --save_steps 2 --eval_steps 2 "
          "--eval_rows 4")
QUICK = {
    train_sft: f"{EPOCHS} --actor_training_data {{0}}/actor_train.jsonl {held_out('actor')} --test_rows 4 "
               "--max_new_tokens 8",
    train_reward: f"{EPOCHS} --reward_training_data {{0}}/reward_train.jsonl {held_out('reward')} "
                  f"--centring_data {DATA}/actor_validation.jsonl.gz --test_rows 8",
    train_ppo: f"--rlhf_training_data {{0}}/rlhf_train.jsonl {held_out('rlhf')} "
               f"--gold_rules {DATA}/gold.json --total_episodes 32 --prompts_per_update 4 "
               "--responses_per_prompt 2 --ppo_epochs 2 --eval_steps 2 --save_steps 2 --eval_rows 4 "
               "--test_rows 4 --max_new_tokens 8",
}
NAMES = {train_sft: "sft", train_reward: "reward", train_ppo: "ppo"}
CONFIGS = {train_sft: train_sft.SFTStageConfig, train_reward: train_reward.RewardStageConfig,
           train_ppo: train_ppo.PPOStageConfig}
every_stage = pytest.mark.parametrize("script", list(NAMES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny OPT, six rows of training data for each stage, and where the three stages put their runs."""
    folder = tmp_path_factory.mktemp("stages")
    save_opt(folder / "base", eos_logit=3.0)
    for name in ("actor_train", "reward_train", "rlhf_train"):
        with gzip.open(PROJECT / "data" / "tldr_mini" / f"{name}.jsonl.gz", "rt") as rows:
            (folder / f"{name}.jsonl").write_text("".join(next(rows) for _ in range(6)))
    return folder


def config_of(script, folder, out, extra=""):
    sft = f"--model {folder}/run/sft/final"
    parents = {train_sft: f"--model {folder}/base", train_reward: sft,
               train_ppo: f"{sft} --reward_model {folder}/run/reward/final"}
    stage = NAMES[script]
    words = f"{parents[script]} {QUICK[script].format(folder)} --output_dir {folder / out / stage} {extra}"
    return parse_config(CONFIGS[script], PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", words.split())


def stopped_and_resumed(script, folder, out, monkeypatch, extra=""):
    """A run that a signal stops in its third step of four, the second pass over the data, and that goes on.

    Returns:
        What it had trained when it stopped.
    """
    run_class, reached = script.Run, []

    class Interrupted(run_class):
        def metrics(self, step, values):
            super().metrics(step, values)
            reached.append(step)
            if step == 3 and not self.config.resume:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(script, "Run", Interrupted)
        script.main(config_of(script, folder, out, extra))
    assert stopped.value.code == 128 + signal.SIGTERM and max(reached) == 3
    half_way = last_trained(folder / out / NAMES[script])
    script.main(config_of(script, folder, out, f"{extra} --resume"))
    return half_way


def assert_same_runs(ours, theirs):
    """Bit for bit: what was logged, sampled and saved."""
    assert metrics(ours) == metrics(theirs)
    assert (ours / "samples.jsonl").read_text() == (theirs / "samples.jsonl").read_text()
    assert furthest(last_trained(ours), last_trained(theirs)) == 0
    assert furthest(weights(ours / "final"), weights(theirs / "final")) == 0


@pytest.fixture(scope="module")
def finished(folder):
    """The run directory after all three stages."""
    for script in (train_sft, train_reward, train_ppo):
        script.main(config_of(script, folder, "run"))
    return folder / "run"


CARRIED = ("--kl_target 0.01 --kl_horizon 20 --ema_decay 0.6 --value_model shared --ptx_coef 0.1 "
           "--actor_training_data data/tldr_mini/actor_train.jsonl.gz --guard 0.1 "
           "--reward_model {0}/several/reward/final --guard_model {0}/run/reward/final")


@pytest.fixture(scope="module")
def several(finished, folder):
    """The reward stage with three heads."""
    train_reward.main(config_of(train_reward, folder, "several", "--reward_heads 3"))
    return folder / "several" / "reward"


@pytest.fixture(scope="module")
def carried(several, folder):
    """A PPO run with every option that hands something on from update to update."""
    train_ppo.main(config_of(train_ppo, folder, "carried", CARRIED.format(folder)))
    return folder / "carried"


@pytest.fixture(scope="module")
def by_transformers(finished, folder):
    """A PPO run whose responses transformers' continuous batching samples."""
    train_ppo.main(config_of(train_ppo, folder, "by_transformers", "--rollout_engine transformers"))
    return folder / "by_transformers"


@pytest.mark.parametrize(("stage", "keys", "plots"), [
    ("sft", SFT_KEYS, {"sft.png"}),
    ("reward", REWARD_KEYS, {"reward.png", "score_histogram.png", "calibration.png"}),
    ("ppo", PPO_KEYS, {"ppo.png"}),
])
def test_run_directory(finished, stage, keys, plots):
    run = finished / stage
    assert {p.name for p in run.iterdir()} == FILES
    assert {p.name for p in (run / "plots").iterdir()} == plots
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary) == keys | EVERY_STAGE
    assert all(isinstance(value, int | float) for value in summary.values())
    final = {path.name for path in (run / "final").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "stage.json"} <= final
    assert not list(run.rglob("*.tmp"))
    assert all(json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines())


def test_metrics_hold_a_line_for_every_update(finished):
    rows = metrics(finished / "ppo")
    assert [row["step"] for row in rows if "objective/kl" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 4]
    first = rows[1]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the policy still is the reference


def test_another_engine_samples_in_the_real_run(finished, by_transformers):
    rows = [row for row in metrics(by_transformers / "ppo") if "objective/kl" in row]
    assert len(rows) == 4 and all(row["policy/sampling_drift"] < 1e-4 for row in rows)
    assert rows[0]["objective/kl"] == pytest.approx(0.0, abs=1e-4)
    assert (by_transformers / "ppo/final/model.safetensors").is_file()
    assert not any("policy/sampling_drift" in row for row in metrics(finished / "ppo"))


def test_the_glossary_explains_what_is_logged_and_nothing_else(finished, carried, by_transformers):
    runs = [*(finished / stage for stage in ("sft", "reward", "ppo")), carried / "ppo",
            by_transformers / "ppo"]
    logged = {name for run in runs
              for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    table = re.findall(r"^\|([^|]*)\|", (PROJECT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    kinds = "eval|loss|objective|policy|reward|sft|time|value"
    names = r"`(rewards/NAME[a-z_/]*)`"
    rewards = {name.replace("NAME", "model") for cell in table for name in re.findall(names, cell)}
    explained = {name for cell in table for name in re.findall(rf"`((?:{kinds})/[a-zA-Z0-9_]+)`", cell)}
    experts = {"sft/router_loss"}  # of models that have some: test_routers.py finds it in their log
    controlled = {"rewards/model/slope"}  # with length_control: test_rewards.py finds it in their log
    logged = {name for name in logged if not name.startswith("test/")} - {"step"}
    assert logged | experts | controlled == explained | rewards


@pytest.mark.parametrize(("stage", "keys"), [("sft", SFT_KEYS), ("reward", REWARD_KEYS), ("ppo", PPO_KEYS)])
def test_the_test_figures_are_logged_as_those_of_the_last_step(stage, keys, finished):
    """Under the names of summary.json, which the glossary explains; without how fast the run was."""
    [row] = [row for row in metrics(finished / stage) if any(name.startswith("test/") for name in row)]
    figures = {name: value for name, value in row.items() if name != "step"}
    assert row["step"] == 4
    assert set(figures) == {f"test/{name}" for name in keys if not name.endswith("_per_second")
                            and name not in ("episodes", "best_step")}
    summary = json.loads((finished / stage / "summary.json").read_text())
    assert {f"test/{name}": value for name, value in summary.items() if f"test/{name}" in figures} == (
        pytest.approx(figures, abs=1e-6))
    text = (PROJECT / "docs" / "metrics.md").read_text()
    [explained] = re.findall(rf"^\| {stage} \|(.*)\|$", text, re.MULTILINE)
    names = {name.removeprefix("gold_win_rate_") for name in keys}
    assert all(re.search(rf"`[a-z_]*{name.split('_')[-1]}`", explained) for name in names)


def samples(run, posts):
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    return [row for row in rows if row["posts"] == posts]


@every_stage
def test_every_evaluation_shows_the_same_posts_from_the_start(script, finished, folder, monkeypatch):
    """Also of a run that never ends: a signal stops it in its third step."""
    stage = NAMES[script]
    shown = samples(finished / stage, "validation")
    assert [row["step"] for row in shown] == [0] * 4 + [2] * 4 + [4] * 4
    prompts = [row["prompt"] for row in shown]
    assert prompts[:4] == prompts[4:8] == prompts[8:] and len(set(prompts)) == 4
    if stage == "reward":
        assert [row["scores"] for row in shown[:4]] != [row["scores"] for row in shown[8:]], "it was trained"
    else:
        assert all(isinstance(row["summary"], str) and "reference" in row for row in shown)
    assert len(samples(finished / stage, "test")) == (8 if stage == "reward" else 4)
    run_class = script.Run

    class Stopped(run_class):
        def metrics(self, step, values):
            super().metrics(step, values)
            if step == 3:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script, "Run", Stopped)
    with pytest.raises(SystemExit):
        script.main(config_of(script, folder, "unfinished"))
    run = folder / "unfinished" / stage
    assert samples(run, "validation") == shown[:8] and samples(run, "test") == []


def test_final_models_are_stock_checkpoints(finished):
    policy = AutoModelForCausalLM.from_pretrained(finished / "ppo" / "final")
    reward = AutoModelForSequenceClassification.from_pretrained(finished / "reward" / "final")
    assert reward.config.num_labels == 1 and policy.config.dropout == 0
    assert policy.config.use_cache and policy.generation_config.use_cache
    stage = json.loads((finished / "ppo" / "final" / "stage.json").read_text())
    assert stage["stage"] == "ppo" and set(stage["parents"]) == {"model", "reward_model"}


def test_the_evidence_scripts_read_what_the_stages_write(finished, tmp_path, capsys):
    words = ["--runs", str(finished), "--output", str(tmp_path / "seeds.png")]
    compare_seeds.main(parse_config(compare_seeds.CompareConfig, None, words))
    ppo = shutil.copytree(finished / "ppo", tmp_path / "ppo")
    rows = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    sampled = {"eval/score_sampled": 0.1, "eval/gold_sampled": 0.2}
    rows = [{**(sampled if "eval/score" in row else {}), **row} for row in rows]
    (ppo / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    over_optimisation.main(parse_config(over_optimisation.OverOptimisationConfig, None, [
        "--sft", str(finished / "sft/final"), "--reward_model", str(finished / "reward/final"),
        "--runs", str(ppo), "--rows", "4", "--best_of", "2", "--output", str(tmp_path / "over.png"),
    ]))
    printed = capsys.readouterr().out
    assert "collapsed: " in printed and " of 4 " in printed and "note:" not in printed
    assert {path.name for path in tmp_path.glob("*.png")} == {"seeds.png", "over.png"}


@torch.no_grad()
def test_reference_summaries_score_0_on_average_after_the_reward_stage(finished):
    folder = finished / "reward" / "final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with gzip.open(PROJECT / "data" / "tldr_mini" / "actor_validation.jsonl.gz", "rt") as file:
        rows = [json.loads(next(file)) for _ in range(8)]  # test_rows
    texts = [tokenizer(row["prompt"] + row["completion"])["input_ids"] for row in rows]
    found = [model(input_ids=torch.tensor([[*text, tokenizer.eos_token_id]])).logits.item() for text in texts]
    assert sum(found) / len(found) == pytest.approx(0, abs=2e-3) and max(map(abs, found)) > 1e-2


def test_sft_ends_with_its_best_checkpoint(folder, monkeypatch):
    rouge = train_sft.rouge_of
    scripted = {"validation": iter([0.2, 0.1, 0.4, 0.3])}  # at steps 0, 1, 2 and 3

    def of(loop, posts, title):
        figures, summaries = rouge(loop, posts, title)
        return figures | ({"rouge_avg": next(scripted[title])} if title in scripted else {}), summaries

    monkeypatch.setattr(train_sft, "rouge_of", of)
    extra = "--max_steps 3 --eval_steps 1 --save_steps 1 --save_total_limit 9"
    train_sft.main(config_of(train_sft, folder, "best", extra))
    run = folder / "best" / "sft"
    second, last = ({name.removeprefix("model."): weight for name, weight in weights(path, "trained").items()}
                    for path in checkpoints(run)[1:])
    assert furthest(weights(run / "final"), second) == 0 and furthest(weights(run / "final"), last) > 0


def test_where_rouge_says_nothing_sft_ends_with_the_lowest_loss(folder, monkeypatch):
    """As for references of emoji, or a base model that cannot summarise yet."""
    rouge, losses = train_sft.rouge_of, iter([9.0, 3.0, 2.0, 2.5])  # at steps 0, 1, 2 and 3

    def of(loop, posts, title):
        figures, summaries = rouge(loop, posts, title)
        return figures | {"rouge_avg": 0.0}, summaries

    monkeypatch.setattr(train_sft, "rouge_of", of)
    monkeypatch.setattr(train_sft, "loss_of", lambda *_: next(losses))
    train_sft.main(config_of(train_sft, folder, "equal", "--max_steps 3 --eval_steps 1 --save_steps 1"))
    run = folder / "equal" / "sft"
    said = (run / "train.log").read_text()
    assert "step 2 scores 0.000 as step 1 did, so the loss decides: 2.0000 against 3.0000" in said
    assert "best weights: those of step 2" in said


@pytest.fixture
def second_is_best(monkeypatch):
    """Of PPO's policies the one after update 2 is the best."""
    offer = Best.offer
    monkeypatch.setattr(Best, "offer", lambda self, step, score, weights, **figures: offer(
        self, step, {0: 0.0, 2: 1.0, 4: 0.5}[step], weights, **figures))


def test_ppo_ends_with_its_best_policy(finished, folder, second_is_best):
    train_ppo.main(config_of(train_ppo, folder, "best", "--save_total_limit 9"))
    run = folder / "best" / "ppo"
    second, last = ({name.removeprefix("policy."): weight for name, weight in weights(path, "trained").items()
                     if name.startswith("policy.")} for path in checkpoints(run))
    assert furthest(weights(run / "final"), second) == 0 and furthest(weights(run / "final"), last) > 0


def test_a_used_folder_is_refused(finished, folder):
    before = sorted(p.stat().st_mtime_ns for p in (finished / "sft").rglob("*"))
    with pytest.raises(UserError, match="is in use"):
        train_sft.main(config_of(train_sft, folder, "run"))
    assert sorted(p.stat().st_mtime_ns for p in (finished / "sft").rglob("*")) == before


@every_stage
def test_stop_and_resume_end_like_an_undisturbed_run(script, finished, folder, monkeypatch):
    """A signal in the middle saves; `--resume` then ends with the weights of the undisturbed run."""
    half_way = stopped_and_resumed(script, folder, "stopped", monkeypatch)
    ours, whole = folder / "stopped" / NAMES[script], finished / NAMES[script]
    assert_same_runs(ours, whole)
    assert furthest(half_way, last_trained(whole)) > 1e-5, "the last step must have changed something"


@every_stage
def test_a_damaged_checkpoint_is_passed_over(script, finished, folder):
    """A run that was killed after its last step goes on from the checkpoint before, and ends alike."""
    run, whole = folder / "damaged" / NAMES[script], finished / NAMES[script]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    [before, last] = checkpoints(run)
    with (last / "optimizer.pt").open("r+b") as file:
        file.seek(-99, 2)
        file.write(b"damaged")
    script.main(config_of(script, folder, "damaged", "--resume"))
    assert f"'{last}' is damaged (optimizer.pt has changed); going back" in (run / "train.log").read_text()
    assert_same_runs(run, whole)


@every_stage
def test_a_run_that_was_killed_after_its_last_step_makes_no_other(script, finished, folder):
    run, whole = folder / "late" / NAMES[script], finished / NAMES[script]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    script.main(config_of(script, folder, "late", "--resume"))
    assert_same_runs(run, whole)


ADAPTERS = "--lora_rank 2 --learning_rate 0.01 --gradient_checkpointing true"


def test_adapters_are_trained_and_merged_into_stock_checkpoints(folder, second_is_best, monkeypatch):
    """All three stages with LoRA, each on the one before; and PPO once more, stopped and resumed."""
    run = folder / "lora"
    sft = f"--model {run}/sft/final {ADAPTERS}"
    extra = {train_sft: ADAPTERS, train_reward: sft,
             train_ppo: f"{sft} --reward_model {run}/reward/final --kl_budget 99"}
    for script in NAMES:
        script.main(config_of(script, folder, "lora", extra[script]))
    base, sft, ppo = map(weights, (folder / "base", run / "sft" / "final", run / "ppo" / "final"))
    assert base.keys() == sft.keys() == ppo.keys()
    changed = {name for name in base if not torch.equal(base[name], sft[name])}
    assert changed and all(re.search(r"(proj|fc\d)\.weight$", name) for name in changed)
    trained = last_trained(run / "ppo")
    assert all("lora_" in name for name in trained if not name.startswith("value_model.score"))
    assert all(trained[name].any() for name in trained if "lora_B" in name)
    best = weights(run / "ppo" / "checkpoints" / "best-2", "best")
    for name in ppo:
        a, b = (best.get(name.replace(".weight", f".lora_{half}.default.weight")) for half in "AB")
        added = 16 / 2 * b @ a if name in changed else torch.zeros(())  # lora_alpha / lora_rank
        torch.testing.assert_close(ppo[name], sft[name] + added, rtol=0, atol=1e-6)
        assert name not in changed or added.abs().max() > 1e-4
    reward = AutoModelForSequenceClassification.from_pretrained(run / "reward" / "final")
    assert reward.config.num_labels == 1
    stopped_and_resumed(train_ppo, folder, "lora-stopped", monkeypatch, extra[train_ppo])
    assert_same_runs(folder / "lora-stopped" / "ppo", run / "ppo")


@pytest.mark.slow
def test_weights_in_4_bits_under_adapters_end_in_stock_checkpoints(folder, monkeypatch):
    """All three stages, each on the merged one before; and PPO once more, stopped and resumed."""
    run, rounded = folder / "rounded", f"{ADAPTERS} --load_in_4bit true"
    sft = f"--model {run}/sft/final {rounded}"
    extra = {train_sft: rounded, train_reward: sft,
             train_ppo: f"{sft} --reward_model {run}/reward/final --kl_budget 99"}
    for script in NAMES:
        script.main(config_of(script, folder, "rounded", extra[script]))
    for stage, kind in (("sft", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification),
                        ("ppo", AutoModelForCausalLM)):
        model, info = kind.from_pretrained(run / stage / "final", output_loading_info=True)
        assert not any(info.values()) and not hasattr(model.config, "quantization_config")
        assert json.loads((run / stage / "final" / "stage.json").read_text())["load_in_4bit"] is True
        assert "in 4 bits" in (run / stage / "final" / "README.md").read_text()
    trained = last_trained(run / "ppo")
    assert all("lora_" in name for name in trained if not name.startswith("value_model.score"))
    assert metrics(run / "ppo")[0]["eval/kl"] == pytest.approx(0, abs=1e-5)
    stopped_and_resumed(train_ppo, folder, "rounded-stopped", monkeypatch, extra[train_ppo])
    assert_same_runs(folder / "rounded-stopped" / "ppo", run / "ppo")


def stock_with_adapters(kind, base: Path, final: Path):
    """The base model in 4 bits with a stage's adapters, by transformers and peft alone."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    more = {} if kind is AutoModelForCausalLM else {"num_labels": 1}
    model = kind.from_pretrained(base, quantization_config=asked, dtype=torch.float32, **more)
    for module in model.modules():
        if isinstance(module, Linear4bit):  # on some CPUs it would round the scales once more
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, final).eval()


@pytest.mark.slow
@torch.no_grad()
def test_adapters_as_final_are_those_of_one_base_in_all_stages(folder, monkeypatch):
    """Stock peft reads them and says what our own loading says; PPO has all its models on one base."""
    run, adapters = folder / "beside", f"{ADAPTERS} --load_in_4bit true --save_adapters true"
    sft = f"--model {run}/sft/final {adapters}"
    extra = {train_sft: adapters, train_reward: sft,
             train_ppo: f"{sft} --reward_model {run}/reward/final --kl_budget 99"}
    with torch.enable_grad():
        for script in NAMES:
            script.main(config_of(script, folder, "beside", extra[script]))
        stopped_and_resumed(train_ppo, folder, "beside-stopped", monkeypatch, extra[train_ppo])
    before, after = folder / "beside-stopped" / "ppo", run / "ppo"
    assert metrics(before) == metrics(after) and furthest(last_trained(before), last_trained(after)) == 0
    assert metrics(after)[0]["eval/kl"] == pytest.approx(0, abs=1e-5), "the reference has the SFT adapters"
    config = config_of(train_ppo, folder, "beside", extra[train_ppo])
    storage, ids = storage_of(config), torch.arange(10, 40)[None]
    said = {}
    for stage, load, kind in (("sft", load_policy, AutoModelForCausalLM),
                              ("reward", load_scalar_model, AutoModelForSequenceClassification),
                              ("ppo", load_policy, AutoModelForCausalLM)):
        final = run / stage / "final"
        assert not (final / "model.safetensors").exists() and (final / "adapter_model.safetensors").exists()
        parent = Parent("model", str(final))
        assert parent.base.folder == folder / "base"
        ours = load(parent, storage=storage).eval()(input_ids=ids).logits
        said[stage] = stock_with_adapters(kind, folder / "base", final)(input_ids=ids).logits
        torch.testing.assert_close(ours, said[stage], rtol=1e-4, atol=1e-4)
    assert (said["sft"] - said["ppo"]).abs().max() > 1e-4
    exact = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), final).eval()
    torch.testing.assert_close(load_policy(parent).eval()(input_ids=ids).logits, exact(input_ids=ids).logits,
                               rtol=1e-4, atol=1e-4)
    parent = Parent("model", config.model)
    models = load_models(parent, open_rewards(config, parent), config)
    held = [{layer.weight.data_ptr() for _, layer in layers_of(model)} for model in (
        models.policy, models.ref_policy, *models.rewards.models, models.trained.value_model)]
    assert held[0] == held[1] == held[2] == held[3] and len(held[0]) == 12
    refuse_what_does_not_fit(folder, run, extra, tmp=folder / "other")


def refuse_what_does_not_fit(folder, run, extra, tmp):
    """Adapters of another size than asked for, and adapters whose base has changed."""
    with pytest.raises(UserError, match="^lora_rank: the adapters of the stage before .* --lora_rank 2 "):
        train_reward.main(config_of(train_reward, folder, "no", extra[train_reward] + " --lora_rank 4"))
    shutil.copytree(run / "sft" / "final", tmp)
    stage = json.loads((tmp / "stage.json").read_text())
    stage["base"]["sha256"] = {"model.safetensors": "0"}
    (tmp / "stage.json").write_text(json.dumps(stage))
    with pytest.raises(UserError, match="^model: .* holds adapters of .*, whose weights have changed since"):
        _ = Parent("model", str(tmp)).base


def test_all_that_an_update_hands_on_outlives_a_stop(carried, folder, monkeypatch):
    """The adapted KL coefficient, the averaged policy, the supervised examples."""
    stopped_and_resumed(train_ppo, folder, "carried-stopped", monkeypatch, CARRIED.format(folder))
    assert_same_runs(folder / "carried-stopped" / "ppo", carried / "ppo")
    runs = [out / "ppo" for out in (carried, folder / "carried-stopped")]
    assert furthest(*(weights(checkpoints(run)[-1], "average") for run in runs)) == 0
    assert len({row.get("objective/kl_coef") for row in metrics(runs[0])}) > 3


@torch.no_grad()
def test_plain_transformers_scores_like_the_reward_stage(finished):
    """Right-padded rows through the stock forward, against what the stage wrote into samples.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(finished / "reward" / "final")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "reward" / "final").eval()
    rows = samples(finished / "reward", "test")
    assert rows
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        texts = [prompt + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                 for text in row["completions"]]
        batch = pad_sequence(list(map(torch.tensor, texts)), batch_first=True,
                             padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in texts], batch_first=True)
        found = model(input_ids=batch, attention_mask=mask).logits[:, 0]
        assert found.tolist() == pytest.approx(row["scores"], abs=2e-3)


@torch.no_grad()
def test_several_heads_end_in_a_stock_checkpoint_with_their_mean(several, folder):
    """The references of the centring score 0 by each head, from stock states; resume makes the same heads."""
    model = AutoModelForSequenceClassification.from_pretrained(several / "final").eval()
    tokenizer = AutoTokenizer.from_pretrained(several / "final")
    heads = load_file(several / "final" / "reward_heads.safetensors")
    assert model.config.num_labels == 1 and heads["weight"].shape[0] == 3
    assert torch.allclose(model.score.weight, heads["weight"].mean(0, keepdim=True), atol=1e-6)
    assert heads["bias"].mean().item() == pytest.approx(model.config.score_shift, abs=1e-4)
    with gzip.open(PROJECT / DATA / "actor_validation.jsonl.gz", "rt") as lines:
        rows = [json.loads(next(lines)) for _ in range(8)]  # test_rows
    rows = [tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"] for row in rows]
    states = [model.base_model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    each = torch.stack(states) @ heads["weight"].T + heads["bias"]
    assert each.mean(0).tolist() == pytest.approx([0, 0, 0], abs=2e-3)
    assert each.std(1).mean() > 0.01, "the heads differ"
    stage = json.loads((several / "final" / "stage.json").read_text())["reward_heads"]
    assert stage["count"] == 3 and len(stage["accuracy"]) == 3


def test_several_heads_stop_and_resume(several, folder, monkeypatch):
    stopped_and_resumed(train_reward, folder, "several-stopped", monkeypatch, "--reward_heads 3")
    ours = folder / "several-stopped" / "reward"
    assert_same_runs(ours, several)
    assert furthest(weights(ours / "final", "reward_heads"), weights(several / "final", "reward_heads")) == 0


def test_a_reward_model_goes_on_from_its_own_head(finished, folder):
    """Before the first step its scores are those of the stock model in the folder; then it learns.

    The seed is not that of the first run: a new head would be another one.
    """
    parent = finished / "reward" / "final"
    train_reward.main(config_of(train_reward, folder, "further", f"--model {parent} --seed 1"))
    model = AutoModelForSequenceClassification.from_pretrained(parent).eval()
    tokenizer = AutoTokenizer.from_pretrained(parent)
    rows = [row for row in samples(folder / "further" / "reward", "validation") if row["step"] == 0]
    for row in rows:
        for text, score in zip(row["completions"], row["scores"], strict=True):
            ids = tokenizer(row["prompt"] + text + tokenizer.eos_token, return_tensors="pt")
            assert model(**ids).logits.item() == pytest.approx(score, abs=2e-3)
    assert len({score for row in rows for score in row["scores"]}) > 4, "the scores tell answers apart"
    assert furthest(weights(parent), weights(folder / "further" / "reward" / "final")) > 0


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 1.25])
def test_the_reward_models_card_says_how_its_scores_are_read(shift, finished, tmp_path):
    """Its code runs as it stands, and a stock pipeline agrees with it."""
    folder = shutil.copytree(finished / "reward" / "final", tmp_path / "final")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"score_shift": shift}))
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    pipe = pipeline("text-classification", model=str(folder), tokenizer=str(folder))
    row = samples(finished / "reward", "test")[0]
    for completion, score in zip(row["completions"], row["scores"], strict=True):
        names = {"folder": folder, "prompt": row["prompt"], "completion": completion}
        exec(code, names)  # noqa: S102  the card's own code
        assert names["score"] == pytest.approx(score - shift, abs=2e-3)
        [found] = pipe(names["text"])
        assert found["score"] - shift == pytest.approx(names["score"], abs=1e-4)


# ------------------------------------------------------------------------------------- mistakes, from outside


PPO_MISTAKES = {
    "gold_rules: 'no.json' does not exist": "--gold_rules no.json",
    "report_to: 'foo' is not installed": "--report_to foo",
    "reward_model: .* comes from the stage 'sft'": "--reward_model {run}/sft/final",
    "model: .* comes from the stage 'reward'": "--model {run}/reward/final",
    "rlhf_training_data: '{run}' is a folder": "--rlhf_training_data {run}",
    "model: no model folder at 'data/final'": "--model data/final",
    "max_prompt_tokens .* 384 positions": "--max_prompt_tokens 500",
}


@pytest.mark.parametrize("message", PPO_MISTAKES)
def test_a_mistake_leaves_no_run_folder_behind(message, finished, folder):
    words = PPO_MISTAKES[message].format(run=finished)
    with pytest.raises(UserError, match="^" + message.format(run=finished)):
        train_ppo.main(config_of(train_ppo, folder, "mistaken", words))
    assert not (folder / "mistaken").exists()


@pytest.mark.parametrize("script", [train_sft, train_reward])
def test_a_loss_that_is_not_finite_stops_the_stage(script, finished, folder):
    """At a step that is logged, or in an evaluation before the next of them."""
    with pytest.raises(UserError, match="(loss or the gradient|validation: a score) is not finite .*: lower"):
        script.main(replace(config_of(script, folder, "broken"), learning_rate=1e30))
    assert not (folder / "broken" / NAMES[script] / "final").exists()


def test_an_updates_figures_are_logged_before_a_collapse_stops_the_run(finished, folder):
    with pytest.raises(UserError, match="^the KL to the reference is .* above kl_limit 0.0: .* is intact"):
        train_ppo.main(config_of(train_ppo, folder, "collapsed", "--kl_limit 0 --learning_rate 0.01"))
    rows = metrics(folder / "collapsed" / "ppo")
    assert rows[-1]["objective/kl"] > 0 and "loss/policy" not in rows[-1]
