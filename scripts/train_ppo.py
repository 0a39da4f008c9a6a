"""Stage 3, PPO: the policy learns to write summaries that the reward model scores highly, close to the SFT model.

    python scripts/train_ppo.py                                        # the embedded default, after the other two stages
    python scripts/train_ppo.py --config configs/opt-125m/ppo.yaml
    python scripts/train_ppo.py --rlhf_training_data my_prompts.jsonl --rlhf_validation_data none --rlhf_test_data none \\
        --gold_rules none --model outputs/mine/sft/final --reward_model outputs/mine/reward/final --output_dir outputs/mine/ppo

One update: sample K responses for each prompt, score them, take the log-probs of the reference policy and the
values, turn score and KL into rewards, advantages by GAE, then `ppo_epochs` passes of the clipped objective. A
prompt is computed once for its K responses in every one of these passes. `advantage: rloo` or `grpo` compares the K
responses with each other instead, and needs no value model.

Every `eval_steps` updates held-out posts are summarised; the policy with the highest score within `kl_budget`
is the one in final/. It does not train on human ratings directly.
"""

import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import ClassVar

import torch
from tqdm.auto import tqdm
from transformers import set_seed

from utils.config import PROJECT, StageConfig, UserError, key
from utils.data.report import DataReport
from utils.data.rows import Rows, Tokenised, load_data, split_rows, tokenised
from utils.data.sources import data_key
from utils.distributed import agreed, build_accelerator, gradients_of_part, world
from utils.judge.evaluation import print_stages
from utils.judge.judging import Judge, load_rules, refuse_missing_facts
from utils.judge.metrics import length_controlled_win_rate, win_rate
from utils.judge.plots import plot_ppo
from utils.launch import start
from utils.models.loading import load_tokenizer
from utils.models.ppo_models import Models, load_models, prepare
from utils.models.prompt_groups import PromptGroups, pack
from utils.ppo import adapted_kl_coef, policy_loss, policy_statistics, value_loss
from utils.rollout import Carried, MicroBatch, collect_rollout, rollout_metrics
from utils.runs.checkpoints import Keeper
from utils.runs.divergence import Divergence
from utils.runs.run import Run, check_task, refuse_impossible, stage_folders
from utils.zero import load_settings


@dataclass
class PPOStageConfig(StageConfig):
    """PPO. Defaults: those of the published TL;DR runs."""

    section: ClassVar[str] = "ppo"

    model: str = key("outputs/opt-125m/sft/final", "The SFT model: policy and reference.")
    reward_model: str = key("outputs/opt-125m/reward/final", "The reward model; the value model starts from it.",
                            source="N+ detail 22")
    rlhf_training_data: str = data_key("trl-lib/tldr", "Prompts.")
    rlhf_validation_data: str | None = data_key(None, "Prompts that choose the policy; none: held out of the training data.")
    rlhf_test_data: str | None = data_key(None, "Prompts that the final figures are taken on; none: held out too.")
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
    kl_coef: float = key(0.05, "Weight of the KL penalty; with kl_target its first value.", unit="score a nat",
                         source="N+ detail 23", low=0.0)
    kl_estimator: str = key("k1", "Estimator of the KL that is penalised.", source="N+ detail 24", choices=["k1", "k2", "k3"])
    kl_target: float | None = key(None, "kl_coef adapts so that the KL gets here (LMHP: 6); none: kl_coef is fixed.",
                                  unit="nats a summary", source="LMHP detail 23", low=1e-6)
    kl_horizon: int = key(10_000, "How slowly kl_coef adapts.", unit="episodes", source="LMHP detail 23", low=1)
    score_clip: float | None = key(None, "Scores are clipped to plus or minus this (DSC: 5); none: not clipped.", unit="score",
                                   source="DSC", low=1e-6)
    scale_scores: bool = key(False, "Divide scores by the standard deviation of all scores so far.")
    whiten_rewards: bool = key(False, "Scale rewards to variance 1, their mean kept; harmful in N+.", source="N+ detail 30")
    advantage: str = key("gae", "GAE of a value model; or a response against the others of its prompt (no value model).",
                         source="N+ detail 29; RLOO; GRPO", choices=["gae", "rloo", "grpo"])
    value_model: str = key("separate", "A model of its own, from the reward model; or a head on the policy's trunk, at half the "
                           "cost.", source="N+ detail 22", choices=["separate", "shared"])
    gamma: float = key(1.0, "Discount.", source="N+ detail 29", low=0.0, high=1.0)
    lam: float = key(0.95, "Lambda of GAE.", source="N+ detail 29", low=0.0, high=1.0)
    cliprange: float = key(0.2, "Clip of the probability ratio.", source="N+ detail 31", low=0.0)
    cliprange_value: float = key(0.2, "Clip of the value.", unit="score", source="N+ detail 31", low=0.0)
    vf_coef: float = key(0.1, "Weight of the value loss.", source="N+ detail 31", low=0.0)
    target_kl: float | None = key(None, "No further pass in an update after one whose approx_kl is above this; none: all passes.",
                                  unit="nats a token", low=0.0)
    ptx_coef: float = key(0.0, "Weight of the SFT loss on actor_training_data, added in each step; 0: off.",
                          source="IG detail 34", low=0.0)
    actor_training_data: str | None = data_key(None, "SFT examples for ptx_coef.")
    max_completion_tokens: int = key(64, "SFT examples with longer completions are dropped.", unit="tokens", low=2)
    ema_decay: float = key(0.0, "Judge and keep an exponential average of the policy (IG: .992 a step); 0: the policy itself.",
                           source="IG detail 35", low=0.0, high=0.999999)
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


# ---------------------------------------------------------------------------------------------- the algorithm


def ppo_update(models: Models, batches, optimizer, scheduler, config, accelerator, divergence: Divergence,
               shuffle: random.Random, examples: Iterator[PromptGroups] | None = None) -> dict:
    """Up to `ppo_epochs` passes of the clipped objective; metrics are means over all tokens of all passes.

    Args:
        examples: supervised micro-batches for `ptx_coef`, without an end.
    """
    passes, ratio_max = [], torch.zeros((), device=accelerator.device)
    count = min(config.num_minibatches, len(batches))
    for epoch in range(1, config.ppo_epochs + 1):
        sums = {}
        order = shuffle.sample(batches, len(batches))
        for first in range(count):
            minibatch = order[first::count]
            part = [next(examples) if examples else None for _ in minibatch]
            tokens = accelerator.reduce(sum(b.rollout.response_mask.sum() for b in minibatch), "sum")
            ptx_tokens = accelerator.reduce(sum(e.response_mask.sum() for e in part), "sum") if examples else None
            for number, (batch, example) in enumerate(zip(minibatch, part, strict=True), start=1):
                with gradients_of_part(accelerator, models.trained, last=number == len(minibatch)):
                    loss, figures = batch_loss(models.trained, batch, tokens, config, example, ptx_tokens)
                    divergence.watch(loss, batch.groups, *([example] if example else []))
                    # every rank's gradient is averaged over the ranks afterwards
                    accelerator.backward(loss * accelerator.num_processes)
                ratio_max = torch.maximum(ratio_max, figures.pop("ratio_max"))
                for name, value in figures.items():
                    sums[name] = sums.get(name, 0.0) + value
            norm = optimizer_step(models, optimizer, scheduler, config, accelerator, divergence)
        passes.append({name: accelerator.reduce(value, "sum").item() for name, value in sums.items()})
        if config.target_kl is not None and passes[-1]["policy/approx_kl"] / passes[-1]["tokens"] > config.target_kl:
            for _ in range(count * (config.ppo_epochs - epoch)):
                scheduler.step()  # the learning rate follows the updates, also past those that were cut short
            break
    sums = {name: sum(p[name] for p in passes) for name in passes[0]}
    tokens, ptx_tokens = sums.pop("tokens"), sums.pop("ptx_tokens", None)
    ptx = {"loss/ptx": sums.pop("loss/ptx") / ptx_tokens} if examples else {}
    return {name: value / tokens for name, value in sums.items()} | ptx | {
        "policy/ratio_max": accelerator.reduce(ratio_max, "max").item(), "policy/grad_norm": float(norm),
        "policy/epochs": len(passes),
    }


def optimizer_step(models: Models, optimizer, scheduler, config, accelerator, divergence: Divergence) -> torch.Tensor:
    """One step on the gradients gathered so far, left out where they are not finite; returns their norm before clipping."""
    # 0 is no clipping, as in transformers' Trainer
    norm = accelerator.clip_grad_norm_(models.trained.parameters(), config.max_grad_norm or math.inf)
    left_out = divergence.leaves_out(norm)
    if left_out:
        optimizer.zero_grad()  # to None: at a gradient of 0 AdamW would still move
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    if models.average is not None and not left_out:
        models.average.update_parameters(models.policy)
    return norm


def batch_loss(trained, batch: MicroBatch, tokens: torch.Tensor, config, examples: PromptGroups | None = None,
               ptx_tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, dict]:
    """PPO's objective on one micro-batch, divided by the tokens of the whole optimizer step; and sums for metrics."""
    data, mask = batch.rollout, batch.rollout.response_mask
    new_logprobs, entropy, new_values, ptx_logprobs = trained(batch.groups, config.temperature, examples)
    policy_losses, clipped = policy_loss(new_logprobs, data.logprobs, data.advantages, config.cliprange)
    policy_sum = policy_losses[mask].sum()
    loss = policy_sum / tokens
    figures = policy_statistics(new_logprobs.detach(), data.logprobs, entropy, clipped, mask)
    sums = {
        "tokens": figures.pop("tokens"),
        "ratio_max": figures.pop("ratio_max"),
        "objective/entropy": figures.pop("entropy"),
        **{f"policy/{name}": value for name, value in figures.items()},
        "loss/policy": policy_sum.detach(),
    }
    if new_values is not None:
        value_losses, value_clipped = value_loss(new_values, data.values, data.returns, config.cliprange_value)
        value_sum = value_losses[mask].sum()
        loss = loss + config.vf_coef * value_sum / tokens
        sums |= {"value/clipfrac": value_clipped[mask].float().sum(), "loss/value": value_sum.detach()}
    if ptx_logprobs is not None:
        ptx_sum = -ptx_logprobs[examples.response_mask].sum()
        loss = loss + config.ptx_coef * ptx_sum / ptx_tokens
        sums |= {"loss/ptx": ptx_sum.detach(), "ptx_tokens": examples.response_mask.sum()}
    return loss, sums


# ------------------------------------------------------------------------------------------------- the script


def load_splits(config, tokenizer, report, gold_rules: dict | None):
    """Training, validation and test prompts as tokens, no prompt in two of them; and the examples of `ptx_coef`."""
    keys = [f"rlhf_{split}_data" for split in ("training", "validation", "test")]
    kinds = dict.fromkeys(keys, "prompts") | ({"actor_training_data": "examples"} if config.ptx_coef else {})
    found = load_data(config, kinds, tokenizer, report)
    train, validation, test = split_rows(config, "rlhf", found, report)
    if gold_rules is not None:
        refuse_missing_facts(gold_rules, [*validation, *test])
    supervised = found.get("actor_training_data")
    if supervised is not None:
        supervised = supervised_examples(config, supervised, [validation, test], report)
    return *(tokenised(rows, None, report.say) for rows in (train, validation, test)), supervised


def supervised_examples(config, examples: Rows, held_out: list[Rows], report) -> Tokenised:
    """The examples of `ptx_coef` without the posts that the policy is judged on."""
    judged = {mark for rows in held_out for mark in rows.prompts()}
    kept = examples.select([mark not in judged for mark in examples.prompts()])
    if len(kept) < len(examples):
        report.say(f"actor_training_data: left out {len(examples) - len(kept)} of {len(examples)} examples, whose prompts "
                   "are held out for validation or test")
    if not len(kept):
        raise UserError(f"actor_training_data: every prompt in '{config.actor_training_data}' is held out for validation or "
                        "test; name the data that train_sft.py learnt from")
    return tokenised(kept.weighed(config.seed), config.max_completion_tokens, report.say)


def prompts_of(update: int, prompts: list, config, accelerator) -> list:
    """This rank's prompts of an update: pass after pass over the data, each in its own shuffled order."""
    size = config.prompts_per_update // accelerator.num_processes
    first = update * config.prompts_per_update + accelerator.process_index * size
    places = [divmod(index, len(prompts)) for index in range(first, first + size)]
    orders = {epoch: random.Random(f"{config.seed}-{epoch}").sample(range(len(prompts)), len(prompts))
              for epoch in {epoch for epoch, _ in places}}
    return [prompts[orders[epoch][place]] for epoch, place in places]


def supervised_batches(examples: Tokenised, pad_id: int, update: int, config, accelerator) -> Iterator[PromptGroups]:
    """Micro-batches of SFT examples without an end, drawn anew for each update and rank (detail 34)."""
    draw = random.Random(f"{config.seed}-supervised-{update}-{accelerator.process_index}")
    while True:
        rows = draw.choices(range(len(examples.prompts)), k=config.per_device_batch_size)
        groups = pack([examples.prompts[i] for i in rows], [[examples.completions[i]] for i in rows], pad_id)
        yield groups.to(accelerator.device)


def train(models, tokenizer, prompts, judge, validation, supervised, config, run, keeper, optimizer, scheduler,
          accelerator) -> int:
    """The PPO loop. Returns the number of updates made, without those before a `--resume`.

    Sampling and scoring call the models inside the accelerator's wrapper, so they need its autocast (detail 27). Its
    blocks must be short: autocast keeps the weights it has cast until its end, and they are old after a step.
    """
    done, carried = 0, Carried(config.kl_coef)
    if config.resume:
        done, saved = keeper.load()
        carried = Carried(**{**asdict(carried), **saved})
    divergence = Divergence(run, tokenizer, accelerator)
    episodes = config.prompts_per_update * config.responses_per_prompt
    bar = tqdm(total=config.updates, initial=done, desc="ppo", unit="update", disable=not accelerator.is_main_process)
    for update in range(done, config.updates):
        began = time.time()
        chosen = prompts_of(update, prompts, config, accelerator)
        with accelerator.autocast():
            batches = collect_rollout(models, tokenizer, chosen, config, update, accelerator, carried)
        sampled = time.time()
        figures = rollout_metrics(batches, accelerator) | {"objective/kl_coef": carried.kl_coef}
        if reason := collapse(figures, config):
            run.metrics(update + 1, figures)
            raise UserError(f"{reason}; the last checkpoint is intact")
        if update % config.eval_steps == 0:
            with accelerator.autocast():
                evaluate(models.outcome, judge, validation, config, run, keeper, update)
        evaluated = time.time()
        shuffle = random.Random(f"{config.seed}-{update}")
        examples = supervised and supervised_batches(supervised, tokenizer.pad_token_id, update, config, accelerator)
        divergence.step = update + 1
        figures |= ppo_update(models, batches, optimizer, scheduler, config, accelerator, divergence, shuffle, examples)
        if config.kl_target is not None:
            carried.kl_coef = adapted_kl_coef(carried.kl_coef, figures["objective/kl"], config.kl_target, episodes,
                                              config.kl_horizon)
        figures |= {"time/rollout": sampled - began, "time/update": time.time() - evaluated,
                    "policy/learning_rate": scheduler.get_last_lr()[0],
                    "objective/episodes": (update + 1) * episodes}
        run.metrics(update + 1, figures)
        bar.update(1)
        bar.set_postfix(score=f"{figures['objective/score']:.2f}", kl=f"{figures['objective/kl']:.2f}")
        run.stop_signal = agreed(run.stop_signal)
        # between steps that were left out the weights may be broken
        if not divergence.row and ((update + 1) % config.save_steps == 0 or run.stop_signal is not None):
            keeper.save(update + 1, asdict(carried))
        if run.stop_signal is not None:
            bar.close()
            run.stopped()
    bar.close()
    divergence.end()
    with accelerator.autocast():
        evaluate(models.outcome, judge, validation, config, run, keeper, config.updates)
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
    score, score_sampled = judge.scores(validation, [greedy, sampled], "validation, scores")
    columns = {
        "tokens": list(map(len, greedy.tokens)),
        "ended": greedy.ended,
        "score": score,
        "score_sampled": score_sampled,
        "kl": judge.kls(validation, sampled, "validation, KL"),
        "gold": judge.gold(validation, greedy),
        "gold_sampled": judge.gold(validation, sampled),
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
        for name, policy in (("before", models.ref_policy), ("after", models.outcome))
        for kind, temperature in (("sampled", config.temperature), ("greedy", config.eval_temperature))
    }
    after = found["after", "sampled"]
    scored = judge.scores(test, [found["before", "sampled"], after], "test, scores")
    score = dict(zip(("before", "after"), map(fmean, scored), strict=True))
    kl = fmean(judge.kls(test, after, "test, KL"))
    length = {name: fmean(map(len, found[name, "sampled"].tokens)) for name in ("before", "after")}
    run.say(f"test: share with EOS {fmean(after.ended):.3f}, length {length['before']:.1f} -> {length['after']:.1f} tokens")
    run.samples([
        {"prompt": example.prompt, "reference": example.completion, "sft": sft, "ppo": ppo}
        for example, sft, ppo in zip(test.examples[:20], found["before", "greedy"].texts, found["after", "greedy"].texts,
                                     strict=False)
    ])
    golds = {key: judge.gold(test, summaries) for key, summaries in found.items()}
    gold = gold_figures(golds, config.seed)
    if golds["after", "sampled"] is not None:
        lengths = [list(map(len, found[name, "sampled"].tokens)) for name in ("after", "before")]
        controlled = length_controlled_win_rate(golds["after", "sampled"], golds["before", "sampled"], *lengths)
        run.metrics(config.updates, {"test/gold_win_rate_length_controlled": controlled})
        run.say(f"test: gold win rate {gold['gold_win_rate']:.3f}, {controlled:.3f} at equal length")
    run.finish({"score_before": score["before"], "score_after": score["after"], **gold, "kl": kl,
                "rouge_avg": judge.rouge(test, found["after", "greedy"]), "episodes": config.updates * episodes,
                "seconds": time.time() - run.started, "episodes_per_second": updates_per_second * episodes})
    if run.is_main:
        plot_ppo(run)
    run.save_final(models.outcome, tokenizer, {"model": config.model, "reward_model": config.reward_model},
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


def refuse_contradictions(config: PPOStageConfig) -> None:
    """Raise UserError for keys that make no sense together."""
    processes = world().num_processes
    if config.prompts_per_update % processes:
        raise UserError(f"prompts_per_update: {config.prompts_per_update} prompts cannot be shared out over {processes} "
                        "processes; take a multiple")
    if config.advantage != "gae" and config.responses_per_prompt < 2:
        raise UserError(f"responses_per_prompt: advantage '{config.advantage}' compares the responses to a prompt with each "
                        "other, so there must be 2 or more; or take advantage 'gae'")
    if bool(config.ptx_coef) != bool(config.actor_training_data):
        raise UserError("actor_training_data: it is for ptx_coef; give both or neither (the data that train_sft.py learnt from)")
    if config.advantage != "gae" and config.value_model != "separate":
        raise UserError(f"value_model: advantage '{config.advantage}' has none; leave it out, or take advantage 'gae'")
    if config.target_kl is not None and config.ppo_epochs == 1:
        raise UserError("target_kl: it leaves out later passes, but ppo_epochs is 1; raise that, or leave target_kl out")
    if config.kl_target is not None:
        episodes = config.prompts_per_update * config.responses_per_prompt
        if not config.kl_coef:
            raise UserError("kl_coef: 0 never adapts to kl_target; give a first value above 0")
        if episodes >= 5 * config.kl_horizon:  # the factor 1 - .2 episodes / horizon
            raise UserError(f"kl_horizon: with {episodes} episodes an update it must be above {episodes / 5:g}, or one update "
                            "would turn kl_coef to 0 and below")


def main(config: PPOStageConfig) -> None:
    refuse_impossible(config)
    refuse_contradictions(config)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config.model)
    check_task(tokenizer, {"model": config.model, "reward_model": config.reward_model})
    gold_rules = load_rules(config.gold_rules) if config.gold_rules else None
    report = DataReport()
    prompts, validation, test, supervised = load_splits(config, tokenizer, report, gold_rules)
    report.tokens("rlhf_training_data", prompts.examples.dataset())
    settings = load_settings(config)
    models = load_models(config)
    run = Run(config, "ppo", report)
    accelerator = build_accelerator(config, run.folder, settings)
    run.use_tracker(accelerator)
    run.catch_signals()
    models, optimizer, scheduler = prepare(models, config, accelerator)
    keeper = Keeper(run, config, accelerator, models.outcome)
    judge = Judge(models.ref_policy, models.reward_model, tokenizer, gold_rules, config)
    began = time.time()
    made = train(models, tokenizer, prompts.prompts, judge, validation, supervised, config, run, keeper, optimizer, scheduler,
                 accelerator)
    speed = made / (time.time() - began)
    keeper.restore_best()
    with accelerator.autocast():
        finish(run, config, models, judge, tokenizer, test, speed)
    accelerator.end_training()


if __name__ == "__main__":
    start(main, PPOStageConfig, PROJECT / "configs" / "tldr_mini" / "ppo.yaml", __doc__)
