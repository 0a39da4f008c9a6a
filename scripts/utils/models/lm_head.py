"""The language-model head and its softmax as one differentiable function: log-probabilities of given tokens.

With a vocabulary of 50,000 words, reading and writing memory costs as much as the matrix products. As a head,
a log-softmax, a gather and an entropy, autograd keeps five tables (M, V), for M tokens and V words. This
function keeps one, the probabilities, because the gradient needs no more:

    d log p(y) / d state   =  w_y - sum_v p_v w_v        (D,), computed in the forward pass
    d log p(y) / d weight  =  (onehot(y) - p) x state    one matrix product over all tokens

The table is kept in the arithmetic of that product: in 16 bits under autocast. On a GPU a table that would
take much of its memory is computed again instead. None is kept where the head is frozen (the reference
policy, LoRA). The entropy is computed in the same pass.

The function is called inside the head's own forward, because under ZeRO-3 a weight is gathered only while its
module is called.
"""

import torch
from torch import nn
from torch.nn.functional import linear

_CHUNK = 2**22  # entries of a table (rows, V) that are computed at once, so that it stays in the CPU's cache
_LEAST_ROWS = 256  # on a GPU; a product of fewer rows takes as long as it takes to read the weight


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU, whether free or not: chunks decide the rounding, which a resumed run must repeat. None
    for a CPU.
    """
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def rows_at_once(device: torch.device, words: int) -> int:
    """Rows of a chunk. On a CPU its table stays in the cache. On a GPU the float32 table takes 1/256 of the
    memory, of which a chunk holds about three at a time; more rows gain nothing, fewer cost launches.
    """
    memory = device_memory(device)
    return max(1, _CHUNK // words) if memory is None else max(_LEAST_ROWS, memory // 1024 // words)


def keeps_table(device: torch.device, table: int) -> bool:
    """Whether `table` bytes are kept for the backward pass: on a GPU up to 1/16 of its memory. To compute
    them again is one more matrix product beside three.
    """
    memory = device_memory(device)
    return memory is None or table <= memory // 16


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


def _logits(states, weight, bias, softcap, temperature):
    """Float32 logits of a chunk (rows, V), and with a softcap their slope by the head's output."""
    logits = linear(states, weight, bias).float()
    if softcap is None:
        return logits, None
    logits.div_(softcap).tanh_()
    slope = (1 - logits.square()).div_(temperature)
    return logits.mul_(softcap / temperature), slope


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, tokens, words, softcap, temperature, with_entropy):
        device = states.device
        # of the products; the weight is cast here, since autocast would cast it again for every chunk
        dtype = (torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type)
                 else weight.dtype)
        ctx.shape, ctx.behind = weight.shape, (softcap, temperature)
        own_rows = weight[tokens]  # (M, D)
        inputs, weight = states.to(dtype), weight[:words].to(dtype)
        bias = None if bias is None else bias[:words].to(dtype)
        trains_states = ctx.needs_input_grad[0]
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        rows = rows_at_once(device, len(weight))
        keeps = keeps_table(device, len(states) * len(weight) * dtype.itemsize)
        kept = states.new_empty(len(states), len(weight), dtype=dtype) if trains_head and keeps else None
        logprobs, entropy, expected, slopes = [], [], [], []  # of each chunk; expected: sum_v p_v w_v
        ctx.chunks = [slice(first, first + rows) for first in range(0, len(states), rows)]
        with torch.autocast(device.type, enabled=False):
            for here in ctx.chunks:
                logits, slope = _logits(inputs[here], weight, bias, softcap, temperature)  # (rows, V)
                top, picked = logits.amax(-1), logits.gather(-1, tokens[here, None])[:, 0]
                in_place = kept is not None and dtype == torch.float32
                probs = torch.softmax(logits, -1, out=kept[here] if in_place else None)
                normaliser = top - probs.amax(-1).log()  # log-sum-exp, the exponentials not computed again
                logprobs.append(picked - normaliser)
                if with_entropy:
                    entropy.append(normaliser - logits.mul_(probs).sum(-1))
                if slope is not None:  # from here on p_v stands with the slope at v
                    probs.mul_(slope)
                    slopes.append(slope.gather(-1, tokens[here, None])[:, 0])
                if kept is not None and not in_place:
                    probs = kept[here].copy_(probs)
                if trains_states:
                    expected.append(torch.mm(probs.to(dtype), weight))
        slopes = torch.cat(slopes) if slopes else None  # (M,) at each token
        if trains_states:
            # the last one is d log p / d state, (M, D)
            own = own_rows if slopes is None else own_rows * slopes[:, None]
            again = (weight, bias) if trains_head and not keeps else (None, None)
            ctx.save_for_backward(states, tokens, kept, *again, slopes, own - torch.cat(expected))
        logprobs, entropy = torch.cat(logprobs), torch.cat(entropy) if with_entropy else None
        if with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, _):
        states, tokens, kept, weight, bias, slopes, direction = ctx.saved_tensors
        weighted = grad[:, None] * states  # (M, D)
        own = grad if slopes is None else grad * slopes  # (M,)
        grad_weight = grad_bias = None
        if kept is not None or weight is not None:
            words = len(weight) if kept is None else kept.shape[1]
            grad_weight = weighted.new_empty(ctx.shape, dtype=torch.float32)  # (V, D)
            grad_weight[words:] = 0
            if ctx.needs_input_grad[2]:
                grad_bias = grad.new_zeros(ctx.shape[0])
            for here in [slice(None)] if kept is not None else ctx.chunks:
                probs = (kept[here] if kept is not None
                         else _probabilities(states[here], weight, bias, *ctx.behind))
                product = probs.t(), -weighted[here].to(probs.dtype)
                first = here.start in (None, 0)
                if probs.dtype == torch.float32:  # a table of this size is written once
                    grad_weight[:words].addmm_(*product, beta=0 if first else 1)
                elif first:
                    grad_weight[:words] = torch.mm(*product)
                else:
                    grad_weight[:words] += torch.mm(*product)
                if grad_bias is not None:
                    grad_bias[:words] += torch.mv(probs.t(), -grad[here].to(probs.dtype))
            grad_weight.index_add_(0, tokens, (own[:, None] * states).float())
        if grad_bias is not None:
            grad_bias.index_add_(0, tokens, own)
        return (grad[:, None] * direction).to(states.dtype), grad_weight, grad_bias, *[None] * 5


def _probabilities(states, weight, bias, softcap, temperature):
    """Those of a chunk once more, (rows, V) in the weight's arithmetic, with the softcap's slope."""
    logits, slope = _logits(states.to(weight.dtype), weight, bias, softcap, temperature)
    probs = torch.softmax(logits, -1)
    return (probs if slope is None else probs.mul_(slope)).to(weight.dtype)
