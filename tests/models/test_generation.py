"""Sampling: what it reports is what the update's forward pass computes, and what it draws is what it says."""

from collections import Counter

import pytest
import torch

from families import EOS, FAMILIES, PAD, VOCAB, draw, policy, random_groups
from utils.models import generation
from utils.models.generation import _draw, _truncated
from utils.models.loading import load_policy
from utils.models.outputs import response_logprobs
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

every_family = pytest.mark.parametrize("family", FAMILIES)
PROMPTS = random_groups([5, 1, 8, 3], [[1]] * 4)[0]


@pytest.fixture(params=[1, 4, 256])
def block(request, monkeypatch):
    """Words summed at once: all 31 fit into the last size, 4 leaves a rest of 3."""
    monkeypatch.setattr(generation, "_BLOCK", request.param)


@every_family
@pytest.mark.parametrize("truncation", [{}, {"top_k": 3, "top_p": 0.8}])
def test_sampled_logprobs_are_those_of_the_updates_forward_pass(family, truncation):
    """Detail 27: ratio 1 in the first inner step."""
    model = policy(family)
    found = draw(model, PROMPTS, **truncation)
    groups = pack(PROMPTS, [found.responses[3 * i : 3 * i + 3] for i in range(len(PROMPTS))], PAD)
    with torch.no_grad():
        logprobs = response_logprobs(model, groups, 0.7)
    assert truncation or len(set(map(len, found.responses))) > 1, "the test wants different lengths"
    for row, mask, reported in zip(logprobs, groups.response_mask, found.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(reported), row[mask], rtol=0, atol=1e-5)


@every_family
def test_a_seed_decides_its_response_whatever_else_is_in_the_batch(family):
    model = policy(family)
    many = draw(model, PROMPTS)
    assert draw(model, PROMPTS, batch_size=1).responses == many.responses
    assert draw(model, PROMPTS, batch_size=3).responses == many.responses
    assert draw(model, [PROMPTS[2]], seeds=[6, 7, 8]).responses == many.responses[6:9]
    assert draw(model, [PROMPTS[2]], k=1, seeds=[7]).responses == many.responses[7:8]
    assert draw(model, PROMPTS, seeds=list(range(50, 62))).responses != many.responses


def test_a_response_ends_at_its_first_eos_although_bos_is_eos():
    prompts = [[EOS, *prompt] for prompt in PROMPTS]
    found = draw(policy("opt"), prompts, k=8, temperature=2.0)
    assert any(found.ended) and not all(found.ended)
    for response, logprobs, ended in zip(*found, strict=True):
        assert len(logprobs) == len(response)
        assert ended == (response[-1] == EOS)
        assert EOS not in response[:-1]
        assert ended or len(response) == 8


@every_family
def test_near_zero_temperature_is_transformers_greedy_search(family):
    model = policy(family)
    found = draw(model, PROMPTS, k=2, temperature=1e-3, max_new_tokens=6)
    for i, prompt in enumerate(PROMPTS):
        row, special = torch.tensor([prompt]), {"eos_token_id": EOS, "pad_token_id": PAD}
        whole = model.generate(row, attention_mask=row > 0, do_sample=False, max_new_tokens=6, **special)
        greedy = whole[0, len(prompt) :].tolist()
        assert found.responses[2 * i] == found.responses[2 * i + 1] == greedy


@every_family
def test_top_k_of_one_is_greedy(family):
    model = policy(family)
    assert (draw(model, PROMPTS, top_k=1, temperature=1.5).responses
            == draw(model, PROMPTS, temperature=1e-3).responses)


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_frequencies_follow_the_softmax(temperature, block):
    """Pearson's statistic has mean V - 1 and variance 2 (V - 1); the seeds are fixed."""
    model, prompt, count = policy("opt"), PROMPTS[0], 4000
    found = draw(model, [prompt], k=count, temperature=temperature, max_new_tokens=1)
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1) * count
    observed = torch.bincount(torch.tensor(found.responses)[:, 0], minlength=VOCAB)
    often = expected > 5
    assert often.sum() > 10
    freedom = often.sum().item() - 1
    statistic = ((observed - expected).square() / expected)[often].sum().item()
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5
    for token, logprob in zip(found.responses, found.logprobs, strict=True):
        assert logprob[0] == pytest.approx((expected[token[0]] / count).log().item(), abs=1e-5)


@torch.no_grad()
def test_a_draw_inverts_the_cumulative_distribution(block):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, VOCAB, generator=generator) * 3
    uniform = torch.rand(300, generator=generator)
    tokens, logprobs = _draw(logits, uniform, 0, 1.0)
    cumulative = logits.double().softmax(-1).cumsum(-1)
    first_above = (cumulative > uniform.double()[:, None]).int().argmax(-1)
    assert torch.equal(tokens, first_above)
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[torch.arange(300), tokens], rtol=1e-5,
                               atol=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_have_ended_leave_the_batch(k, monkeypatch):
    sizes, forward = [], generation._Batch._forward

    def watched(batch, input_ids, *rest, **more):
        sizes.append(len(input_ids))
        return forward(batch, input_ids, *rest, **more)

    monkeypatch.setattr(generation._Batch, "_forward", watched)
    prompts = random_groups([6] * 12, [[1]] * 12)[0]
    settings = {"k": k, "temperature": 2.0, "max_new_tokens": 50}
    often = Counter(token for response in draw(policy("opt"), prompts, eos_id=-1, **settings).responses
                    for token in response)
    settings["eos_id"] = often.most_common(1)[0][0]
    sizes.clear()
    together = draw(policy("opt"), prompts, **settings)
    assert sizes[0] == 12 and 1 < len(set(sizes)) and sizes[-1] <= 6
    apart = draw(policy("opt"), prompts, batch_size=1, **settings)
    assert together.responses == apart.responses and together.ended == apart.ended
    for one, other in zip(together.logprobs, apart.logprobs, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_branches_of_a_prompt_are_independent_draws():
    found = draw(policy("opt"), [PROMPTS[0]], k=20, temperature=1.5)
    assert len({tuple(response) for response in found.responses}) > 10
    same = draw(policy("opt"), [PROMPTS[0]], k=20, temperature=1.5, seeds=[3] * 20)
    assert len({tuple(response) for response in same.responses}) == 1


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [
        (0, 0.5, [1]),  # .5 alone is enough
        (0, 0.51, [1, 3]),  # the token that crosses stays
        (0, 0.9, [0, 1, 3]),
        (0, 0.94, [0, 1, 2, 3]),
        (0, 1.0, [0, 1, 2, 3]),
        (2, 1.0, [1, 3]),
        (2, 0.4, [1]),
        (1, 0.99, [1]),
        (9, 1.0, [0, 1, 2, 3]),
    ],
)
def test_truncation_keeps_the_smallest_set(top_k, top_p, kept):
    probabilities = torch.tensor([[0.125, 0.5, 0.0625, 0.3125]])
    expected = [p if i in kept else 0.0 for i, p in enumerate(probabilities[0].tolist())]
    assert _truncated(probabilities, top_k, top_p)[0].tolist() == expected


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.39, 1), (0.41, 3), (0.999999, 3)])
def test_a_token_without_probability_is_never_drawn(uniform, token, block):
    logits = torch.tensor([[0.0, 0.4, 0.0, 0.6, 0.0]]).log()
    found, logprob = _draw(logits, torch.tensor([uniform]), 0, 1.0)
    assert found.item() == token and logprob.item() == pytest.approx(logits[0, token].item())


def test_the_models_mode_is_left_as_it_was_and_dropout_plays_no_part():
    model = policy("gpt2").train()
    first = draw(model, PROMPTS)
    assert model.training and first.responses == draw(model.eval(), PROMPTS).responses
    assert not model.training


def test_no_prompts_no_responses():
    """A rank may have no share of a short list."""
    assert draw(policy("opt"), [], seeds=[]) == ([], [], [])


def test_the_bar_moves_within_a_batch_and_ends_full(monkeypatch):
    """48 prompts in one batch of 64 would show no time left before they are all done."""
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.moves = total, []
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, count):
            self.moves.append(count)

    monkeypatch.setattr(generation, "progress_bar", Bar)
    found = draw(policy("opt"), PROMPTS, k=1, temperature=2.0, batch_size=3, progress="sampling")
    assert sum(bars[0].moves) == bars[0].total == 2 * 8
    assert bars[0].moves.count(1) >= max(map(len, found.responses))


@torch.no_grad()
def test_a_ratio_of_1_is_float32s():
    """In bfloat16 sampling and the update round differently; docs/metrics.md has what comes of it."""
    parent = Parent("model", "assets/opt-mini")
    model, pad = load_policy(parent).eval(), parent.tokenizer.pad_token_id
    prompts, _ = random_groups([40] * 32, [[1]] * 32)
    for bf16, least, most in ((False, 0.0, 1e-4), (True, 1e-3, 0.5)):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = draw(model, prompts, k=2, max_new_tokens=30, eos_id=-1, pad_id=pad)
            groups = pack(prompts, [found.responses[2 * i : 2 * i + 2] for i in range(32)], pad)
            logprobs = response_logprobs(model, groups, 0.7)
        ratio = (logprobs - torch.tensor(found.logprobs)).exp()
        assert least <= (ratio - 1).abs().max() < most and ratio.mean() == pytest.approx(1, abs=2e-3)
