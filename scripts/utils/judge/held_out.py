"""PPO on held-out prompts: the evaluations that choose the policy, and the final figures."""

import math
from functools import partial
from statistics import fmean

from utils.data.layouts import layout_of
from utils.data.rows import Tokenised
from utils.judge.evaluation import Summaries
from utils.judge.gold import GoldJudge
from utils.judge.guard import gain
from utils.judge.judging import Judge
from utils.judge.plots import plot_ppo
from utils.loop import Loop
from utils.models.policy_value import Models
from utils.rewards.length import slope_between
from utils.rewards.rewards import Scores
from utils.runs.checkpoints import trainable_weights
from utils.runs.ending import Ending
from utils.runs.run import SHOWN


def fit_lengths(loop: Loop, models: Models, validation: Tokenised, judge: Judge) -> None:
    """Before the first update: what the rewards with `length_control` pay for length."""
    rewards = judge.rewards
    if not any(reward.entry.length_control for reward in rewards.rewards):
        return
    with loop.accelerator.autocast():
        judge.fit_lengths(models.outcome, validation)
    for name, (slope, centre) in rewards.length_fits.items():
        loop.run.log(f"length control: {name} pays {slope:+.4f} a token, which is taken off around "
                     f"{centre:.1f} tokens" if slope else
                     f"length control: {name} stays as it is: no prompt has finished answers of two lengths "
                     "whose scores differ")
    loop.run.metrics(0, {f"rewards/{name}/slope": fit.slope for name, fit in rewards.length_fits.items()})


def evaluate(loop: Loop, models: Models, validation: Tokenised, judge: Judge, gold: GoldJudge | None,
             update: int):
    """Summarise the validation prompts nearly greedily, log the figures, offer the policy as the best one
    (detail 33).

    The KL is that of summaries sampled at the training temperature: of greedy ones it would be no estimate.
    """
    config = loop.config
    with loop.accelerator.autocast():
        greedy = judge.summaries(models.outcome, validation, config.eval_temperature, "validation")
        sampled = judge.summaries(models.outcome, validation, config.temperature, "validation, sampled")
        scored, scored_sampled = judge.scores(validation, [greedy, sampled], "validation, scores")
        kl = judge.kls(validation, sampled, "validation, KL")
        opinions, signs = judge.opinions(validation, greedy, sampled)
    columns = {"tokens": list(map(len, greedy.tokens)), "ended": greedy.ended, "score": scored.total,
               "score_sampled": scored_sampled.total, "kl": kl}
    if gold is not None:
        columns |= {"gold": gold.scores(validation.examples, greedy),
                    "gold_sampled": gold.scores(validation.examples, sampled)}
    means = {name: fmean(values) for name, values in columns.items()} | scored.means("rewards/{}") | signs
    opinions, kept = [scored.total, *opinions], loop.carried.get("kept")
    if config.guard is not None and kept:
        means["guard_gain"] = gain(opinions, kept)
    if (rouge := judge.rouge(validation, greedy)) is not None:
        means["rouge_avg"] = rouge
    loop.run.metrics(update, {f"eval/{name}": value for name, value in means.items()})
    texts = zip(validation.examples[:SHOWN], greedy.texts, scored.total, strict=False)
    loop.run.samples(update, "validation", [
        {"prompt": example.prompt, "reference": example.completion, "summary": text, "score": value}
        for example, text, value in texts])
    loop.run.log(f"update {update}: " + " ".join(f"{name} {value:.3f}" for name, value in means.items()))
    if means["kl"] <= config.kl_budget and means.get("guard_gain", math.inf) > (config.guard or 0.0):
        if config.guard is not None:
            loop.carried["kept"] = opinions
        loop.best.offer(update, means["score"], outcome_weights(models), kl=means["kl"])


def outcome_weights(models: Models) -> dict:
    """The weights of the policy that is judged and kept."""
    return {name: models.outcome.get_parameter(name) for name in trainable_weights(models.policy)}


def ending(loop: Loop, models: Models, test: Tokenised, judge: Judge, gold: GoldJudge | None,
           best_step: int) -> Ending:
    """PPO against SFT on the same held-out prompts: samples and the final figures."""
    config = loop.config
    written = {
        (name, kind): judge.summaries(policy, test, temperature, f"test, {name}, {kind}")
        for name, policy in (("before", models.ref_policy), ("after", models.outcome))
        for kind, temperature in (("sampled", config.temperature), ("greedy", config.eval_temperature))
    }
    before, after = written["before", "sampled"], written["after", "sampled"]
    scored_before, scored_after = judge.scores(test, [before, after], "test, scores")
    kl = fmean(judge.kls(test, after, "test, KL"))
    lengths = [fmean(map(len, summaries.tokens)) for summaries in (before, after)]
    loop.run.log(f"test: share with EOS {fmean(after.ended):.3f}, length {lengths[0]:.1f} -> "
                 f"{lengths[1]:.1f} tokens")
    figures = length_figures(scored_before, scored_after, before, after)
    if gold is not None:
        figures |= gold.compare(test.examples, written, config.seed)
    texts = zip(test.examples[:20], written["before", "greedy"].texts, written["after", "greedy"].texts,
                strict=False)
    return Ending(
        samples=[{"prompt": example.prompt, "reference": example.completion, "sft": sft, "ppo": ppo}
                 for example, sft, ppo in texts],
        summary={"score_before": fmean(scored_before.total), "score_after": fmean(scored_after.total),
                 **scored_before.means("{}_before"), **scored_after.means("{}_after"), **figures, "kl": kl,
                 "rouge_avg": judge.rouge(test, written["after", "greedy"])},
        work={"best_step": best_step, "episodes": config.updates * config.episodes_per_update},
        stage={"prompt_layout": layout_of(test.examples[0].prompt),
               "max_prompt_tokens": config.max_prompt_tokens, "max_new_tokens": config.max_new_tokens,
               "score": fmean(scored_after.total), "kl": kl},
        plot=partial(plot_ppo, kept=best_step, kl_budget=config.kl_budget),
        compared=("sft", "ppo"),
    )


def length_figures(scored_before: Scores, scored_after: Scores, before: Summaries,
                    after: Summaries) -> dict[str, float]:
    """What the score and each reward pay for a token, measured between SFT's and PPO's summaries of the same
    posts; and what PPO would score if its summaries were as long as SFT's.
    """
    lengths = [list(map(len, summaries.tokens)) for summaries in (before, after)]
    ended = [a and b for a, b in zip(before.ended, after.ended, strict=True)]
    slope = slope_between(scored_before.total, scored_after.total, *lengths, ended)
    longer = fmean(lengths[1]) - fmean(lengths[0])
    return {"score_slope": slope,
            "score_after_length_controlled": fmean(scored_after.total) - slope * longer,
            **{f"{name}_slope": slope_between(values, scored_after.by_reward[name], *lengths, ended)
               for name, values in scored_before.by_reward.items() if scored_before.listed}}
