"""What the two stages on transformers' `Trainer` share: one mean per optimizer step, and when a run must stop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import train_reward
import train_sft
from families import EOS, PAD, policy, random_groups, scalar_model
from utils.config import UserError
from utils.models.loading import without_dropout
from utils.models.prompt_groups import PromptGroups, pack
from utils.trainer import GroupLossMixin, in_parts, training_arguments

PROMPTS, COMPLETIONS = random_groups([5, 1, 8, 3], [[2], [7], [4], [1]])
ROWS = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])} for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]


class Stage(GroupLossMixin, Trainer):
    """The mixin with the SFT loss."""


class Run:
    """Collects what a run is told."""

    stage, stop_signal, is_main = "sft", None, True

    def __init__(self, folder):
        self.folder, self.rows = folder, []

    def metrics(self, step, values):
        self.rows.append((step, values))

    def say(self, line):
        pass


def trained(folder, batch_size, accumulation, steps=1, max_tokens=None, **more):
    """A model after plain SGD on all four rows a step, its trainer and its run."""
    run = Run(folder)
    model = without_dropout(policy("opt"))
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=steps,
        logging_steps=1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, report_to=[], remove_unused_columns=False,
        disable_tqdm=True, save_strategy="no", use_cpu=True, logging_nan_inf_filter=False, **{"learning_rate": 0.1, **more},
    )
    trainer = Stage(
        model=model, args=arguments, train_dataset=Rows(), loss_sum=train_sft.completion_loss_sum, run=run,
        processing_class=SimpleNamespace(decode=str),
        data_collator=lambda rows: in_parts(rows, lambda part: train_sft.collate(part, PAD, "completion"), max_tokens),
    )
    trainer.train()
    return model, trainer, run


def token_losses(model):
    """-log p of every completion token of all rows, by stock forward passes on single rows."""
    losses = []
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["prompt"] + row["completion"]])).logits[0]
        losses.append(cross_entropy(logits[len(row["prompt"]) - 1 : -1], torch.tensor(row["completion"]), reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize(("batch_size", "accumulation", "max_tokens"),
                         [(4, 1, None), (2, 2, None), (1, 4, None), (4, 1, 24), (4, 1, 1), (2, 2, 15)])
def test_a_step_follows_the_mean_over_all_its_tokens(batch_size, accumulation, max_tokens, tmp_path):
    """Detail 12: rows of 2, 7, 4 and 1 tokens; a mean of micro-batch means is another gradient."""
    model, _, run = trained(tmp_path, batch_size, accumulation, max_tokens=max_tokens)
    oracle = without_dropout(policy("opt"))
    loss = token_losses(oracle).mean()
    loss.backward()
    for ours, theirs in zip(model.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad, rtol=0, atol=1e-5)
    [(step, logged)] = [row for row in run.rows if "sft/loss" in row[1]]
    assert step == 1 and logged["sft/loss"] == pytest.approx(loss.item(), abs=1e-3)


def test_rows_trained_are_those_of_this_session(tmp_path):
    _, trainer, _ = trained(tmp_path, 2, 2, steps=3)
    assert trainer.rows_trained() == 12
    trainer.progress.first_step = 2  # as after --resume at step 2
    assert trainer.rows_trained() == 4


def test_a_loss_that_is_not_finite_stops_the_run_after_it_is_logged(tmp_path):
    with pytest.raises(UserError, match=r"^step 4: the loss or the gradient is not finite .*: lower learning_rate"):
        trained(tmp_path, 4, 1, steps=9, learning_rate=1e30)


def test_a_loss_that_is_not_finite_is_not_hidden(tmp_path, monkeypatch):
    """By default `Trainer` logs the mean of the losses before it in its place."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    arguments = training_arguments(train_reward.RewardStageConfig(report_to=["none"]), Run(tmp_path), TrainingArguments)
    assert not arguments.logging_nan_inf_filter


@pytest.mark.parametrize("config", [
    train_reward.RewardStageConfig(report_to=["none"], adam_eps=3e-4, adam_beta2=0.9, max_grad_norm=0.7),
    train_sft.SFTStageConfig(report_to=["none"], weight_decay=0.1, warmup_steps=3, max_grad_norm=0.0),
])
def test_the_trainers_arguments_are_the_configured_ones(config, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    found = training_arguments(config, Run(tmp_path), TrainingArguments)
    assert found.lr_scheduler_type == "cosine" and found.adam_epsilon == config.adam_eps
    for name in ("adam_beta2", "weight_decay", "warmup_steps", "max_grad_norm", "learning_rate", "num_train_epochs", "seed",
                 "gradient_accumulation_steps"):
        assert getattr(found, name) == getattr(config, name), name


# ------------------------------------------------------------------------------------------------- losses


@torch.no_grad()
def test_completion_loss_is_the_sum_over_completion_tokens():
    model = policy("opt")
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    expected = 0.0
    for row in ROWS:
        logits = model(input_ids=torch.tensor([row["prompt"] + row["completion"]])).logits[0].double().numpy()
        for place, token in enumerate(row["completion"], start=len(row["prompt"]) - 1):
            expected += np.log(np.exp(logits[place]).sum()) - logits[place, token]
    assert train_sft.completion_loss_sum(model, groups).item() == pytest.approx(expected, rel=1e-5)
    assert all(row["completion"][-1] == EOS for row in ROWS), "the EOS is learnt as well"


@torch.no_grad()
def test_pairwise_loss_is_the_sum_over_pairs():
    model = scalar_model("opt")
    prompts, completions = random_groups([4, 6], [[3, 1, 5], [2, 4]])
    rows = [{"prompt": prompts[0], "completions": completions[0], "pairs": [(0, 1), (0, 2), (1, 2)]},
            {"prompt": prompts[1], "completions": completions[1], "pairs": [(1, 0)]}]
    batch = train_reward.collate(rows, PAD)
    assert batch["items"] == 4
    groups = PromptGroups(**{name: batch[name] for name in PromptGroups._fields})
    expected = 0.0
    for row in rows:
        scores = [model(input_ids=torch.tensor([row["prompt"] + c])).logits.item() for c in row["completions"]]
        expected += sum(np.log1p(np.exp(scores[worse] - scores[better])) for better, worse in row["pairs"])
    found = train_reward.pairwise_loss_sum(model, groups, batch["better"], batch["worse"])
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_on_the_sequence_the_loss_is_taken_on_all_but_the_first_token():
    rows = [{"prompt": [5, 6, 7], "completion": [8, EOS]}, {"prompt": [9], "completion": [4, 3, EOS]}]
    whole, part = (train_sft.collate(rows, PAD, loss_on) for loss_on in ("sequence", "completion"))
    learnt = [[row[mask].tolist() for row, mask in zip(batch["responses"], batch["response_mask"], strict=True)]
              for batch in (whole, part)]
    assert learnt == [[[6, 7, 8, EOS], [4, 3, EOS]], [[8, EOS], [4, 3, EOS]]]
    assert (whole["items"], part["items"]) == (7, 5)


# ------------------------------------------------------------------------------------------------ figures


def test_rouge_is_that_of_summaries_sampled_at_the_evaluations_temperature(monkeypatch):
    asked = []

    def summarise(model, tokenizer, prompts, config, temperature, seed, title):
        asked.append(temperature)
        return SimpleNamespace(texts=[" my cat ran away", " no"], tokens=[[3, 4, EOS], [5]], ended=[True, False])

    monkeypatch.setattr(train_sft, "summarise", summarise)
    posts = SimpleNamespace(prompts=[[1], [1]], examples=[SimpleNamespace(completion=" my cats ran away"),
                                                          SimpleNamespace(completion=" yes")])
    figures, _ = train_sft.rouge_of(None, None, posts, train_sft.SFTStageConfig(eval_temperature=0.02), "")
    assert asked == [0.02]
    assert figures == pytest.approx({"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5, "rouge_avg": 0.5, "ended": 0.5, "tokens": 2.0})


def test_figures_of_the_reward_model_by_hand(monkeypatch):
    """Three pairs of one post are right by 2, right by 1 and wrong by 1; the pair of the other is a tie."""
    rows = {"prompt": [[5], [6]], "completions": [[[1, 1], [1], [1, 1, 1]], [[1, 1], [1]]],
            "pairs": [[(0, 1), (0, 2), (1, 2)], [(1, 0)]], "label_scores": [None, None]}
    monkeypatch.setattr(train_reward, "score_groups", lambda *_: [[3.0, 1.0, 2.0], [0.5, 0.5]])
    figures, _ = train_reward.accuracy_of(None, None, rows, train_reward.RewardStageConfig(), "")
    assert (figures["accuracy"], figures["pairs"]) == (2.5 / 4, 4)
    # the two posts are drawn again: the first twice, say, or the second
    assert (figures["accuracy_low"], figures["accuracy_high"]) == pytest.approx((0.5, 2 / 3))
    sure = {gap: 1 / (1 + np.exp(-gap)) for gap in (2, 1)}  # .88 and .73; the second is right once of two, the tie half of .5
    assert figures["ece"] == pytest.approx(((1 - sure[2]) + 2 * (sure[1] - 0.5) + 0.0) / 4)
    # the longer one wins in (0, 1) only
    assert train_reward.baselines(rows) == {"longest_accuracy": 1 / 4, "label_ceiling": None}


@torch.no_grad()
def test_centring_puts_reference_summaries_at_0_on_average():
    model, said = scalar_model("opt"), []
    references = SimpleNamespace(prompts=PROMPTS, completions=[c[0] for c in COMPLETIONS])
    rows = [torch.tensor([p + c[0]]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    before = [model(input_ids=row).logits.item() for row in rows]
    train_reward.centre(model, SimpleNamespace(pad_token_id=PAD), references, train_reward.RewardStageConfig(), said.append)
    after = [model(input_ids=row).logits.item() for row in rows]
    assert after == pytest.approx([score - np.mean(before) for score in before], abs=1e-4)
    assert f"{-np.mean(before):+.3f}" in said[0]
