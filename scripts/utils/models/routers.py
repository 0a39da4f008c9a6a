"""Models with experts: the weight of the loss that keeps their routers from using a few experts only."""

import torch

from utils.config import UserError
from utils.models.outputs import supervised_outputs
from utils.models.parents import Parent
from utils.models.prompt_groups import pack
from utils.zero import gathered_weights


def router_coef(policy, parent: Parent, given: float | None) -> float:
    """Weight of the routers' load-balancing loss in SFT; 0: the model has none, or it is not wanted.

    Every rank must call it, because under ZeRO-3 the weights are gathered.

    Args:
        given: the key `router_loss_coef`; None: the weight in the model's own config.

    Raises:
        UserError: when a weight is given for a model that has no such loss.
    """
    config = policy.config.get_text_config()
    coef = getattr(config, "router_aux_loss_coef", None) if given is None else given
    if not coef:
        return 0.0
    if not hasattr(config, "output_router_logits") or not _has_router_loss(policy):
        if given is None:  # configs of some families have the weight, and their models no loss (Llama 4)
            return 0.0
        raise UserError(f"router_loss_coef: transformers has no load-balancing loss for {parent.key} "
                        f"'{parent.name}' ({type(policy).__name__}); leave the key out")
    return coef


@torch.no_grad()
def _has_router_loss(policy) -> bool:
    """Whether the stock model says its routers' loss when it is asked for."""
    with gathered_weights(policy):
        weight = policy.get_input_embeddings().weight
        groups = pack([[len(weight) // 2]], [[[len(weight) // 2]]], 0).to(weight.device)
        was_training = policy.training
        try:
            supervised_outputs(policy.eval(), groups, balances=True)
        except (AttributeError, TypeError):  # the output has no such field, or it is None
            return False
        finally:
            policy.train(was_training)
    return True
