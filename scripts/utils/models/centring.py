"""The level of a reward model's scores. Training sees differences only, so it is free; here it is set."""

import torch

from utils.models.outputs import scores
from utils.models.prompt_groups import pack
from utils.zero import gathered_weights


def centre_scores(reward_model, mean: float, fold: bool = True) -> None:
    """Shift the model so that what scored `mean` scores 0 (detail 19; ST, N+, IG).

    Stock classification heads have no bias. Where nothing but linear maps follow a bias of the trunk (that of
    the last LayerNorm in OPT, GPT-2, GPT-NeoX), the shift is folded into it, and every tool that loads the
    checkpoint sees centred scores. A trunk that ends in a norm without bias (Llama, Qwen, Gemma) has no
    constant direction: there the shift is kept in the config as `score_shift`. `scores` subtracts it, and the
    model card says how others do. Without `fold` it is kept there always: adapters in final/ leave their base
    model as it is.
    """
    bias = _last_bias(reward_model) if fold else None
    if bias is None or not _folded(reward_model, bias, mean):
        reward_model.config.score_shift = getattr(reward_model.config, "score_shift", 0.0) + mean


def _last_bias(reward_model) -> torch.nn.Parameter | None:
    """The bias of the trunk's last norm, or of its last layer's where the trunk has none (OPT-350m)."""
    trunk = _trunk(reward_model)
    layers = [child for child in trunk.children() if isinstance(child, torch.nn.ModuleList) and len(child)]
    for module in (trunk, *(child[-1] for child in layers)):
        norms = [child for child in module.children() if "norm" in type(child).__name__.lower()]
        if norms:
            return getattr(norms[-1], "bias", None)
    return None


def _trunk(reward_model):
    return getattr(reward_model.base_model, "decoder", reward_model.base_model)


def _folded(reward_model, bias: torch.nn.Parameter, mean: float) -> bool:
    """Take the shift into `bias`; False, and nothing changed, when the scores do not move by it.

    The direction is the score's gradient by the bias, the head's weights brought back through a projection.
    """
    with torch.no_grad(), gathered_weights(reward_model, change=True):
        direction = reward_model.score.weight[0]
        projection = getattr(_trunk(reward_model), "project_out", None)
        if projection is not None:  # called, since an adapter may stand in its place
            unit = torch.eye(len(bias), dtype=direction.dtype, device=direction.device)
            direction = projection(unit) @ direction
        step = mean * direction / direction.square().sum()
        before = _probe(reward_model)
        bias -= step.to(bias.dtype)
        moved = before - _probe(reward_model)
        # 2 %: weights in bfloat16 round a small step
        right = bool(((moved - mean).abs() <= 0.02 * abs(mean) + 1e-4).all())
        if not right:
            bias += step.to(bias.dtype)
    return right


def _probe(reward_model) -> torch.Tensor:
    """Scores (2,) of two short rows."""
    return scores(reward_model, pack([[0, 1]], [[[2], [3, 4]]], 0).to(reward_model.score.weight.device))
