"""Stage 2, the reward model: the SFT model's trunk with a scalar head learns which summary people prefer.

    python scripts/train_reward.py                                  # the embedded default, after train_sft.py
    python scripts/train_reward.py --config configs/opt/reward.yaml configs/opt/125m.yaml
    python scripts/train_reward.py --reward_training_data my.jsonl --model outputs/mine/sft/final \\
        --output_dir outputs/mine/reward

K ranked summaries of a post are one row: the post is computed once and all K(K-1)/2 pairs are trained on. The
loss is -log sigmoid(r_better - r_worse), one mean over all pairs of an optimizer step, or over its posts
(`pair_weighting`). At the end the scores are shifted so that reference summaries score 0, and the model is
saved as a stock one-label classifier. With a reward model as `--model` training goes on from that one.

It does not train on absolute ratings.
"""

import math
import time
from dataclasses import dataclass
from statistics import fmean
from typing import ClassVar

from utils.config import PROJECT, UserError, key
from utils.data.sources import data_key
from utils.launch import read_config, start
from utils.models.folders import model_key
from utils.stage_keys import EpochStageConfig


@dataclass
class RewardStageConfig(EpochStageConfig):
    """The reward model. Defaults: OPT on TL;DR comparisons."""

    section: ClassVar[str] = "reward"
    belongs_to: ClassVar[dict] = {"reward_training_data": ("reward_validation_data", "reward_test_data",
                                                           "centring_data", "rating_data")}

    model: str = model_key("outputs/opt-125m/sft/final", "The SFT model whose trunk is used, or a "
                                                         "reward model that goes on learning: a folder or a "
                                                         "hub name.")
    reward_training_data: str = data_key("CarperAI/openai_summarize_comparisons", "Comparisons or rankings.")
    reward_validation_data: str | None = data_key(None, "Rankings to watch during training; none: held "
                                                         "out of the training data.")
    reward_test_data: str | None = data_key(None, "Rankings that the final figures are taken on; "
                                                   "none: held out too.")
    centring_data: str | None = data_key(None, "Examples whose references score 0 on average (detail "
                                               "19); none: no shift.")
    rating_data: str | None = data_key(None, "Rated answers (openai/summarize_from_feedback, axis): in the "
                                             "end, how far scores agree with the overall ratings; "
                                             "none: not looked at.")
    max_completions: int = key(9, "Largest prompt group; larger ones are split.", unit="completions",
                               source="IG: K = 4 to 9", low=2, high=1000)
    min_score_ratio: float = key(1.0, "Rows with a smaller `score_ratio` are dropped; SHP's "
                                      "authors advise 2.",
                                 source="SHP", low=0.0, high=1e6)
    max_pairs_per_prompt: int | None = key(None, "Of a prompt's pairwise rows the first so many; SHP's "
                                                 "authors advise 5.",
                                           unit="pairs", source="SHP", low=1, high=10**6)
    max_completion_tokens: int = key(169, "Rankings with a longer completion are dropped.", unit="tokens",
                                     source="N+", low=2, high=10_000_000)
    pair_weighting: str = key("pair", "What weighs the same in a step's loss: each pair; or each post, "
                                      "whatever the number of its pairs.",
                              source="ST; post: IG eq. 1", choices=["pair", "post"])
    margin: float = key(0.0, "The better score must be above the worse by this.", unit="score",
                        source="Llama 2, 2307.09288", low=0.0, high=1000.0)
    margin_scale: float = key(0.0, "The margin of each pair in the data, times this, is added to `margin`; "
                                   "0: it is not looked at.",
                              source="Llama 2, 2307.09288", low=0.0, high=1000.0)
    centring_coef: float = key(0.0, "Weight of (better + worse)^2, which keeps the scores of "
                                    "each post around 0.",
                               source="Eisenstein 2023, 2312.09244", low=0.0, high=1000.0)
    other_answers: int = key(0, "Best answers of other prompts that a ranking gets in each step, worse than "
                                "all of its own.", unit="answers", source="own", low=0, high=1000)
    reward_heads: int = key(1, "Heads on the one trunk, each with its own bootstrap of the posts; final/ has "
                               "their mean, and reward_heads.safetensors each of them.", unit="heads",
                            source="Coste 2023, 2310.02743: 5", low=1, high=100)
    test_rows: int = key(1000, "Posts in the final figures.", unit="posts", low=1, high=10**9)
    eval_batch_size: int = key(32, "Rows scored at once.", unit="rows", low=1, high=100_000)


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(RewardStageConfig, PROJECT / "configs" / "tldr_mini" / "reward.yaml", __doc__)

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import set_seed

from utils.data.batches import LengthGroupedBatches, rows_at
from utils.data.other_answers import OtherAnswers
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, refuse_overlap, split_rows, tokenised
from utils.distributed import on_device
from utils.judge.evaluation import score_groups
from utils.judge.gold import labeller_figures
from utils.judge.metrics import (
    bootstrap_interval,
    expected_calibration_error,
    pair_accuracy,
    rank_correlation,
)
from utils.judge.plots import plot_calibration, plot_reward
from utils.judge.rankings import (
    accuracy_by_note,
    confidence,
    gaps_of,
    longest_accuracy,
    reliability_by_confidence,
)
from utils.loop import Loop
from utils.models.centring import centre_scores
from utils.models.fitness import refuse_unfit
from utils.models.four_bit import storage_of
from utils.models.heads import FILE, Heads, bootstrap_draws, give_heads, head_scores, take_heads
from utils.models.loading import load_scalar_model, trainable
from utils.models.outputs import GroupModel, scores
from utils.models.parents import Parent, check_task
from utils.models.prompt_groups import PromptGroups, micro_batches, pack
from utils.runs.ending import Ending, end_stage, refuse_broken_summaries
from utils.runs.final import rehearse_saving
from utils.runs.opening import open_stage, plan_of
from utils.runs.run import SHOWN, Run, refuse_impossible
from utils.zero import load_settings

# ---------------------------------------------------------------------------------------------- the algorithm


def train(loop: Loop, rankings, validation) -> None:
    """Minimise -log sigmoid(r_better - r_worse) over all pairs of each post's completions."""
    config, run = loop.config, loop.run
    batches = LengthGroupedBatches(list(rankings["length"]), config.rows_per_step, config.seed)
    others = OtherAnswers(rankings, config.other_answers, config.seed) if config.other_answers else None
    for step, places in loop.steps(batches):
        # a post with all its completions is one row; a step has the same rows for any number of processes
        rows = rows_at(rankings, loop.share(places))
        if others is not None:
            rows = others(rows, loop.share(places), step)
        passes = micro_batches([row["length"] for row in rows], config.per_device_batch_size,
                               config.micro_batch_tokens)
        parts = [collate([rows[i] for i in part], loop) for part in passes]
        # pairs or posts, of all ranks; a rank without rows must bring a number of the same type
        total = loop.total(sum((weights.sum() for *_, weights in parts), start=torch.tensor(0.0)))
        for groups, order, margins, draws, weights in loop.parts(
                parts, spare=lambda first=places[:1]: collate(rows_at(rankings, first), loop)):
            # all completions of a post are scored in one pass over the post, by all heads
            score = loop.model(groups)  # (N, H)
            better, worse = score[order].unbind(1)  # (P, H)
            losses = pairwise_loss(better, worse, margins[:, None], config.centring_coef)
            losses = (losses * draws).mean(1)  # (P,): each head has a bootstrap of the posts of its own
            loop.backward((losses * weights).sum() / total, groups)
        loop.optimizer_step()

        if loop.logs(step):
            loss = loop.mean_loss()
            loop.show(loss=loss)
            run.metrics(step, {"reward/loss": loss, "reward/grad_norm": loop.grad_norm,
                               "reward/learning_rate": loop.learning_rate})
        if loop.evaluates(step):
            evaluate(loop, validation, step)


def pairwise_loss(better: torch.Tensor, worse: torch.Tensor, margins: torch.Tensor,
                  centring_coef: float) -> torch.Tensor:
    """-log sigmoid(better - worse - margin) + centring_coef (better + worse)^2 of each pair, float32.

    Scores and losses are (P,), or (P, H) of H heads; the margins then (P, 1).

    Sources: ST; IG eq. 1 (detail 17). The margin is that of Llama 2 (2307.09288, eq. 2); the second term is
    Eisenstein et al.'s (2312.09244).
    """
    return -logsigmoid(better - worse - margins) + centring_coef * (better + worse).square()


def collate(rows: list[dict], loop: Loop) -> tuple[PromptGroups, *tuple[torch.Tensor, ...]]:
    """Prompt groups; (better, worse) indices into the batch's N completions, (P, 2); a pair's margin, (P,);
    how often each head has drawn its post, (P, H); its weight, (P,).

    The pairs of a post stand in one batch (detail 18) and weigh 1 each, or 1 together.
    """
    groups = pack([row["prompt"] for row in rows], [row["completions"] for row in rows],
                  loop.tokenizer.pad_token_id)
    starts = np.cumsum([0] + [len(row["completions"]) for row in rows])
    order = [(first + b, first + w) for first, row in zip(starts, rows, strict=False)
             for b, w in row["pairs"]]
    by_post = loop.config.pair_weighting == "post"
    weights = [1 / len(row["pairs"]) if by_post else 1.0 for row in rows for _ in row["pairs"]]
    margins = [loop.config.margin] * len(order)
    if loop.config.margin_scale:
        known = (margin for row in rows for margin in row["margins"])
        margins = [loop.config.margin + loop.config.margin_scale * margin for margin in known]
    draws = [bootstrap_draws(row["prompt"], loop.config.reward_heads, loop.config.seed) for row in rows]
    draws = [draw for draw, row in zip(draws, rows, strict=True) for _ in row["pairs"]]
    return (groups.to(loop.device), *(on_device(torch.tensor(values), loop.device)
                                      for values in (order, margins, draws, weights)))


# -------------------------------------------------------------------------------------------- what it reaches


def accuracy_of(loop: Loop, rows, title: str) -> tuple[dict[str, float], list[list[float]]]:
    """Accuracy over all pairs with its interval over posts, calibration (detail 20); and the scores.

    Raises:
        UserError: when a score is not finite, which has no order.
    """
    found = scores_of(loop, rows["prompt"], rows["completions"], title)
    if not all(math.isfinite(score) for group in found for score in group):
        raise UserError(f"{title}: a score is not finite (NaN or infinite): lower learning_rate; the "
                        f"last checkpoint is "
                        "intact")
    # a post whose answers are spread over several groups is one post
    posts = list(map(tuple, rows["prompt"]))
    accuracy, low, high = bootstrap_interval(*pair_accuracy(found, rows["pairs"]), posts, loop.config.seed)
    gaps, right = gaps_of(found, rows["pairs"])
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "pairs": len(gaps),
            "ece": expected_calibration_error(confidence(gaps), right)}, found


def scores_of(loop: Loop, prompts, completions, title: str, outputs=scores) -> list[list]:
    """The model's score of each completion of each prompt; with `head_scores` those of each head."""
    with loop.accelerator.autocast():
        return score_groups(loop.module.model, loop.tokenizer, prompts, completions,
                            loop.config.eval_batch_size, title, outputs)


def evaluate(loop: Loop, validation, step: int) -> None:
    """Log what the model reaches on the validation rankings."""
    figures, found = accuracy_of(loop, validation, "validation")
    loop.run.metrics(step, {"eval/accuracy": figures["accuracy"], "eval/ece": figures["ece"]})
    loop.run.samples(step, "validation", judged(loop, validation, found, SHOWN))
    loop.run.log(f"step {step}, validation: accuracy {figures['accuracy']:.3f}, ece {figures['ece']:.3f}")


def judged(loop: Loop, rows, found: list[list[float]], count: int) -> list[dict]:
    """The first rankings as text, with the score of each completion."""
    decode = loop.tokenizer.batch_decode
    columns = (rows[name][:count] for name in ("prompt", "completions", "pairs"))
    return [{"prompt": decode([prompt], skip_special_tokens=True)[0], "pairs": order,
             "completions": decode(completions, skip_special_tokens=True), "scores": score}
            for prompt, completions, order, score in zip(*columns, found[:count], strict=True)]


def centre(loop: Loop, references) -> None:
    """Shift the scores so that reference summaries score 0 on average (detail 19)."""
    found = scores_of(loop, references.prompts, [[completion] for completion in references.completions],
                      "centring")
    mean = float(np.mean(found))
    centre_scores(loop.module.model, mean, fold=not loop.config.save_adapters)
    loop.run.log(f"shifted the scores by {-mean:+.3f}: the {len(found)} reference summaries now "
                 f"score 0 on average")


def finish_heads(loop: Loop, heads: Heads, references, test) -> dict:
    """Shift each head so that reference summaries score 0 by it, as they do by the mean; its accuracy."""
    model = loop.module.model
    mean_head, model.score = model.score, heads
    if references is not None:
        found = scores_of(loop, references.prompts, [[completion] for completion in references.completions],
                          "centring, heads", head_scores)  # (references, 1, H)
        heads.bias.data -= torch.tensor(found, device=heads.bias.device).mean((0, 1))
    found = scores_of(loop, test["prompt"], test["completions"], "test, heads", head_scores)
    model.score = mean_head
    reached = []
    for head in range(len(heads.bias)):
        right, pairs = pair_accuracy([[each[head] for each in group] for group in found], test["pairs"])
        reached.append(float(right.sum() / pairs.sum()))
    loop.run.log(f"test, accuracy of each head: {', '.join(f'{accuracy:.3f}' for accuracy in reached)}")
    return {"file": FILE, "count": len(reached), "accuracy": reached}


def log_rating_agreement(loop: Loop, ratings) -> None:
    """Spearman's correlation of the scores with the labellers' overall ratings."""
    found = scores_of(loop, ratings["prompt"], ratings["completions"], "ratings")
    rated = [rating for group in ratings["label_scores"] for rating in group]
    agreement = rank_correlation([score for group in found for score in group], rated)
    loop.run.log(f"test, rank correlation of scores and overall ratings: {agreement:.3f} "
                 f"({len(rated)} answers)")


# ------------------------------------------------------------------------------------------------- the script


def load_splits(config: RewardStageConfig, tokenizer, report: DataReport):
    """Training, validation and test rankings as tokens, no prompt in two; references for centring; rated
    answers.
    """
    longest = config.max_completion_tokens
    loaded = load_data(config, {
        "reward_training_data": NamedSet(config.reward_training_data, "rankings", longest),
        "reward_validation_data": NamedSet(config.reward_validation_data, "rankings", longest),
        "reward_test_data": NamedSet(config.reward_test_data, "rankings", longest),
        "centring_data": NamedSet(config.centring_data, "examples", longest),
        "rating_data": NamedSet(config.rating_data, "ratings", longest),
    }, tokenizer, report, {"max_completions": config.max_completions,
                           "min_score_ratio": config.min_score_ratio,
                           "max_pairs_per_prompt": config.max_pairs_per_prompt})
    names = ("reward_training_data", "reward_validation_data", "reward_test_data")
    parts = split_rows(config, loaded, *names, report)
    report.groups("reward_training_data", parts[0])
    if config.margin_scale:
        report.margins("reward_training_data", parts[0])
    references = loaded.get("centring_data")
    if references is not None:
        references = tokenised(references.first(config.test_rows))
    ratings = loaded.get("rating_data")
    if ratings is not None:
        refuse_overlap({"reward_training_data": parts[0], "rating_data": ratings}, config.allow_overlap,
                       report.log)
        ratings = ratings.dataset()
    return *(rows.dataset() for rows in parts), references, ratings


def main(config: RewardStageConfig) -> None:
    base = Parent("model", config.model, config.chat_template, stages=("sft", "ppo", "reward"))
    open_stage(config, base)
    refuse_impossible(config)
    set_seed(config.seed)
    check_task(base)
    refuse_broken_summaries(base)
    report = DataReport()
    rankings, validation, test, references, ratings = load_splits(config, base.tokenizer, report)
    report.tokens("reward_training_data", rankings)
    deepspeed = load_settings(config, base)
    # a reward model keeps its head, and goes on from what it knows
    model = load_scalar_model(base, new_head_seed=None if base.is_reward_model else config.seed,
                              storage=storage_of(config))
    model.config.pad_token_id = base.tokenizer.pad_token_id
    refuse_unfit(model, base, base.tokenizer, config.max_prompt_tokens + config.max_completion_tokens,
                 "max_prompt_tokens + max_completion_tokens")
    rehearse_saving(model, base.tokenizer, config)
    model = trainable(model, config)
    give_heads(model, base, config)

    run = Run(config, "reward", report, [base])
    schedule = config.schedule(len(rankings))
    run.log(plan_of(config, len(rankings), schedule.steps, run.unit))
    loop = Loop(run, GroupModel(model, head_scores), base.tokenizer, schedule, deepspeed)
    loop.resume()
    if loop.step == 0:
        evaluate(loop, validation, 0)
    began = time.monotonic()
    train(loop, rankings, validation)
    seconds = time.monotonic() - began
    heads = take_heads(model)  # from here on the model is what final/ will hold
    # only differences are trained, so the level of the scores is free: 0 is what people wrote
    if references is not None:
        centre(loop, references)
    if ratings is not None:
        log_rating_agreement(loop, ratings)
    figures, found = accuracy_of(loop, test, "test")
    speed = loop.steps_done * config.rows_per_step * fmean(map(len, rankings["pairs"])) / seconds
    end = ending(loop, test, figures, found, speed)
    if heads is not None:
        end.stage["reward_heads"] = finish_heads(loop, heads, references, test)
        end = end._replace(tensors={FILE: {name: each.data.cpu() for name, each in heads.named_parameters()}})
    end_stage(run, loop.step, model, base.tokenizer, [base], end)


def ending(loop: Loop, test, figures: dict, found: list[list[float]], speed: float) -> Ending:
    """Samples with their scores, and the final figures; what they depend on is logged (detail 20)."""
    known, curves = labeller_figures(test, found)
    curves = {"reward model's confidence": reliability_by_confidence(found, test["pairs"])} | curves
    for name, curve in curves.items():
        shown = ", ".join(f"{sure:.2f}: {right:.3f} ({n} pairs)" for sure, right, n in curve)
        loop.run.log(f"test, accuracy by {name}: {shown}")
    for column, values in accuracy_by_note(found, test).items():
        shown = ", ".join(f"{value}: {right:.3f} ({n} pairs)" for value, right, n in values)
        loop.run.log(f"test, accuracy by {column}: {shown}")
    pairs = [(group[b], group[w]) for group, order in zip(found, test["pairs"], strict=True)
             for b, w in order]

    def plot(run):
        plot_calibration(run, curves)
        plot_reward(run, pairs)

    return Ending(
        samples=judged(loop, test, found, 20),
        summary={**figures, "longest_accuracy": longest_accuracy(test), **known},
        work={"pairs_per_second": speed},
        stage={"max_prompt_tokens": loop.config.max_prompt_tokens, "accuracy": figures["accuracy"],
               "score_shift": loop.module.model.config.score_shift},
        plot=plot,
    )


if __name__ == "__main__":
    start(main, CONFIG)
