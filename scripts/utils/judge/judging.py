"""What summaries of held-out posts are worth: the rewards' score, KL, and ROUGE.

Each measure stands alone, because each costs a pass of a model or more: a caller takes those that it reports.
"""

import numpy as np

from utils.data.rows import Tokenised
from utils.judge.evaluation import Summaries, measure_groups, score_groups, summarise
from utils.judge.metrics import SummaryRouge
from utils.models.heads import Heads, head_scores
from utils.models.outputs import response_logprobs
from utils.rewards.rewards import Rewards, Scores


class Judge:
    """What summaries are measured with. A list has one entry for each post."""

    def __init__(self, ref_policy, rewards: Rewards, tokenizer, config):
        self.ref_policy, self.rewards, self.tokenizer, self.config = ref_policy, rewards, tokenizer, config

    def summaries(self, policy, posts: Tokenised, temperature: float, title: str) -> Summaries:
        """One summary of each post; the same seeds for every policy."""
        return summarise(policy, self.tokenizer, posts.prompts, self.config, temperature, title)

    def fit_lengths(self, policy, posts: Tokenised) -> None:
        """Fit what rewards with `length_control` pay for length, to as many samples of the policy for each
        post as an update has, but at least two.
        """
        k, config = max(2, self.config.responses_per_prompt), self.config
        sampled = summarise(policy, self.tokenizer, posts.prompts, config, config.temperature,
                            "validation, length", k)
        written = [Summaries(*(column[number::k] for column in sampled)) for number in range(k)]
        self.rewards.fit_lengths(posts, written, self.tokenizer, max(1, config.eval_batch_size // k),
                                 "validation, length, scores")

    def scores(self, posts: Tokenised, written: list[Summaries], title: str) -> list[Scores]:
        """The scores of each policy's summaries: those of one post are one prompt group.

        A summary without EOS scores `missing_eos_score`, as in training (detail 26).
        """
        missing = self.config.missing_eos_score
        scored = self.rewards.judge(posts, written, self.tokenizer, self.config.eval_batch_size, title)
        if missing is None:
            return scored
        return [one._replace(total=[score if ended else missing
                                    for score, ended in zip(one.total, summaries.ended, strict=True)])
                for one, summaries in zip(scored, written, strict=True)]

    def opinions(self, posts: Tokenised, greedy: Summaries, sampled: Summaries) -> tuple[list, dict]:
        """What other judges than the score say, without any gold score: each head of the reward models that
        have several, and the guard.

        Returns:
            The scores of the nearly greedy summaries by each judge, (judges, posts). And means by names of
            metrics: `spread`, the standard deviation of a summary's score over the heads of the first such
            model; `guard_score`; and with `_sampled` those of the sampled summaries.
        """
        completions = [[a, b] for a, b in zip(greedy.tokens, sampled.tokens, strict=True)]
        judges, means = [], {}
        for reward in self.rewards.all_models:
            several = isinstance(reward.model.score, Heads) and not reward.reads_text
            if reward is not self.rewards.guard and not several:
                continue
            found = np.array(score_groups(reward.model, self.tokenizer, posts.prompts, completions,
                                          self.config.eval_batch_size, "validation, judges", head_scores))
            lengths = np.array([[len(tokens) for tokens in group] for group in completions])
            found -= self.rewards.length_part(reward.entry, lengths)[..., None]
            name, figures = "spread", found.std(-1)  # found: (posts, 2, heads)
            if self.config.missing_eos_score is not None:
                found[~np.array([greedy.ended, sampled.ended]).T] = self.config.missing_eos_score
            if reward is self.rewards.guard:
                found = found.mean(-1, keepdims=True)
                name, figures = "guard_score", found[..., 0]
            judges += found[:, 0].T.tolist()
            means = dict(zip((name, f"{name}_sampled"), map(float, figures.mean(0)), strict=True)) | means
        return judges, means

    def kls(self, posts: Tokenised, sampled: Summaries, title: str) -> list[float]:
        """log p - log p_ref in nats, of summaries sampled at the training temperature: their own log-probs
        are log p.
        """
        def summed(groups):
            return response_logprobs(self.ref_policy, groups, self.config.temperature).sum(1)  # padding is 0

        size, completions = self.config.eval_batch_size, [[tokens] for tokens in sampled.tokens]
        device = self.ref_policy.device
        ref = measure_groups(summed, self.tokenizer, posts.prompts, completions, size, device, title)
        return [sum(logprobs) - r for logprobs, [r] in zip(sampled.logprobs, ref, strict=True)]

    def rouge(self, posts: Tokenised, written: Summaries) -> float | None:
        """Mean of ROUGE-1/2/L over the posts that have a reference; None when none has."""
        known = [(text.strip(), e.completion.strip())
                 for text, e in zip(written.texts, posts.examples, strict=True) if e.completion]
        if not known:
            return None
        texts, references = zip(*known, strict=True)
        return SummaryRouge().compute(predictions=texts, references=references)["rouge_avg"]
