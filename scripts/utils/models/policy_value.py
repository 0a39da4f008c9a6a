"""The models of PPO: policy and value model, which are trained together, and the frozen reference and reward
model.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from utils.models.fitness import refuse_unfit
from utils.models.four_bit import storage_of
from utils.models.heads import use_heads
from utils.models.loading import (
    ScalarHead,
    load_policy,
    load_scalar_model,
    trainable,
    without_dropout,
)
from utils.models.lora import join_weights, share_weights
from utils.models.outputs import hidden_states, logprobs_and_entropy, response_logprobs, response_values
from utils.models.parents import Parent
from utils.models.prompt_groups import PromptGroups, response_states, spread
from utils.zero import MasterWeights, gathered_weights


class PolicyAndValue(nn.Module):
    """What PPO trains, as one module, so that there is one engine and one optimizer.

    `value_model` is a scalar model of its own (detail 22); or a linear layer (D, 1) on the policy's last
    hidden states, which share the trunk; or None, for advantages that need no values.
    """

    def __init__(self, policy, value_model: nn.Module | None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.frozen = nn.ModuleList()  # under DeepSpeed the frozen models, which its engine then shards, too

    def forward(self, groups: PromptGroups, temperature: float, supervised: bool = False):
        """New log-probs, entropy and values of a batch, each (N, R); the values are None without a value
        model.

        Of supervised examples the log-probs alone (N, R). They go through the same forward, because engines
        hook it.
        """
        if supervised:
            return response_logprobs(self.policy, groups, temperature)
        states = response_states(hidden_states(self.policy, groups), groups)
        logprobs, entropy = logprobs_and_entropy(self.policy, states, groups, temperature)
        return logprobs, entropy, self._values(groups, states)

    def values(self, groups: PromptGroups) -> torch.Tensor | None:
        """Value of the state before each response token, float32 (N, R); None without a value model."""
        shares = isinstance(self.value_model, nn.Linear)
        return self._values(groups, response_states(hidden_states(self.policy, groups), groups) if shares
                            else None)

    def _values(self, groups, states):
        if self.value_model is None:
            return None
        if isinstance(self.value_model, nn.Linear):
            return spread(self.value_model(states)[:, 0], groups)
        return response_values(self.value_model, groups)


class Models(NamedTuple):
    """What is trained together, and what is frozen."""

    trained: PolicyAndValue
    ref_policy: nn.Module
    rewards: object  # a `Rewards`, with the reward models
    average: AveragedModel | None = None  # of the policy, over the optimizer steps (detail 35)

    @property
    def policy(self) -> nn.Module:
        return self.trained.policy

    @property
    def frozen(self) -> list[nn.Module]:
        return [self.ref_policy, *self.rewards.models]

    @property
    def outcome(self) -> nn.Module:
        """The policy that is judged and kept: the average where there is one."""
        return self.policy if self.average is None else self.average.module


def load_models(policy_parent: Parent, rewards, config) -> Models:
    """Policy and value model in one module; the reference and the reward models frozen.

    With LoRA the reference policy shares the policy's weights and the first reward model those of a separate
    value model, without their adapters.

    Args:
        rewards: a `Rewards`, whose models are put into it.
    """
    tokenizer = policy_parent.tokenizer
    policy = without_dropout(load_policy(policy_parent, storage_of(config)))
    answers = ("max_new_tokens", "max_completion_tokens") if config.ptx_coef else ("max_new_tokens",)
    longest = max(answers, key=lambda name: getattr(config, name))
    refuse_unfit(policy, policy_parent, tokenizer, config.max_prompt_tokens + getattr(config, longest),
                 f"max_prompt_tokens + {longest}")
    for reward in rewards.all_models:
        load_reward_model(reward, policy, tokenizer, config)
    ref_policy = share_weights(policy) if config.lora_rank else without_dropout(load_policy(policy_parent))
    value_model = None
    if config.advantage == "gae" and config.value_model == "shared":
        value_model = new_value_head(policy)
    elif config.advantage == "gae":
        value_model = new_value_model(policy_parent, rewards.first_model, config)
    for model in (policy, value_model):
        if isinstance(model, PreTrainedModel):
            trainable(model, config)
    for reward in rewards.all_models:  # now: the value model starts from the mean of the heads
        use_heads(reward.model, reward.parent, reward.entry)
    for frozen in (ref_policy, *rewards.models):
        frozen.requires_grad_(False).eval()
    return Models(PolicyAndValue(policy, value_model), ref_policy, rewards)


def load_reward_model(reward, policy, tokenizer, config) -> None:
    """Load the model of a `ModelReward`, and refuse what cannot be computed in prompt groups."""
    own = reward.reads_text  # by its own tokenizer
    reward.model = load_scalar_model(reward.parent, storage=storage_of(config), vocab_size=None if own
                                     else policy.config.get_text_config().vocab_size)
    refuse_unfit(reward.model, reward.parent, reward.parent.tokenizer if own else tokenizer,
                 config.max_prompt_tokens + config.max_new_tokens, "max_prompt_tokens + max_new_tokens")
    if config.load_in_4bit:
        join_weights(reward.model, policy)


def new_value_model(policy_parent: Parent, first, config) -> nn.Module:
    """A separate value model: it starts from the first reward model that reads the policy's tokens (detail
    22); without one from the SFT model's trunk, with a head that says 0.
    """
    if first is not None:
        return share_weights(first.model) if config.lora_rank else load_scalar_model(first.parent)
    value_model = load_scalar_model(policy_parent, new_head_seed=config.seed, storage=storage_of(config))
    with gathered_weights(value_model.score, change=True):
        nn.init.zeros_(value_model.score.weight)
    return value_model


def new_value_head(policy) -> nn.Linear:
    """A value head for the policy's own trunk; it starts at 0, which is what reference summaries score."""
    head = ScalarHead(policy.get_output_embeddings().in_features, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def averaged(policy, decay: float) -> AveragedModel:
    """An exponential average of the policy, in float32, that starts at its present weights (detail 35)."""
    average = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(decay)).requires_grad_(False).float()
    average_in(average, policy)  # the first update copies
    return average


def average_in(average: AveragedModel, policy) -> None:
    """Take the present weights into the average: those of the optimizer. In 16 bits a change of one step is
    rounded away.
    """
    average.update_parameters(MasterWeights(policy))
