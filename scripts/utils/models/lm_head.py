"""The language-model head and its softmax as one differentiable function: log-probabilities of given tokens.

With a vocabulary of 50,000 words, reading and writing memory costs as much as the matrix products. As a head,
a log-softmax, a gather and an entropy, autograd keeps five tables (M, V), for M tokens and V words. This
function keeps one, the probabilities, because the gradient needs no more:

    d log p(y) / d state   =  w_y - sum_v p_v w_v        (D,), computed in the forward pass
    d log p(y) / d weight  =  (onehot(y) - p) x state    one matrix product over all tokens

It keeps none where the head is frozen (the reference policy, LoRA). The entropy is computed in the same pass.

The function is called inside the head's own forward, because under ZeRO-3 a weight is gathered only while its
module is called.
"""

import torch
from torch import nn
from torch.nn.functional import linear

_CHUNK = 2**22  # entries of a table (rows, V) that are computed at once, so that it stays in the CPU's cache


class LMHead(nn.Linear):
    """A head that can also be called for log-probabilities.

    `with_our_heads` sets the class of a loaded model's `nn.Linear` to this one. Weights and checkpoints stay
    the same. Some families change their logits behind the head, z being its output:

    Attributes:
        scale: the logits are scale * z (Cohere; Granite divides).
        softcap: the logits are softcap * tanh(z / softcap) (Gemma); None: they are z.
        words: the rows of the weight that stand for words; those after them are never sampled.
    """

    scale: float = 1.0
    softcap: float | None = None
    words: int | None = None

    def forward(self, states, tokens=None, temperature=1.0, with_entropy=False):
        """The head's output (..., V) for states (..., D). With `tokens` (M,): see
        `token_logprobs_and_entropy`.
        """
        if tokens is None:
            return super().forward(states)
        factor = self.scale
        if self.softcap is None:  # the temperature can be divided by before the product, which is smaller
            factor, temperature = factor / temperature, 1.0
        bias = None if self.bias is None else self.bias * factor
        return _TokenLogprobs.apply(states * factor, self.weight, bias, tokens, self.words, self.softcap,
                                    temperature, with_entropy)

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """The model's logits of its words, float32 (..., words), from the head's output (..., V)."""
        output = output[..., : self.words].float() * self.scale
        return output if self.softcap is None else self.softcap * torch.tanh(output / self.softcap)


def token_logprobs(
    head: LMHead, states: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Log-probability of each token.

    Args:
        states: (M, D) hidden states that predict the tokens.
        tokens: (M,).
        temperature: divides the logits.

    Returns:
        (M,) float32.
    """
    return head(states, tokens, temperature)[0]


def token_logprobs_and_entropy(
    head: LMHead, states: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy of each distribution [nats], (M,) float32, which has no gradient."""
    return head(states, tokens, temperature, True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, tokens, words, softcap, temperature, with_entropy):
        ctx.rows, weight, bias = len(weight), weight[:words], None if bias is None else bias[:words]
        trains_states = ctx.needs_input_grad[0]
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        kept = torch.empty(len(states), len(weight), device=states.device) if trains_head else None  # (M, V)
        logprobs, entropy, expected, slopes = [], [], [], []  # of each chunk; expected: sum_v p_v w_v
        rows = max(1, _CHUNK // len(weight))
        for first in range(0, len(states), rows):
            here = slice(first, first + rows)
            logits = linear(states[here], weight, bias).float()  # (rows, V)
            if softcap is not None:
                logits.div_(softcap).tanh_()
                slope = (1 - logits.square()).div_(temperature)  # of the logits by the head's output
                logits.mul_(softcap / temperature)
            top, picked = logits.amax(-1), logits.gather(-1, tokens[here, None])[:, 0]
            probs = torch.softmax(logits, -1, out=kept[here] if trains_head else None)
            normaliser = top - probs.amax(-1).log()  # log-sum-exp, without computing the exponentials again
            logprobs.append(picked - normaliser)
            if with_entropy:
                entropy.append(normaliser - logits.mul_(probs).sum(-1))
            if softcap is not None:  # from here on p_v stands with the slope at v
                probs.mul_(slope)
                slopes.append(slope.gather(-1, tokens[here, None])[:, 0])
            if trains_states:
                expected.append(torch.mm(probs.to(weight.dtype), weight))
        slopes = torch.cat(slopes) if slopes else None  # (M,) at each token
        if trains_states:
            # the last one is d log p / d state, (M, D)
            own = weight[tokens] if slopes is None else weight[tokens] * slopes[:, None]
            ctx.save_for_backward(states, tokens, kept, slopes, own - torch.cat(expected))
        device = states.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        logprobs, entropy = torch.cat(logprobs), torch.cat(entropy) if with_entropy else None
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        states, tokens, probs, slopes, direction = ctx.saved_tensors
        weighted = grad[:, None] * states  # (M, D)
        own = grad if slopes is None else grad * slopes  # (M,)
        grad_weight = grad_bias = None
        if probs is not None:
            dtype, words = ctx.dtype or states.dtype, probs.shape[1]
            grad_weight = weighted.new_empty(ctx.rows, states.shape[1], dtype=torch.float32)  # (V, D)
            product = probs.to(dtype).t(), -weighted.to(dtype)
            if dtype == torch.float32:  # a table of this size is written once
                torch.mm(*product, out=grad_weight[:words])
            else:
                grad_weight[:words] = torch.mm(*product)
            grad_weight[words:] = 0
            grad_weight.index_add_(0, tokens, (own[:, None] * states).float())
        if ctx.needs_input_grad[2]:
            grad_bias = grad.new_zeros(ctx.rows)
            grad_bias[:words] = torch.mv(probs.t(), -grad)
            grad_bias.index_add_(0, tokens, own)
        return (grad[:, None] * direction).to(states.dtype), grad_weight, grad_bias, *[None] * 5
