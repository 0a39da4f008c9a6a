"""Sampling: a prompt is computed once, and K responses branch from its cache.

A decoding step is one more slice of the prompt-group row: the K newest tokens of a row go through the model
together, and each sees the prompt and its own branch. So the prompt's keys and values are stored once instead
of K times. Stock models do this with an attention mask alone.

The steps of a stretch are alike: their tensors have the same shapes and addresses, and what differs between
two steps is read from tensors. So on a GPU one step is recorded and replayed (`cuda_graphs.py`).

Shapes: B prompts of a batch, Q tokens in the longest, N = B * K responses, L columns of the cache, V words.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicLayer

from utils.console import progress_bar
from utils.models.branches import branching
from utils.models.compiled import uncompiled
from utils.models.cuda_graphs import Replayed
from utils.models.outputs import trunk
from utils.zero import gathered_weights


class _Pace(NamedTuple):
    """How often something is done that a device waits for."""

    checked: int  # steps between checks of which responses have ended
    stretch: int  # steps of a stretch, a multiple of `checked`; rows that have ended leave between two
    multiple: int  # of which the columns that a step sees are a multiple
    recorded: bool  # whether a step is recorded and replayed


PACE = _Pace(checked=4, stretch=4, multiple=1, recorded=False)
# a check waits for the device; a new stretch is a new recording, which takes as long as two or three steps
# without one; attention kernels want aligned masks
PACE_CUDA = _Pace(checked=8, stretch=64, multiple=16, recorded=True)
_BLOCK = 256  # words whose probabilities are summed first when a token is drawn, see `_draw`


class Samples(NamedTuple):
    """The responses of all prompts: the K of the first prompt, then those of the second, ..."""

    responses: list[list[int]]  # token ids, the EOS included
    logprobs: list[list[float]]  # of each token
    ended: list[bool]  # whether the response has an EOS


class _Place:
    """Where the newest tokens of a batch stand in its cache. All layers read it."""

    columns: torch.Tensor  # (T,) of the newest tokens
    shown: int  # columns that they are shown, from the first on


class _PreallocatedLayer(DynamicLayer):
    """A cache layer with its final length allocated, so that a step writes in place and copies nothing."""

    def __init__(self, length: int, place: _Place):
        super().__init__()
        self.length, self.place, self.prompt = length, place, 0  # columns: allocated, of the prompt

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:  # shape, dtype and device are known from the first call on
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            # in some models (DeepSeek-V3) values are narrower than keys, or have fewer heads
            self.keys, self.values = (  # zeros: columns ahead are seen with weight 0, and 0 x NaN is NaN
                states.new_zeros((*states.shape[:2], self.length, states.shape[3]))
                for states in (key_states, value_states)
            )
            self.prompt = key_states.shape[2]
        self.keys.index_copy_(2, self.place.columns, key_states)
        self.values.index_copy_(2, self.place.columns, value_states)
        return self.keys[:, :, : self.place.shown], self.values[:, :, : self.place.shown]

    def retire(self, running):
        """Drop the rows of the batch for which `running` (B,) is False."""
        self.keys, self.values = self.keys[running], self.values[running]

    def get_seq_length(self) -> int:
        return self.prompt

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.shown, 0


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
        seeds: one for each response (len(prompts) * k), so that the batch size does not change what is
            sampled.
        top_k: sample from the k most likely tokens; 0: from all.
        top_p: sample from the smallest set of tokens with at least this probability; 1: from all.
        batch_size: prompts of a batch.
        progress: title of the progress bar; empty: no bar.

    Returns:
        Responses, and their log-probs under the *untruncated* distribution at this temperature. The forward
        pass of the update computes the same for these tokens (detail 27), whatever top_k and top_p are.
    """
    # every rank must take part under ZeRO-3, even one without prompts
    with uncompiled(policy), gathered_weights(policy):
        return _sample(policy, prompts, k, max_new_tokens, temperature, seeds, eos_id, pad_id, top_k, top_p,
                       batch_size, progress)


def _sample(policy, prompts, k, max_new_tokens, temperature, seeds, eos_id, pad_id, top_k, top_p,
            batch_size, progress):
    if not prompts:  # a list shorter than the number of ranks leaves some without prompts
        return Samples([], [], [])
    was_training = policy.training
    policy.eval()
    # prompts of similar length share a batch, so that little padding is computed
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results = {}  # number of a response -> (tokens, log-probs, ended)
    steps = math.ceil(len(order) / batch_size) * max_new_tokens
    with progress_bar(total=steps, desc=progress, unit="token", shown=bool(progress), leave=False) as bar:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            noise = _uniforms([seeds[i * k + j] for i in part for j in range(k)], max_new_tokens)
            batch = _Batch(policy, [prompts[i] for i in part], k, max_new_tokens, pad_id)
            tokens, logprobs = batch.run(noise, temperature, top_k, top_p, eos_id, bar)
            for row, i in enumerate(part):
                for j in range(k):
                    results[i * k + j] = _cut(tokens[row * k + j], logprobs[row * k + j], eos_id)
            bar.update(max_new_tokens - len(tokens[0]))  # steps that no branch needed
    policy.train(was_training)
    return Samples(*map(list, zip(*(results[n] for n in range(len(prompts) * k)), strict=True)))


@torch.no_grad()
def forced_logits(policy, prompts: list[list[int]], answers: list[list[list[int]]],
                  pad_id: int) -> torch.Tensor:
    """The logits from which `sample` would draw the tokens of given answers.

    Args:
        answers: K of each prompt, all of R tokens.

    Returns:
        (B, K, R, V) float32.
    """
    batch = _Batch(policy, prompts, len(answers[0]), len(answers[0][0]), pad_id)
    return batch.forced(torch.tensor(answers, device=batch.device))


def _uniforms(seeds, length):
    """Uniform random numbers (N, length), one for each response and step. Sampling needs no others."""
    return torch.stack([torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def _cut(tokens, logprobs, eos_id):
    """Cut a response after its first EOS.

    The prompt is not searched, because OPT's BOS is its EOS (detail 4).
    """
    end = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
    return tokens[:end], logprobs[:end], eos_id in tokens


class _Batch:
    """A batch of left-padded prompts, and the cache that they share with their branches."""

    def __init__(self, policy, prompts, k, max_new_tokens, pad_id):
        self.policy, self.k, self.max_new_tokens = policy, k, max_new_tokens
        self.width = max(map(len, prompts))
        self.device = policy.get_input_embeddings().weight.device
        self.pace = PACE_CUDA if self.device.type == "cuda" else PACE
        rows = [[pad_id] * (self.width - len(p)) + p for p in prompts]
        self.input_ids = torch.tensor(rows, device=self.device)  # (B, Q)
        self.lengths = torch.tensor([len(p) for p in prompts], device=self.device)  # (B,)
        # (B, Q) True = a token of the prompt, False = padding
        self.real = torch.arange(self.width, device=self.device) >= (self.width - self.lengths)[:, None]
        length = self.columns_until(max_new_tokens)  # L
        # a layer is made when the model first asks for it, because some layers share another's
        self.place = _Place()
        self.cache = Cache(layer_class_to_replicate=partial(_PreallocatedLayer, length, self.place))
        # (B, L) of the cache
        self.positions = torch.zeros(len(prompts), length, dtype=torch.long, device=self.device)
        # (B, 1, K, L) what the newest tokens see; the cache has the K tokens of each step next to each other
        self.seen = torch.zeros(len(prompts), 1, k, length, dtype=torch.bool, device=self.device)
        self.fed = torch.zeros(1, dtype=torch.long, device=self.device)  # (1,) tokens of each branch so far

    def columns_until(self, tokens: int) -> int:
        """Columns of the cache that the prompts and so many tokens of each branch take."""
        columns = self.width + self.k * tokens
        return columns + -columns % self.pace.multiple

    def run(self, noise, temperature, top_k, top_p, eos_id, bar):
        """Decode until every branch has ended.

        Args:
            noise: (N, max_new_tokens) from `_uniforms`.
            bar: progress bar, moved by each step.

        Returns:
            Tokens and log-probs of each branch, two lists of N lists.
        """
        drawn = _Drawn(noise.to(self.device), temperature, top_k, top_p, eos_id)
        drawn.draw(self._prefill().repeat_interleave(self.k, 0), self.fed)
        bar.update(1)

        def advance():  # n = branches of the rows that still run; they are N at first
            drawn.draw(self._decode(drawn.newest.view(-1, self.k)), self.fed)

        count = 1  # tokens of each branch
        while count < self.max_new_tokens:
            if count % self.pace.checked == 0:
                # (B,) True = a branch of the prompt has no EOS yet
                running = drawn.running(count).view(-1, self.k).any(1)
                rows = int(running.sum())
                if rows == 0:
                    break
                # copying the cache is worth it
                if rows <= len(running) / 2 and count % self.pace.stretch == 0:
                    self._retire(running)
                    drawn.retire(running.repeat_interleave(self.k))
            if count == 1 or count % self.pace.stretch == 0:
                self._begin_stretch(count)
                step = Replayed(advance, self.policy) if self.pace.recorded else advance
            step()
            count += 1
            bar.update(1)
        return drawn.tokens[:, :count].tolist(), drawn.logprobs[:, :count].tolist()

    def forced(self, answers):
        """Logits (B, K, R, V) that lead to given answers (B, K, R)."""
        logits = [self._prefill().repeat_interleave(self.k, 0)]
        for step in range(answers.shape[2] - 1):
            self._begin_stretch(step)
            logits.append(self._decode(answers[:, :, step]))
        return torch.stack(logits, 1).unflatten(0, (-1, self.k))

    def _begin_stretch(self, count):
        """The steps that follow, up to the next stretch, are shown the columns that they will fill.

        Args:
            count: tokens of each branch.
        """
        until = count - count % self.pace.stretch + self.pace.stretch
        self.place.shown = self.columns_until(min(until, self.max_new_tokens))

    def _retire(self, running):
        """Drop the prompts for which `running` (B,) is False."""
        self.lengths, self.positions = self.lengths[running], self.positions[running]
        self.seen = self.seen[running]
        for layer in self.cache.layers:
            layer.retire(running)

    def _prefill(self):
        """Fill the cache with the prompts. Returns the logits after each prompt, (B, V)."""
        column = torch.arange(self.width, device=self.device)
        causal = column[:, None] >= column[None, :]  # (Q, Q)
        # (B, Q, Q); a padding token sees itself, because a softmax over nothing would be NaN
        seen = (causal & self.real[:, None, :]) | torch.eye(self.width, dtype=torch.bool, device=self.device)
        positions = (column - (self.width - self.lengths)[:, None]).clamp(min=0)
        self.seen[..., : self.width] = self.real[:, None, None, :]
        self.place.shown = self.width
        return self._forward(self.input_ids, seen[:, None], column, positions, last_only=True)[:, -1]

    def _decode(self, tokens):
        """Feed one token of each branch, (B, K). Returns the logits after them, (B * K, V).

        Nothing here may depend on the step but by way of tensors, and nothing may wait for the device.
        """
        branch = torch.arange(self.k, device=self.device)
        columns = self.width + self.k * self.fed + branch  # (K,)
        own = torch.eye(self.k, dtype=torch.bool, device=self.device)
        self.seen.index_copy_(3, columns, own.expand(len(tokens), 1, -1, -1))
        positions = (self.lengths + self.fed)[:, None].expand(-1, self.k)
        logits = self._forward(tokens, self.seen[..., : self.place.shown], columns, positions)
        self.fed += 1  # at the end: a step that broke off in the model can be made again
        return logits.flatten(0, 1)

    def _forward(self, input_ids, mask, columns, positions, last_only=False):
        """Float32 logits of the new tokens, which stand in these columns at these positions."""
        self.place.columns = columns
        self.positions.index_copy_(1, columns, positions)
        shown = self.positions[:, : self.place.shown]
        with branching(mask, positions, shown):
            hidden = trunk(self.policy)(
                input_ids=input_ids, attention_mask=torch.ones_like(shown), position_ids=positions,
                past_key_values=self.cache, use_cache=True,
            ).last_hidden_state
        if last_only:
            hidden = hidden[:, -1:]
        head = self.policy.get_output_embeddings()
        return head.logits(head(hidden))


class _Drawn:
    """What has been drawn for each branch."""

    def __init__(self, noise, temperature, top_k, top_p, eos_id):
        self.noise, self.temperature, self.top_k, self.top_p = noise, temperature, top_k, top_p
        self.eos_id, device = eos_id, noise.device
        self.tokens = torch.full(noise.shape, eos_id, device=device)  # (N, max_new_tokens)
        self.logprobs = torch.zeros(noise.shape, device=device)
        self.branches = torch.arange(len(noise), device=device)  # (n,) their rows in `tokens`
        self.newest = torch.zeros_like(self.branches)  # (n,) tokens

    def draw(self, logits, place):
        """Draw a token for each row of logits (n, V); it stands at `place` (1,) of its branch."""
        here = self.branches, place.expand(len(self.branches))
        token, logprob = _draw(logits / self.temperature, self.noise[here], self.top_k, self.top_p)
        self.tokens.index_put_(here, token)
        self.logprobs.index_put_(here, logprob)
        self.newest.copy_(token)

    def running(self, count):
        """(n,) True = there is no EOS among the first `count` tokens."""
        return (self.tokens[self.branches, :count] != self.eos_id).all(1)

    def retire(self, running):
        """Drop the branches for which `running` (n,) is False."""
        self.branches, self.newest = self.branches[running], self.newest[running]


def _draw(logits, uniform, top_k, top_p):
    """Draw a token for each row of logits, by inverting the cumulative distribution.

    It is inverted in two levels, first over blocks of words, then over the words of one block, because a
    cumulative sum over all words is slow.

    Args:
        logits: (n, V), divided by the temperature.
        uniform: (n,) numbers in [0, 1).

    Returns:
        Tokens and their log-probs without truncation, (n,) each.
    """
    probabilities = logits.softmax(-1)
    kept = _truncated(probabilities, top_k, top_p) if top_k or top_p < 1 else probabilities
    words = kept.shape[-1]
    whole = words - words % _BLOCK
    blocks = kept[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(-1)
    # (n, V / 256 + 1), the last one is short
    blocks = torch.cat([blocks, kept[:, whole:].sum(-1, keepdim=True)], -1)
    sums = blocks.cumsum(-1)
    block, before = _first_above(sums, uniform * sums[:, -1])
    column = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = kept.gather(-1, column.clamp(max=words - 1)).masked_fill(column >= words, 0.0)
    word, _ = _first_above(inside.cumsum(-1), uniform * sums[:, -1] - before)
    token = (block * _BLOCK + word).clamp(max=words - 1)  # for NaN probabilities searchsorted returns the end
    return token, probabilities.gather(-1, token[:, None])[:, 0].log()


def _first_above(sums, target):
    """The first entry in each row of ascending `sums` (n, C) above `target` (n,).

    Returns:
        Its index, and the entry before it (0 if there is none); (n,) each.
    """
    # rounding must not lead past the last entry with a probability above 0
    target = torch.minimum(target, sums[:, -1].nextafter(torch.zeros_like(target)))
    place = torch.searchsorted(sums, target[:, None], right=True).clamp(max=sums.shape[1] - 1)
    before = torch.where(place > 0, sums.gather(-1, (place - 1).clamp(min=0)), 0.0)
    return place[:, 0], before[:, 0]


def _truncated(probabilities, top_k, top_p):
    """Probabilities (n, V) with 0 for the tokens that top_k and top_p leave out; not normalised again."""
    ordered, order = probabilities.sort(-1, descending=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    keep = ordered.cumsum(-1) - ordered < top_p  # the token that crosses top_p stays
    if top_k:
        keep &= rank < top_k
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * keep)
