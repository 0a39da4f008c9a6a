"""Stage 3, PPO: the policy learns to write summaries that the reward model scores highly, close to the SFT model.

    python scripts/train_ppo.py                                        # the embedded default, after the other two stages
    python scripts/train_ppo.py --config configs/opt-125m/ppo.yaml
    python scripts/train_ppo.py --rlhf_training_data my_prompts.jsonl --rlhf_validation_data none --rlhf_test_data none \\
        --gold_rules none --model outputs/mine/sft/final --reward_model outputs/mine/reward/final --output_dir outputs/mine/ppo

One update: sample K responses for each prompt, score them, take the log-probs of the reference policy and the
values, turn score and KL into rewards, advantages by GAE, then `ppo_epochs` passes of the clipped objective. A
prompt is computed once for its K responses in every one of these passes.

Every `eval_steps` updates held-out posts are summarised; the policy with the highest score within `kl_budget`
is the one in final/. It does not train on human ratings directly, and has no GRPO or RLOO.
"""

import math
import random
import time
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from utils.checkpoints import Keeper
from utils.config import PROJECT, StageConfig, UserError, key, start
from utils.data import load_examples, refuse_overlap, split_off
from utils.distributed import agreed, build_accelerator, world
from utils.evaluation import print_stages, refuse_too_long, tokenise
from utils.generation import sample
from utils.judging import Judge, load_rules, refuse_missing_facts
from utils.metrics import win_rate
from utils.models import (
    PolicyAndValue,
    load_policy,
    load_scalar_model,
    load_tokenizer,
    response_logprobs,
    response_values,
    scores,
    without_dropout,
)
from utils.plots import plot_ppo
from utils.ppo import (
    Rollout,
    explained_variance,
    gae,
    kl_k3,
    kl_penalty,
    masked_moments,
    mean_var,
    missing_eos_penalty,
    policy_loss,
    policy_statistics,
    token_rewards,
    value_loss,
    whiten,
)
from utils.prompt_groups import PromptGroups, pack
from utils.run import Run, check_task, refuse_impossible, stage_folders


@dataclass
class PPOStageConfig(StageConfig):
    """PPO. Defaults: those of the published TL;DR runs."""

    model: str = key("outputs/opt-125m/sft/final", "The SFT model: policy and reference.")
    reward_model: str = key("outputs/opt-125m/reward/final", "The reward model; the value model starts from it.",
                            source="N+ detail 22")
    rlhf_training_data: str = key("trl-lib/tldr", "Prompts: .jsonl(.gz) file or hub name.")
    rlhf_validation_data: str | None = key(None, "Prompts that choose the policy; none: held out of the training data.")
    rlhf_test_data: str | None = key(None, "Prompts that the final figures are taken on; none: held out too.")
    gold_rules: str | None = key(None, "Rules of the gold score, for data whose rows carry `facts`.")
    total_episodes: int = key(100_000, "Responses sampled in the whole run.", unit="episodes", low=1)
    prompts_per_update: int = key(128, "Prompts of one update, over all processes.", unit="prompts", low=1)
    responses_per_prompt: int = key(4, "K, responses sampled for each prompt; 128 x 4 is the published 512.", unit="responses",
                                    source="N+ detail 31", low=1)
    ppo_epochs: int = key(4, "Passes over the episodes of an update.", unit="passes",
                          source="N+ detail 31; 1 is stabler for DSC", low=1)
    num_minibatches: int = key(1, "Optimizer steps in one pass; at most one for each micro-batch.", unit="steps",
                               source="N+ detail 31", low=1)
    max_new_tokens: int = key(53, "Longest response.", unit="tokens", source="N+ detail 3", low=1)
    temperature: float = key(0.7, "Divides the logits in every log-probability.", source="N+ detail 25", low=1e-3)
    kl_coef: float = key(0.05, "Weight of the KL penalty.", unit="score a nat", source="N+ detail 23", low=0.0)
    gamma: float = key(1.0, "Discount.", source="N+ detail 29", low=0.0, high=1.0)
    lam: float = key(0.95, "Lambda of GAE.", source="N+ detail 29", low=0.0, high=1.0)
    cliprange: float = key(0.2, "Clip of the probability ratio.", source="N+ detail 31", low=0.0)
    cliprange_value: float = key(0.2, "Clip of the value.", unit="score", source="N+ detail 31", low=0.0)
    vf_coef: float = key(0.1, "Weight of the value loss.", source="N+ detail 31", low=0.0)
    missing_eos_score: float = key(-1.0, "Score of a response without EOS.", unit="score", source="N+ detail 26")
    save_steps: int = key(20, "A checkpoint is saved every so many updates.", unit="updates", low=1)
    eval_steps: int = key(10, "Summarise the validation prompts every so many updates.", unit="updates", low=1)
    eval_rows: int = key(200, "Prompts in each evaluation during training.", unit="prompts", low=1)
    test_rows: int = key(400, "Prompts in the final figures.", unit="prompts", low=1)
    eval_batch_size: int = key(64, "Prompts summarised at once.", unit="prompts", low=1)
    eval_temperature: float = key(0.01, "Sampling temperature of evaluations.", source="N+ detail 32", low=1e-3)
    kl_budget: float = key(20.0, "A policy further than this from the reference is never chosen.", unit="nats a summary", low=0.0)
    kl_limit: float = key(100.0, "The run stops when the KL of an update is above this.", unit="nats a summary", low=0.0)

    @property
    def updates(self) -> int:
        return math.ceil(self.total_episodes / (self.prompts_per_update * self.responses_per_prompt))


class Models(NamedTuple):
    """The four models: trained together (one engine, one optimizer), and frozen."""

    trained: torch.nn.Module  # PolicyAndValue, as the accelerator wrapped it
    policy: torch.nn.Module
    value_model: torch.nn.Module
    ref_policy: torch.nn.Module
    reward_model: torch.nn.Module


class MicroBatch(NamedTuple):
    """Prompt groups of one forward pass with what is known of their responses."""

    groups: PromptGroups
    rollout: Rollout
    ended: torch.Tensor  # (N,)


# ---------------------------------------------------------------------------------------------- the algorithm


def collect_rollout(models: Models, tokenizer, prompts, config, update: int, accelerator) -> list[MicroBatch]:
    """Sample K responses for each prompt and judge them: scores, reference log-probs, values, rewards, advantages."""
    k, size = config.responses_per_prompt, config.per_device_batch_size
    first = (update * config.prompts_per_update + accelerator.process_index * len(prompts)) * k
    samples = sample(
        models.policy, prompts, k=k, max_new_tokens=config.max_new_tokens, temperature=config.temperature,
        seeds=[config.seed * 1_000_003 + first + i for i in range(len(prompts) * k)],
        eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id, batch_size=config.eval_batch_size,
    )
    total = [len(p) + sum(map(len, samples.responses[i * k : (i + 1) * k])) for i, p in enumerate(prompts)]
    order = sorted(range(len(prompts)), key=lambda i: total[i])
    batches = []
    for begin in range(0, len(order), size):
        part = order[begin : begin + size]
        members = [i * k + j for i in part for j in range(k)]
        groups = pack([prompts[i] for i in part], [samples.responses[i * k : (i + 1) * k] for i in part], tokenizer.pad_token_id)
        logprobs = torch.nn.utils.rnn.pad_sequence([torch.tensor(samples.logprobs[n]) for n in members], batch_first=True)
        ended = torch.tensor([samples.ended[n] for n in members])
        batches.append(rewarded(models, groups.to(accelerator.device), logprobs.to(accelerator.device),
                                ended.to(accelerator.device), config))
    return whiten_advantages(batches, accelerator)


@torch.no_grad()
def rewarded(models: Models, groups: PromptGroups, logprobs, ended, config) -> MicroBatch:
    """Scores, reference log-probs and values of one batch of responses; then rewards and advantages."""
    ref_logprobs = response_logprobs(models.ref_policy, groups, config.temperature)
    values = response_values(models.value_model, groups)
    score = missing_eos_penalty(scores(models.reward_model, groups), ended, config.missing_eos_score)
    kl = kl_penalty(logprobs, ref_logprobs)
    rewards = token_rewards(score, kl, groups.response_mask, config.kl_coef)
    advantages, returns = gae(rewards, values, groups.response_mask, config.gamma, config.lam)
    rollout = Rollout(groups.response_mask, logprobs, ref_logprobs, values, score, advantages, returns)
    return MicroBatch(groups, rollout, ended)


def whiten_advantages(batches: list[MicroBatch], accelerator) -> list[MicroBatch]:
    """Whiten over the whole update and all ranks, never one micro-batch at a time (detail 30)."""
    moments = sum(masked_moments(b.rollout.advantages, b.rollout.response_mask) for b in batches)
    mean, var = mean_var(accelerator.reduce(moments, "sum"))
    return [
        b._replace(rollout=b.rollout._replace(advantages=whiten(b.rollout.advantages, b.rollout.response_mask, mean, var)))
        for b in batches
    ]


def ppo_update(models: Models, batches, optimizer, scheduler, config, accelerator, shuffle: random.Random) -> dict:
    """`ppo_epochs` passes of the clipped objective; metrics are means over all tokens of all passes."""
    sums, ratio_max = {}, torch.zeros((), device=accelerator.device)
    count = min(config.num_minibatches, len(batches))
    for _ in range(config.ppo_epochs):
        order = shuffle.sample(batches, len(batches))
        for first in range(count):
            minibatch = order[first::count]
            tokens = accelerator.reduce(sum(b.rollout.response_mask.sum() for b in minibatch), "sum")
            for number, batch in enumerate(minibatch, start=1):
                last = number == len(minibatch)
                with nullcontext() if last else accelerator.no_sync(models.trained):
                    loss, figures = batch_loss(models.trained, batch, tokens, config)
                    # every rank's gradient is averaged over the ranks afterwards
                    accelerator.backward(loss * accelerator.num_processes)
                ratio_max = torch.maximum(ratio_max, figures.pop("ratio_max"))
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value
            # 0 is no clipping, as in transformers' Trainer
            norm = accelerator.clip_grad_norm_(models.trained.parameters(), config.max_grad_norm or math.inf)
            # fp16 finds its loss scale by steps whose gradient overflows, and leaves those steps out
            if not torch.isfinite(norm) and config.mixed_precision != "fp16":
                raise UserError("the gradient is not finite (NaN or infinite): lower learning_rate, or look at the reward "
                                "model's scores in metrics.jsonl; the last checkpoint is intact")
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    sums = {name: accelerator.reduce(value, "sum").item() for name, value in sums.items()}
    tokens = sums.pop("tokens")
    return {name: value / tokens for name, value in sums.items()} | {
        "policy/ratio_max": accelerator.reduce(ratio_max, "max").item(), "policy/grad_norm": float(norm)}


def batch_loss(trained, batch: MicroBatch, tokens: torch.Tensor, config) -> tuple[torch.Tensor, dict]:
    """PPO's objective on one micro-batch, divided by the tokens of the whole optimizer step; and sums for metrics."""
    data, mask = batch.rollout, batch.rollout.response_mask
    new_logprobs, entropy, new_values = trained(batch.groups, config.temperature)
    policy_losses, clipped = policy_loss(new_logprobs, data.logprobs, data.advantages, config.cliprange)
    value_losses, value_clipped = value_loss(new_values, data.values, data.returns, config.cliprange_value)
    policy_sum, value_sum = policy_losses[mask].sum(), value_losses[mask].sum()
    figures = policy_statistics(new_logprobs.detach(), data.logprobs, entropy, clipped, mask)
    return (policy_sum + config.vf_coef * value_sum) / tokens, {
        "tokens": figures.pop("tokens"),
        "ratio_max": figures.pop("ratio_max"),
        "objective/entropy": figures.pop("entropy"),
        **{f"policy/{name}": value for name, value in figures.items()},
        "value/clipfrac": value_clipped[mask].float().sum(),
        "loss/policy": policy_sum.detach(),
        "loss/value": value_sum.detach(),
    }


def rollout_metrics(batches: list[MicroBatch], config, accelerator) -> dict:
    """What the episodes of an update say: means over all episodes of all ranks (detail 32)."""
    def total(value):
        return accelerator.reduce(sum(value(b) for b in batches).double(), "sum").item()

    def masked(x, b):
        return torch.where(b.rollout.response_mask, x, 0.0).sum()

    episodes = total(lambda b: torch.ones_like(b.ended).sum())
    kl = total(lambda b: masked(kl_penalty(b.rollout.logprobs, b.rollout.ref_logprobs), b)) / episodes
    score = total(lambda b: b.rollout.scores.sum()) / episodes
    def moments(x):
        return accelerator.reduce(sum(masked_moments(x(b.rollout), b.rollout.response_mask) for b in batches), "sum")

    return {
        "objective/kl": kl,
        "objective/kl_k3": total(lambda b: masked(kl_k3(b.rollout.logprobs, b.rollout.ref_logprobs), b)) / episodes,
        "objective/score": score,
        "objective/rlhf_reward": score - config.kl_coef * kl,
        "objective/length": total(lambda b: b.rollout.response_mask.sum()) / episodes,
        "objective/ended": total(lambda b: b.ended.sum()) / episodes,
        "value/explained_variance": explained_variance(
            moments(lambda r: r.returns - r.values), moments(lambda r: r.returns)
        ).item(),
    }


# ------------------------------------------------------------------------------------------------- the script


def load_splits(config, tokenizer, gold_rules: dict | None):
    """Training, validation and test prompts as tokens, no prompt in two of them."""
    train = load_examples(config.rlhf_training_data, "rlhf_training_data", need_completion=False)
    held, limits = {}, {"validation": config.eval_rows, "test": config.test_rows}
    for split, rows in limits.items():
        name = getattr(config, f"rlhf_{split}_data")
        if name:
            held[split] = load_examples(name, f"rlhf_{split}_data", need_completion=False)[:rows]
        else:
            train, held[split] = split_off(train, min(0.1, rows / len(train)), config.seed)
    refuse_overlap({"rlhf_training_data": train, **{f"rlhf_{k}_data": v for k, v in held.items()}})
    if gold_rules is not None:
        refuse_missing_facts(gold_rules, [example for part in held.values() for example in part])
    return [tokenise(tokenizer, part, config) for part in (train, *held.values())]


def load_models(config) -> Models:
    """Policy and value model in one module, reference and reward model frozen."""
    policy, ref_policy = (without_dropout(load_policy(config.model)) for _ in range(2))
    value_model, reward_model = (
        load_scalar_model(config.reward_model, "reward_model", vocab_size=policy.config.vocab_size) for _ in range(2)
    )
    if config.gradient_checkpointing:
        policy.gradient_checkpointing_enable()
        value_model.gradient_checkpointing_enable()
    refuse_too_long(policy, config.max_prompt_tokens + config.max_new_tokens, "max_prompt_tokens + max_new_tokens")
    for frozen in (ref_policy, reward_model):
        frozen.requires_grad_(False).eval()
    # transformers recomputes activations in training mode only; no dropout is left that the mode could switch on
    trained = PolicyAndValue(policy, value_model).train()
    return Models(trained, policy, value_model, ref_policy, reward_model)


def prepare(models: Models, config, accelerator) -> tuple[Models, torch.optim.Optimizer, object]:
    """One optimizer and one engine for what is trained; the frozen models on the device."""
    optimizer = torch.optim.AdamW(models.trained.parameters(), lr=config.learning_rate, eps=config.adam_eps,
                                  betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay)
    batches = math.ceil(config.prompts_per_update / accelerator.num_processes / config.per_device_batch_size)
    steps = config.updates * config.ppo_epochs * min(config.num_minibatches, batches)
    # the scheduler is stepped by hand and on every rank alike, so the accelerator must not wrap it
    scheduler = get_linear_schedule_with_warmup(optimizer, config.warmup_steps, steps)
    trained, optimizer = accelerator.prepare(models.trained, optimizer)
    for frozen in (models.ref_policy, models.reward_model):
        frozen.to(accelerator.device)
    return models._replace(trained=trained), optimizer, scheduler


def prompts_of(update: int, prompts: list, config, accelerator) -> list:
    """This rank's prompts of an update: pass after pass over the data, each in its own shuffled order."""
    size = config.prompts_per_update // accelerator.num_processes
    first = update * config.prompts_per_update + accelerator.process_index * size
    places = [divmod(index, len(prompts)) for index in range(first, first + size)]
    orders = {epoch: random.Random(f"{config.seed}-{epoch}").sample(range(len(prompts)), len(prompts))
              for epoch in {epoch for epoch, _ in places}}
    return [prompts[orders[epoch][place]] for epoch, place in places]


def train(models, tokenizer, prompts, judge, validation, config, run, keeper, optimizer, scheduler, accelerator) -> int:
    """The PPO loop. Returns the number of updates made, without those before a `--resume`.

    Sampling and scoring call the models inside the accelerator's wrapper, so they need its autocast (detail 27). Its
    blocks must be short: autocast keeps the weights it has cast until its end, and they are old after a step.
    """
    done = keeper.load() if config.resume else 0
    bar = tqdm(total=config.updates, initial=done, desc="ppo", unit="update", disable=not accelerator.is_main_process)
    for update in range(done, config.updates):
        began = time.time()
        chosen = prompts_of(update, prompts, config, accelerator)
        with accelerator.autocast():
            batches = collect_rollout(models, tokenizer, chosen, config, update, accelerator)
        sampled = time.time()
        figures = rollout_metrics(batches, config, accelerator)
        if reason := collapse(figures, config):
            run.metrics(update + 1, figures)
            raise UserError(f"{reason}; the last checkpoint is intact")
        if update % config.eval_steps == 0:
            with accelerator.autocast():
                evaluate(models.policy, judge, validation, config, run, keeper, update)
        evaluated = time.time()
        shuffle = random.Random(f"{config.seed}-{update}")
        figures |= ppo_update(models, batches, optimizer, scheduler, config, accelerator, shuffle)
        figures |= {"time/rollout": sampled - began, "time/update": time.time() - evaluated,
                    "policy/learning_rate": scheduler.get_last_lr()[0],
                    "objective/episodes": (update + 1) * config.prompts_per_update * config.responses_per_prompt}
        run.metrics(update + 1, figures)
        bar.update(1)
        bar.set_postfix(score=f"{figures['objective/score']:.2f}", kl=f"{figures['objective/kl']:.2f}")
        run.stop_signal = agreed(run.stop_signal)
        if (update + 1) % config.save_steps == 0 or run.stop_signal is not None:
            keeper.save(update + 1)
        if run.stop_signal is not None:
            bar.close()
            run.stopped()
    bar.close()
    with accelerator.autocast():
        evaluate(models.policy, judge, validation, config, run, keeper, config.updates)
    return config.updates - done


def collapse(figures: dict, config) -> str | None:
    """Why an update must not be trained on; None when it may."""
    for name in ("objective/kl", "objective/score"):
        if not math.isfinite(figures[name]):
            return f"{name} is not finite (NaN or infinite): lower learning_rate"
    if figures["objective/kl"] > config.kl_limit:
        return (f"the KL to the reference is {figures['objective/kl']:.1f} nats a summary, above kl_limit "
                f"{config.kl_limit}: lower learning_rate or raise kl_coef")
    return None


def evaluate(policy, judge: Judge, validation, config, run, keeper, update: int) -> None:
    """Summarise the validation prompts nearly greedily, log the figures, offer the policy as the best one.

    The KL is that of summaries sampled at the training temperature: of greedy ones it would be no estimate.
    """
    greedy = judge.summaries(policy, validation, config.eval_temperature, "validation")
    sampled = judge.summaries(policy, validation, config.temperature, "validation, sampled")
    columns = {
        "tokens": list(map(len, greedy.tokens)),
        "ended": greedy.ended,
        "score": judge.scores(validation, greedy, "validation, scores"),
        "kl": judge.kls(validation, sampled, "validation, KL"),
        "gold": judge.gold(validation, greedy),
    }
    means = {name: fmean(values) for name, values in columns.items() if values is not None}
    if (rouge := judge.rouge(validation, greedy)) is not None:
        means["rouge_avg"] = rouge
    run.metrics(update, {f"eval/{name}": value for name, value in means.items()})
    run.say(f"update {update}: " + " ".join(f"{name} {value:.3f}" for name, value in means.items()))
    keeper.offer(update, means["score"], means["kl"])


def finish(run, config, models, judge: Judge, tokenizer, test, updates_per_second: float) -> None:
    """PPO against SFT on the same held-out prompts; samples, summary.json, plots, final/, the table."""
    episodes = config.prompts_per_update * config.responses_per_prompt
    found = {
        (name, kind): judge.summaries(policy, test, temperature, f"test, {name}, {kind}")
        for name, policy in (("before", models.ref_policy), ("after", models.policy))
        for kind, temperature in (("sampled", config.temperature), ("greedy", config.eval_temperature))
    }
    after = found["after", "sampled"]
    score = {name: fmean(judge.scores(test, found[name, "sampled"], f"test, {name}, scores")) for name in ("before", "after")}
    kl = fmean(judge.kls(test, after, "test, KL"))
    length = {name: fmean(map(len, found[name, "sampled"].tokens)) for name in ("before", "after")}
    run.say(f"test: share with EOS {fmean(after.ended):.3f}, length {length['before']:.1f} -> {length['after']:.1f} tokens")
    run.samples([
        {"prompt": example.prompt, "reference": example.completion, "sft": sft, "ppo": ppo}
        for example, sft, ppo in zip(test.examples[:20], found["before", "greedy"].texts, found["after", "greedy"].texts,
                                     strict=False)
    ])
    gold = gold_figures({key: judge.gold(test, summaries) for key, summaries in found.items()}, config.seed)
    run.finish({"score_before": score["before"], "score_after": score["after"], **gold, "kl": kl,
                "rouge_avg": judge.rouge(test, found["after", "greedy"]), "episodes": config.updates * episodes,
                "seconds": time.time() - run.started, "episodes_per_second": updates_per_second * episodes})
    if run.is_main:
        plot_ppo(run)
    run.save_final(models.policy, tokenizer, {"model": config.model, "reward_model": config.reward_model},
                   {"max_prompt_tokens": config.max_prompt_tokens, "max_new_tokens": config.max_new_tokens,
                    "score": score["after"], "kl": kl})
    print_stages(stage_folders(run, [config.model, config.reward_model]))


def gold_figures(gold: dict, seed: int) -> dict:
    """Gold scores and win rates of PPO over SFT on the same prompts; None where the data has no facts."""
    names = ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high")
    if gold["after", "sampled"] is None:
        return dict.fromkeys(("gold_before", "gold_after", *names, "gold_win_rate_greedy"))
    won = {kind: win_rate(gold["after", kind], gold["before", kind], seed) for kind in ("sampled", "greedy")}
    return {"gold_before": fmean(gold["before", "sampled"]), "gold_after": fmean(gold["after", "sampled"]),
            **dict(zip(names, won["sampled"], strict=True)), "gold_win_rate_greedy": won["greedy"][0]}


def main(config: PPOStageConfig) -> None:
    refuse_impossible(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    check_task(tokenizer, {"model": config.model, "reward_model": config.reward_model})
    processes = world().num_processes
    if config.prompts_per_update % processes:
        raise UserError(f"prompts_per_update: {config.prompts_per_update} prompts cannot be shared out over {processes} "
                        "processes; take a multiple")
    gold_rules = load_rules(config.gold_rules) if config.gold_rules else None
    prompts, validation, test = load_splits(config, tokenizer, gold_rules)
    models = load_models(config)
    run = Run(config, "ppo", [])
    accelerator = build_accelerator(config, run.folder)
    run.use_tracker(accelerator)
    run.catch_signals()
    models, optimizer, scheduler = prepare(models, config, accelerator)
    accelerator.register_for_checkpointing(scheduler)
    keeper = Keeper(run, config, accelerator, models.policy)
    judge = Judge(models.ref_policy, models.reward_model, tokenizer, gold_rules, config)
    began = time.time()
    made = train(models, tokenizer, prompts.prompts, judge, validation, config, run, keeper, optimizer, scheduler, accelerator)
    speed = made / (time.time() - began)
    keeper.restore_best()
    with accelerator.autocast():
        finish(run, config, models, judge, tokenizer, test, speed)
    accelerator.end_training()


if __name__ == "__main__":
    start(main, PPOStageConfig, PROJECT / "configs" / "tldr_mini" / "ppo.yaml", __doc__)
