"""What summaries of held-out posts are worth: score, KL, gold score where facts are known, and ROUGE.

Each measure stands alone, because each costs a pass of a model or more: a caller takes those that it reports.
"""

from utils.config import UserError, find_input
from utils.data.rows import Tokenised
from utils.judge.evaluation import Summaries, measure_groups, score_groups, summarise
from utils.judge.gold import gold_score, load_gold
from utils.judge.metrics import SummaryRouge
from utils.models.loading import response_logprobs


class Judge:
    """The frozen models and rules that summaries are held against. A list has one entry for each post."""

    def __init__(self, ref_policy, reward_model, tokenizer, gold_rules: dict | None, config):
        self.ref_policy, self.reward_model, self.tokenizer = ref_policy, reward_model, tokenizer
        self.gold_rules, self.config = gold_rules, config

    def summaries(self, policy, posts: Tokenised, temperature: float, title: str) -> Summaries:
        """One summary of each post; the same seeds for every policy."""
        return summarise(policy, self.tokenizer, posts.prompts, self.config, temperature, self.config.seed, title)

    def scores(self, posts: Tokenised, found: list[Summaries], title: str) -> list[list[float]]:
        """The reward model's scores, a list for each policy's summaries: those of one post are one prompt group.

        A summary without EOS scores `missing_eos_score`, as in training.
        """
        completions = [list(group) for group in zip(*(summaries.tokens for summaries in found), strict=True)]
        raw = score_groups(self.reward_model, self.tokenizer, posts.prompts, completions, self.config.eval_batch_size, title)
        return [[score if ended else self.config.missing_eos_score for score, ended in zip(column, summaries.ended, strict=True)]
                for column, summaries in zip(zip(*raw, strict=True), found, strict=True)]

    def kls(self, posts: Tokenised, found: Summaries, title: str) -> list[float]:
        """log p - log p_ref in nats, of summaries sampled at the training temperature: their own log-probs are log p."""
        def summed(groups):
            return response_logprobs(self.ref_policy, groups, self.config.temperature).sum(1)  # padding is 0

        size, completions = self.config.eval_batch_size, [[tokens] for tokens in found.tokens]
        device = self.ref_policy.device
        ref = measure_groups(summed, self.tokenizer, posts.prompts, completions, size, device, title)
        return [sum(logprobs) - r for logprobs, [r] in zip(found.logprobs, ref, strict=True)]

    def gold(self, posts: Tokenised, found: Summaries) -> list[float] | None:
        """Gold scores; None without rules."""
        if self.gold_rules is None:
            return None
        judged = zip(found.texts, posts.examples, found.ended, strict=True)
        return [gold_score(text, example.facts, self.gold_rules, ended) for text, example, ended in judged]

    def rouge(self, posts: Tokenised, found: Summaries) -> float | None:
        """Mean of ROUGE-1/2/L over the posts that have a reference; None when none has."""
        known = [(text.strip(), e.completion.strip())
                 for text, e in zip(found.texts, posts.examples, strict=True) if e.completion]
        if not known:
            return None
        texts, references = zip(*known, strict=True)
        return SummaryRouge().compute(predictions=texts, references=references)["rouge_avg"]


def load_rules(path: str) -> dict:
    """The rules of the gold score.

    Raises:
        UserError: when the file is not there or is none that `gold_score` could work with.
    """
    found = find_input(path, "gold_rules")
    try:
        rules = load_gold(found)
        gold_score("", dict.fromkeys(rules["slots"], ""), rules)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"gold_rules: '{found}' holds no rules of a gold score ({type(error).__name__}: {error}); make it again "
                        "with data/tldr_mini/generate.py, or leave gold_rules out") from None
    return rules


def refuse_missing_facts(rules: dict, examples: list) -> None:
    """Raise UserError when a held-out example's `facts` are not what the gold score needs: a text for each slot."""
    for example in examples:
        facts = example.facts if isinstance(example.facts, dict) else {}
        missing = [slot for slot in rules["slots"] if not isinstance(facts.get(slot), str)]
        if missing:
            raise UserError(f"gold_rules: a held-out row has no column 'facts' with a text for '{missing[0]}' "
                            f"({example.prompt[:60]!r}...); leave gold_rules out for this data")
