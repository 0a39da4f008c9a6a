"""Several reward heads on one trunk, for little more than the cost of one (Coste et al., 2310.02743).

Each head has its own first weights and its own bootstrap of the posts. In `final/` the model has the mean of
the heads as its one label, so it is a stock checkpoint; `reward_heads.safetensors` beside it holds the heads.

Shapes: N completions, H heads, D width that reaches a head.
"""

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from utils.errors import UserError
from utils.models.loading import ScalarHead
from utils.models.outputs import hidden_states
from utils.models.parents import Parent
from utils.models.prompt_groups import PromptGroups, end_states
from utils.zero import gathered_weights

FILE = "reward_heads.safetensors"  # in final/: weight (H, D) and bias (H,), float32


class Heads(ScalarHead):
    """H heads in the place of a reward model's one. Its output is (..., 1 + H): the score that the heads make
    together (`ensemble_score`), then the score of each.

    So whatever reads a reward model's first label reads the score of the ensemble.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, ensemble: str = "mean", coef: float = 0.0,
                 replaced: ScalarHead | None = None):
        super().__init__(weight.shape[1], len(weight), bias=bias is not None, device=weight.device)
        self.ensemble, self.coef = ensemble, coef
        self.replaced = replaced and replaced.requires_grad_(False)  # not read: `take_heads` puts it back
        with torch.no_grad():
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)

    def forward(self, states):
        each = super().forward(states)
        return torch.cat([ensemble_score(each, self.ensemble, self.coef)[..., None], each], -1)


def ensemble_score(each: Tensor, ensemble: str, coef: float) -> Tensor:
    """One score (...) of the scores of H heads (..., H): their mean, the lowest ("worst"), or the mean less
    `coef` times their variance ("uncertainty").

    Source: Coste et al. (2310.02743), the three objectives of their ensembles: mean, worst-case and
    uncertainty-weighted optimisation. The variance divides by H, as theirs.
    """
    if ensemble == "worst":
        return each.amin(-1)
    mean = each.mean(-1)
    return mean if ensemble == "mean" else mean - coef * each.var(-1, correction=0)


def head_scores(reward_model, groups: PromptGroups) -> Tensor:
    """The score of each completion by each head, float32 (N, H); by the one head of a stock model (N, 1)."""
    found = reward_model.score(end_states(hidden_states(reward_model, groups), groups))
    found = found[:, 1:] if isinstance(reward_model.score, Heads) else found
    return found - getattr(reward_model.config, "score_shift", 0.0)


def bootstrap_draws(prompt: list[int], heads: int, seed: int) -> list[float]:
    """How often each head's bootstrap of the posts has drawn this post, (H,): Poisson with mean 1, the limit
    of drawing as many posts as there are with replacement. One head has every post once.

    A function of the post's tokens and the seed: groups of one post are drawn together, in every pass.
    """
    if heads == 1:
        return [1.0]
    digest = hashlib.blake2b(np.asarray(prompt, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest)]).poisson(1.0, heads).astype(float).tolist()


def give_heads(model, parent: Parent, config) -> None:
    """Put `config.reward_heads` heads into a model that is going to be trained, behind its adapters: those of
    a reward model that goes on learning, or new ones with weights N(0, 1/sqrt(D+1)) each (detail 15).

    Raises:
        UserError: when the reward model has another number of them.
    """
    count, path = config.reward_heads, heads_file(parent)
    if count == 1:
        return
    if parent.is_reward_model:
        weight = None if path is None else load_file(path)["weight"]
        if weight is None or len(weight) != count:
            has = "one head" if weight is None else f"{len(weight)} heads"
            raise UserError(f"reward_heads: '{parent.name}' has {has}, not {count}; give that number, or "
                            "start from the SFT model")
    else:
        generator, width = torch.Generator().manual_seed(config.seed), model.score.in_features
        weight = torch.empty(count, width).normal_(std=1 / math.sqrt(width + 1), generator=generator)
    model.score = Heads(weight.to(model.device), None, replaced=model.score)


def take_heads(model) -> Heads | None:
    """Put the mean of the heads into the model as its one head; returns the heads, None where there are none.

    Their mean goes into the head that `give_heads` took out, since ZeRO-3 cannot compute a module that was
    not there when its engine was made.
    """
    heads = model.score
    if not isinstance(heads, Heads):
        return None
    with gathered_weights(heads):
        weight = heads.weight.detach().clone()
    model.score = heads.replaced.to(weight.device)
    with gathered_weights(model.score, change=True), torch.no_grad():
        model.score.weight.copy_(weight.mean(0, keepdim=True))
    return Heads(weight, torch.zeros(len(weight), device=weight.device)).eval()


def heads_file(parent: Parent) -> Path | None:
    """The file of a reward model's heads; None when it has one head."""
    path = parent.folder and parent.folder / FILE
    return path if path and path.is_file() else None


def use_heads(reward_model, parent: Parent, config) -> None:
    """Let a frozen reward model score with its heads, as `config.ensemble` says; with one head it stays as it
    is.

    Raises:
        UserError: when `ensemble` needs heads that are not there, or the file does not fit the model.
    """
    path = heads_file(parent)
    if path is None:
        if config.ensemble != "mean":
            raise UserError(f"ensemble: '{parent.name}' has one head; train a reward model with "
                            "reward_heads: 5, or leave ensemble out")
        return
    state = parent.load(lambda _: load_file(path))
    weight, bias = state.get("weight"), state.get("bias")
    if weight is None or bias is None or weight.shape != (len(bias), reward_model.score.in_features):
        raise UserError(f"{parent.key}: '{path}' does not hold heads of this model; train that stage again")
    device = reward_model.score.weight.device
    reward_model.score = Heads(weight.to(device), bias.to(device), config.ensemble, config.ensemble_coef)
