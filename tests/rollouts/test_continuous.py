"""Sampling by transformers' continuous batching: the same distribution as ours."""

from collections import Counter

import pytest
import torch

from families import EOS, PAD, VOCAB, policy, random_groups
from utils.errors import UserError
from utils.models.attention import CAUSAL_BLOCKS
from utils.models.loading import in_blocks
from utils.models.outputs import response_logprobs
from utils.models.prompt_groups import pack
from utils.ppo import importance_weights
from utils.rollouts.continuous import sample_continuously

PROMPTS = random_groups([5, 1, 8], [[1]] * 3)[0]


def continuously(model, prompts, **more):
    settings = {"k": 4, "max_new_tokens": 8, "temperature": 0.7, "seed": 0, "eos_id": EOS, "pad_id": PAD}
    return sample_continuously(model, prompts, **{**settings, **more})


@pytest.mark.parametrize("family", ["opt", "llama-gqa"])
@torch.no_grad()
def test_its_logprobs_are_those_of_a_forward_pass_and_responses_end_at_eos(family):
    model = in_blocks(policy(family)).train()
    found = continuously(model, PROMPTS, temperature=1.5, max_new_tokens=16)
    assert model.training and model.config._attn_implementation == CAUSAL_BLOCKS
    assert len(found.responses) == 12 and any(found.ended) and not all(found.ended)
    for response, ended in zip(found.responses, found.ended, strict=True):
        assert EOS not in response[:-1] and ended == (response[-1] == EOS) and (ended or len(response) == 16)
    groups = pack(PROMPTS, [found.responses[4 * i : 4 * i + 4] for i in range(3)], PAD)
    logprobs = response_logprobs(model.eval(), groups, 1.5)
    for row, mask, reported in zip(logprobs, groups.response_mask, found.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(reported), row[mask], rtol=0, atol=1e-5)


@torch.no_grad()
def test_frequencies_follow_the_softmax():
    """Pearson's statistic over the first tokens has mean V - 1 and variance 2 (V - 1)."""
    model, count = in_blocks(policy("opt")), 400
    found = continuously(model, [PROMPTS[0]], k=count, temperature=1.5, max_new_tokens=1)
    expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5).softmax(-1) * count
    counts = Counter(response[0] for response in found.responses)
    observed = torch.tensor([counts[word] for word in range(VOCAB)])
    often = expected > 5
    freedom = often.sum().item() - 1
    assert freedom > 9
    assert ((observed - expected).square() / expected)[often].sum() < freedom + 4 * (2 * freedom) ** 0.5


def test_rows_behind_the_last_word_are_refused():
    model = in_blocks(policy("opt"))
    model.get_output_embeddings().words = VOCAB - 2
    with pytest.raises(UserError, match="2 rows behind its last word"):
        continuously(model, PROMPTS)


def test_importance_weights_by_hand():
    ours, theirs = torch.tensor([[-1.0, -1.0, -3.0]]), torch.tensor([[-1.0, -3.0, -1.0]])
    torch.testing.assert_close(importance_weights(ours, theirs, 2.0), torch.tensor([[1.0, 2.0, 0.1353353]]))
