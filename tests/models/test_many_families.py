"""Many families, most with a sliding window or chunks: against the stock forward pass on plain rows.

Rows are longer than the window: prompts that are longer, answers that cross it from a shorter prompt, and
answers that are longer themselves. Positions restart at a prompt's end, so columns and positions differ.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from families import EOS, PAD, VOCAB, draw, random_groups
from many_families import TRAINED, WINDOW, WINDOWED, table, tiny, tiny_scalar
from oracle import TEMPERATURE, each_row, stock_logprobs
from utils.config import PROJECT, UserError
from utils.models import attention
from utils.models.loading import load_scalar_model
from utils.models.lora import add_adapter, merge_adapter
from utils.models.outputs import response_logprobs, response_values, scores
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

PROMPTS, COMPLETIONS = random_groups([14, 3, WINDOW, 1], [[5, 1, 9], [10, 4], [2], [WINDOW + 2]])
every_family = pytest.mark.parametrize("family", TRAINED)


def close(actual, expected, tolerance=1e-4):
    limit = tolerance * max(expected.abs().max().item(), 1e-3)
    torch.testing.assert_close(actual, expected, rtol=0, atol=limit)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@every_family
def test_logprobs_and_gradients(family, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 4)  # attention in blocks, also of these short rows
    model, groups = tiny(family), pack(PROMPTS, COMPLETIONS, PAD)
    ours = response_logprobs(model, groups, TEMPERATURE)
    stock = pad_sequence([stock_logprobs(model, *row)[0] for row in each_row(PROMPTS, COMPLETIONS)], True)
    close(ours, stock)
    weights = torch.randn(stock.shape, generator=torch.Generator().manual_seed(1))
    ours, stock = (gradients(model, (logprobs * weights).sum()) for logprobs in (ours, stock))
    assert ours.keys() == stock.keys()
    largest = max(gradient.abs().max() for gradient in stock.values())
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=float(1e-4 * largest),
                                   msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", WINDOWED)
def test_recomputed_activations_have_the_same_windows(family):
    """Layers run again in the backward pass, when the row is no longer at hand."""
    groups, found = pack(PROMPTS, COMPLETIONS, PAD), []
    for recompute in (False, True):
        model = tiny(family).train()
        if recompute:
            model.gradient_checkpointing_enable()
        found.append(gradients(model, response_logprobs(model, groups, 1.0).sum()))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@every_family
@torch.no_grad()
def test_scores_and_values(family):
    model = tiny_scalar(family)
    if model is None:
        pytest.skip("transformers has no classifier of this family")
    groups = pack(PROMPTS, COMPLETIONS, PAD)
    rows = each_row(PROMPTS, COMPLETIONS)
    close(scores(model, groups), torch.cat([model(torch.tensor([p + c])).logits[0] for p, c in rows]))
    values = [torch.cat([model(torch.tensor([p + c[:r]])).logits[0] for r in range(len(c))]) for p, c in rows]
    close(response_values(model, groups), pad_sequence(values, True))


@every_family
@torch.no_grad()
def test_sampling(family):
    """Greedy as stock generation, one prompt at a time; and the log-probs are those of the update."""
    model = tiny(family)
    samples = draw(model, PROMPTS, k=2, max_new_tokens=12)
    groups = pack(PROMPTS, [samples.responses[2 * i : 2 * i + 2] for i in range(len(PROMPTS))], PAD)
    logprobs = response_logprobs(model, groups, TEMPERATURE)
    for row, mask, reported in zip(logprobs, groups.response_mask, samples.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(reported), row[mask], rtol=0, atol=1e-4)
    greedy = draw(model, PROMPTS, k=2, max_new_tokens=12, temperature=1e-6).responses
    for i, prompt in enumerate(PROMPTS):
        row = torch.tensor([prompt])
        stock = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=12,
                               eos_token_id=EOS, pad_token_id=PAD)[0, len(prompt):].tolist()
        assert greedy[2 * i] == greedy[2 * i + 1] == stock


@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama4"])
def test_rows_that_have_ended_leave_the_batch_with_their_positions(family):
    model, settings = tiny(family), {"k": 2, "max_new_tokens": 16, "temperature": 1.5}
    prompts = PROMPTS + random_groups([9, 2, 17, 5], [[1]] * 4, seed=3)[0]
    often = Counter(token for response in draw(model, prompts, eos_id=-1, **settings).responses
                    for token in response)
    settings["eos_id"] = often.most_common(1)[0][0]
    together, apart = draw(model, prompts, **settings), draw(model, prompts, batch_size=1, **settings)
    assert together.responses == apart.responses and any(together.ended) and not all(together.ended)
    for one, other in zip(together.logprobs, apart.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.parametrize("family", WINDOWED)
@torch.no_grad()
def test_the_windows_of_these_models_matter(family):
    """The oracle's, too: else the tests above would pass without any."""
    logprobs = [stock_logprobs(tiny(family, window=window), PROMPTS[0], COMPLETIONS[0][2])[0]
                for window in (WINDOW, 64)]
    assert (logprobs[0] - logprobs[1]).abs().max() > 0.01


@every_family
@torch.no_grad()
def test_adapters_are_trained_and_merged(family, tmp_path):
    """Each adapter gets a gradient, and the merged model says what the adapted one did."""
    model, groups = tiny(family), pack(PROMPTS, COMPLETIONS, PAD)
    before = response_logprobs(model, groups, 1.0)
    add_adapter(model, SimpleNamespace(lora_rank=2, lora_alpha=3))
    close(response_logprobs(model, groups, 1.0), before)
    adapters = {name: weight for name, weight in model.named_parameters() if "lora_B" in name}
    with torch.enable_grad():
        response_logprobs(model, groups, 1.0).sum().backward()
    unused = [name for name, weight in adapters.items() if weight.grad is None]
    assert not unused
    for weight in adapters.values():
        torch.nn.init.normal_(weight, std=0.3)
    adapted = response_logprobs(model, groups, 1.0)
    assert (adapted - before).abs().max() > 1e-2
    close(response_logprobs(merge_adapter(model), groups, 1.0), adapted)


def test_the_documents_table_is_that_of_these_tests():
    """When it is not, this prints the lines that belong into docs/models.md."""
    text = (PROJECT / "docs" / "models.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in text, "\n".join(table())


@torch.no_grad()
def test_a_config_with_parts_says_its_sizes_in_the_part_for_text(tmp_path):
    """Gemma 3 with images has no `vocab_size` and no `hidden_size` of its own."""
    model = tiny_scalar("gemma3-images")
    model.save_pretrained(tmp_path)
    parent, groups = Parent("reward_model", str(tmp_path)), pack(PROMPTS, COMPLETIONS, PAD)
    assert parent.hidden_size == 16
    close(scores(load_scalar_model(parent, vocab_size=VOCAB), groups), scores(model, groups))
    with pytest.raises(UserError, match=f"^reward_model: .* has {VOCAB} tokens, the policy 40"):
        load_scalar_model(parent, vocab_size=40)
