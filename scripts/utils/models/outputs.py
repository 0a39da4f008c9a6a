"""What a model says of a batch of prompt groups: log-probabilities, scores, values.

The language-model head is applied at response positions only: nothing of shape (B, T, vocabulary) is made.
Shapes: B rows, T tokens in a row, N completions, R tokens in the longest completion, D hidden size.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from utils.models.branches import branching
from utils.models.lm_head import token_logprobs, token_logprobs_and_entropy
from utils.models.prompt_groups import PromptGroups, branches, end_states, response_states, spread


class GroupModel(nn.Module):
    """A model whose forward is one of the functions below.

    Engines and wrappers (DDP, DeepSpeed, autocast) hook the forward of the module they are given. So the
    stock model stays as it is, and what is saved is the stock model.
    """

    def __init__(self, model, outputs):
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, *groups):
        return self.outputs(self.model, *groups)


def trunk(model):
    """The model in front of its head. Llama 4's class gives its place another name than the model has."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def hidden_states(model, groups: PromptGroups) -> torch.Tensor:
    """The trunk's last hidden states (B, T, D), each completion seeing its prompt and itself only."""
    positions = groups.position_ids
    with branching(branches(groups), positions, positions):
        return trunk(model)(
            input_ids=groups.input_ids,
            attention_mask=torch.ones_like(groups.input_ids),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state


def response_logprobs(policy, groups: PromptGroups, temperature: float) -> torch.Tensor:
    """Log-probability of each response token, float32 (N, R). Padding is 0.

    The temperature divides the logits, as it does in sampling (detail 25).
    """
    states = response_states(hidden_states(policy, groups), groups)
    found = token_logprobs(policy.get_output_embeddings(), states, groups.tokens, temperature)
    return spread(found, groups)


def supervised_outputs(policy, groups: PromptGroups,
                       balances: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`response_logprobs` at temperature 1, (N, R); and the routers' loss, summed over the tokens read, ().

    The routers' loss is the load-balancing loss that transformers defines for the model's family. It is taken
    on every token that is read, those of prompts too; a prompt with several completions counts once.

    Args:
        balances: whether the model is trained on it; False: it is 0 and not computed.
    """
    if not balances:
        logprobs = response_logprobs(policy, groups, temperature=1.0)
        return logprobs, logprobs.new_zeros(())
    positions, read = groups.position_ids, groups.owners >= 0
    with branching(branches(groups), positions, positions):
        # within `branching` the attention mask says nothing but which tokens the routers' loss is taken on
        found = policy(input_ids=groups.input_ids, attention_mask=read.long(), position_ids=positions,
                       use_cache=False, output_router_logits=True, output_hidden_states=True,
                       logits_to_keep=1)
    states = response_states(found.hidden_states[-1], groups)
    logprobs = token_logprobs(policy.get_output_embeddings(), states, groups.tokens, temperature=1.0)
    return spread(logprobs, groups), found.aux_loss * read.sum()


def logprobs_and_entropy(policy, states, groups: PromptGroups,
                         temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`response_logprobs` from the policy's `response_states`, and each token's entropy without a gradient,
    both (N, R).
    """
    found = token_logprobs_and_entropy(policy.get_output_embeddings(), states, groups.tokens, temperature)
    return tuple(spread(values, groups) for values in found)


def scores(reward_model, groups: PromptGroups) -> torch.Tensor:
    """The reward model's score of each completion, read at its last token, float32 (N,) (detail 16)."""
    states = end_states(hidden_states(reward_model, groups), groups)
    return reward_model.score(states)[:, 0] - getattr(reward_model.config, "score_shift", 0.0)


def response_values(value_model, groups: PromptGroups) -> torch.Tensor:
    """Value of the state before each response token, float32 (N, R). Padding is 0."""
    states = response_states(hidden_states(value_model, groups), groups)
    values = value_model.score(states)[:, 0] - getattr(value_model.config, "score_shift", 0.0)
    return spread(values, groups)
