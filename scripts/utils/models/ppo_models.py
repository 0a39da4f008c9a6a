"""The models of PPO: which are trained, which are frozen, and the optimizer."""

import math
from typing import NamedTuple

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from utils.judge.evaluation import refuse_too_long
from utils.models.loading import PolicyAndValue, load_policy, load_scalar_model, new_value_head, without_dropout
from utils.models.lora import add_adapter, twin
from utils.zero import use_engine


class Models(NamedTuple):
    """What is trained together (one engine, one optimizer), and what is frozen."""

    trained: torch.nn.Module  # PolicyAndValue, as the accelerator wrapped it
    inside: PolicyAndValue  # the same without the wrapper: policy and value model
    ref_policy: torch.nn.Module
    reward_model: torch.nn.Module
    average: AveragedModel | None = None  # of the policy, over the optimizer steps

    @property
    def policy(self) -> torch.nn.Module:
        return self.inside.policy

    @property
    def outcome(self) -> torch.nn.Module:
        """The policy that is judged and kept: the average where there is one."""
        return self.policy if self.average is None else self.average.module


def load_models(config) -> Models:
    """Policy and value model in one module, reference and reward model frozen.

    With LoRA the reference policy shares the policy's weights and the reward model those of a separate value model,
    without their adapters.
    """
    policy = without_dropout(load_policy(config.model))
    reward_model = load_scalar_model(config.reward_model, "reward_model", vocab_size=policy.config.vocab_size)
    for longest in ("max_new_tokens", "max_completion_tokens") if config.ptx_coef else ("max_new_tokens",):
        refuse_too_long(policy, config.max_prompt_tokens + getattr(config, longest), f"max_prompt_tokens + {longest}")
    ref_policy = twin(policy) if config.lora_rank else without_dropout(load_policy(config.model))
    value_model = None
    if config.advantage == "gae" and config.value_model == "shared":
        value_model = new_value_head(policy)
    elif config.advantage == "gae":
        value_model = twin(reward_model) if config.lora_rank else load_scalar_model(config.reward_model, "reward_model")
    for model in (policy, value_model):
        if isinstance(model, PreTrainedModel):
            if config.lora_rank:
                add_adapter(model, config)
            if config.gradient_checkpointing:
                model.gradient_checkpointing_enable()
    for frozen in (ref_policy, reward_model):
        frozen.requires_grad_(False).eval()
    # transformers recomputes activations in training mode only; no dropout is left that the mode could switch on
    trained = PolicyAndValue(policy, value_model).train()
    return Models(trained, trained, ref_policy, reward_model)


def prepare(models: Models, config, accelerator) -> tuple[Models, torch.optim.Optimizer, object]:
    """One optimizer and one engine for what is trained; the frozen models on the device."""
    weights = [weight for weight in models.trained.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=config.learning_rate, eps=config.adam_eps,
                                  betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay, fused=True)  # as in `Trainer`
    batches = math.ceil(config.prompts_per_update / accelerator.num_processes / config.per_device_batch_size)
    steps = config.updates * config.ppo_epochs * min(config.num_minibatches, batches)
    if config.deepspeed:
        models.inside.frozen.extend([models.ref_policy, models.reward_model])
    trained, optimizer = accelerator.prepare(models.trained, optimizer)
    use_engine(trained)
    # of the optimizer in use, which DeepSpeed may have exchanged; stepped by hand and on every rank alike, so not prepared
    scheduler = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    if not config.deepspeed:
        for frozen in (models.ref_policy, models.reward_model):
            frozen.to(accelerator.device)
    accelerator.register_for_checkpointing(scheduler)
    average = None
    if config.ema_decay:
        average = AveragedModel(models.policy, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)).requires_grad_(False)
        average.update_parameters(models.policy)  # the first time copies: the average starts at the SFT model
        accelerator.register_for_checkpointing(average)
    return models._replace(trained=trained, average=average), optimizer, scheduler
