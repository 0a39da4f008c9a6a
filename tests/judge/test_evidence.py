"""The real `main()` of compare_seeds.py and over_optimisation.py: their tables against figures worked out by
hand.
"""

import itertools
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from studies import compare_seeds, over_optimisation
from tiny_models import mini_tokenizer, opt_config
from utils.config import PROJECT, UserError, parse_config
from utils.judge.gold import gold_score, load_gold
from utils.models.generation import sample
from utils.models.loading import with_our_heads
from utils.models.parents import Parent

# -------------------------------------------------------------------------------------------------- the seeds

SUMMARIES = {
    "sft": {"base_rouge_avg": 0.2, "rouge_avg": 0.7, "seed": 0},
    "reward": {"accuracy": 0.6, "label_ceiling": 0.8, "seed": 0},
    "ppo": {"score_before": 0.0, "score_after": 1.0, "kl": 2.0, "rouge_avg": 0.1},
}
GOLD = {"gold_win_rate": 0.8, "gold_win_rate_low": 0.75, "gold_win_rate_high": 0.85,
        "gold_win_rate_greedy": 0.9,
        "gold_before": 0.5, "gold_after": 0.7}
METRICS = {
    "sft": [{"step": 0, "eval/rouge_avg": 0.2}, {"step": 5, "sft/loss": 2.0}, {"step": 10, "sft/loss": 1.0}],
    "reward": [{"step": 100, "eval/accuracy": 0.6}],
    "ppo": [{"step": 0, "eval/gold": 0.5}, {"step": 1, "objective/ended": 0.5, "objective/kl": 0.0},
            {"step": 2, "objective/ended": 0.98, "objective/kl": 1.0}],
}


def written_seed(folder, number, ended=0.98, kl_coef=0.05, gold=GOLD, **ppo):
    """A folder with the three finished stages of one seed."""
    summaries = {**SUMMARIES, "ppo": {**SUMMARIES["ppo"], **gold, **ppo}}
    if not gold:
        summaries["reward"] = {"accuracy": 0.6}
    for stage, summary in summaries.items():
        run = folder / stage
        (run / "final").mkdir(parents=True)
        (run / "final" / "stage.json").write_text(json.dumps({"stage": stage}))
        summary = {**summary, "seed": number}
        (run / "summary.json").write_text(json.dumps(summary))
        settings = {"seed": number, "output_dir": str(run), "model": f"{folder}/sft/final" if stage != "sft"
                    else "base",
                    "learning_rate": 1e-3, **({"kl_coef": kl_coef, "reward_model": str(folder)}
                                              if stage == "ppo" else {})}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        rows = METRICS[stage] + ([{"step": 3, "objective/ended": ended}] if stage == "ppo" else [])
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def compared(*words):
    return compare_seeds.main(parse_config(compare_seeds.CompareConfig, None, list(words)))


def markdown_rows(printed):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()
            if line.startswith("| ")]
    header, _, *rows = rows
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_table_over_seeds_by_hand(tmp_path, capsys):
    """Win rates .8, .6, .7: mean .7, sample standard deviation sqrt((.01 + .01 + 0) / 2) = .1."""
    seeds = [written_seed(tmp_path / "a", 0, score_before=-10.0, score_after=-11.0, kl=2.0),
             written_seed(tmp_path / "b", 1, gold_win_rate=0.6, kl=3.0, gold_after=0.9, ended=1.0),
             written_seed(tmp_path / "c", 7, gold_win_rate=0.7, kl=7.0, gold_after=0.8, ended=0.96)]
    compared("--runs", *seeds, "--markdown", "--output", str(tmp_path / "curves.png"))
    printed = capsys.readouterr().out
    rows = markdown_rows(printed)
    assert list(rows) == ["0", "1", "7", "mean", "sd", "min", "max"]
    assert rows["1"] == {
        "seed": "1", "ROUGE mean, base → SFT": "0.200 → 0.700", "reward accuracy": "0.600",
        "of its ceiling": "75.0%",
        "gold win rate, sampled (95 %)": "0.600 (0.750 - 0.850)", "greedy": "0.900",
        "gold score, SFT → PPO": "0.500 → 0.900",
        "KL": "3.00", "with EOS": "1.000", "reward score, SFT → PPO": "0.000 → 1.000",
    }
    line = next(line for line in printed.splitlines() if line.startswith("│ 1 "))
    assert line.endswith("│") and len(line) < 140
    # nothing is cut off or wrapped
    assert [cell.strip() for cell in line.strip("│").split("│")] == list(rows["1"].values())
    spread = {name: [rows[label][name] for label in ("mean", "sd", "min", "max")] for name in rows["1"]}
    assert spread["gold win rate, sampled (95 %)"] == ["0.700", "0.100", "0.600", "0.800"]
    assert spread["KL"] == ["4.00", "2.65", "2.00", "7.00"]  # sqrt((4 + 1 + 9) / 2)
    assert spread["gold score, SFT → PPO"] == ["0.500 → 0.800", "0.000 → 0.100", "0.500 → 0.700",
                                               "0.500 → 0.900"]
    assert spread["with EOS"] == ["0.980", "0.020", "0.960", "1.000"]
    assert "collapsed: none" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("figures", "reason"), [
    ({"gold_win_rate": 0.499}, "gold win rate 0.499 is below 0.500"),
    ({"gold_after": 0.49}, "gold score 0.490 is below 0.500"),
    ({"ended": 0.89}, "share with EOS 0.890 is below 0.900"),
    ({"gold_after": math.nan}, "gold score nan is below 0.500"),
])
def test_a_collapsed_seed_is_named(figures, reason, tmp_path, capsys):
    compared("--runs", written_seed(tmp_path / "a", 0), written_seed(tmp_path / "b", 3, **figures))
    assert f"collapsed: seed 3 ({reason})\n" in capsys.readouterr().out


def test_a_seed_on_the_border_has_not_collapsed(tmp_path, capsys):
    compared("--runs", written_seed(tmp_path / "a", 0, gold_win_rate=0.5, gold_after=0.5, ended=0.9))
    assert "collapsed: none" in capsys.readouterr().out


def test_data_without_gold_scores_and_one_seed_show_dashes(tmp_path, capsys):
    """Such a run's summaries have no gold figures and no ceiling at all: no other data has them."""
    compared("--runs", written_seed(tmp_path / "a", 0, gold={}), "--markdown")
    printed = capsys.readouterr().out
    rows = markdown_rows(printed)
    for column in ("gold score, SFT → PPO", "gold win rate, sampled (95 %)", "greedy", "of its ceiling"):
        assert {rows[label][column] for label in rows} == {"-"}
    assert (rows["mean"]["KL"], rows["sd"]["KL"]) == ("2.00", "-") and "collapsed: none" in printed


def test_seeds_without_gold_scores_are_judged_by_their_ends(tmp_path, capsys):
    seeds = [written_seed(tmp_path / "a", 0, gold={}), written_seed(tmp_path / "b", 1, gold={}, ended=0.5)]
    compared("--runs", *seeds)
    assert "collapsed: seed 1 (share with EOS 0.500 is below 0.900)\n" in capsys.readouterr().out


def test_a_summary_with_some_of_the_gold_figures_is_broken(tmp_path):
    gold = {name: value for name, value in GOLD.items() if name != "gold_after"}
    with pytest.raises(UserError, match="^runs: '.*ppo/summary.json' has no 'gold_after'; "
                                        "train that stage again"):
        compared("--runs", written_seed(tmp_path / "a", 0, gold=gold))


@pytest.mark.parametrize(("break_it", "message"), [
    (lambda seed: None, "^runs: '.*/none' does not exist"),
    (lambda seed: (seed / "ppo" / "summary.json").unlink(), "^runs: no finished run in '.*seed/ppo' .*train "
                                                            "it to its end first"),
    (lambda seed: (seed / "sft" / "summary.json").write_text("{"),
     "^runs: '.*seed/sft/summary.json' is no JSON object"),
    (lambda seed: (seed / "sft" / "summary.json").write_text("{}"),
     "^runs: '.*seed/sft/summary.json' has no 'base_rouge_avg'"),
])
def test_a_folder_that_is_no_finished_seed_is_refused(break_it, message, tmp_path):
    written_seed(tmp_path / "seed", 0)
    break_it(tmp_path / "seed")
    with pytest.raises(UserError, match=message):
        compared("--runs", str(tmp_path / "seed"), str(tmp_path / "none"))


def test_two_runs_of_one_seed_are_compared_and_said_to_be_of_one(tmp_path, capsys):
    seeds = [written_seed(tmp_path / "a", 4, kl=1.0), written_seed(tmp_path / "b", 4, kl=2.0)]
    compared("--runs", *seeds, "--markdown")
    printed = capsys.readouterr().out
    rows = markdown_rows(printed)
    assert list(rows)[:2] == [f"{seed} (seed 4)" for seed in seeds] and rows["mean"]["KL"] == "1.50"
    assert "\nseed 4 was run 2 times: that is no spread over seeds\n" in printed


def test_two_configurations_are_compared_without_being_mixed(tmp_path, capsys):
    """kl_coef .05 with seeds 0 and 1, .1 with 0 and 0 again, .2 once: three means are two."""
    runs = [written_seed(tmp_path / name, seed, kl_coef=coef, kl=kl) for name, seed, coef, kl in (
        ("a", 0, 0.05, 1.0), ("b", 0, 0.1, 10.0), ("c", 1, 0.05, 3.0), ("d", 0, 0.1, 20.0),
        ("e", 5, 0.2, 7.0))]
    compared("--runs", *runs, "--markdown", "--output", str(tmp_path / "curves.png"))
    printed = capsys.readouterr().out
    rows = markdown_rows(printed)
    assert list(rows)[:5] == [f"{run} (seed {seed}, {letter})" for run, seed, letter in zip(
        runs, (0, 0, 1, 0, 5), "ABABC", strict=True)]
    assert list(rows)[5:] == [f"{name}, {letter}" for letter in "AB" for name in ("mean", "sd", "min", "max")]
    assert (rows["mean, A"]["KL"], rows["mean, B"]["KL"], rows["sd, A"]["KL"]) == ("2.00", "15.00", "1.41")
    assert "\nppo/kl_coef: 0.05 in A, 0.1 in B, 0.2 in C\n" in printed
    assert "\nseed 0 of B was run 2 times" in printed and "of A was run" not in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_key_that_one_run_does_not_know_is_a_difference(tmp_path, capsys):
    seeds = [Path(written_seed(tmp_path / name, number)) for number, name in enumerate("ab")]
    config = seeds[1] / "sft" / "config.yaml"
    config.write_text(config.read_text() + "new_key: 3\n")
    compared("--runs", *map(str, seeds))
    assert "\nsft/new_key: not there in A, 3 in B\n" in capsys.readouterr().out


def test_stages_that_a_run_lacks_are_dashes(tmp_path, capsys):
    """One stage by itself, beside a run without PPO and a whole one."""
    whole = Path(written_seed(tmp_path / "whole", 0, kl=3.0))
    part = Path(written_seed(tmp_path / "part", 1))
    shutil.rmtree(part / "ppo")
    compared("--runs", str(whole), str(part), str(whole / "ppo"), "--markdown")
    rows = list(markdown_rows(capsys.readouterr().out).values())
    assert [row["KL"] for row in rows[:3]] == ["3.00", "-", "3.00"]
    assert [row["reward accuracy"] for row in rows[:3]] == ["0.600", "0.600", "-"]
    compared("--runs", str(part / "sft"), str(part / "reward"))
    assert "collapsed: none" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="^runs: no run in '.*/empty': neither summary.json nor a folder sft"):
        compared("--runs", str(tmp_path / "empty"))
    seed = Path(written_seed(tmp_path / "seed", 0))
    for text in ("{}", "[]", "{", '{"stage": "other"}'):
        (seed / "ppo" / "final" / "stage.json").write_text(text)
        with pytest.raises(UserError, match="^runs: '.*/stage.json' does not say which stage this is"):
            compared("--runs", str(seed / "ppo"))


@pytest.mark.parametrize("script", ["compare_seeds.py", "over_optimisation.py"])
@pytest.mark.parametrize(("words", "message"), [
    ([], "error: runs: name the folders"),
    (["--runs"], "error: command line: --runs: expected at least one argument"),
    (["--runs", "nowhere"], "error: runs: 'nowhere' does not exist"),
    (["--runs", "nowhere", "--output", "no/folder.png"], "error: output: 'no/folder.png' must be a "
                                                         ".png file in a folder"),
    (["--runs", "nowhere", "--output", "figure.gif"], "error: output: 'figure.gif' must be a "
                                                      ".png file in a folder"),
    (["--nonsense"], "error: command line: unknown key '--nonsense'"),
])
def test_mistakes_are_one_line_and_status_2(script, words, message, tmp_path, monkeypatch, capsys):
    """As a user meets them: through `start`."""
    module = {"compare_seeds.py": compare_seeds, "over_optimisation.py": over_optimisation}[script]
    kind = {"compare_seeds.py": "CompareConfig", "over_optimisation.py": "OverOptimisationConfig"}[script]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as stopped:
        module.start(module.main, module.read_config(getattr(module, kind), None, ""))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert printed.err.startswith(message) and printed.err.count("\n") == 1


def test_help_says_what_collapsed_means(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_seeds.py", "--help"])
    with pytest.raises(SystemExit) as left:
        compare_seeds.read_config(compare_seeds.CompareConfig, None, compare_seeds.__doc__)
    printed = capsys.readouterr().out
    assert left.value.code == 0 and "A run counts as collapsed when" in printed and "--markdown" in printed


# ------------------------------------------------------------------------------------------ over-optimisation

K, POSTS = 6, 3
# kl, near-greedy score and gold, sampled score and gold of the evaluations at updates 0, 3, 6, 9
POINTS = [(-1e-7, 0.5, 0.6, 0.1, 0.5), (2.0, 0.9, 0.8, 0.6, 0.8), (4.0, 1.2, 0.7, 0.9, 0.76),
          (9.0, 1.5, 0.4, 1.2, 0.3)]
NAMES = ("eval/kl", "eval/score", "eval/gold", "eval/score_sampled", "eval/gold_sampled")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny random SFT model and reward model with the mini tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = mini_tokenizer()
    config = opt_config(tokenizer)
    torch.manual_seed(0)
    policy, reward_model = (AutoModelForCausalLM.from_config(config),
                            AutoModelForSequenceClassification.from_config(config))
    # so that within 8 tokens some samples end, and others are cut off after a full stop
    with torch.no_grad():
        for token, logit in ((tokenizer.eos_token_id, 6.0),
                             (tokenizer(".", add_special_tokens=False)["input_ids"][-1], 7.0)):
            weight = policy.lm_head.weight[token]
            policy.model.decoder.final_layer_norm.bias += logit * weight / weight.square().sum()
    for name, model in (("sft", policy), ("reward", reward_model)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def written_run(models, tmp_path):
    """Makes the folder of a finished PPO run, as far as the script reads it."""
    def write(name, points=POINTS, names=NAMES, model="sft", **settings):
        run = tmp_path / name
        (run / "final").mkdir(parents=True)
        settings = {"temperature": 0.9, "max_new_tokens": 8, "max_prompt_tokens": 256,
                    "missing_eos_score": -1.0,
                    "eval_rows": POSTS, "kl_budget": 8.0, "kl_coef": 0.05, **settings}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        rows = [{"step": 3 * i, **dict(zip(names, point, strict=False))} for i, point in enumerate(points)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n"
                                                   for row in [*rows, {"step": 9, "objective/kl": 9.0}]))
        (run / "summary.json").write_text("{}")
        parents = {"model": Parent("model", str(models / model)).identity,
                   "reward_model": Parent("reward_model", str(models / "reward")).identity}
        (run / "final" / "stage.json").write_text(json.dumps({"parents": parents}))
        return str(run)
    return write


def drawn(models, runs, *words):
    words = ["--sft", str(models / "sft"), "--reward_model", str(models / "reward"), "--rows", str(POSTS),
             "--best_of", str(K),
             *(["--runs", *runs] if runs else []), *words]
    return over_optimisation.main(parse_config(over_optimisation.OverOptimisationConfig, None, words))


def test_figure_and_numbers(models, written_run, tmp_path, capsys, monkeypatch):
    """The rule picks update 6: update 9 scores higher beyond the budget. Gold peaks at update 3: .76 / .8 =
    .95.
    """
    monkeypatch.setattr(over_optimisation, "SCORED_IN_A_ROW", 4)  # two rows for the 6 samples of a post
    other = [(0.0, 0.5, 0.6, 0.1, -0.5), (1.0, 0.4, 0.8, 0.6, -0.2)]
    runs = [written_run("one"), written_run("two", other, kl_coef=0.0)]
    drawn(models, runs, "--output", str(tmp_path / "o.png"), "--json", str(tmp_path / "o.json"))
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "o.json").read_text())
    one, two = found["runs"]
    assert one["rule"]["update"] == 6 and two["rule"]["update"] == 0
    assert one["rule"]["gold"] == {"picked": 0.76, "peak": 0.8, "peak_update": 3,
                                   "ratio": pytest.approx(0.95)}
    assert one["rule"]["greedy_gold"]["ratio"] == pytest.approx(0.7 / 0.8)
    assert two["rule"]["gold"]["ratio"] is None  # of a peak below 0
    assert [point["gold"] for point in one["points"]] == [0.5, 0.8, 0.76, 0.3]
    printed = capsys.readouterr().out
    assert "6 of 9" in printed and "0.950" in printed and "0.875" in printed and "note:" not in printed
    for point, (n, score, gold) in zip(found["best_of_n"], naive_best_of_n(models), strict=True):
        assert point == {"n": n, "kl": pytest.approx(math.log(n) - (n - 1) / n),
                         "score": pytest.approx(score, abs=1e-4),
                         "gold": pytest.approx(gold, abs=1e-4)}


@torch.no_grad()
def naive_best_of_n(models):
    """Each sample scored by itself through stock transformers, then all subsets of each post's samples."""
    tokenizer = AutoTokenizer.from_pretrained(models / "sft")
    reward_model = AutoModelForSequenceClassification.from_pretrained(models / "reward").eval()
    rules = load_gold(PROJECT / "data/tldr_mini/gold.json")
    posts = [json.loads(line) for line in subprocess.run(
        ["gzip", "-dc", PROJECT / "data/tldr_mini/rlhf_validation.jsonl.gz"], capture_output=True, check=True
    ).stdout.splitlines()[:POSTS]]
    prompts = [tokenizer(post["prompt"])["input_ids"] for post in posts]
    policy = with_our_heads(AutoModelForCausalLM.from_pretrained(models / "sft"))
    found = sample(policy, prompts, k=K, max_new_tokens=8, temperature=0.9,
                   seeds=list(range(POSTS * K)), eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    texts = tokenizer.batch_decode(found.responses, skip_special_tokens=True)
    cut = [text for text, ended in zip(texts, found.ended, strict=True) if not ended]
    assert len(cut) < len(texts) and any(text.endswith(".")
                                         for text in cut), ("both kinds of samples must be there")
    judged = []
    for i, (tokens, ended) in enumerate(zip(found.responses, found.ended, strict=True)):
        score = (reward_model(input_ids=torch.tensor([prompts[i // K] + tokens])).logits.item() if ended
                 else -1.0)
        judged.append((score, gold_score(texts[i], posts[i // K]["facts"], rules, ended)))
    for n in (1, 2, 4):
        scores, golds = [], []
        for first in range(0, POSTS * K, K):
            for subset in itertools.combinations(judged[first : first + K], n):
                best = max(score for score, _ in subset)
                scores.append(best)
                golds.append(fmean(gold for score, gold in subset if score == best))
        yield n, fmean(scores), fmean(golds)


def test_the_rule_takes_the_first_of_equal_scores_and_the_last_policy_where_none_is_within_the_budget(
    written_run):
    points = [(1.0, score, 0.0, 0.0, 0.0) for score in (0.5, 0.7, 0.7)]
    equal = over_optimisation.load_run(written_run("equal", points))
    assert over_optimisation.picked(equal)["update"] == 3
    beyond = over_optimisation.load_run(written_run("beyond", kl_budget=-1.0))
    assert over_optimisation.picked(beyond)["update"] == 9


def test_the_rule_can_be_judged_with_another_budget(models, written_run, tmp_path):
    output, report = str(tmp_path / "o.png"), str(tmp_path / "o.json")
    drawn(models, [written_run("one")], "--output", output, "--json", report, "--kl_budget", "3")
    [run] = json.loads((tmp_path / "o.json").read_text())["runs"]
    assert run["rule"]["update"] == 3 and run["rule"]["gold"]["ratio"] == 1


def test_an_evaluation_that_is_not_a_number_is_left_out(written_run):
    run = over_optimisation.load_run(written_run("null", [*POINTS, (1.0, None, 0.5, 0.5, 0.5)]))
    assert [point["update"] for point in run.points] == [0, 3, 6, 9]


@pytest.mark.parametrize(("write", "message"), [
    ({"names": NAMES[:3]}, "^runs: '.*/run/metrics.jsonl' has evaluations without "
                           "eval/score_sampled; train it again"),
    ({"points": []}, "^runs: '.*/run' is no finished PPO run"),
    ({"model": "reward"}, "^runs: the model of '.*/run' was not '.*/sft'; give the one it was trained with"),
    ({"temperature": 0.7}, "^runs: temperature is 0.7 in '.*/run' but 0.9 in '.*/first'"),
])
def test_runs_that_do_not_belong_in_one_figure_are_refused(write, message, models, written_run):
    with pytest.raises(UserError, match=message):
        drawn(models, [written_run("first"), written_run("run", **write)])


def test_other_posts_than_those_of_the_runs_are_noted(models, written_run, tmp_path, capsys):
    drawn(models, [written_run("run", eval_rows=48)], "--output", str(tmp_path / "o.png"))
    assert "note: best-of-n takes 3 posts, but the runs were evaluated on 48" in capsys.readouterr().out
