"""What the summaries of held-out posts are worth: score, KL, ROUGE, and the gold score where facts are known."""

import torch

from utils.config import find_input
from utils.evaluation import score_groups, summarise
from utils.gold import gold_score, load_gold
from utils.metrics import SummaryRouge
from utils.models import response_logprobs
from utils.ppo import kl_penalty
from utils.prompt_groups import pack


def judge_summaries(policy, ref_policy, reward_model, tokenizer, posts, config, temperature: float, title: str):
    """Summarise posts and judge the summaries.

    Returns:
        Means by name, and the columns behind them (one entry for each post), the texts among them.
    """
    found = summarise(policy, tokenizer, posts.prompts, config, temperature, config.seed, title)
    responses = [[tokens] for tokens in found.tokens]
    raw = score_groups(reward_model, tokenizer, posts.prompts, responses, config.eval_batch_size)
    columns = {
        "text": found.texts,
        "tokens": [len(tokens) for tokens in found.tokens],
        "ended": found.ended,
        "score": [s if ended else config.missing_eos_score for [s], ended in zip(raw, found.ended, strict=True)],
        "kl": sequence_kl(policy, ref_policy, tokenizer, posts.prompts, responses, config),
    }
    if config.gold_rules:
        rules = load_gold(find_input(config.gold_rules, "gold_rules"))
        judged = zip(found.texts, posts.examples, found.ended, strict=True)
        columns["gold"] = [gold_score(text, example.facts, rules, ended) for text, example, ended in judged]
    means = {name: sum(values) / len(values) for name, values in columns.items() if name != "text"}
    known = [(text.strip(), e.completion.strip()) for text, e in zip(found.texts, posts.examples, strict=True) if e.completion]
    if known:
        texts, references = zip(*known, strict=True)
        means["rouge_avg"] = SummaryRouge().compute(predictions=texts, references=references)["rouge_avg"]
    return means, columns


@torch.no_grad()
def sequence_kl(policy, ref_policy, tokenizer, prompts, responses, config) -> list[float]:
    """log p(response) - log p_ref(response) at the training temperature, of each response."""
    if policy is ref_policy:
        return [0.0] * len(prompts)
    found = []
    for begin in range(0, len(prompts), config.eval_batch_size):
        part = slice(begin, begin + config.eval_batch_size)
        groups = pack(prompts[part], responses[part], tokenizer.pad_token_id).to(policy.device)
        logprobs, ref_logprobs = (response_logprobs(model, groups, config.temperature)[0] for model in (policy, ref_policy))
        found += kl_penalty(logprobs, ref_logprobs).sum(1).tolist()  # padding is 0 in both
    return found
