"""The rewards of a PPO run, and the one score that they make of an answer.

    score of an answer = sum over the rewards of weight x clip((score of the reward - length part) / scale)

The length part is 0 without `length_control`. Shapes: N answers of this rank, E rewards. NaN in a tensor
(N, E) stands for an answer that a reward does not score; it then adds nothing to the sum.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor

from utils.config import UserError
from utils.data.layouts import Example
from utils.data.rows import Rows, Tokenised
from utils.distributed import on_all, world
from utils.judge.evaluation import Summaries, measure_groups
from utils.models.parents import Parent, task_of
from utils.rewards.answers import Answers, answers_of
from utils.rewards.entries import (
    Entry,
    JudgeEntry,
    ModelEntry,
    PythonEntry,
    UrlEntry,
    entries_of,
)
from utils.rewards.length import length_fit
from utils.rewards.model import ModelReward, RenderedReward
from utils.rewards.python import PythonReward
from utils.rewards.rules import RuleReward
from utils.rewards.service import JudgeReward, ServiceReward, UrlReward
from utils.rollouts.episodes import Episodes

_KINDS = {PythonEntry: PythonReward, UrlEntry: UrlReward, JudgeEntry: JudgeReward}  # RuleReward: all others


class Scores(NamedTuple):
    """What summaries of held-out posts score: of each post one number."""

    total: list[float]
    by_reward: dict[str, list[float]]  # as the reward gave it; NaN: not scored
    listed: bool = True  # whether the rewards' means say more than that of the total

    def means(self, called: str) -> dict[str, float]:
        """The mean of each reward, under `called.format(its name)`; none of a single one that is the total.
        """
        if not self.listed:
            return {}
        return {called.format(name): torch.tensor(values).nanmean().item()
                for name, values in self.by_reward.items()}


class Asked(NamedTuple):
    """What text rewards are asked in an update."""

    answers: Answers | None  # of this rank; None: no reward reads text
    replies: dict[str, Future]  # of services, by the reward's name: the scores of these answers


class Rewards:
    """The rewards of a run, in the order of its configuration.

    Attributes:
        scales: of the rewards with `scale: std`, by name; the first `judge` fills it.
        length_fits: of the rewards with `length_control`, by name; `fit_lengths` fills it.
    """

    def __init__(self, rewards: Sequence, tokenizer=None, guard: ModelReward | None = None):
        self.rewards, self.tokenizer = list(rewards), tokenizer
        self.scales, self.length_fits = {}, {}
        self.guard = guard  # it scores held-out answers only

    @property
    def names(self) -> list[str]:
        return [reward.entry.name for reward in self.rewards]

    @property
    def of_models(self) -> list[ModelReward]:
        """The rewards that are a model."""
        return [reward for reward in self.rewards if isinstance(reward, ModelReward)]

    @property
    def all_models(self) -> list[ModelReward]:
        """Those and, before them, the guard."""
        return [*([self.guard] if self.guard else []), *self.of_models]

    @property
    def first_model(self) -> ModelReward | None:
        """The reward model that a separate value model starts from; None: none reads the policy's tokens."""
        return next((reward for reward in self.of_models if not reward.reads_text), None)

    @property
    def models(self) -> list[torch.nn.Module]:
        """The loaded reward models, which nothing trains."""
        return [reward.model for reward in self.all_models]

    @property
    def parents(self) -> list[Parent]:
        """The reward models' folders or hub names."""
        return [reward.parent for reward in self.all_models]

    def ask(self, episodes: Episodes, rows: Sequence[Example]) -> Asked:
        """Send this rank's episodes to the services among the rewards, and wait for none.

        Args:
            rows: those of the prompts, K episodes for each.
        """
        if not any(reward.reads_text for reward in self.rewards):
            return Asked(None, {})
        answers = answers_of(rows, episodes.responses, episodes.ended.tolist(), self.tokenizer)
        services = [reward for reward in self.rewards if isinstance(reward, ServiceReward)]
        pool = ThreadPoolExecutor(max(len(services), 1))
        replies = {reward.entry.name: pool.submit(reward.of_answers, answers) for reward in services}
        pool.shutdown(wait=False)  # its threads end when they have answered
        return Asked(answers, replies)

    def score(self, episodes: Episodes, asked: Asked, update: int) -> tuple[Tensor, dict]:
        """What this rank's episodes score in an update, float32 (N,); and metrics over all ranks, by name.

        Raises:
            UserError: on every rank, when a reward fails on one.
        """
        columns = []
        for reward in self.rewards:
            if not reward.reads_text:
                columns.append(episodes.measure(reward.measure))
                continue
            reply = asked.replies.get(reward.entry.name)
            scores = scored_texts(reward, asked.answers) if reply is None else on_all(reply.result)
            columns.append(torch.tensor(_numbers(scores)).to(episodes.ended.device))
        columns = torch.stack(columns, 1)
        lengths = episodes.response_mask.sum(1)
        figures = reward_figures(columns, lengths, self.names)
        warmups = [min(1.0, update / max(reward.entry.warmup_updates, 1)) for reward in self.rewards]
        return self._summed(columns, lengths, warmups), figures

    def judge(self, posts: Tokenised, written: list[Summaries], tokenizer, batch_size: int,
              title: str = "") -> list[Scores]:
        """What summaries of held-out posts score, for each of `written`.

        The summaries of one post are one prompt group; the posts are shared out over the ranks.
        """
        columns, lengths = _measured(self.rewards, posts, written, tokenizer, batch_size, title)
        for reward, column in zip(self.rewards, columns.unbind(-1), strict=True):
            if reward.entry.scale == "std":
                controlled = column - self.length_part(reward.entry, lengths)
                self.scales.setdefault(reward.entry.name, _deviation(controlled))
        listed = len(self.rewards) > 1 or self.rewards[0].entry.length_control
        return [Scores(self._summed(of_policy, tokens, [1.0] * len(self.rewards)).tolist(),
                       dict(zip(self.names, of_policy.T.tolist(), strict=True)), listed)
                for of_policy, tokens in zip(columns, lengths, strict=True)]

    def fit_lengths(self, posts: Tokenised, written: list[Summaries], tokenizer, batch_size: int,
                    title: str = "") -> None:
        """Fit what the rewards with `length_control` pay for length, to several summaries of each post."""
        controlled = [reward for reward in self.rewards if reward.entry.length_control]
        columns, lengths = _measured(controlled, posts, written, tokenizer, batch_size, title)
        for reward, column in zip(controlled, columns.unbind(-1), strict=True):
            self.length_fits[reward.entry.name] = length_fit(column.numpy(), lengths.numpy(),
                                                             [one.ended for one in written])

    def length_part(self, entry: Entry, lengths):
        """What a reward pays answers of these lengths above or below the usual one; 0 without a fit."""
        slope, centre = self.length_fits.get(entry.name, (0.0, 0.0))
        return slope * (lengths - centre)

    def _summed(self, columns: Tensor, lengths: Tensor, warmups: list[float]) -> Tensor:
        """The weighted sum (N,) of the rewards' scores (N, E) of answers of these lengths (N,)."""
        parts = []
        for reward, warmup, column in zip(self.rewards, warmups, columns.unbind(1), strict=True):
            entry = reward.entry
            scale = self.scales.get(entry.name, 1.0) if entry.scale in (None, "std") else entry.scale
            column = (column - self.length_part(entry, lengths)) / scale
            if entry.clip is not None:
                column = column.clamp(-entry.clip, entry.clip)
            parts.append(torch.where(column.isnan(), 0.0, column * (entry.weight * warmup)))
        return sum(parts[1:], parts[0])


def _measured(rewards: Sequence, posts: Tokenised, written: list[Summaries], tokenizer, batch_size: int,
              title: str) -> tuple[Tensor, Tensor]:
    """What rewards give to summaries, as many of each post, and their lengths: (K, P, E) and (K, P)."""
    completions = [list(group) for group in zip(*(one.tokens for one in written), strict=True)]
    ended = [list(group) for group in zip(*(one.ended for one in written), strict=True)]
    columns = []  # for each reward a list for each post
    for reward in rewards:
        if reward.reads_text:
            columns.append(_shared_out(reward, posts.examples, completions, ended, tokenizer))
        else:
            columns.append(measure_groups(reward.measure, tokenizer, posts.prompts, completions, batch_size,
                                          reward.model.device, title))
    lengths = torch.tensor([list(map(len, one.tokens)) for one in written])
    return torch.tensor(columns, dtype=torch.float64).permute(2, 1, 0), lengths


def reward_figures(columns: Tensor, lengths: Tensor, names: list[str]) -> dict[str, float]:
    """Mean, standard deviation and share of unscored answers of each reward, and Pearson's correlation of
    each with the answers' lengths and with the rewards after it: over the answers of all ranks.

    Args:
        columns: (N, E), as the rewards gave them.
        lengths: (N,) in tokens.
    """
    table = torch.cat([columns.double(), lengths[:, None].double()], 1)
    if world().num_processes > 1:
        table = torch.tensor(gather_object(table.tolist()), dtype=torch.float64)
    table, names, figures = table.cpu(), [*names, "tokens"], {}
    for place, name in enumerate(names[:-1]):
        known = table[:, place][~table[:, place].isnan()]
        figures |= {f"rewards/{name}": known.mean().item(),
                    f"rewards/{name}/std": known.std(correction=0).item(),
                    f"rewards/{name}/unscored": 1 - len(known) / len(table)}
        figures |= {f"rewards/{name}/r_{other}": _correlation(table[:, place], table[:, place + 1 + further])
                    for further, other in enumerate(names[place + 1 :])}
    return figures


def _correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation over the answers that have both; NaN where one of them is the same for all."""
    both = ~(first.isnan() | second.isnan())
    if both.sum() < 2:
        return math.nan
    first, second = (x[both] - x[both].mean() for x in (first, second))
    return (first @ second / (first.norm() * second.norm())).item()


def _deviation(values: Tensor) -> float:
    """The standard deviation of numbers without NaN; 1 where all are equal, or there are none."""
    known = values[~values.isnan()]
    deviation = known.std(correction=0).item() if len(known) else 0.0
    return deviation if deviation > 0 else 1.0


def _numbers(scores: list[float | None]) -> list[float]:
    return [math.nan if score is None else score for score in scores]


# ---------------------------------------------------------------------------------------- several processes


def scored_texts(reward, answers: Answers) -> list[float | None]:
    """A reward's scores of the answers of this rank. Every rank must call it.

    With `processes: main` the first process of each node scores those of all of its node.
    """
    if getattr(reward.entry, "processes", "each") == "each" or world().num_processes == 1:
        called = answers.prompts or isinstance(reward, ModelReward)  # whose forward passes all ranks share
        return on_all(lambda: reward.of_answers(answers) if called else [])
    rank, local = world().process_index, world().local_process_index
    everything = gather_object([(rank, answers)])
    mine = [(other, theirs) for other, theirs in everything
            if rank - local <= other < rank - local + int(os.environ.get("LOCAL_WORLD_SIZE", 1))]

    def of_node() -> dict[int, list]:
        if local:
            return {}
        first, *others = [theirs for _, theirs in mine]
        scores = iter(reward.of_answers(first.joined(*others)))
        return {other: [next(scores) for _ in theirs.prompts] for other, theirs in mine}

    gathered = gather_object([on_all(of_node)])
    return next(scored[rank] for scored in gathered if rank in scored)


def _shared_out(reward, rows: Sequence[Example], completions, ended, tokenizer) -> list[list[float]]:
    """A reward's scores of the completions of each row, the rows shared out over the ranks."""
    with world().split_between_processes(list(range(len(rows)))) as mine:
        own = rows.select(mine) if isinstance(rows, Rows) else [rows[i] for i in mine]
        answers = answers_of(own, sum((completions[i] for i in mine), []),
                             sum((ended[i] for i in mine), []), tokenizer)
    scores, k = _numbers(scored_texts(reward, answers)), len(completions[0])
    return gather_object([scores[first : first + k] for first in range(0, len(scores), k)])


# -------------------------------------------------------------------------------------------------- opening


def open_rewards(config, policy: Parent) -> Rewards:
    """The rewards that a configuration names: functions are imported, no weight is loaded.

    Args:
        policy: whose tokens are scored.

    Raises:
        UserError: when there is none, or what an entry names is not there or not what it should be.
    """
    if config.rewards is None and config.reward_model is None:
        raise UserError("reward_model: nothing scores the answers; name a reward model, or rewards")
    guard = None
    if config.guard_model:
        guard = ModelReward(ModelEntry(model=config.guard_model), Parent("guard_model", config.guard_model))
    return Rewards([_opened(entry, config, policy) for entry in entries_of(config)], policy.tokenizer, guard)


def _opened(entry: Entry, config, policy: Parent):
    where = "reward_model" if config.rewards is None else f"rewards.{entry.name}"
    if not isinstance(entry, ModelEntry):
        return _KINDS.get(type(entry), RuleReward)(entry, where)
    parent = Parent(where, entry.model, entry.chat_template, stages=("reward",))
    if config.rewards is None or task_of(parent.tokenizer) == task_of(policy.tokenizer):
        return ModelReward(entry, parent)
    return RenderedReward(entry, parent, entry.max_prompt_tokens or config.max_prompt_tokens,
                          config.per_device_batch_size)
