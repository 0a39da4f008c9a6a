"""Stage 3, PPO: the policy learns to write summaries that the reward model scores highly, close to the SFT
model.

    python scripts/train_ppo.py                             # the embedded default, after the other two stages
    python scripts/train_ppo.py --config configs/opt/ppo.yaml configs/opt/125m.yaml
    python scripts/train_ppo.py --rlhf_training_data my_prompts.jsonl --model outputs/mine/sft/final \\
        --reward_model outputs/mine/reward/final --output_dir outputs/mine/ppo

One update (`train`): sample K responses for each prompt, score them, take the log-probs of the reference
policy and the values, turn score and KL into rewards, advantages by GAE, then `ppo_epochs` passes of the
clipped objective (`optimise`). A prompt is computed once for its K responses in every one of these passes.
`advantage: rloo` or `grpo` compares the K responses with each other instead, and needs no value model.

Shapes: N episodes (responses) of this rank, the K of a prompt one after the other; R tokens in the longest
response. The mathematics is in `utils/ppo.py`. `utils/rollouts` samples, estimates advantages and takes the
figures that are logged. `utils/judge/held_out.py` evaluates.

Every `eval_steps` updates held-out posts are summarised; the policy with the highest score within `kl_budget`
is the one in final/. It does not train on human ratings directly.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from utils.config import PROJECT, key, refuse_missing_file
from utils.data.sources import data_key
from utils.launch import read_config, start
from utils.models.folders import model_key
from utils.rewards.entries import rewards_key
from utils.stage_keys import Schedule, StageConfig


@dataclass
class PPOStageConfig(StageConfig):
    """PPO. Defaults: those of the published TL;DR runs."""

    section: ClassVar[str] = "ppo"
    belongs_to: ClassVar[dict] = {"rlhf_training_data": ("rlhf_validation_data", "rlhf_test_data",
                                                         "gold_rules")}

    model: str = model_key("outputs/opt-125m/sft/final", "The SFT model: policy and reference.")
    reward_model: str | None = model_key(None, "The reward model; the value model starts from it.",
                                         source="detail 22")
    rewards: str | None = rewards_key("In place of reward_model: a list of rewards, whose scores are added "
                                      "(docs/rewards.md).")
    rlhf_training_data: str = data_key("trl-lib/tldr", "Prompts.")
    rlhf_validation_data: str | None = data_key(None, "Prompts that choose the policy; none: held out of "
                                                       "the training data.")
    rlhf_test_data: str | None = data_key(None, "Prompts that the final figures are taken on; "
                                                 "none: held out too.")
    gold_rules: str | None = key(None, "Rules of the gold score, for data whose rows carry `facts`.",
                                 there=refuse_missing_file)
    total_episodes: int = key(100_000, "Responses sampled in the whole run.", unit="episodes",
                              low=1, high=10**9)
    prompts_per_update: int = key(128, "Prompts of one update, over all processes.", unit="prompts",
                                  low=1, high=10**6)
    responses_per_prompt: int = key(4, "K, responses sampled for each prompt; 128 x 4 is the published 512.",
                                    unit="responses",
                                    source="detail 31", low=1, high=1000)
    ppo_epochs: int = key(4, "Passes over the episodes of an update.", unit="passes",
                          source="detail 31; DSC: 1 is more stable", low=1, high=1000)
    num_minibatches: int = key(1, "Optimizer steps in one pass, each on its share of the prompts.",
                               unit="steps",
                               source="detail 31", low=1, high=10**6)
    max_new_tokens: int = key(53, "Longest response.", unit="tokens", source="detail 3",
                              low=1, high=1_000_000)
    temperature: float = key(0.7, "Divides the logits in every log-probability.", source="detail 25",
                             low=1e-3, high=100.0)
    rollout_engine: str = key("own", "What samples the responses: our sampler, transformers' continuous "
                                     "batching, or vLLM.", choices=["own", "transformers", "vllm"])
    importance_limit: float = key(2.0, "Largest weight of a token that another engine sampled, in the "
                                       "policy loss.", source="Yao et al. 2025", low=1e-3, high=1e6)
    kl_coef: float = key(0.05, "Weight of the KL penalty; with kl_target its first value.",
                         unit="score a nat",
                         source="detail 23", low=0.0, high=1000.0)
    kl_estimator: str = key("k1", "Estimator of the KL that is penalised.", source="detail 24",
                            choices=["k1", "k2", "k3"])
    kl_target: float | None = key(None, "kl_coef adapts so that the KL gets here (LMHP: 6); none: "
                                        "kl_coef is fixed.",
                                  unit="nats a summary", source="detail 23", low=1e-6, high=1e6)
    kl_horizon: int = key(10_000, "How slowly kl_coef adapts.", unit="episodes", source="detail 23",
                          low=1, high=10**9)
    score_clip: float | None = key(None, "Scores are clipped to plus or minus this (DSC: 5); "
                                         "none: not clipped.", unit="score",
                                   source="DSC", low=1e-6, high=1e6)
    whiten_rewards: bool = key(False, "Scale rewards to variance 1, their mean kept; harmful in N+.",
                               source="detail 30")
    advantage: str = key("gae", "GAE of a value model; or a response against the others of its prompt "
                                "(no value model).",
                         source="detail 29; RLOO; GRPO", choices=["gae", "rloo", "grpo"])
    value_model: str = key("separate", "A model of its own, from the reward model; or a head on the policy's "
                                       "trunk, at half the cost.", source="detail 22",
                                       choices=["separate", "shared"])
    gamma: float = key(1.0, "Discount.", source="detail 29", low=0.0, high=1.0)
    lam: float = key(0.95, "Lambda of GAE.", source="detail 29", low=0.0, high=1.0)
    cliprange: float = key(0.2, "Clip of the probability ratio.", source="detail 31", low=0.0, high=1000.0)
    cliprange_value: float = key(0.2, "Clip of the value.", unit="score", source="detail 31",
                                 low=0.0, high=1e6)
    vf_coef: float = key(0.1, "Weight of the value loss.", source="detail 31", low=0.0, high=1000.0)
    target_kl: float | None = key(None, "No further pass in an update after one whose approx_kl is above "
                                        "this; none: all passes.",
                                  unit="nats a token", low=0.0, high=1e6)
    ptx_coef: float = key(0.0, "Weight of the SFT loss on actor_training_data, added in each step; 0: off.",
                          source="detail 34", low=0.0, high=1000.0)
    actor_training_data: str | None = data_key(None, "SFT examples for ptx_coef.")
    max_completion_tokens: int = key(64, "SFT examples with longer completions are dropped.", unit="tokens",
                                     low=2, high=10_000_000)
    ema_decay: float = key(0.0, "Judge and keep an exponential average of the policy (IG: .992 a step); 0: "
                                "the policy itself.",
                           source="detail 35", low=0.0, high=0.999999)
    missing_eos_score: float | None = key(-1.0, "Score of a response without EOS; none: what the rewards "
                                                "say.", unit="score", source="detail 26", low=-1e6, high=1e6)
    save_steps: int = key(20, "A checkpoint is saved every so many updates.", unit="updates",
                          low=1, high=10**9)
    eval_steps: int = key(10, "Summarise the validation prompts every so many updates.", unit="updates",
                          low=1, high=10**9)
    eval_rows: int = key(200, "Prompts in each evaluation during training.", unit="prompts",
                         low=1, high=10**9)
    test_rows: int = key(400, "Prompts in the final figures.", unit="prompts", low=1, high=10**9)
    eval_batch_size: int = key(64, "Prompts summarised at once.", unit="prompts", low=1, high=100_000)
    eval_temperature: float = key(0.01, "Sampling temperature of evaluations.", source="detail 32",
                                  low=1e-3, high=100.0)
    kl_budget: float = key(20.0, "A policy further than this from the reference is never chosen.",
                           unit="nats a summary", low=0.0, high=1e9)
    guard: float | None = key(None, "A later policy takes the kept one's place only when score, heads and "
                                    "guard_model all see it better by more than so many standard errors; "
                                    "none: when its score is higher.", low=0.0, high=100.0)
    guard_model: str | None = model_key(None, "A second reward model, of other rankings, for the guard: no "
                                              "policy learns from it.")
    kl_limit: float = key(100.0, "The run stops when the KL of an update is above this.",
                          unit="nats a summary", low=0.0, high=1e9)

    @property
    def episodes_per_update(self) -> int:
        return self.prompts_per_update * self.responses_per_prompt

    @property
    def updates(self) -> int:
        return math.ceil(self.total_episodes / self.episodes_per_update)

    @property
    def steps_per_pass(self) -> int:
        return min(self.num_minibatches, self.prompts_per_update)

    def without_effect(self) -> dict[str, str]:
        idle = super().without_effect()
        if self.rewards is not None:
            idle["reward_model"] = ("rewards says what scores; reward_model: none takes back what a file "
                                    "before names")
        if self.advantage != "gae":
            names = ("gamma", "lam", "vf_coef", "cliprange_value", "value_model")
            idle |= dict.fromkeys(names, f"advantage '{self.advantage}' has no value model")
        if self.guard is None:
            idle["guard_model"] = "it is for guard, which is not given"
        if self.kl_target is None:
            idle["kl_horizon"] = "it is for kl_target, which is not given"
        if self.rollout_engine == "own":
            idle["importance_limit"] = "our sampler needs no weights; it is for another rollout_engine"
        if not self.ptx_coef:
            idle["max_completion_tokens"] = "it is for ptx_coef, which is 0"
        return idle


if __name__ == "__main__":  # before the libraries, which take seconds to import
    CONFIG = read_config(PPOStageConfig, PROJECT / "configs" / "tldr_mini" / "ppo.yaml", __doc__)

import torch
from transformers import set_seed

from utils.contradictions import refuse_contradictions
from utils.data.batches import PromptBatches
from utils.data.prompts import Posts, load_posts
from utils.data.report import DataReport
from utils.data.rows import Tokenised
from utils.judge.gold import GoldJudge
from utils.judge.held_out import ending, evaluate, fit_lengths, outcome_weights
from utils.judge.judging import Judge
from utils.loop import Loop
from utils.models.outputs import response_logprobs
from utils.models.parents import Parent, check_task
from utils.models.policy_value import Models, average_in, averaged, load_models
from utils.ppo import (
    Rollout,
    adapted_kl_coef,
    clipped_scores,
    kl_estimate,
    missing_eos_penalty,
    policy_loss,
    token_rewards,
    value_loss,
)
from utils.ptx import add_supervised_gradients
from utils.rewards.rewards import open_rewards
from utils.rollouts.advantages import correct_engine, estimate_advantages, whitened
from utils.rollouts.episodes import Episodes, minibatches, own_prompts, passes_of, rollout_of, sample_episodes
from utils.rollouts.figures import refuse_collapse, rollout_metrics, statistics_of
from utils.runs.ending import end_stage, refuse_broken_summaries
from utils.runs.final import rehearse_saving
from utils.runs.opening import open_stage, plan_of
from utils.runs.run import Run, refuse_impossible
from utils.runs.token_sums import TokenSums
from utils.zero import load_settings

# ---------------------------------------------------------------------------------------------- the algorithm


def train(loop: Loop, models: Models, posts: Posts, judge: Judge, gold: GoldJudge | None) -> None:
    """PPO. Shapes: N episodes of this rank, R tokens in the longest response."""
    config = loop.config
    batches = PromptBatches(len(posts.prompts), config.prompts_per_update, config.seed)
    for update, places in loop.steps(batches):
        began, worked = time.monotonic(), time.process_time()
        mine = list(places)[own_prompts(loop)]
        queries = [posts.prompts[place] for place in mine]
        # These call the models inside the accelerator's wrapper, so they need its autocast (detail 27). The
        # block is short: autocast keeps the weights it has cast until its end, and a step makes them old.
        with torch.no_grad(), loop.accelerator.autocast():
            episodes = sample_episodes(loop, models.policy, queries, update)
            asked = models.rewards.ask(episodes, posts.rows(mine))  # services answer meanwhile
            reference = partial(response_logprobs, models.ref_policy, temperature=config.temperature)
            ref_logprobs = episodes.measure(reference)  # (N, R)
            values = episodes.measure(models.trained.values)  # (N, R), of the state before each token
            score, reward_figures = models.rewards.score(episodes, asked, update)  # (N,)
        mask, logprobs = episodes.response_mask, episodes.logprobs
        # a response that does not end gets a fixed score, or length would be free (detail 26)
        score = missing_eos_penalty(score, episodes.ended, config.missing_eos_score)
        kl = kl_estimate(logprobs, ref_logprobs, config.kl_estimator)  # (N, R), detail 24
        # the KL is paid at every token, the score at the last one (detail 23)
        rewards = token_rewards(clipped_scores(score, config.score_clip), kl, mask, loop.carried["kl_coef"])
        if config.whiten_rewards:
            rewards = whitened(loop, rewards, mask, shift_mean=False)  # detail 30
        advantages, returns = estimate_advantages(loop, rewards, values, mask)  # (N, R), details 29 and 30
        weights, drift = correct_engine(loop, episodes)
        rollout = Rollout(mask, logprobs, ref_logprobs, values, score, rewards, advantages, returns, weights)

        figures = rollout_metrics(loop, rollout, episodes.ended) | reward_figures | drift
        refuse_collapse(loop, figures, update)  # before the update makes it worse
        sampled = time.monotonic()
        figures |= optimise(loop, models, episodes, rollout, posts.supervised)
        if config.kl_target is not None:
            loop.carried["kl_coef"] = adapted_kl_coef(
                loop.carried["kl_coef"], figures["objective/kl"], config.kl_target,
                config.episodes_per_update, config.kl_horizon)
        seconds = {"time/rollout": sampled - began, "time/update": time.monotonic() - sampled,
                   "time/cpu": time.process_time() - worked}
        loop.run.metrics(update, figures | seconds)
        loop.show(score=figures["objective/score"], kl=figures["objective/kl"])
        if loop.evaluates(update):
            evaluate(loop, models, posts.validation, judge, gold, update)


def optimise(loop: Loop, models: Models, episodes: Episodes, rollout: Rollout,
             supervised: Tokenised | None) -> dict:
    """Up to `ppo_epochs` passes of the clipped objective (detail 31).

    Returns:
        Metrics: means over all tokens of all passes (detail 12).
    """
    config, all_sums = loop.config, TokenSums(loop.accelerator)
    ptx_losses = []
    for epoch in range(1, config.ppo_epochs + 1):
        sums = TokenSums(loop.accelerator)
        for prompts in minibatches(loop, epoch):
            passes = passes_of(loop, episodes, prompts)
            # one mean over the tokens of the optimizer step, of all ranks and micro-batches (detail 12)
            tokens = loop.total(sum(groups.response_mask.sum() for groups, _ in passes))
            if supervised is not None:
                ptx_losses.append(add_supervised_gradients(loop, supervised, len(prompts)))  # detail 34
            for groups, members in loop.parts(passes, spare=lambda: episodes.passes[0]):
                # what the behaviour policy said of the same tokens, and what they turned out to be worth
                old = rollout_of(rollout, members, width=groups.response_mask.shape[1])
                new_logprobs, entropy, new_values = loop.model(groups, config.temperature)  # (n, R)
                losses, clips = policy_loss(new_logprobs, old.logprobs, old.advantages, config.cliprange)
                if old.weights is not None:
                    losses = losses * old.weights
                objective, figures = losses, {"loss/policy": losses}
                if new_values is not None:
                    value_losses, value_clips = value_loss(new_values, old.values, old.returns,
                                                           config.cliprange_value)
                    objective = losses + config.vf_coef * value_losses
                    figures |= {"loss/value": value_losses, "value/clipfrac": value_clips.float()}
                loop.backward(torch.where(old.response_mask, objective, 0.0).sum() / tokens, groups)
                if loop.part_counts:  # not a spare pass, which only keeps ranks in step
                    sums.add({name: torch.where(old.response_mask, value.detach(), 0.0).sum()
                              for name, value in figures.items()})
                    sums.add(*statistics_of(new_logprobs, old, entropy, clips))
            loop.optimizer_step()
            if models.average is not None and loop.made_step():
                average_in(models.average, models.policy)  # detail 35
        all_sums.merge(sums)
        if config.target_kl is not None and sums.means()["policy/approx_kl"] > config.target_kl:
            loop.skip_optimizer_steps(config.steps_per_pass * (config.ppo_epochs - epoch))
            break
    figures = all_sums.means() | ({"loss/ptx": torch.stack(ptx_losses).mean().item()} if ptx_losses else {})
    return figures | {"policy/grad_norm": loop.grad_norm, "policy/epochs": epoch,
                      "policy/learning_rate": loop.learning_rate}


# ------------------------------------------------------------------------------------------------- the script


def main(config: PPOStageConfig) -> None:
    refuse_contradictions(config)
    sft = Parent("model", config.model, config.chat_template)
    rewards = open_rewards(config, sft)
    open_stage(config, sft)
    refuse_impossible(config)
    set_seed(config.seed)
    check_task(sft, *(reward.parent for reward in rewards.all_models if not reward.reads_text))
    refuse_broken_summaries(sft, *rewards.parents)
    report = DataReport()
    posts = load_posts(config, sft.tokenizer, report)
    held_out = [*posts.validation.examples, *posts.test.examples]
    gold = GoldJudge(config.gold_rules, held_out) if config.gold_rules else None
    deepspeed = load_settings(config, sft)
    models = load_models(sft, rewards, config)
    rehearse_saving(models.policy, sft.tokenizer, config)
    if deepspeed:
        models.trained.frozen.extend(models.frozen)

    run = Run(config, "ppo", report, [sft, *rewards.parents])
    run.log(plan_of(config, len(posts.prompts), config.updates, run.unit))
    optimizer_steps = config.updates * config.ppo_epochs * config.steps_per_pass
    loop = Loop(run, models.trained, sft.tokenizer, Schedule(config.updates, optimizer_steps, "linear"),
                deepspeed)
    for frozen in () if deepspeed else models.frozen:
        frozen.to(loop.device)
    if config.ema_decay:
        models = models._replace(average=averaged(models.policy, config.ema_decay))
        loop.weights["average"] = outcome_weights(models)
    loop.carried = {"kl_coef": config.kl_coef, "reward_scales": rewards.scales,
                    "length_fits": rewards.length_fits}
    judge = Judge(models.ref_policy, rewards, sft.tokenizer, config)
    loop.resume()
    rewards.scales = loop.carried["reward_scales"]
    rewards.length_fits = loop.carried.get("length_fits", {})  # a run of an older commit has none
    if loop.step == 0:
        fit_lengths(loop, models, posts.validation, judge)
        evaluate(loop, models, posts.validation, judge, gold, 0)
    began = time.monotonic()
    train(loop, models, posts, judge, gold)
    speed = loop.steps_done * config.episodes_per_update / (time.monotonic() - began)
    best_step = loop.best.restore(outcome_weights(models), last=loop.step)
    with loop.accelerator.autocast():
        end = ending(loop, models, posts.test, judge, gold, best_step)
    end.work["episodes_per_second"] = speed
    end_stage(run, loop.step, models.outcome, sft.tokenizer, [sft, *rewards.parents], end)


if __name__ == "__main__":
    start(main, CONFIG)
