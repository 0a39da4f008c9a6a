"""Sampling: the prompt is computed once, and K samples branch from its cache.

A decoding step is one more slice of the prompt-group row: the K newest tokens of a row go through the model
together, each seeing the prompt and its own branch. So the prompt's keys and values are stored once, not K
times, and stock models do it with nothing but an attention mask.
"""

import math
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers.cache_utils import Cache, DynamicLayer

from utils.zero import gathered_weights

_CHECKED_EVERY = 4  # steps between looks at who has ended: on a GPU each look waits for the device
_BLOCK = 256  # words summed at once when a token is drawn


class Samples(NamedTuple):
    """Responses of all prompts, K after K; each ends with its EOS when it has one."""

    responses: list[list[int]]
    logprobs: list[list[float]]
    ended: list[bool]


class _PreallocatedLayer(DynamicLayer):
    """A cache layer of a known final length: a step writes in place instead of copying all that came before."""

    def __init__(self, length: int):
        super().__init__()
        self.length, self.used = length, 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            shape = (*key_states.shape[:2], self.length, key_states.shape[3])
            self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        end = self.used + key_states.shape[2]
        self.keys[:, :, self.used : end] = key_states
        self.values[:, :, self.used : end] = value_states
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def retire(self, running):
        """Keep the rows (B,) that are True."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((int(running.sum()), *old.shape[1:]))
            new[:, :, : self.used] = old[running, :, : self.used]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        return self.used


@torch.no_grad()
def sample(
    policy,
    prompts: list[list[int]],
    *,
    k: int,
    max_new_tokens: int,
    temperature: float,
    seeds: list[int],
    eos_id: int,
    pad_id: int,
    top_k: int = 0,
    top_p: float = 1.0,
    batch_size: int = 64,
    progress: str = "",
) -> Samples:
    """Sample K responses for each prompt.

    Args:
        prompts: token ids.
        temperature: divides the logits, in sampling and in the log-probs.
        seeds: one for each response (len(prompts) * k), so that the batch size does not change what is sampled.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability is at least this; 1 keeps all.
        batch_size: prompts in one batch.
        progress: title of a progress bar; empty for none.

    Returns:
        Responses with log-probs under the *untruncated* distribution at this temperature: what the update's
        forward pass computes for the same tokens (detail 27), whatever top_k and top_p are.
    """
    with gathered_weights(policy):  # on all ranks, also on one without a prompt
        return _sample(policy, prompts, k, max_new_tokens, temperature, seeds, eos_id, pad_id, top_k, top_p, batch_size, progress)


def _sample(policy, prompts, k, max_new_tokens, temperature, seeds, eos_id, pad_id, top_k, top_p, batch_size, progress):
    if not prompts:  # a rank's share of a short list
        return Samples([], [], [])
    was_training = policy.training
    policy.eval()
    # neighbours of like length share a batch, so that little padding is computed
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found = {}
    batches = math.ceil(len(order) / batch_size)
    with tqdm(total=batches * max_new_tokens, desc=progress, unit="token", disable=not progress, leave=False) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            noise = _uniforms([seeds[i * k + j] for i in part for j in range(k)], max_new_tokens)
            batch = _Batch(policy, [prompts[i] for i in part], k, max_new_tokens, pad_id)
            tokens, logprobs = batch.run(noise, temperature, top_k, top_p, eos_id, bar)
            for row, i in enumerate(part):
                for j in range(k):
                    found[i * k + j] = _cut(tokens[row * k + j], logprobs[row * k + j], eos_id)
            bar.update(max_new_tokens - len(tokens[0]))  # those that no branch needed
    policy.train(was_training)
    return Samples(*map(list, zip(*(found[n] for n in range(len(prompts) * k)), strict=True)))


def _uniforms(seeds, length):
    """One uniform number for each sample and step, (N, length): all the randomness a response takes."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _cut(tokens, logprobs, eos_id):
    """Everything up to and with the first EOS of the *response* (OPT's BOS is its EOS; detail 4)."""
    end = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
    return tokens[:end], logprobs[:end], eos_id in tokens


class _Batch:
    """One batch of prompts, left-padded, and the cache they share with their branches."""

    def __init__(self, policy, prompts, k, max_new_tokens, pad_id):
        self.policy, self.k = policy, k
        self.width = max(map(len, prompts))
        self.device = policy.get_input_embeddings().weight.device
        rows = [[pad_id] * (self.width - len(p)) + p for p in prompts]
        self.input_ids = torch.tensor(rows, device=self.device)
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.real = torch.arange(self.width, device=self.device) >= (self.width - self.lengths)[:, None]  # (B, Q)
        layers = policy.config.num_hidden_layers
        length = self.width + k * max_new_tokens
        self.cache = Cache(layers=[_PreallocatedLayer(length) for _ in range(layers)])
        self.max_new_tokens = max_new_tokens

    def run(self, noise, temperature, top_k, top_p, eos_id, bar):
        """Decode until every branch has ended; tokens and log-probs as lists of (N) lists. `bar` moves at each token."""
        logits = self._prefill().repeat_interleave(self.k, 0)  # (n, V), n = the branches of the rows that still run
        noise = noise.to(self.device)
        tokens = torch.full(noise.shape, eos_id, device=self.device)
        logprobs = torch.zeros(noise.shape, device=self.device)
        branches = torch.arange(len(noise), device=self.device)
        for step in range(self.max_new_tokens):
            token, logprob = _draw(logits / temperature, noise[branches, step], top_k, top_p)
            tokens[branches, step], logprobs[branches, step] = token, logprob
            bar.update(1)
            if step + 1 == self.max_new_tokens:
                break
            if step % _CHECKED_EVERY == _CHECKED_EVERY - 1:
                running = (tokens[branches, : step + 1] != eos_id).all(1).view(-1, self.k).any(1)
                count = int(running.sum())
                if count == 0:
                    break
                if count <= len(running) / 2:
                    self._retire(running)
                    branches, token = (kept.view(-1, self.k)[running].flatten() for kept in (branches, token))
            logits = self._decode(token.view(-1, self.k), step)
        return tokens[:, : step + 1].tolist(), logprobs[:, : step + 1].tolist()

    def _retire(self, running):
        """Go on with the rows (B,) that are True: the batch shrinks."""
        self.real, self.lengths = self.real[running], self.lengths[running]
        for layer in self.cache.layers:
            layer.retire(running)

    def _prefill(self):
        """Fill the cache with the prompts; logits after each prompt's last token (B, V)."""
        column = torch.arange(self.width, device=self.device)
        causal = column[:, None] >= column[None, :]
        seen = (causal & self.real[:, None, :]) | torch.eye(self.width, dtype=torch.bool, device=self.device)
        positions = (column - (self.width - self.lengths)[:, None]).clamp(min=0)
        return self._forward(self.input_ids, seen[:, None], positions)[:, -1]

    def _decode(self, tokens, step):
        """One token (B, K) for each branch; logits after them (N, V)."""
        k = self.k
        own = torch.eye(k, dtype=torch.bool, device=self.device).repeat(1, step + 1)  # (K, K * (step + 1))
        own = own.expand(len(tokens), k, -1)
        seen = torch.cat([self.real[:, None, :].expand(-1, k, -1), own], -1)
        positions = (self.lengths + step)[:, None].expand(-1, k)
        return self._forward(tokens, seen[:, None], positions).flatten(0, 1)

    def _forward(self, input_ids, mask, positions):
        hidden = self.policy.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        if mask.shape[2] == self.width and self.cache.get_seq_length() == self.width:
            hidden = hidden[:, -1:]  # the prompt's own tokens need no logits
        return self.policy.get_output_embeddings()(hidden).float()


def _draw(logits, uniform, top_k, top_p):
    """A token for each row of logits (N, V) by inverting the cumulative distribution at `uniform` (N,).

    In two levels, blocks of words and the words of the block that is hit: a running sum over all words is slow.
    """
    probabilities = logits.softmax(-1)
    kept = _truncated(probabilities, top_k, top_p) if top_k or top_p < 1 else probabilities
    words = kept.shape[-1]
    whole = words - words % _BLOCK
    blocks = kept[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    blocks = torch.cat([blocks, kept[:, whole:].sum(-1, keepdim=True)], -1)
    sums = blocks.cumsum(-1)
    block, before = _first_above(sums, uniform * sums[:, -1])
    column = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = kept.gather(-1, column.clamp(max=words - 1)).masked_fill(column >= words, 0.0)
    word, _ = _first_above(inside.cumsum(-1), uniform * sums[:, -1] - before)
    token = (block * _BLOCK + word).clamp(max=words - 1)  # not-a-number is above nothing
    return token, probabilities.gather(-1, token[:, None])[:, 0].log()


def _first_above(sums, target):
    """The first entry of each row of running sums (N, C) that is above `target` (N,), and the sum before it."""
    # rounding must never point past the last entry that adds something
    target = torch.minimum(target, sums[:, -1].nextafter(torch.zeros_like(target)))
    place = torch.searchsorted(sums, target[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(place > 0, sums.gather(-1, (place - 1).clamp(min=0)), 0.0)
    return place[:, 0], before[:, 0]


def _truncated(probabilities, top_k, top_p):
    ordered, order = probabilities.sort(-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    keep = ordered.cumsum(-1) - ordered < top_p  # the token that crosses top_p stays
    if top_k:
        keep &= rank < top_k
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * keep)
