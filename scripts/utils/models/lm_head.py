"""The language-model head and its softmax in one differentiable step: log-probabilities of given tokens.

Over a vocabulary of 50,000 the passes through memory cost as much as the matrix products. Written as a head, a
log-softmax, a gather and an entropy, autograd keeps five copies of (M, V), M tokens by V words. Here one is kept, the
probabilities, because the gradient needs no more:

    d log p(y) / d state   =  w_y - sum_v p_v w_v        (D,), known in the forward pass
    d log p(y) / d weight  =  (onehot(y) - p) x state    one matrix product over all tokens

and none where the head is frozen (the reference policy, LoRA). The entropy comes out of the same pass.

It is the head's own forward that does it: under ZeRO-3 a weight is whole only while its module is called.
"""

import torch
from torch import nn
from torch.nn.functional import linear

_CHUNK = 2**22  # entries of (rows, V) that are worked on at once, so that they stay in a processor's cache


class LMHead(nn.Linear):
    """A model's own head, with a second way to be called. The class of a loaded `nn.Linear` is set to it; all else stays."""

    def forward(self, states, tokens=None, temperature=1.0, with_entropy=False):
        """Logits (..., V) of states (..., D); with `tokens`, what `token_logprobs_and_entropy` returns."""
        if tokens is None:
            return super().forward(states)
        bias = None if self.bias is None else self.bias / temperature
        return _TokenLogprobs.apply(states / temperature, self.weight, bias, tokens, with_entropy)


def token_logprobs(head: LMHead, states: torch.Tensor, tokens: torch.Tensor, temperature: float) -> torch.Tensor:
    """Log-probability of each token (M,) after its state (M, D), float32 (M,); the temperature divides the logits."""
    return head(states, tokens, temperature)[0]


def token_logprobs_and_entropy(head: LMHead, states: torch.Tensor, tokens: torch.Tensor,
                               temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy of each distribution in nats, float32 (M,), without a gradient."""
    return head(states, tokens, temperature, True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, tokens, with_entropy):
        trains_states, trains_head = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept = torch.empty(len(states), len(weight), device=states.device) if trains_head else None
        found, entropy, expected = [], [], []
        rows = max(1, _CHUNK // len(weight))
        for first in range(0, len(states), rows):
            here = slice(first, first + rows)
            logits = linear(states[here], weight, bias).float()
            top, picked = logits.amax(-1), logits.gather(-1, tokens[here, None])[:, 0]
            probs = torch.softmax(logits, -1, out=kept[here] if trains_head else None)
            normaliser = top - probs.amax(-1).log()  # log-sum-exp, without another pass of exponentials
            found.append(picked - normaliser)
            if with_entropy:
                entropy.append(normaliser - logits.mul_(probs).sum(-1))
            if trains_states:
                expected.append(torch.mm(probs.to(weight.dtype), weight))
        if trains_states:
            ctx.save_for_backward(states, tokens, kept, weight[tokens] - torch.cat(expected))
        ctx.dtype = torch.get_autocast_dtype(states.device.type) if torch.is_autocast_enabled(states.device.type) else None
        logprobs, entropy = torch.cat(found), torch.cat(entropy) if with_entropy else None
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        states, tokens, probs, direction = ctx.saved_tensors
        weighted = grad[:, None] * states
        grad_weight = grad_bias = None
        if probs is not None:
            dtype = ctx.dtype or states.dtype
            grad_weight = torch.mm(probs.to(dtype).t(), -weighted.to(dtype)).float().index_add_(0, tokens, weighted.float())
        if ctx.needs_input_grad[2]:
            grad_bias = torch.mv(probs.t(), -grad).index_add_(0, tokens, grad)
        return (grad[:, None] * direction).to(states.dtype), grad_weight, grad_bias, None, None
