"""Sampling by transformers' continuous batching (`generate_batch`), which forks the K samples of a prompt.

It works in a thread of its own, where no autocast holds: it computes in the precision of the weights.
"""

import logging
import math
from contextlib import contextmanager

from transformers import ContinuousBatchingConfig, GenerationConfig

from utils.errors import UserError
from utils.models.generation import Samples
from utils.models.loading import in_blocks

_PAGE = 64  # tokens of a page of its cache


def sample_continuously(
    policy, prompts: list[list[int]], *, k: int, max_new_tokens: int, temperature: float, seed: int,
    eos_id: int, pad_id: int, top_k: int = 0, top_p: float = 1.0,
) -> Samples:
    """K responses for each prompt, as `utils.models.generation.sample`.

    Args:
        seed: of all responses. What is sampled depends on the batch.

    Returns:
        Responses, and their log-probs as the engine computed them, under the truncated distribution.

    Raises:
        UserError: when the engine leaves a response out or cannot run this model.
    """
    refuse_foreign_heads(policy)
    if not prompts:
        return Samples([], [], [])
    settings = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p, max_new_tokens=max_new_tokens,
        num_return_sequences=k, eos_token_id=eos_id, pad_token_id=pad_id)
    engine = engine_settings(prompts, k, max_new_tokens, return_logprobs=True, seed=seed)
    with _stock_attention(policy), _quiet():
        found = list(policy.generate_batch(prompts, settings, engine).values())
    failed = [one.error for one in found if one.error]
    if failed or len(found) != len(prompts) * k:
        raise UserError(f"rollout_engine: transformers returned {len(found) - len(failed)} of "
                        f"{len(prompts) * k} responses ({failed[0] if failed else 'no reason given'}); "
                        "take rollout_engine 'own'")
    responses = [one.generated_tokens for one in found]
    return Samples(responses, [one.logprobs for one in found], [one[-1] == eos_id for one in responses])


def engine_settings(prompts: list[list[int]], k: int, max_new_tokens: int,
                    **more) -> ContinuousBatchingConfig:
    """As much cache as all responses take at once: otherwise the engine takes what memory is free."""
    pages = sum(k * math.ceil((len(prompt) + max_new_tokens + 1) / _PAGE) for prompt in prompts)
    # forks copy the last page of a prompt
    return ContinuousBatchingConfig(page_size=_PAGE, num_blocks=pages + k, **more,
                                    max_batch_tokens=max(1024, len(prompts) * k, *map(len, prompts)))


def refuse_foreign_heads(policy) -> None:
    """Raise UserError for a model with rows behind its last word: no engine is told never to sample them."""
    head = policy.get_output_embeddings()
    if head.words is not None and head.words < len(head.weight):
        raise UserError(f"rollout_engine: the model has {len(head.weight) - head.words} rows behind its last "
                        "word, which other engines would sample; take rollout_engine 'own'")


@contextmanager
def _stock_attention(policy):
    """Inside, the policy is in evaluation mode and has an attention that the engine knows."""
    was_training = policy.training
    policy.eval()
    policy.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        in_blocks(policy)
        policy.train(was_training)


@contextmanager
def _quiet():
    """Without the engine's lines on its warm-up and its settings."""
    log = logging.getLogger("ContinuousBatchingLogger")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
