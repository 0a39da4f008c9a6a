"""The head and its softmax in one step: against a head, a log-softmax, a gather and an entropy in float64."""

import pytest
import torch
from torch import nn

from utils.models import lm_head
from utils.models.lm_head import LMHead, token_logprobs, token_logprobs_and_entropy

TOKENS, WIDTH, WORDS = 23, 16, 101


@pytest.fixture(params=[1, 5 * WORDS, 2**22, "no room for the table"])
def chunk(request, monkeypatch):
    """Rows worked on at once: one, five (23 leaves a rest), all; or as on a GPU with little memory, where the
    probabilities are computed again.
    """
    if isinstance(request.param, int):
        monkeypatch.setattr(lm_head, "_CHUNK", request.param)
    else:
        monkeypatch.setattr(lm_head, "device_memory", lambda device: 16 * TOKENS)
        monkeypatch.setattr(lm_head, "_LEAST_ROWS", 9)
    return request.param


def work(bias: bool):
    generator = torch.Generator().manual_seed(0)
    head = LMHead(WIDTH, WORDS, bias=bias)
    for weight in head.parameters():
        nn.init.normal_(weight.data, generator=generator)
    states = torch.randn(TOKENS, WIDTH, generator=generator, requires_grad=True)
    tokens = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    tokens[1] = tokens[0]  # two gradients meet in one row of the weight
    return head, states, tokens, torch.randn(TOKENS, generator=generator)


def plain(head, states, tokens, temperature, softcap=None, scale=1.0, words=WORDS):
    logits = head(states)[:, :words] * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, tokens[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


BEHIND = [{}, {"softcap": 3.0}, {"scale": 0.25}, {"words": 90}, {"softcap": 5.0, "scale": 2.0, "words": 90}]


@pytest.mark.parametrize("behind", BEHIND, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients(bias, temperature, behind, chunk):
    head, states, tokens, weights = work(bias)
    tokens = tokens % 90
    for name, value in behind.items():
        setattr(head, name, value)
    logprobs, entropy = token_logprobs_and_entropy(head, states, tokens, temperature)
    (logprobs * weights).sum().backward()
    exact = nn.Linear(WIDTH, WORDS, bias=bias).double()
    exact.load_state_dict(head.state_dict())
    inputs = states.detach().double().requires_grad_()
    expected, expected_entropy = plain(exact, inputs, tokens, temperature, **behind)
    (expected * weights).sum().backward()
    assert (torch.equal(logprobs, token_logprobs(head, states, tokens, temperature))
            and not entropy.requires_grad)
    for ours, theirs in ((logprobs, expected), (entropy, expected_entropy), (states.grad, inputs.grad),
                         *((w.grad, v.grad) for w, v in zip(head.parameters(), exact.parameters(),
                                                            strict=True))):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("behind", BEHIND, ids=str)
def test_logits_of_the_sampler_are_those_of_the_update(behind):
    head, states, tokens, _ = work(bias=True)
    tokens = tokens % 90
    for name, value in behind.items():
        setattr(head, name, value)
    logits = head.logits(head(states))
    assert logits.shape == (TOKENS, behind.get("words", WORDS))
    found = (logits / 0.7).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(found, token_logprobs(head, states, tokens, 0.7), rtol=1e-4, atol=1e-4)


def kept_shapes(run) -> list[tuple]:
    """Shapes of what autograd keeps for the backward pass."""
    shapes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: shapes.append(tuple(x.shape)) or x, lambda x: x):
        run()
    return shapes


def test_one_table_of_probabilities_is_kept_and_none_where_the_head_is_frozen(chunk):
    head, states, tokens, weights = work(bias=False)
    assert kept_shapes(lambda: plain(head, states, tokens, 0.7)).count((TOKENS, WORDS)) > 1
    assert (kept_shapes(lambda: token_logprobs_and_entropy(head, states, tokens, 0.7)).count((TOKENS, WORDS))
            == isinstance(chunk, int))
    head.requires_grad_(False)
    assert (TOKENS, WORDS) not in kept_shapes(lambda: token_logprobs_and_entropy(head, states, tokens, 0.7))
    logprobs = token_logprobs(head, states, tokens, 0.7)
    ours, = torch.autograd.grad((logprobs * weights).sum(), states)
    theirs, = torch.autograd.grad((plain(head, states, tokens, 0.7)[0] * weights).sum(), states)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_as_good_as_with_separate_operations(chunk):
    """Of the head's gradient: how far it is from float32's, relative to that of a head under autocast."""
    head, states, tokens, weights = work(bias=False)
    def gradients(run, dtype=None):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logprobs, entropy = run(head, states, tokens, 0.7)
        return (*torch.autograd.grad((logprobs * weights).sum(), [states, head.weight]), logprobs.detach(),
                entropy.detach())
    exact, theirs = gradients(plain), gradients(plain, torch.bfloat16)
    ours = gradients(token_logprobs_and_entropy, torch.bfloat16)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert a.dtype == torch.float32
        assert 0 < (a - c).norm() < 1.5 * (b - c).norm()  # 0: it was not bfloat16 at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_table_is_kept_in_the_arithmetic_of_the_products(dtype):
    head, states, tokens, _ = work(bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            token_logprobs(head, states, tokens, 0.7)
    assert [one.dtype for one in kept if one.shape == (TOKENS, WORDS)] == [dtype]


@pytest.mark.parametrize("words", [50_272, 151_936])
@pytest.mark.parametrize(("memory", "at_least"), [(8, 256), (24, 256), (80, 500), (141, 900)])
def test_a_chunk_on_a_gpu_is_large_and_takes_little_of_its_memory(memory, at_least, words, monkeypatch):
    monkeypatch.setattr(lm_head, "device_memory", lambda device: memory * 2**30)
    rows = lm_head.rows_at_once(torch.device("cuda"), words)
    assert rows >= at_least and 3 * 4 * rows * words <= max(memory * 2**30 / 64, 256 * 12 * words)
    assert lm_head.keeps_table(torch.device("cuda"), 2 * 2048 * words) == (memory >= 16 or words < 10**5)


def test_a_chunk_on_a_cpu_stays_in_the_cache():
    assert lm_head.rows_at_once(torch.device("cpu"), 50_272) == 83
    assert lm_head.rows_at_once(torch.device("cpu"), 10**8) == 1
    assert lm_head.keeps_table(torch.device("cpu"), 2**50)
