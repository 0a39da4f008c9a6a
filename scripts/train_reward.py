"""Stage 2, the reward model: the SFT model's trunk with a scalar head learns which summary people prefer.

    python scripts/train_reward.py                                        # the embedded default, after train_sft.py
    python scripts/train_reward.py --config configs/opt-125m/reward.yaml
    python scripts/train_reward.py --reward_training_data my.jsonl --reward_validation_data none --reward_test_data none \\
        --centring_data none --model outputs/mine/sft/final --output_dir outputs/mine/reward

K ranked summaries of a post are one row: the post is computed once and all K(K-1)/2 pairs are trained on. The
loss is -log sigmoid(r_better - r_worse), one mean over all pairs of an optimizer step. At the end the scores are
shifted so that reference summaries score 0, and the model is saved as a stock one-label classifier.

It does not train on absolute ratings.
"""

import math
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch.nn.functional import logsigmoid
from transformers import Trainer, TrainingArguments, set_seed

from utils.config import PROJECT, UserError, key
from utils.data.layouts import NOTES
from utils.data.report import DataReport
from utils.data.rows import load_data, refuse_overlap, split_rows, tokenised
from utils.data.sources import data_key
from utils.judge.evaluation import print_stages, refuse_too_long, score_groups
from utils.judge.metrics import (
    bootstrap_interval,
    expected_calibration_error,
    label_ceiling,
    pair_accuracy,
    rank_correlation,
    reliability,
)
from utils.judge.plots import plot_calibration, plot_reward
from utils.launch import start
from utils.models.loading import centre_scores, load_scalar_model, load_tokenizer, scores
from utils.models.lora import add_adapter
from utils.models.prompt_groups import pack
from utils.runs.run import Run, check_task, refuse_impossible, stage_folders
from utils.trainer import GroupLossMixin, TrainerStageConfig, in_parts, newest_checkpoint, training_arguments
from utils.zero import load_settings


@dataclass
class RewardStageConfig(TrainerStageConfig):
    """The reward model. Defaults: OPT on TL;DR comparisons."""

    section: ClassVar[str] = "reward"

    model: str = key("outputs/opt-125m/sft/final", "The SFT model whose trunk is used: a folder or a hub name.")
    reward_training_data: str = data_key("CarperAI/openai_summarize_comparisons", "Comparisons or rankings.")
    reward_validation_data: str | None = data_key(None, "Rankings to watch during training; none: held out of the training "
                                                  "data.")
    reward_test_data: str | None = data_key(None, "Rankings that the final figures are taken on; none: held out too.")
    centring_data: str | None = data_key(None, "Examples whose references score 0 on average (detail 19); none: no shift.")
    rating_data: str | None = data_key(None, "Rated answers (openai/summarize_from_feedback, axis): in the end, how far scores "
                                       "agree with the overall ratings; none: not looked at.")
    max_completions: int = key(9, "Largest prompt group; larger ones are split.", unit="completions",
                               source="IG: K = 4 to 9", low=2)
    min_score_ratio: float = key(1.0, "Rows with a smaller `score_ratio` are dropped; SHP's authors advise 2.",
                                 source="SHP", low=0.0)
    max_pairs_per_prompt: int | None = key(None, "Of a prompt's pairwise rows the first so many; SHP's authors advise 5.",
                                           unit="pairs", source="SHP", low=1)
    max_completion_tokens: int = key(169, "Rankings with a longer completion are dropped.", unit="tokens", source="N+", low=2)
    margin: float = key(0.0, "The better score must be above the worse by this.", unit="score",
                        source="Llama 2, 2307.09288", low=0.0)
    centring_coef: float = key(0.0, "Weight of (better + worse)^2, which keeps the scores of each post around 0.",
                               source="Eisenstein 2023, 2312.09244", low=0.0)
    num_train_epochs: float = key(1.0, "Passes over the data; it overfits in the second.", unit="epochs",
                                  source="IG detail 10", low=0.0)
    save_steps: int = key(100, "A checkpoint is saved every so many steps.", unit="steps", low=1)
    eval_steps: int = key(100, "Accuracy on the validation rankings every so many steps.", unit="steps", low=1)
    eval_rows: int = key(200, "Posts in each evaluation during training.", unit="posts", low=1)
    test_rows: int = key(1000, "Posts in the final figures.", unit="posts", low=1)
    eval_batch_size: int = key(32, "Rows scored at once.", unit="rows", low=1)


class RewardStageTrainer(GroupLossMixin, Trainer):
    """`Trainer` with the pairwise loss over prompt groups, and pair accuracy as its evaluation."""

    def __init__(self, *args, config, validation, **kwargs):
        loss_sum = partial(pairwise_loss_sum, margin=config.margin, centring_coef=config.centring_coef)
        super().__init__(*args, loss_sum=loss_sum, **kwargs)
        self.config, self.validation = config, validation

    def figures(self):
        found, _ = accuracy_of(self.model, self.processing_class, self.validation, self.config, "validation")
        return {name: found[name] for name in ("accuracy", "ece")}


def pairwise_loss_sum(model, groups, better, worse, margin=0.0, centring_coef=0.0):
    """Sum over pairs of -log sigmoid(r_better - r_worse - margin) + centring_coef (r_better + r_worse)^2, a scalar.

    In float32 (ST; IG eq. 1; detail 17). The margin is that of Llama 2 (2307.09288, eq. 2), one for all pairs.

    Args:
        better, worse: (P,) indices into the batch's N completions.
    """
    score = scores(model, groups)
    better, worse = score[better], score[worse]
    return (-logsigmoid(better - worse - margin) + centring_coef * (better + worse).square()).sum()


def collate(rows, pad_id: int) -> dict[str, torch.Tensor]:
    """Prompt groups and the pairs of their completions."""
    groups = pack([row["prompt"] for row in rows], [row["completions"] for row in rows], pad_id)
    starts = np.cumsum([0] + [len(row["completions"]) for row in rows])
    pairs = torch.tensor([(first + b, first + w) for first, row in zip(starts, rows, strict=False) for b, w in row["pairs"]])
    return {**groups._asdict(), "better": pairs[:, 0], "worse": pairs[:, 1], "items": torch.tensor(len(pairs))}


def accuracy_of(model, tokenizer, rows, config, title):
    """Accuracy over all pairs with its interval, calibration, and the scores as lists.

    Raises:
        UserError: when a score is not finite, which has no order.
    """
    found = score_groups(model, tokenizer, rows["prompt"], rows["completions"], config.eval_batch_size, title)
    if not all(math.isfinite(score) for group in found for score in group):
        raise UserError(f"{title}: a score is not finite (NaN or infinite): lower learning_rate; the last checkpoint is intact")
    accuracy, low, high = bootstrap_interval(*pair_accuracy(found, rows["pairs"]), config.seed)
    gaps, right = gaps_of(found, rows["pairs"])
    return {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high, "pairs": len(gaps),
            "ece": expected_calibration_error(confidence(gaps), right)}, found


def gaps_of(scores, pairs) -> tuple[np.ndarray, np.ndarray]:
    """Score of the better minus score of the worse completion of each pair, and whether that is right: (P,) both."""
    gaps = np.array([group[b] - group[w] for group, order in zip(scores, pairs, strict=True) for b, w in order])
    return gaps, (gaps > 0) + 0.5 * (gaps == 0)


def confidence(gaps: np.ndarray) -> np.ndarray:
    """How sure somebody is of an order who gives the two scores `gaps` apart, right or wrong: sigmoid(|gap|), 0.5 to 1."""
    return 1 / (1 + np.exp(-np.abs(gaps)))


def reliabilities(found, rows) -> dict[str, list[tuple[float, float, int]]]:
    """Confidence against accuracy, in bins: the model's own confidence, and the labeller's where it is known (detail 20).

    On the diagonal the model is calibrated; for the labeller's confidence the diagonal is what his noise allows.
    """
    gaps, right = gaps_of(found, rows["pairs"])
    curves = {"reward model's confidence": reliability(confidence(gaps), right)}
    if all(group is not None for group in rows["label_scores"]):
        curves["labeller's confidence"] = reliability(confidence(gaps_of(rows["label_scores"], rows["pairs"])[0]), right)
    return curves


def accuracy_by_note(found, rows, most=20) -> dict[str, list[tuple[str, float, int]]]:
    """For each of NOTES that the set has: (value, accuracy, pairs) of its most frequent values (detail 20)."""
    _, right = gaps_of(found, rows["pairs"])
    notes = [note for group, pairs in zip(rows["notes"], rows["pairs"], strict=True) for note in group or [{}] * len(pairs)]
    table = {}
    for column in NOTES:
        outcomes = defaultdict(list)
        for note, outcome in zip(notes, right, strict=True):
            if note.get(column) is not None:
                outcomes[note[column]].append(outcome)
        if outcomes:
            frequent = sorted(outcomes, key=lambda value: (-len(outcomes[value]), value))[:most]
            table[column] = [(value, float(np.mean(outcomes[value])), len(outcomes[value])) for value in sorted(frequent)]
    return table


def baselines(rows) -> dict[str, float | None]:
    """What needs no model: the longer one wins, and the ceiling that the labels' noise sets where it is known."""
    lengths = [[len(completion) for completion in group] for group in rows["completions"]]
    correct, count = pair_accuracy(lengths, rows["pairs"])
    known = all(group is not None for group in rows["label_scores"])
    return {"longest_accuracy": float(correct.sum() / count.sum()),
            "label_ceiling": label_ceiling(rows["label_scores"], rows["pairs"]) if known else None}


def load_splits(config, tokenizer, report):
    """Training, validation and test rankings as tokens, no prompt in two of them; references for centring; rated answers."""
    keys = [f"reward_{split}_data" for split in ("training", "validation", "test")]
    kinds = dict.fromkeys(keys, "rankings") | {"centring_data": "examples", "rating_data": "ratings"}
    found = load_data(config, kinds, tokenizer, report)
    parts = [usable(rows, config, key, report) for key, rows in zip(keys, split_rows(config, "reward", found, report),
                                                                    strict=True)]
    report.groups("reward_training_data", parts[0])
    references = found.get("centring_data")
    if references is not None:
        references = tokenised(references.first(config.test_rows), config.max_completion_tokens, report.say)
    ratings = found.get("rating_data")
    if ratings is not None:
        refuse_overlap({keys[0]: parts[0], "rating_data": ratings}, config.allow_overlap, report.say)
        ratings = usable(ratings, config, "rating_data", report).dataset()
    return *(rows.dataset() for rows in parts), references, ratings


def usable(rows, config, name, report):
    """Rankings or ratings without those that have a completion over the limit, which are counted."""
    kept = rows.select(rows.token_column("longest") <= config.max_completion_tokens)
    if len(kept) < len(rows):
        report.say(f"{name}: dropped {len(rows) - len(kept)} of {len(rows)} groups with a completion of more "
                   f"than {config.max_completion_tokens} tokens")
    if not len(kept):
        raise UserError(f"{name}: no group is left; raise max_completion_tokens ({config.max_completion_tokens})")
    return kept


def centre(model, tokenizer, references, config, say) -> None:
    """Shift the scores so that reference summaries score 0 on average (detail 19)."""
    completions = [[completion] for completion in references.completions]
    found = score_groups(model, tokenizer, references.prompts, completions, config.eval_batch_size, "centring")
    mean = float(np.mean(found))
    centre_scores(model, mean)
    say(f"shifted the scores by {-mean:+.3f}: the {len(found)} reference summaries now score 0 on average")


def main(config: RewardStageConfig) -> None:
    refuse_impossible(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    check_task(tokenizer, {"model": config.model})
    report = DataReport()
    train, validation, test, references, ratings = load_splits(config, tokenizer, report)
    report.tokens("reward_training_data", train)
    settings = load_settings(config)
    model = load_scalar_model(config.model, "model", new_head_seed=config.seed)
    model.config.pad_token_id = tokenizer.pad_token_id
    if config.lora_rank:
        add_adapter(model, config)
    refuse_too_long(model, config.max_prompt_tokens + config.max_completion_tokens, "max_prompt_tokens + max_completion_tokens")
    run = Run(config, "reward", report)
    run.catch_signals()
    trainer = RewardStageTrainer(
        model=model,
        args=training_arguments(
            config, run, TrainingArguments, deepspeed=settings,
            train_sampling_strategy="group_by_length",
            eval_strategy="steps", eval_steps=config.eval_steps, save_steps=config.save_steps,
        ),
        train_dataset=train, eval_dataset=validation,
        data_collator=partial(in_parts, collate=partial(collate, pad_id=tokenizer.pad_token_id),
                              max_tokens=config.micro_batch_tokens),
        processing_class=tokenizer,
        run=run, config=config, validation=validation,
    )
    began = time.time()
    trainer.train(resume_from_checkpoint=newest_checkpoint(run))
    seconds = time.time() - began
    if run.stop_signal is not None:
        run.stopped()
    if references is not None:
        centre(trainer.model, tokenizer, references, config, run.say)
    if ratings is not None:
        agreement, count = rating_agreement(trainer.model, tokenizer, ratings, config)
        run.say(f"test, rank correlation of scores and overall ratings: {agreement:.3f} ({count} answers)")
    finish(run, config, trainer, tokenizer, test, seconds)


def rating_agreement(model, tokenizer, ratings, config) -> tuple[float, int]:
    """Spearman's correlation of the reward model's scores with the labellers' overall ratings, and the number of answers."""
    found = score_groups(model, tokenizer, ratings["prompt"], ratings["completions"], config.eval_batch_size, "ratings")
    rated = [rating for group in ratings["label_scores"] for rating in group]
    return rank_correlation([score for group in found for score in group], rated), len(rated)


def finish(run, config, trainer, tokenizer, test, seconds) -> None:
    """The test figures, samples, summary.json, plots, final/, the table."""
    figures, found = accuracy_of(trainer.model, tokenizer, test, config, "test")
    pairs = sum(map(len, trainer.train_dataset["pairs"])) / len(trainer.train_dataset) * trainer.rows_trained()
    run.samples([{"prompt": tokenizer.decode(prompt, skip_special_tokens=True), "pairs": order,
                  "completions": tokenizer.batch_decode(completions, skip_special_tokens=True), "scores": score}
                 for prompt, completions, order, score in zip(test["prompt"][:20], test["completions"][:20],
                                                              test["pairs"][:20], found[:20], strict=True)])
    run.metrics(trainer.state.global_step, {"test/accuracy": figures["accuracy"], "test/ece": figures.pop("ece")})
    run.finish({**figures, **baselines(test), "seconds": time.time() - run.started, "pairs_per_second": pairs / seconds})
    curves = reliabilities(found, test)
    for name, curve in curves.items():
        run.say(f"test, accuracy by {name}: " + ", ".join(f"{sure:.2f}: {right:.3f} ({n} pairs)" for sure, right, n in curve))
    for column, values in accuracy_by_note(found, test).items():
        run.say(f"test, accuracy by {column}: " + ", ".join(f"{value}: {right:.3f} ({n} pairs)" for value, right, n in values))
    if run.is_main:
        plot_calibration(run, curves)
        plot_reward(run, [(group[b], group[w]) for group, order in zip(found, test["pairs"], strict=True) for b, w in order])
    run.save_final(trainer.model, tokenizer, {"model": config.model},
                   {"max_prompt_tokens": config.max_prompt_tokens, "accuracy": figures["accuracy"],
                    "score_shift": trainer.model.config.score_shift})
    print_stages(stage_folders(run, [config.model]))


if __name__ == "__main__":
    start(main, RewardStageConfig, PROJECT / "configs" / "tldr_mini" / "reward.yaml", __doc__)
