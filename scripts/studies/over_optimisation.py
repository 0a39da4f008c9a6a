"""Over-optimisation: the gold score while the reward model's score rises (Gao et al., arXiv 2210.10760).

    make over_optimisation                           # three PPO runs past the usual end, then this script
    python scripts/studies/over_optimisation.py --sft outputs/tldr_mini/sft/final \\
        --reward_model outputs/tldr_mini/reward/final \\
        --runs outputs/over/kl0.0 outputs/over/kl0.04 outputs/over/kl0.12 --output outputs/over.png

Both scores are plotted against the KL to the SFT policy: for the evaluations of each PPO run, and for
best-of-n. Best-of-n samples n summaries from the SFT model and takes the one with the highest score of the
reward model.

Score, gold score and KL of a point belong to one policy: all three are measured on summaries sampled at the
training temperature (PPO's `eval/score_sampled`, `eval/gold_sampled` and `eval/kl`). The nearly greedy
summaries of `eval/score` and `eval/gold` are another policy's and score higher even at a KL of 0. They would
put PPO above best-of-n without PPO's doing. So the curves must start at one point: update 0 and best-of-1 are
both the SFT model. Give the posts that the runs were evaluated on.

The KL of best-of-n is analytic: log n - (n - 1) / n. It is an upper bound, because two samples of a post can
be equal.

A star marks the evaluation whose policy train_ppo.py keeps: the one with the highest nearly greedy score
(`eval/score`) within the run's kl_budget, or within the budget given here. The table shows which share of the
run's gold peak that policy has.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from utils.config import UserError, key
from utils.console import show_table
from utils.data.rows import load_examples
from utils.data.tokens import prompt_tokens
from utils.judge.evaluation import score_groups
from utils.judge.gold import gold_score, load_rules, refuse_missing_facts
from utils.judge.metrics import best_of_n, best_of_n_kl
from utils.judge.plots import plot_over_optimisation
from utils.launch import read_config, start
from utils.models.generation import sample
from utils.models.loading import load_policy, load_scalar_model
from utils.models.parents import Parent
from utils.runs.records import read_whole_rows
from utils.runs.run import finished_run, output_file
from utils.yaml_files import read_yaml

SAMPLED_AT_ONCE = 256  # responses. With 4 times as many a response takes 1.5 times as long: the caches grow.
SCORED_IN_A_ROW = 16  # responses of one prompt in a row. With all 64 attention takes twice as long.
# keys that the runs must share with one another and with best-of-n
SETTINGS = ("temperature", "max_new_tokens", "max_prompt_tokens", "missing_eos_score", "eval_rows")
# measures of an evaluation -> their keys in metrics.jsonl; the last two are of nearly greedy summaries
MEASURES = {
    "kl": "eval/kl", "score": "eval/score_sampled", "gold": "eval/gold_sampled",
    "greedy_score": "eval/score", "greedy_gold": "eval/gold",
}


@dataclass
class OverOptimisationConfig:
    """Models, runs, posts and output."""

    sft: str = key("outputs/tldr_mini/sft/final", "The SFT model that the runs started from.")
    reward_model: str = key("outputs/tldr_mini/reward/final", "The reward model of the runs.")
    runs: list[str] = key([], "Folders of finished PPO runs.")
    data: str = key("data/tldr_mini/rlhf_validation.jsonl.gz", "Posts with `facts` for best-of-n: a file or "
                    "folder.")
    gold_rules: str = key("data/tldr_mini/gold.json", "Rules of the gold score.")
    kl_budget: float | None = key(None, "Pick checkpoints within this budget instead of the runs' own.",
                                  unit="nats a summary", low=0.0, high=1e9)
    rows: int = key(200, "Posts for best-of-n; if there are fewer, all.", unit="posts", low=1, high=10**9)
    best_of: int = key(64, "Samples of each post: the largest n.", unit="responses", source="ST, Gao",
                       low=1, high=100_000)
    seed: int = key(0, "Seed of the samples.", low=0, high=2**32 - 1)
    output: str = key("over_optimisation.png", "Write the figure to this .png file.")
    json: str | None = key(None, "Write all numbers of the figure to this .json file.")


class PPORun(NamedTuple):
    """A finished PPO run."""

    name: str  # its folder
    settings: dict  # config.yaml
    points: list[dict]  # its evaluations in order: `update` and the MEASURES of each
    parents: dict  # the models that it started from, from stage.json


def load_run(name: str) -> PPORun:
    """Read a run's config.yaml, metrics.jsonl and stage.json.

    Raises:
        UserError: when the folder does not exist, the run is not finished or not PPO, or a measure is
            missing.
    """
    folder, _ = finished_run(name, "", "runs")
    settings, _ = read_yaml(folder / "config.yaml")
    rows = {row["step"]: row for row in read_whole_rows(folder / "metrics.jsonl") if "eval/score" in row}
    stage = folder / "final" / "stage.json"
    if not rows or not stage.is_file():
        raise UserError(f"runs: '{name}' is no finished PPO run; name folders that train_ppo.py has written")
    for logged in MEASURES.values():
        if any(logged not in row for row in rows.values()):
            raise UserError(f"runs: '{name}/metrics.jsonl' has evaluations without {logged}; train it again, "
                            "with gold_rules")
    points = [{"update": step} | {measure: row[logged] for measure, logged in MEASURES.items()}
              for step, row in rows.items()]
    # NaN is logged as null; such an evaluation is neither plotted nor picked
    points = [point for point in points if None not in point.values()]
    return PPORun(name, settings, points, json.loads(stage.read_text(encoding="utf-8"))["parents"])


def load_runs(config: OverOptimisationConfig) -> list[PPORun]:
    """Read all runs.

    Raises:
        UserError: when a run has other parents than the models given, or the runs differ in one of SETTINGS.
    """
    if not config.runs:
        raise UserError("runs: name the folders of PPO runs, for example --runs outputs/over/kl0.0 "
                        "outputs/over/kl0.04")
    runs = [load_run(name) for name in config.runs]
    for field, name in (("model", config.sft), ("reward_model", config.reward_model)):
        given = Parent(field, name).identity
        for run in runs:
            parent = run.parents[field]
            if given.get("sha256", name) != parent.get("sha256", parent["name"]):
                raise UserError(f"runs: the {field} of '{run.name}' was not '{name}'; give the one it was "
                                "trained with")
    for run in runs:
        for setting in SETTINGS:
            value, first = run.settings[setting], runs[0].settings[setting]
            if value != first:
                raise UserError(f"runs: {setting} is {value} in '{run.name}' but {first} in "
                                f"'{runs[0].name}'; give runs with the same {setting}")
    if config.kl_budget is not None:
        runs = [run._replace(settings=run.settings | {"kl_budget": config.kl_budget}) for run in runs]
    return runs


def picked(run: PPORun) -> dict:
    """The evaluation whose policy the run kept.

    That is the first one with the highest score within the KL budget, or the last of all if none is within
    it.
    """
    within = [point for point in run.points if point["kl"] <= run.settings["kl_budget"]]
    return max(within, key=lambda point: point["greedy_score"], default=run.points[-1])


def judged_samples(
    config: OverOptimisationConfig, settings: dict
) -> tuple[list[list[float]], list[list[float]]]:
    """Sample summaries from the SFT model and score them.

    Returns:
        Scores of the reward model and gold scores, both (posts, best_of). A sample without EOS scores
        `missing_eos_score`, as in training.
    """
    rules, k = load_rules(config.gold_rules), config.best_of
    examples = load_examples(config.data, "data", need_completion=False)[: config.rows]
    refuse_missing_facts(rules, examples)
    sft = Parent("sft", config.sft)
    tokenizer, policy = sft.tokenizer, load_policy(sft)
    reward_parent = Parent("reward_model", config.reward_model)
    reward_model = load_scalar_model(reward_parent, vocab_size=policy.config.vocab_size)
    posts = [example.prompt for example in examples]
    prompts = prompt_tokens(tokenizer, posts, settings["max_prompt_tokens"])
    count = len(prompts) * k
    samples = sample(
        policy, prompts, k=k, max_new_tokens=settings["max_new_tokens"], temperature=settings["temperature"],
        seeds=[config.seed * 1_000_003 + number for number in range(count)],
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, batch_size=max(1, SAMPLED_AT_ONCE // k),
        progress=f"best of {k}, sampling",
    )
    # (post, numbers of its responses) of each row to score
    rows = [(post, range(first, min(first + SCORED_IN_A_ROW, post * k + k)))
            for post in range(len(prompts)) for first in range(post * k, post * k + k, SCORED_IN_A_ROW)]
    scores_of_rows = score_groups(
        reward_model, tokenizer, [prompts[post] for post, _ in rows],
        [[samples.responses[i] for i in part] for _, part in rows], 8, f"best of {k}, scores",
    )
    raw_scores = [score for row in scores_of_rows for score in row]
    scores = [score if ended else settings["missing_eos_score"]
              for score, ended in zip(raw_scores, samples.ended, strict=True)]
    texts = tokenizer.batch_decode(samples.responses, skip_special_tokens=True)
    gold = [gold_score(text, examples[i // k].facts, rules, samples.ended[i]) for i, text in enumerate(texts)]
    return tuple([column[i : i + k] for i in range(0, count, k)] for column in (scores, gold))


def best_of_n_curve(scores: list[list[float]], gold: list[list[float]]) -> list[dict]:
    """The points of best-of-n for n = 1, 2, 4, ...

    The best of n is the one with the highest score. Its score and gold score are expectations, averaged over
    posts. The KL is analytic.

    Args:
        scores, gold: (posts, samples) each.
    """
    sizes = [2**power for power in range(len(scores[0]).bit_length())]
    return [{
        "n": n, "kl": best_of_n_kl(n), "score": fmean(best_of_n(post, post, n) for post in scores),
        "gold": fmean(best_of_n(post, post_gold, n) for post, post_gold in zip(scores, gold, strict=True)),
    } for n in sizes]


def rule_of(run: PPORun) -> dict:
    """What the best-checkpoint rule picked: its gold score, the run's gold peak and the ratio of the two.

    Both for sampled and for nearly greedy summaries. The ratio is None when the peak is not above 0.
    """
    pick, ratios = picked(run), {}
    for measure in ("gold", "greedy_gold"):
        peak = max(run.points, key=lambda point: point[measure])
        ratios[measure] = {
            "picked": pick[measure], "peak": peak[measure], "peak_update": peak["update"],
            "ratio": pick[measure] / peak[measure] if peak[measure] > 0 else None,
        }
    return {"update": pick["update"], "kl": pick["kl"], **ratios}


def print_rules(runs: list[PPORun], rules: list[dict]) -> None:
    """Print what the best-checkpoint rule picked in each run."""
    table = Table(title="What the best-checkpoint rule keeps of the gold peak", title_justify="left")
    for column in ("run", "kl_coef", "picked update", "KL", "gold", "gold peak", "at update", "ratio",
                   "ratio, nearly greedy"):
        # folded, not cut: the end of a folder's name tells the runs apart
        table.add_column(column, overflow="fold")
    for run, rule in zip(runs, rules, strict=True):
        gold = rule["gold"]
        ratios = ["-" if ratio is None else f"{ratio:.3f}"
                  for ratio in (gold["ratio"], rule["greedy_gold"]["ratio"])]
        table.add_row(
            run.name, str(run.settings["kl_coef"]), f"{rule['update']} of {run.points[-1]['update']}",
            f"{rule['kl']:.2f}", f"{gold['picked']:.3f}", f"{gold['peak']:.3f}", str(gold["peak_update"]),
            *ratios,
        )
    show_table(table)


def main(config: OverOptimisationConfig) -> None:
    output = output_file(config.output, "output", ".png")
    report = output_file(config.json, "json", ".json") if config.json else None
    runs = load_runs(config)
    settings = runs[0].settings
    if config.rows != settings["eval_rows"]:
        print(f"note: best-of-n takes {config.rows} posts, but the runs were evaluated on "
              f"{settings['eval_rows']} (eval_rows)")
    scores, gold = judged_samples(config, settings)
    curve, rules = best_of_n_curve(scores, gold), [rule_of(run) for run in runs]
    lines = [{"label": f"PPO, kl_coef {run.settings['kl_coef']}", "picked": picked(run), "points": run.points}
             for run in runs]
    caption = (f"Summaries of validation posts, sampled at temperature {settings['temperature']}. Best of n: "
               f"{len(scores)} posts, {config.best_of} samples of each; the KL is an upper bound.\nStar: the "
               "checkpoint that is kept (highest score of nearly greedy summaries within the KL budget).")
    plot_over_optimisation(output, lines, curve, caption)
    print_rules(runs, rules)
    print(f"figure: {output}")
    if report:
        figures = [{"run": run.name, "kl_coef": run.settings["kl_coef"], "rule": rule, "points": run.points}
                   for run, rule in zip(runs, rules, strict=True)]
        numbers = {"best_of_n": curve, "runs": figures}
        report.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    start(main, read_config(OverOptimisationConfig, None, __doc__))
