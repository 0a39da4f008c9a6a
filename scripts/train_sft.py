"""Stage 1, supervised fine-tuning: a language model learns to write summaries from examples.

    python scripts/train_sft.py                            # the embedded default, about a minute on two cores
    python scripts/train_sft.py --config configs/opt/sft.yaml configs/opt/125m.yaml    # a real model and data
    python scripts/train_sft.py --actor_training_data my.jsonl --output_dir outputs/mine/sft

The loss is taken on the completion and its EOS, and the language-model head is applied there only. In
conversations this is the last answer, or with `loss_on: turns` every answer of the assistant. Every
`eval_steps` the model summarises held-out posts; the checkpoint with the highest mean of ROUGE-1/2/L is kept.

Conversations go through the tokenizer's chat template. Several examples are not packed into one row.
"""

import time
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import ClassVar

from utils.config import PROJECT, key
from utils.data.sources import data_key
from utils.launch import read_config, start
from utils.models.folders import model_key
from utils.stage_keys import EpochStageConfig


@dataclass
class SFTStageConfig(EpochStageConfig):
    """Supervised fine-tuning. Defaults: OPT on TL;DR."""

    section: ClassVar[str] = "sft"
    belongs_to: ClassVar[dict] = {"actor_training_data": ("actor_validation_data", "actor_test_data")}

    model: str = model_key("facebook/opt-125m", "Base model: a folder or a hub name.")
    actor_training_data: str = data_key("trl-lib/tldr", "Examples to learn from.")
    actor_validation_data: str | None = data_key(None, "Examples that choose the checkpoint; "
                                                        "none: held out of the training data.")
    actor_test_data: str | None = data_key(None, "Examples of the final figures; none: held out too.")
    loss_on: str = key("completion", "Tokens that the loss is taken on: the completion, which is the last "
                                     "answer of a conversation; all its answers; or all tokens.",
                       source="detail 13", choices=["completion", "turns", "sequence"])
    router_loss_coef: float | None = key(None, "Weight of the load-balancing loss of a model with experts; "
                                               "none: what its config.json says, 0 without experts.",
                                         low=0.0, high=1000.0)
    max_completion_tokens: int = key(64, "Examples with longer completions are dropped.", unit="tokens",
                                     low=2, high=10_000_000)
    max_new_tokens: int = key(53, "Longest summary that is generated.", unit="tokens", source="detail 3",
                              low=1, high=1_000_000)
    eval_temperature: float = key(0.01, "Sampling temperature of evaluations.", source="detail 14",
                                  low=1e-3, high=100.0)
    test_rows: int = key(400, "Posts in the final figures.", unit="posts", low=1, high=10**9)
    eval_batch_size: int = key(64, "Posts that are summarised at once.", unit="posts", low=1, high=100_000)


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(SFTStageConfig, PROJECT / "configs" / "tldr_mini" / "sft.yaml", __doc__)

from transformers import set_seed

from utils.data.batches import LengthGroupedBatches, rows_at
from utils.data.layouts import layout_of
from utils.data.report import DataReport
from utils.data.rows import NamedSet, Tokenised, load_data, split_rows, tokenised
from utils.judge.evaluation import Summaries, measure_groups, summarise
from utils.judge.metrics import SummaryRouge
from utils.judge.plots import plot_sft
from utils.loop import Loop
from utils.models.fitness import refuse_unfit
from utils.models.four_bit import storage_of
from utils.models.loading import load_policy, trainable
from utils.models.outputs import GroupModel, response_logprobs, supervised_outputs
from utils.models.parents import Parent, check_task
from utils.models.prompt_groups import PromptGroups, micro_batches, pack
from utils.models.routers import router_coef
from utils.runs.ending import Ending, end_stage, refuse_broken_summaries
from utils.runs.final import rehearse_saving
from utils.runs.opening import open_stage, plan_of
from utils.runs.run import SHOWN, Run, refuse_impossible
from utils.zero import load_settings

# ---------------------------------------------------------------------------------------------- the algorithm


def train(loop: Loop, examples, validation, router_coef: float = 0.0) -> None:
    """Minimise -log p of the completions' tokens; keep the weights whose summaries have the highest ROUGE.

    Args:
        router_coef: weight of the routers' loss of a model with experts.
    """
    config, run = loop.config, loop.run
    batches = LengthGroupedBatches(list(examples["length"]), config.rows_per_step, config.seed)
    for step, places in loop.steps(batches):
        # a step has the same rows for any number of processes; this rank takes its share
        rows = rows_at(examples, loop.share(places))
        # rows of like length share a forward pass, so that little padding is computed
        passes = micro_batches([row["length"] for row in rows], config.per_device_batch_size,
                               config.micro_batch_tokens)
        parts = [collate([rows[i] for i in part], loop) for part in passes]
        tokens = loop.total(sum(groups.response_mask.sum() for groups in parts))  # of all ranks
        # a model's routers are balanced on all tokens that it reads
        read = loop.total(sum((groups.owners >= 0).sum() for groups in parts))
        router = 0.0  # their loss, summed over these tokens
        # one mean over the tokens of the step (detail 12), not a mean of the passes' means
        for groups in loop.parts(parts, spare=lambda first=places[:1]: collate(rows_at(examples, first),
                                                                               loop)):
            logprobs, router_loss = loop.model(groups)  # (N, R), 0 at padding; ()
            loop.backward(-logprobs.sum() / tokens + router_coef * router_loss / read, groups)
            router += router_loss.detach() * loop.part_counts
        loop.optimizer_step()

        if loop.logs(step):
            loss = loop.mean_loss()
            loop.show(loss=loss)
            routers = {"sft/router_loss": (loop.total(router) / read).item()} if router_coef else {}
            run.metrics(step, {"sft/loss": loss, "sft/grad_norm": loop.grad_norm,
                               "sft/learning_rate": loop.learning_rate, **routers})
        # the loss on references says little about what the model writes, so ROUGE chooses (detail 14), and
        # the loss only where ROUGE is the same
        if loop.evaluates(step):
            figures = evaluate(loop, validation, step)
            loop.best.offer(step, figures["rouge_avg"], loop.weights["trained"], loss=figures["loss"])


def collate(rows: list[dict], loop: Loop) -> PromptGroups:
    """Prompt groups of one completion each. With the loss on the sequence the first token alone is the
    prompt. With the loss on all turns the prompt ends where the first answer begins.
    """
    pad = loop.tokenizer.pad_token_id
    if loop.config.loss_on == "turns":
        turns = [row["turns"] for row in rows]
        columns = ([one[name] for one in turns] for name in ("prompt", "completions", "labels"))
        prompts, completions, labels = columns
        return pack(prompts, completions, pad, labels).to(loop.device)
    prompts = [row["prompt"] for row in rows]
    completions = [row["completion"] for row in rows]
    if loop.config.loss_on == "sequence":
        completions = [prompt[1:] + completion for prompt, completion in zip(prompts, completions,
                                                                             strict=True)]
        prompts = [prompt[:1] for prompt in prompts]
    return pack(prompts, [[completion] for completion in completions], pad).to(loop.device)


# -------------------------------------------------------------------------------------------- what it reaches


def rouge_of(loop: Loop, posts: Tokenised, title: str) -> tuple[dict[str, float], Summaries]:
    """ROUGE of generated summaries, share with EOS and mean length (detail 14); and the summaries."""
    with loop.accelerator.autocast():
        written = summarise(loop.module.model, loop.tokenizer, posts.prompts, loop.config,
                            loop.config.eval_temperature,
                            title)
    references = [example.completion.strip() for example in posts.examples]
    figures = SummaryRouge().compute(predictions=[text.strip() for text in written.texts],
                                     references=references)
    return {**figures, "ended": fmean(written.ended), "tokens": fmean(map(len, written.tokens))}, written


def loss_of(loop: Loop, posts: Tokenised, title: str) -> float:
    """-log p of the references' tokens with their EOS: one mean over all tokens of all posts (detail 12)."""
    def summed(groups):
        return response_logprobs(loop.module.model, groups, temperature=1.0).sum(1)  # (N,), padding is 0

    completions = [[completion] for completion in posts.completions]
    with loop.accelerator.autocast():
        logprobs = measure_groups(summed, loop.tokenizer, posts.prompts, completions,
                                  loop.config.eval_batch_size, loop.device, title)
    return -sum(map(sum, logprobs)) / sum(map(len, posts.completions))


def evaluate(loop: Loop, validation: Tokenised, step: int) -> dict[str, float]:
    """Log what the model reaches on the validation posts."""
    figures, written = rouge_of(loop, validation, "validation")
    figures["loss"] = loss_of(loop, validation, "validation, loss")
    loop.run.metrics(step, {f"eval/{name}": value for name, value in figures.items()})
    texts = zip(validation.examples[:SHOWN], written.texts, strict=False)
    loop.run.samples(step, "validation", [
        {"prompt": example.prompt, "reference": example.completion, "summary": text}
        for example, text in texts])
    shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
    loop.run.log(f"step {step}, validation: {shown}")
    return figures


# ------------------------------------------------------------------------------------------------- the script


def load_splits(config: SFTStageConfig, tokenizer, report: DataReport) -> list[Tokenised]:
    """Training, validation and test examples as tokens, no prompt in two of them."""
    longest = config.max_completion_tokens
    loaded = load_data(config, {
        "actor_training_data": NamedSet(config.actor_training_data, "examples", longest,
                                        turns=config.loss_on == "turns"),
        "actor_validation_data": NamedSet(config.actor_validation_data, "examples", longest),
        "actor_test_data": NamedSet(config.actor_test_data, "examples", longest),
    }, tokenizer, report)
    parts = split_rows(config, loaded, "actor_training_data", "actor_validation_data", "actor_test_data",
                       report)
    if config.loss_on == "turns":
        report.turns("actor_training_data", parts[0])
    return list(map(tokenised, parts))


def main(config: SFTStageConfig) -> None:
    base = Parent("model", config.model, config.chat_template)
    open_stage(config, base)
    refuse_impossible(config)
    set_seed(config.seed)
    check_task(base)
    refuse_broken_summaries(base)
    report = DataReport()
    training, validation, test = load_splits(config, base.tokenizer, report)
    examples = training.examples.dataset()
    report.tokens("actor_training_data", examples)
    deepspeed = load_settings(config, base)
    policy = load_policy(base, storage_of(config))
    longest_prompt = max(map(len, [*validation.prompts, *test.prompts]))
    positions = training.examples.token_column("positions" if config.loss_on == "turns" else "length")
    longest = max(positions.max(), longest_prompt + config.max_new_tokens)
    refuse_unfit(policy, base, base.tokenizer, longest, "actor_training_data", dropout=True)
    rehearse_saving(policy, base.tokenizer, config)
    coef = router_coef(policy, base, config.router_loss_coef)
    policy = trainable(policy, config)

    run = Run(config, "sft", report, [base])
    model = GroupModel(policy, partial(supervised_outputs, balances=bool(coef)))
    schedule = config.schedule(len(examples))
    run.log(plan_of(config, len(examples), schedule.steps, run.unit))
    loop = Loop(run, model, base.tokenizer, schedule, deepspeed)
    before = rouge_of(loop, test, "base model")
    run.log(f"base model: test ROUGE mean {before[0]['rouge_avg']:.3f} on {len(test.prompts)} posts")
    # after the base model's figures: a resumed run has trained weights
    loop.resume()
    if loop.step == 0:
        evaluate(loop, validation, 0)
    began = time.monotonic()
    train(loop, examples, validation, coef)
    seconds = time.monotonic() - began
    best_step = loop.best.restore(loop.weights["trained"], last=loop.step)
    after = rouge_of(loop, test, "test")
    rows = loop.steps_done * config.rows_per_step
    speed = rows * fmean(examples["length"]) / seconds
    end = ending(test, before, after, best_step, config)
    end.work["tokens_per_second"] = speed
    end_stage(run, loop.step, policy, base.tokenizer, [base], end)


def ending(test: Tokenised, before, after, best_step: int, config: SFTStageConfig) -> Ending:
    """Samples side by side and the final figures; `before` and `after` are what `rouge_of` returns."""
    (before, base_summaries), (after, summaries) = before, after
    rouge = {name: after[name] for name in ("rouge1", "rouge2", "rougeL", "rouge_avg")}
    texts = zip(test.examples[:20], base_summaries.texts, summaries.texts, strict=False)
    return Ending(
        samples=[{"prompt": example.prompt, "reference": example.completion, "base": base, "sft": sft}
                 for example, base, sft in texts],
        summary={**rouge, "base_rouge_avg": before["rouge_avg"]},
        work={"best_step": best_step},
        stage={"prompt_layout": layout_of(test.examples[0].prompt),
               "max_prompt_tokens": config.max_prompt_tokens, "max_new_tokens": config.max_new_tokens,
               "rouge_avg": after["rouge_avg"]},
        plot=partial(plot_sft, kept=best_step),
        compared=("base", "sft"),
    )


if __name__ == "__main__":
    start(main, CONFIG)
