"""The load-balancing loss of models with experts: transformers' own, in prompt groups and in SFT."""

import json
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import train_sft
from families import PAD, policy, random_groups
from loops import epoch_loop, gradients_of_steps
from many_families import tiny
from oracle import each_row
from tiny_models import mini_tokenizer
from utils.config import PROJECT, UserError, parse_config
from utils.models.outputs import response_logprobs, supervised_outputs
from utils.models.prompt_groups import pack
from utils.models.routers import router_coef

SHORT = ("--max_steps 2 --logging_steps 1 --per_device_batch_size 4 --eval_steps 2 --eval_rows 4 "
         "--test_rows 4 --max_new_tokens 4")
EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "phimoe"]
PARENT = SimpleNamespace(key="model", name="some/model")
PROMPTS, COMPLETIONS = random_groups([14, 3, 6, 1], [[5], [10], [2], [8]])


def stock(model, rows):
    """transformers' outputs on right-padded rows; the labels are the completions'."""
    ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    labels = [torch.tensor([-100] * len(prompt) + completion) for prompt, completion in rows]
    return model(input_ids=pad_sequence(ids, True, PAD), labels=pad_sequence(labels, True, -100),
                 attention_mask=pad_sequence([torch.ones_like(row) for row in ids], True),
                 output_router_logits=True)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("family", EXPERTS)
def test_a_step_of_sft_is_transformers_own_loss(family, passes, tmp_path, monkeypatch):
    """Of one forward pass its `loss`; of two the routers' losses are weighted by the tokens they are of."""
    monkeypatch.setattr(train_sft, "evaluate", lambda *_: {"rouge_avg": 0.0, "loss": 1.0})
    rows = [{"prompt": p, "completion": c[0], "length": len(p) + len(c[0])}
            for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    config = train_sft.SFTStageConfig(output_dir=str(tmp_path), max_grad_norm=0.0, logging_steps=1,
                                      per_device_batch_size=4 // passes, gradient_accumulation_steps=passes)
    model, theirs = tiny(family), tiny(family)
    theirs.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.5
    coef = router_coef(model, PARENT, None)
    loop = epoch_loop(config, model, len(rows), balances=True)
    steps = gradients_of_steps(loop)
    train_sft.train(loop, Dataset.from_list(rows), None, coef)
    # the longest rows share a pass
    ordered = sorted(each_row(PROMPTS, COMPLETIONS), key=lambda row: -len(row[0] + row[1]))
    parts = [ordered[first : first + 4 // passes] for first in range(0, 4, 4 // passes)]
    found = [stock(theirs, part) for part in parts]
    read = [sum(len(p + c) for p, c in part) for part in parts]
    said = [sum(len(c) for _, c in part) for part in parts]
    aux = sum(one.aux_loss * count for one, count in zip(found, read, strict=True)) / sum(read)
    nll = sum((one.loss - 0.5 * one.aux_loss) * count
              for one, count in zip(found, said, strict=True)) / sum(said)
    loss = found[0].loss if passes == 1 else nll + 0.5 * aux
    loss.backward()
    [logged] = [row for row in loop.run.read_metrics() if "sft/loss" in row]
    assert logged["sft/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert logged["sft/router_loss"] == pytest.approx(aux.item(), rel=1e-5)
    [gradients] = steps
    trained = {name: weight.grad for name, weight in theirs.named_parameters() if weight.grad is not None}
    assert any("gate" in name or "router" in name for name in trained)
    for name, gradient in trained.items():
        torch.testing.assert_close(gradients[f"model.{name}"], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", EXPERTS)
@torch.no_grad()
def test_a_prompt_with_several_completions_counts_once(family):
    """The oracle takes the routers' logits of separate rows, with the prompt's of the first one only."""
    prompts, completions = random_groups([6, 3], [[4, 7, 1], [2, 5]])
    model, logits, counts = tiny(family), [], []
    for prompt, group in zip(prompts, completions, strict=True):
        for number, completion in enumerate(group):
            found = model(torch.tensor([prompt + completion]), output_router_logits=True)
            logits.append(found.router_logits)
            counts += [float(number == 0)] * len(prompt) + [1.0] * len(completion)
    config = model.config
    experts = getattr(config, "num_experts", None) or config.num_local_experts
    expected = load_balancing_loss_func(tuple(map(torch.cat, zip(*logits, strict=True))), experts,
                                        config.num_experts_per_tok, torch.tensor(counts))
    groups = pack(prompts, completions, PAD)
    logprobs, loss = supervised_outputs(model, groups, balances=True)
    torch.testing.assert_close(loss / sum(counts), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logprobs, response_logprobs(model, groups, 1.0), rtol=1e-5, atol=1e-6)


def test_recomputed_activations_have_the_same_gradients():
    found, groups = [], pack(PROMPTS, COMPLETIONS, PAD)
    for recompute in (False, True):
        model = tiny("olmoe").train()
        if recompute:
            model.gradient_checkpointing_enable()
        logprobs, loss = supervised_outputs(model, groups, balances=True)
        (loss - logprobs.sum()).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4)


def test_the_weight_is_the_models_own_or_the_keys():
    model = tiny("mixtral")
    assert router_coef(model, PARENT, None) == model.config.router_aux_loss_coef > 0
    assert router_coef(model, PARENT, 0.25) == 0.25 and router_coef(model, PARENT, 0.0) == 0


@pytest.mark.parametrize("family", ["deepseek-v2", "llama4"])
def test_a_model_without_such_a_loss_is_trained_without_it(family):
    """Their configs know routers, and Llama 4's has a weight; transformers has no loss for them."""
    assert router_coef(tiny(family), PARENT, None) == 0


@pytest.mark.parametrize("make", [lambda: policy("opt"), lambda: tiny("llama4")])
def test_a_weight_for_a_loss_that_there_is_none_of_is_refused(make):
    with pytest.raises(UserError, match="^router_loss_coef: transformers has no load-balancing loss for "
                                        "model 'some/model' .*; leave the key out"):
        router_coef(make(), PARENT, 0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("words", "weight"), [("", 0.01), ("--router_loss_coef 0", 0.0)])
def test_the_stage_logs_the_loss_where_it_is_trained_on(words, weight, tmp_path):
    tokenizer = mini_tokenizer()
    config = OlmoeConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=16, num_hidden_layers=2,
                         num_attention_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=1,
                         bos_token_id=2, eos_token_id=2, max_position_embeddings=384)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = f"{SHORT} {words} --model {tmp_path}/base --output_dir {tmp_path}/sft".split()
    train_sft.main(parse_config(train_sft.SFTStageConfig, PROJECT / "configs/tldr_mini/sft.yaml", words))
    lines = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "sft/loss" in row]
    assert len(steps) == 2 and all(("sft/router_loss" in row) == bool(weight) for row in steps)
    # of random routers about as many as a token has experts
    assert all(1.9 < row["sft/router_loss"] < 2.5 for row in steps if weight)
