"""The real `main()` of each stage on a tiny model: the files it leaves, the keys it writes, and going on after a stop."""

import gzip
import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, OPTConfig

import train_ppo
import train_reward
import train_sft
from studies import compare_seeds, over_optimisation
from utils.config import PROJECT, UserError, parse_config

SFT_KEYS = {"rouge1", "rouge2", "rougeL", "rouge_avg", "base_rouge_avg", "seconds", "tokens_per_second"}
REWARD_KEYS = {"accuracy", "accuracy_low", "accuracy_high", "label_ceiling", "longest_accuracy", "pairs", "seconds",
               "pairs_per_second"}
PPO_KEYS = {"score_before", "score_after", "gold_before", "gold_after", "gold_win_rate", "gold_win_rate_low",
            "gold_win_rate_high", "gold_win_rate_greedy", "kl", "rouge_avg", "episodes", "seconds", "episodes_per_second"}
EVERY_STAGE = {"peak_memory_mb", "seed"}
FILES = {"config.yaml", "data.json", "metrics.jsonl", "samples.jsonl", "train.log", "summary.json", "plots", "checkpoints",
         "final", "tensorboard"}

QUICK = {
    train_sft: "--max_steps 4 --eval_steps 2 --eval_rows 4 --test_rows 4 --logging_steps 1",
    train_reward: "--max_steps 4 --eval_steps 2 --save_steps 2 --eval_rows 4 --test_rows 8 --logging_steps 1",
    train_ppo: "--total_episodes 32 --prompts_per_update 4 --responses_per_prompt 2 --ppo_epochs 2 --eval_steps 2 "
               "--save_steps 2 --eval_rows 4 --test_rows 4",
}
NAMES = {train_sft: "sft", train_reward: "reward", train_ppo: "ppo"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random OPT with the mini tokenizer, and where the three stages put their runs."""
    folder = tmp_path_factory.mktemp("stages")
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    config = OPTConfig(vocab_size=len(tokenizer), hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                       num_attention_heads=4, max_position_embeddings=384, dropout=0.1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def config_of(script, folder, out, extra=""):
    parents = {train_sft: f"--model {folder / 'base'}", train_reward: f"--model {folder / 'run/sft/final'}",
               train_ppo: f"--model {folder / 'run/sft/final'} --reward_model {folder / 'run/reward/final'}"}
    stage = NAMES[script]
    kind = {"sft": "SFTStageConfig", "reward": "RewardStageConfig", "ppo": "PPOStageConfig"}[stage]
    words = f"{parents[script]} {QUICK[script]} --max_new_tokens 8 --output_dir {folder / out / stage} {extra}"
    if stage == "reward":
        words = words.replace("--max_new_tokens 8", "")
    return parse_config(getattr(script, kind), PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", words.split())


@pytest.fixture(scope="module")
def finished(folder):
    """The run directory after all three stages."""
    for script in (train_sft, train_reward, train_ppo):
        script.main(config_of(script, folder, "run"))
    return folder / "run"


CARRIED = ("--kl_target 0.01 --kl_horizon 20 --scale_scores true --ema_decay 0.6 --value_model shared --ptx_coef 0.1 "
           "--actor_training_data data/tldr_mini/actor_train.jsonl.gz")


@pytest.fixture(scope="module")
def carried(finished, folder):
    """A PPO run with every option that hands something on from update to update."""
    train_ppo.main(config_of(train_ppo, folder, "carried", CARRIED))
    return folder / "carried"


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
    assert {"config.json", "model.safetensors", "tokenizer.json", "stage.json"} <= {p.name for p in (run / "final").iterdir()}
    assert not list(run.rglob("*.tmp"))
    assert all(json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines())


def test_metrics_hold_a_line_for_every_update(finished):
    rows = [json.loads(line) for line in (finished / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "objective/kl" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/score" in row] == [0, 2, 4]
    first = rows[1]
    assert first["objective/kl"] == pytest.approx(0.0, abs=1e-4)  # the policy still is the reference


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_the_glossary_explains_what_is_logged_and_nothing_else(finished, carried, readme):
    logged = {name for run in (finished / "sft", finished / "reward", finished / "ppo", carried / "ppo")
              for line in (run / "metrics.jsonl").read_text().splitlines() for name in json.loads(line)}
    table = re.findall(r"^\|([^|]*)\|", (PROJECT / readme).read_text(), re.MULTILINE)
    kinds = "eval|loss|objective|policy|reward|sft|test|time|value"
    explained = {name for cell in table for name in re.findall(rf"`((?:{kinds})/[a-zA-Z0-9_]+)`", cell)}
    assert logged - {"step"} == explained


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
        "--sft", str(finished / "sft/final"), "--reward_model", str(finished / "reward/final"), "--runs", str(ppo),
        "--rows", "4", "--best_of", "2", "--output", str(tmp_path / "over.png"),
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
    found = [model(input_ids=torch.tensor([[*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]]))
             .logits.item() for row in rows]
    assert sum(found) / len(found) == pytest.approx(0, abs=2e-3) and max(map(abs, found)) > 1e-2


def test_sft_ends_with_its_best_checkpoint(folder, monkeypatch):
    rouge = train_sft.rouge_of
    scripted = {"validation": iter([0.2, 0.1, 0.4, 0.3])}  # at steps 0, 1, 2 and 3

    def of(model, tokenizer, posts, config, title):
        figures, summaries = rouge(model, tokenizer, posts, config, title)
        return figures | ({"rouge_avg": next(scripted[title])} if title in scripted else {}), summaries

    monkeypatch.setattr(train_sft, "rouge_of", of)
    train_sft.main(config_of(train_sft, folder, "best", "--max_steps 3 --eval_steps 1 --save_total_limit 9"))
    run = folder / "best" / "sft"
    best, last, final = (load_file(path / "model.safetensors") for path in (
        run / "checkpoints" / "checkpoint-2", run / "checkpoints" / "checkpoint-3", run / "final"))
    assert furthest(final, best) == 0 and furthest(final, last) > 0


def test_ppo_ends_with_its_best_policy(finished, folder, monkeypatch):
    class Scripted(train_ppo.Keeper):
        def offer(self, update, score, kl):
            super().offer(update, {0: 0.0, 2: 1.0, 4: 0.5}[update], 0.0)

    monkeypatch.setattr(train_ppo, "Keeper", Scripted)
    train_ppo.main(config_of(train_ppo, folder, "best"))
    run = folder / "best" / "ppo"
    best, final = (load_file(path / "model.safetensors") for path in (run / "checkpoints" / "best-2", run / "final"))
    last = {name.removeprefix("policy."): weight for name, weight in load_file(checkpoints(run)[-1]).items()
            if name.startswith("policy.")}
    assert furthest(final, best) == 0
    assert max((final[name] - last[name]).abs().max() for name in final if name in last) > 0


def test_a_used_folder_is_refused(finished, folder):
    before = sorted(p.stat().st_mtime_ns for p in (finished / "sft").rglob("*"))
    with pytest.raises(UserError, match="is in use"):
        train_sft.main(config_of(train_sft, folder, "run"))
    assert sorted(p.stat().st_mtime_ns for p in (finished / "sft").rglob("*")) == before


@pytest.mark.parametrize("script", [train_sft, train_reward, train_ppo])
def test_stop_and_resume_end_like_an_undisturbed_run(script, finished, folder, monkeypatch):
    """A signal in the middle saves; `--resume` then ends with the weights of the run that was never stopped."""
    stage, steps = NAMES[script], []
    run_class = script.Run

    class Interrupted(run_class):
        def metrics(self, step, values):
            super().metrics(step, values)
            steps.append(step)
            if step == 2 and self.stop_signal is None and not self.config.resume:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script, "Run", Interrupted)
    with pytest.raises(SystemExit) as stopped:
        script.main(config_of(script, folder, "stopped"))
    assert stopped.value.code == 128 + signal.SIGTERM and max(steps) < 4
    half_way = load_file(checkpoints(folder / "stopped" / stage)[-1])
    script.main(config_of(script, folder, "stopped", "--resume"))
    resumed, whole = (load_file(checkpoints(folder / out / stage)[-1]) for out in ("stopped", "run"))
    assert furthest(resumed, whole) < 1e-6
    assert furthest(half_way, whole) > 1e-5, "the second half must have changed something"
    final, whole = (load_file(folder / out / stage / "final" / "model.safetensors") for out in ("stopped", "run"))
    assert furthest(final, whole) < 1e-6


@pytest.mark.parametrize("script", [train_sft, train_reward, train_ppo])
def test_a_run_that_was_killed_after_its_last_step_makes_no_other(script, finished, folder):
    run, whole = folder / "late" / NAMES[script], finished / NAMES[script]
    shutil.copytree(whole, run)
    shutil.rmtree(run / "final")
    script.main(config_of(script, folder, "late", "--resume"))
    found, expected = ([{name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
                        for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, whole))
    assert found == expected
    assert furthest(*(load_file(path / "final" / "model.safetensors") for path in (run, whole))) == 0


def test_adapters_are_trained_and_merged_into_stock_checkpoints(folder):
    """All three stages with LoRA, each on the one before; and a resumed one."""
    out, extra = "lora", "--lora_rank 2 --learning_rate 0.01 --gradient_checkpointing true"
    parents = (f"--model {folder}/lora/sft/final", f"--model {folder}/lora/sft/final --reward_model {folder}/lora/reward/final")
    for script, parent in zip((train_sft, train_reward, train_ppo), ("", *parents), strict=True):
        script.main(config_of(script, folder, out, f"{parent} {extra}"))
    base, sft, ppo = (load_file(path / "model.safetensors")
                      for path in (folder / "base", folder / out / "sft/final", folder / out / "ppo/final"))
    assert base.keys() == sft.keys() == ppo.keys()
    changed = {name for name in base if not torch.equal(base[name], sft[name])}
    assert changed and all(re.search(r"(proj|fc\d)\.weight$", name) for name in changed), "adapted layers and no other"
    last = load_file(checkpoints(folder / out / "ppo")[-1])  # the best policy, in final/, may be the SFT model
    assert all(last[name].any() for name in last if "lora_B" in name)
    assert all(torch.equal(last[f"policy.{name}".replace(".weight", ".base_layer.weight")], sft[name]) for name in changed)
    reward = AutoModelForSequenceClassification.from_pretrained(folder / out / "reward" / "final")
    assert reward.config.num_labels == 1


def test_all_that_an_update_hands_on_outlives_a_stop(carried, folder, monkeypatch):
    """The adapted KL coefficient, the scale of the scores, the averaged policy, the supervised examples."""
    run_class = train_ppo.Run

    class Interrupted(run_class):
        def metrics(self, step, values):
            super().metrics(step, values)
            if step == 2 and not self.config.resume:
                self.stop_signal = signal.SIGTERM

    monkeypatch.setattr(train_ppo, "Run", Interrupted)
    with pytest.raises(SystemExit):
        train_ppo.main(config_of(train_ppo, folder, "carried-stopped", CARRIED))
    train_ppo.main(config_of(train_ppo, folder, "carried-stopped", CARRIED + " --resume"))
    names = ("objective/kl_coef", "objective/rlhf_reward", "loss/ptx", "loss/value", "eval/score")
    whole, resumed = (values_of(out / "ppo", names) for out in (carried, folder / "carried-stopped"))
    assert resumed == pytest.approx(whole, abs=1e-5)
    assert len({value for (name, _), value in whole.items() if name == "objective/kl_coef"}) > 2
    finals = [load_file(out / "ppo" / "final" / "model.safetensors") for out in (carried, folder / "carried-stopped")]
    assert furthest(*finals) < 1e-6


def values_of(run, names):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(name, row["step"]): row[name] for row in rows for name in names if name in row}


def checkpoints(run):
    """Weights in the checkpoints to go on from, oldest first."""
    found = [path for path in run.glob("checkpoints/*/model.safetensors") if not path.parent.name.startswith("best-")]
    return sorted(found, key=lambda path: int(path.parent.name.split("-")[1]))


def furthest(weights, others):
    assert weights.keys() == others.keys()
    return max((weights[name] - others[name]).abs().max().item() for name in weights)


@torch.no_grad()
def test_plain_transformers_scores_like_the_reward_stage(finished):
    """Right-padded rows through the stock forward, against what the stage wrote into samples.jsonl."""
    tokenizer = AutoTokenizer.from_pretrained(finished / "reward" / "final")
    model = AutoModelForSequenceClassification.from_pretrained(finished / "reward" / "final").eval()
    rows = [json.loads(line) for line in (finished / "reward" / "samples.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        texts = [prompt + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
                 for text in row["completions"]]
        batch = pad_sequence([torch.tensor(ids) for ids in texts], batch_first=True, padding_value=tokenizer.pad_token_id)
        mask = pad_sequence([torch.ones(len(ids), dtype=torch.long) for ids in texts], batch_first=True)
        found = model(input_ids=batch, attention_mask=mask).logits[:, 0]
        assert found.tolist() == pytest.approx(row["scores"], abs=2e-3)


# -------------------------------------------------------------------------------------------- mistakes, from outside


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
    with pytest.raises(UserError, match="(the loss or the gradient|validation: a score) is not finite .*: lower learning_rate"):
        script.main(config_of(script, folder, "broken", "--learning_rate 1e30"))
    assert not (folder / "broken" / NAMES[script] / "final").exists()


def test_an_updates_figures_are_logged_before_a_collapse_stops_the_run(finished, folder):
    with pytest.raises(UserError, match="^the KL to the reference is .* above kl_limit 0.0: .*; the last checkpoint is intact"):
        train_ppo.main(config_of(train_ppo, folder, "collapsed", "--kl_limit 0 --learning_rate 0.01"))
    rows = [json.loads(line) for line in (folder / "collapsed" / "ppo" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["objective/kl"] > 0 and "loss/policy" not in rows[-1]
