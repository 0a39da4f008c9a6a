"""Required FLOPs of each algorithm, from formulas: no model and no torch.

Only matrix products are counted, two operations for each multiply-add. That is 2 per weight and token, and
attention over the positions that a token sees. A prompt is counted once for its K completions, and the
language-model head at response positions only. A backward pass counts twice its forward pass. Padding,
embeddings, norms, softmax, losses and the optimizer are not counted, so whatever a program computes beyond
the required FLOPs lowers its utilisation.

Lengths are in tokens. `prompts` is a list of P lengths, `completions` a list of P lists of K lengths.
"""

from typing import NamedTuple


class Size(NamedTuple):
    """A decoder-only transformer with two-layer MLPs (OPT, GPT-2)."""

    hidden: int
    layers: int
    ffn: int
    vocabulary: int


BACKWARD = 2  # FLOPs of a backward pass / FLOPs of its forward pass
TRAIN = 1 + BACKWARD  # FLOPs of forward and backward pass / FLOPs of the forward pass
TRAIN_ADAPTERS = 2  # LoRA: the gradients of the frozen weights, half of the backward pass, are not computed


def seen(prompt: int, completions: list[int]) -> int:
    """Number of pairs (token, position that it sees) in one prompt group.

    A token sees itself and all tokens before it in its prompt and its own completion.
    """
    return prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)


def trunk(size: Size, tokens: int, pairs: int) -> int:
    """A forward pass through all layers: query, key, value and output projections, MLP, attention.

    Args:
        pairs: from `seen`.
    """
    weights = 4 * size.hidden**2 + 2 * size.hidden * size.ffn
    return size.layers * (2 * weights * tokens + 4 * size.hidden * pairs)


def head(size: Size, positions: int) -> int:
    """The language-model head at a number of positions."""
    return 2 * size.hidden * size.vocabulary * positions


def groups_trunk(size: Size, prompts: list[int], completions: list[list[int]]) -> int:
    """A forward pass over prompt groups, without a head."""
    groups = list(zip(prompts, completions, strict=True))
    return trunk(size, sum(p + sum(c) for p, c in groups), sum(seen(p, c) for p, c in groups))


def groups_policy(size: Size, prompts: list[int], completions: list[list[int]]) -> int:
    """A forward pass over prompt groups, with the language-model head at each response token."""
    return groups_trunk(size, prompts, completions) + head(size, sum(map(sum, completions)))


def generation(size: Size, prompts: list[int], k: int, length: int) -> int:
    """Sampling K responses of `length` tokens for each prompt. The last sampled token is not fed back."""
    fed = [[length - 1] * k for _ in prompts]
    return groups_trunk(size, prompts, fed) + head(size, len(prompts) * (1 + k * (length - 1)))


def sft(size: Size, prompts: list[int], completions: list[list[int]], train: int = TRAIN) -> int:
    """One optimizer step with the loss on the completions."""
    return train * groups_policy(size, prompts, completions)


def reward(size: Size, prompts: list[int], completions: list[list[int]], train: int = TRAIN) -> int:
    """One optimizer step on all pairs. The scalar head is not counted."""
    return train * groups_trunk(size, prompts, completions)


def ppo(size: Size, prompts: list[int], k: int, length: int, epochs: int,
        judges: list[Size] | None = None, values: list[Size] | None = None, train: int = TRAIN) -> int:
    """One PPO update: sampling, scoring, then `epochs` passes of policy and value model.

    Sampling returns the behaviour policy's log-probs, so they cost nothing. The reference policy reads the
    responses once.

    Args:
        judges: the other models that read the responses once. None: a reward and a value model of the
            policy's size.
        values: models that are trained beside the policy. None: a value model of the policy's size.
        train: FLOPs of a training pass / FLOPs of its forward pass.
    """
    judges, values = [size, size] if judges is None else judges, [size] if values is None else values
    completions = [[length] * k for _ in prompts]

    def trunks(sizes):
        return sum(groups_trunk(one, prompts, completions) for one in sizes)

    policy = groups_policy(size, prompts, completions)
    ref_policy = policy
    rollout = generation(size, prompts, k, length) + ref_policy + trunks(judges)
    return rollout + epochs * train * (policy + trunks(values))
