"""Stage 1, supervised fine-tuning: a language model learns to write summaries from examples.

    python scripts/train_sft.py                                        # the embedded default, about a minute on two cores
    python scripts/train_sft.py --config configs/opt-125m/sft.yaml     # a real model on a real data set
    python scripts/train_sft.py --actor_training_data my.jsonl --actor_validation_data none --actor_test_data none \\
        --output_dir outputs/mine/sft

The loss is taken on the completion and its EOS, and the language-model head is applied there only. Every
`eval_steps` the model summarises held-out posts; the checkpoint with the highest mean of ROUGE-1/2/L is kept.

It does not pack several examples into a row, and does not teach chat formats.
"""

import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from utils.config import PROJECT, key
from utils.data.report import DataReport
from utils.data.rows import load_data, split_rows, tokenised
from utils.data.sources import data_key
from utils.judge.evaluation import print_stages, refuse_too_long, summarise
from utils.judge.metrics import SummaryRouge
from utils.judge.plots import plot_sft
from utils.launch import start
from utils.models.loading import load_policy, load_tokenizer, response_logprobs
from utils.models.lora import add_adapter
from utils.models.prompt_groups import pack
from utils.runs.run import Run, check_task, refuse_impossible, stage_folders
from utils.trainer import GroupLossMixin, TrainerStageConfig, in_parts, newest_checkpoint, training_arguments
from utils.zero import load_settings


@dataclass
class SFTStageConfig(TrainerStageConfig):
    """Supervised fine-tuning. Defaults: OPT on TL;DR."""

    section: ClassVar[str] = "sft"

    model: str = key("facebook/opt-125m", "Base model: a folder or a hub name.")
    initial_weights: str = key("pretrained", "Where training starts: the checkpoint's weights, fresh random ones, or fresh ones "
                               "in which copying is sketched (OPT; for pretraining).",
                               choices=["pretrained", "random", "induction"], source="own")
    actor_training_data: str = data_key("trl-lib/tldr", "Examples to learn from.")
    actor_validation_data: str | None = data_key(None, "Examples that choose the checkpoint; none: held out of the training "
                                                 "data.")
    actor_test_data: str | None = data_key(None, "Examples that the final figures are taken on; none: held out too.")
    loss_on: str = key("completion", "Tokens that the loss is taken on.", source="detail 13", choices=["completion", "sequence"])
    max_completion_tokens: int = key(64, "Examples with longer completions are dropped.", unit="tokens", low=2)
    max_new_tokens: int = key(53, "Longest summary that is generated.", unit="tokens", source="N+ detail 3", low=1)
    num_train_epochs: float = key(1.0, "Passes over the training data.", unit="epochs", source="N+ detail 10", low=0.0)
    eval_steps: int = key(100, "Summarise the validation posts every so many steps; a checkpoint is saved then.",
                          unit="steps", low=1)
    eval_rows: int = key(200, "Posts in each evaluation during training.", unit="posts", low=1)
    test_rows: int = key(400, "Posts in the final figures.", unit="posts", low=1)
    eval_batch_size: int = key(64, "Posts that are summarised at once.", unit="posts", low=1)
    eval_temperature: float = key(0.01, "Sampling temperature of evaluations.", source="N+ detail 14", low=1e-3)


class SFTStageTrainer(GroupLossMixin, SFTTrainer):
    """trl's trainer with our loss, and ROUGE on generated summaries as its evaluation."""

    def __init__(self, *args, config, validation, **kwargs):
        super().__init__(*args, loss_sum=completion_loss_sum, **kwargs)
        self.config, self.validation = config, validation

    def figures(self):
        return rouge_of(self.model, self.processing_class, self.validation, self.config, "validation")[0]

    def log(self, logs, start_time=None):
        # past SFTTrainer's own, which adds figures that its own loss gathers
        super(SFTTrainer, self).log(logs, start_time)


def completion_loss_sum(model, groups):
    """Sum of -log p over the response tokens: a scalar."""
    return -response_logprobs(model, groups, temperature=1.0).sum()  # padding is 0


def collate(rows, pad_id: int, loss_on: str) -> dict[str, torch.Tensor]:
    """Prompt groups of one completion each. With the loss on the sequence the first token alone is the prompt."""
    prompts = [row["prompt"] for row in rows]
    completions = [row["completion"] for row in rows]
    if loss_on == "sequence":
        completions = [prompt[1:] + completion for prompt, completion in zip(prompts, completions, strict=True)]
        prompts = [prompt[:1] for prompt in prompts]
    groups = pack(prompts, [[completion] for completion in completions], pad_id)
    return {**groups._asdict(), "items": groups.response_mask.sum()}


def rouge_of(model, tokenizer, posts, config, title):
    """ROUGE of generated summaries, share with EOS and mean length; and the summaries."""
    summaries = summarise(model, tokenizer, posts.prompts, config, config.eval_temperature, config.seed, title)
    references = [example.completion.strip() for example in posts.examples]
    figures = SummaryRouge().compute(predictions=[text.strip() for text in summaries.texts], references=references)
    ended = sum(summaries.ended) / len(summaries.ended)
    length = sum(map(len, summaries.tokens)) / len(summaries.tokens)
    return {**figures, "ended": ended, "tokens": length}, summaries


def load_splits(config, tokenizer, report):
    """Training, validation and test examples as tokens, no prompt in two of them."""
    keys = [f"actor_{split}_data" for split in ("training", "validation", "test")]
    found = load_data(config, dict.fromkeys(keys, "examples"), tokenizer, report)
    parts = split_rows(config, "actor", found, report)
    return [tokenised(rows, config.max_completion_tokens, report.say) for rows in parts]


def main(config: SFTStageConfig) -> None:
    refuse_impossible(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    check_task(tokenizer, {"model": config.model})
    report = DataReport()
    train, validation, test = load_splits(config, tokenizer, report)
    rows = train.examples.dataset()
    report.tokens("actor_training_data", rows)
    settings = load_settings(config)
    model = load_policy(config.model, initial_weights=config.initial_weights)
    if config.lora_rank:
        add_adapter(model, config)
    asked = max(map(len, [*validation.prompts, *test.prompts]))
    longest = max(train.examples.token_column("length").max(), asked + config.max_new_tokens)
    refuse_too_long(model, longest, "actor_training_data")
    run = Run(config, "sft", report)
    run.catch_signals()
    trainer = SFTStageTrainer(
        model=model,
        args=training_arguments(
            config, run, SFTConfig, deepspeed=settings,
            eval_strategy="steps", eval_steps=config.eval_steps, save_steps=config.eval_steps,
            load_best_model_at_end=True, metric_for_best_model="rouge_avg", greater_is_better=True,
            train_sampling_strategy="group_by_length",
            dataset_kwargs={"skip_prepare_dataset": True}, max_length=None,
        ),
        train_dataset=rows, eval_dataset=rows.select([0]),
        data_collator=partial(in_parts, collate=partial(collate, pad_id=tokenizer.pad_token_id, loss_on=config.loss_on),
                              max_tokens=config.micro_batch_tokens),
        processing_class=tokenizer,
        run=run, config=config, validation=validation,
    )
    before, base_summaries = rouge_of(model, tokenizer, test, config, "base model")
    run.say(f"base model: test ROUGE mean {before['rouge_avg']:.3f} on {len(test.prompts)} posts")
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        trainer.evaluate()
    began = time.time()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.time() - began
    if run.stop_signal is not None:
        run.stopped()
    after, summaries = rouge_of(trainer.model, tokenizer, test, config, "test")
    finish(run, config, trainer, tokenizer, test, (before, after), (base_summaries, summaries), seconds)


def finish(run, config, trainer, tokenizer, test, figures, summaries, seconds) -> None:
    """Samples side by side, summary.json, plots, final/, the table."""
    before, after = figures
    run.samples([
        {"prompt": example.prompt, "reference": example.completion, "base": base, "sft": sft}
        for example, base, sft in zip(test.examples[:20], summaries[0].texts, summaries[1].texts, strict=False)
    ])
    seen = sum(trainer.train_dataset["length"]) / len(trainer.train_dataset) * trainer.rows_trained()
    run.finish({**{name: after[name] for name in ("rouge1", "rouge2", "rougeL", "rouge_avg")},
                "base_rouge_avg": before["rouge_avg"], "seconds": time.time() - run.started,
                "tokens_per_second": seen / seconds})
    if run.is_main:
        plot_sft(run)
    run.save_final(trainer.model, tokenizer, {"model": config.model},
                   {"max_prompt_tokens": config.max_prompt_tokens, "max_new_tokens": config.max_new_tokens,
                    "rouge_avg": after["rouge_avg"]})
    print_stages(stage_folders(run, []))


if __name__ == "__main__":
    start(main, SFTStageConfig, PROJECT / "configs" / "tldr_mini" / "sft.yaml", __doc__)
