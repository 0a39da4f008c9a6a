"""The SFT stage's step against trl's own trainer: the same loss on the same batch, and the same gradient."""

import pytest
import torch
from datasets import Dataset

import train_sft
from families import FAMILIES, PAD, policy, random_groups
from loops import TOKENIZER, epoch_loop, gradients_of_steps
from utils.data.rows import Tokenised
from utils.models.loading import without_dropout

PROMPTS, COMPLETIONS = random_groups([5, 1, 8, 3], [[2], [7], [4], [1]])


def trl_loss(model, loss_on, folder):
    """What trl would train on: its trainer, its collator, its choice of the tokens that count."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    rows = [{"input_ids": p + c[0], "completion_mask": [0] * len(p) + [1] * len(c[0])}
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    args = trl.SFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", max_length=None,
                         completion_only_loss=loss_on == "completion")
    trainer = trl.SFTTrainer(model, args, processing_class=TOKENIZER, train_dataset=Dataset.from_list(rows))
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(len(rows))])
    assert batch["input_ids"].shape == (4, 12) and (batch["input_ids"] == PAD).any()
    return trainer.compute_loss(trainer.model, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_validation_loss_is_the_mean_over_all_tokens_of_the_references(family, tmp_path):
    """Against a plain forward pass of each row; batches of two, so that rows are padded."""
    config = train_sft.SFTStageConfig(output_dir=str(tmp_path), eval_batch_size=2)
    model = without_dropout(policy(family))
    loop = epoch_loop(config, model, 4)
    completions = [completion for [completion] in COMPLETIONS]
    found = train_sft.loss_of(loop, Tokenised([], PROMPTS, completions), "")
    nlls = []
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        nlls += torch.nn.functional.cross_entropy(logits, torch.tensor(completion), reduction="none").tolist()
    assert found == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


@pytest.mark.parametrize("loss_on", ["completion", "sequence"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_is_that_of_trl(family, loss_on, tmp_path, monkeypatch):
    monkeypatch.setattr(train_sft, "evaluate", lambda *_: {"rouge_avg": 0.0, "loss": 1.0})
    rows = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])}
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    config = train_sft.SFTStageConfig(output_dir=str(tmp_path), loss_on=loss_on, per_device_batch_size=2,
                                      gradient_accumulation_steps=2, max_grad_norm=0.0, logging_steps=1)
    loop = epoch_loop(config, without_dropout(policy(family)), len(rows))
    steps = gradients_of_steps(loop)
    train_sft.train(loop, Dataset.from_list(rows), None)
    theirs = without_dropout(policy(family))
    loss = trl_loss(theirs, loss_on, tmp_path)
    loss.backward()
    [logged] = [row["sft/loss"] for row in loop.run.read_metrics() if "sft/loss" in row]
    assert logged == pytest.approx(loss.item(), rel=1e-5)
    [gradients] = steps
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(gradients[f"model.{name}"], weight.grad, rtol=1e-4, atol=1e-5)
