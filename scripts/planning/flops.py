"""The floating-point operations that an algorithm needs, counted by hand: no model, no torch.

Counted are matrix products, two operations for each multiply-add: 2 per weight and token, and attention over the
positions that a token sees, and no others. A prompt is counted once for its K completions, the language-model head at
response positions only. Padding, embeddings, norms, softmax, losses and the optimizer are not counted; a backward
pass is twice its forward pass. So what a program does beyond this lowers its utilisation.

Sizes are tokens: `prompts` is a list of P lengths, `completions` a list of P lists of K lengths.
"""

from typing import NamedTuple


class Size(NamedTuple):
    """A decoder-only transformer with two-layer MLPs (OPT, GPT-2)."""

    hidden: int
    layers: int
    ffn: int
    vocabulary: int


BACKWARD = 2  # passes of the size of the forward one
TRAIN = 1 + BACKWARD
TRAIN_ADAPTERS = 2  # no gradients of the frozen weights, which are half of the backward pass


def seen(prompt: int, completions: list[int]) -> int:
    """Pairs (token, position it sees): each token sees itself and what is before it in its prompt and completion."""
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)


def trunk(size: Size, tokens: int, pairs: int) -> int:
    """A forward pass through all layers: query, key, value and output projections, MLP, attention."""
    weights = 4 * size.hidden**2 + 2 * size.hidden * size.ffn
    return size.layers * (2 * weights * tokens + 4 * size.hidden * pairs)


def head(size: Size, positions: int) -> int:
    """The language-model head at so many positions."""
    return 2 * size.hidden * size.vocabulary * positions


def groups_trunk(size: Size, prompts: list[int], completions: list[list[int]]) -> int:
    """A forward pass over whole prompt groups without any head."""
    groups = list(zip(prompts, completions, strict=True))
    return trunk(size, sum(p + sum(c) for p, c in groups), sum(seen(p, c) for p, c in groups))


def groups_policy(size: Size, prompts: list[int], completions: list[list[int]]) -> int:
    """The same with the language-model head at each response token."""
    return groups_trunk(size, prompts, completions) + head(size, sum(map(sum, completions)))


def generation(size: Size, prompts: list[int], k: int, length: int) -> int:
    """Sampling K responses of `length` tokens for each prompt. The last token sampled is never fed back."""
    fed = [[length - 1] * k for _ in prompts]
    return groups_trunk(size, prompts, fed) + head(size, len(prompts) * (1 + k * (length - 1)))


def sft(size: Size, prompts: list[int], completions: list[list[int]], train: int = TRAIN) -> int:
    """One optimizer step with the loss on the completions."""
    return train * groups_policy(size, prompts, completions)


def reward(size: Size, prompts: list[int], completions: list[list[int]], train: int = TRAIN) -> int:
    """One optimizer step on all pairs; the scalar head is left out."""
    return train * groups_trunk(size, prompts, completions)


def ppo(size: Size, prompts: list[int], k: int, length: int, epochs: int, judges: list[Size] | None = None,
        values: list[Size] | None = None, train: int = TRAIN) -> int:
    """One update: sampling, reference log-probs, scores, values, then `epochs` passes of policy and value model.

    The behaviour policy's log-probs come out of sampling.

    Args:
        judges: models that read the responses once, besides the reference; none: reward and value model of the policy's size.
        values: models that are trained beside the policy; none: a value model of its size.
        train: of a trained pass, in forward passes.
    """
    judges, values = [size, size] if judges is None else judges, [size] if values is None else values
    completions = [[length] * k for _ in prompts]

    def bare(sizes):
        return sum(groups_trunk(one, prompts, completions) for one in sizes)

    policy = groups_policy(size, prompts, completions)
    return generation(size, prompts, k, length) + policy + bare(judges) + epochs * train * (policy + bare(values))
