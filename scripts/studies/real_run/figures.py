"""What a run on real posts reached: ROUGE beside summaries that need no training, accuracy by kind of worse
summary, and win rates by a reward model that was not trained against.
"""

import re
from statistics import fmean

import numpy as np
import torch
from transformers import pipeline

from studies.real_run.posts import KINDS
from utils.data.layouts import spaced, tldr_parts
from utils.data.tokens import completion_tokens, prompt_tokens
from utils.distributed import world
from utils.judge.evaluation import Summaries, measure_groups, score_groups, summarise
from utils.judge.metrics import (
    SummaryRouge,
    bootstrap_interval,
    length_controlled_win_rate,
    pair_accuracy,
    win_rate,
)
from utils.models.loading import load_policy, load_scalar_model
from utils.models.outputs import response_logprobs
from utils.models.parents import Parent

FIRST_TOKENS = 24
RESAMPLES = 500


def arithmetic(stage):
    """The arithmetic that a stage runs in, as a context."""
    return torch.autocast(world().device.type, torch.bfloat16, enabled=stage.mixed_precision == "bf16")


def baselines(rows: list[dict], folder: str) -> dict[str, list[str]]:
    """Summaries of posts of tldr_valid.jsonl.gz that need none of our models, by what they are.

    Args:
        folder: the model whose tokens are counted.
    """
    tokenizer = Parent("model", folder).tokenizer
    parts = [tldr_parts(row["prompt"]) for row in rows]
    posts = [post.removesuffix("TL;DR:").strip() for _, _, post in parts]
    return {
        "the title": [title for _, title, _ in parts],
        "the first sentence": [re.split(r"(?<=[.?!])\s", post, maxsplit=1)[0] for post in posts],
        f"the first {FIRST_TOKENS} tokens": [
            tokenizer.decode(tokenizer(post, add_special_tokens=False)["input_ids"][:FIRST_TOKENS])
            for post in posts],
        "OpenAI's PPO, 1.3B": [row["openai_ppo_1.3b"] for row in rows],
    }


def rouge(texts: list[str], rows: list[dict]) -> dict[str, float]:
    """ROUGE against the references of the posts."""
    return SummaryRouge().compute(predictions=[text.strip() for text in texts],
                                  references=[row["completion"].strip() for row in rows])


class Scorer:
    """A reward model, and the lengths and the batch that it scores with."""

    def __init__(self, name: str, stage):
        parent = Parent("reward_model", name)
        self.tokenizer, self.stage, self.folder = parent.tokenizer, stage, parent.path
        self.model = load_scalar_model(parent).to(world().device)

    def scores(self, prompts: list[str], completions: list[list[str]], title: str) -> list[list[float]]:
        """The score of each completion of each prompt, all as text."""
        ids = [completion_tokens(self.tokenizer, [spaced(text) for text in group]) for group in completions]
        cut = prompt_tokens(self.tokenizer, prompts, self.stage.max_prompt_tokens)
        return score_groups(self.model, self.tokenizer, cut, ids, self.stage.eval_batch_size, title)

    def scores_of_tokens(self, prompts: list[str], columns: list[list[list[int]]], title: str
                         ) -> list[list[float]]:
        """(posts, policies): the score of what each policy wrote for each prompt, as token ids."""
        cut = prompt_tokens(self.tokenizer, prompts, self.stage.max_prompt_tokens)
        return score_groups(self.model, self.tokenizer, cut, list(map(list, zip(*columns, strict=True))),
                            self.stage.eval_batch_size, title)

    def accuracy_by_kind(self, groups: list[dict]) -> dict[str, dict]:
        """How often the author's summary scores above the one of each other kind, with its interval."""
        scores = self.scores([group["prompt"] for group in groups],
                             [group["completions"] for group in groups], "held-out groups")
        found = {}
        for kind in KINDS[1:]:
            chosen = [(group, score) for group, score in zip(groups, scores, strict=True)
                      if kind in group["kinds"]]
            if chosen:
                pairs = [[(0, group["kinds"].index(kind))] for group, _ in chosen]
                found[kind] = accuracy([score for _, score in chosen], pairs)
        return found

    def difference_to_a_stock_pipeline(self, prompts: list[str], texts: list[str]) -> float:
        """The largest difference between our scores and those of transformers' pipeline less `score_shift`.

        The shift stands in the config; the pipeline does not know it.
        """
        tokenizer = self.tokenizer
        ours = [score for [score] in self.scores(prompts, [[text] for text in texts], "pipeline")]
        stock = pipeline("text-classification", model=self.folder, tokenizer=tokenizer, dtype=torch.float32)
        # without the token at the start, which the pipeline puts there itself
        cut = tokenizer.batch_decode(prompt_tokens(tokenizer, prompts, self.stage.max_prompt_tokens),
                                     skip_special_tokens=True)
        found = stock([prompt + spaced(text) + tokenizer.eos_token
                       for prompt, text in zip(cut, texts, strict=True)])
        shift = self.model.config.score_shift
        return max(abs(a - (b["score"] - shift)) for a, b in zip(ours, found, strict=True))


def accuracy(scores: list[list[float]], pairs) -> dict[str, float]:
    """Accuracy over pairs of different posts, with its interval."""
    rate, low, high = bootstrap_interval(*pair_accuracy(scores, pairs), range(len(pairs)), 0)
    return {"accuracy": rate, "low": low, "high": high, "pairs": len(pairs)}


def judged_pairs(scorers: dict[str, Scorer], rows: list[dict]) -> dict[str, dict]:
    """Accuracy of each scorer, and of "the longer one wins" (in characters), on pairs of
    tldr_valid_gpt4_judged.jsonl.gz.
    """
    groups = [[row["chosen"], row["rejected"]] for row in rows]
    pairs = [[(0, 1)]] * len(rows)
    lengths = [list(map(len, group)) for group in groups]
    prompts = [row["prompt"] for row in rows]
    found = {name: accuracy(scorer.scores(prompts, groups, f"GPT-4, {name}"), pairs)
             for name, scorer in scorers.items()}
    return found | {"the longer one": accuracy(lengths, pairs)}


def written_by(folder: str, prompts: list[str], stage, temperatures: dict[str, float]
               ) -> dict[str, Summaries]:
    """A policy's summaries of the prompts, by the name of the temperature."""
    parent = Parent("model", folder)
    policy, tokenizer = load_policy(parent).to(world().device), parent.tokenizer
    ids = prompt_tokens(tokenizer, prompts, stage.max_prompt_tokens)
    return {name: summarise(policy, tokenizer, ids, stage, temperature, f"{folder}, {name}")
            for name, temperature in temperatures.items()}


def kl_to(folder: str, prompts: list[str], sampled: Summaries, stage) -> float:
    """KL of sampled summaries' policy to the policy in the folder, in nats a summary."""
    parent = Parent("model", folder)
    policy, tokenizer = load_policy(parent).to(world().device), parent.tokenizer

    def summed(groups):
        return response_logprobs(policy.eval(), groups, stage.temperature).sum(1)  # padding is 0

    ids = prompt_tokens(tokenizer, prompts, stage.max_prompt_tokens)
    reference = measure_groups(summed, tokenizer, ids, [[tokens] for tokens in sampled.tokens],
                               stage.eval_batch_size, policy.device, "KL")
    return fmean(sum(mine) - theirs for mine, [theirs] in zip(sampled.logprobs, reference, strict=True))


def compared(ours: Summaries, theirs: Summaries, scores: list[list[float]], seed: int) -> dict[str, float]:
    """How often ours beats theirs, a tie being half a win; at equal length; and the mean scores.

    Args:
        scores: (posts, 2), of ours and theirs.
    """
    mine, other = map(list, zip(*scores, strict=True))
    lengths = [list(map(len, summaries.tokens)) for summaries in (ours, theirs)]
    rate, low, high = win_rate(mine, other, range(len(mine)), seed)
    equal, equal_low, equal_high = at_equal_length(mine, other, *lengths, seed)
    return {"win_rate": rate, "low": low, "high": high, "ties": fmean(a == b for a, b in scores),
            "equal": equal, "equal_low": equal_low, "equal_high": equal_high,
            "score": fmean(mine), "score_before": fmean(other),
            "tokens": fmean(lengths[0]), "tokens_before": fmean(lengths[1]),
            "ended": fmean(ours.ended), "ended_before": fmean(theirs.ended)}


def at_equal_length(ours, theirs, our_lengths, their_lengths, seed: int) -> tuple[float, float, float]:
    """The win rate if both were equally long, and its 95 % bootstrap interval over posts."""
    columns = np.array([ours, theirs, our_lengths, their_lengths], dtype=float)  # (4, posts)
    drawn = np.random.default_rng(seed).integers(columns.shape[1], size=(RESAMPLES, columns.shape[1]))
    rates = [length_controlled_win_rate(*columns[:, posts]) for posts in drawn]
    return (length_controlled_win_rate(*columns), *map(float, np.quantile(rates, [0.025, 0.975])))
