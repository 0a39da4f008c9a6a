"""The rewards of a PPO run, and the one score that they make of an answer.

Shapes: N answers of this rank, E rewards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.config import UserError
from utils.data.rows import Tokenised
from utils.episodes import Episodes
from utils.judge.evaluation import Summaries, measure_groups
from utils.models.parents import Parent
from utils.rewards.entries import entries_of
from utils.rewards.model import ModelReward


class Rewards:
    """The rewards of a run, in the order of its configuration."""

    def __init__(self, rewards: Sequence[ModelReward]):
        self.rewards = list(rewards)

    @property
    def parents(self) -> list[Parent]:
        """The reward models' folders or hub names."""
        return [reward.parent for reward in self.rewards]

    @property
    def first_model(self) -> ModelReward:
        """The reward model that a separate value model starts from."""
        return self.rewards[0]

    @property
    def models(self) -> list[torch.nn.Module]:
        """The loaded models, which nothing trains."""
        return [reward.model for reward in self.rewards]

    def score(self, episodes: Episodes) -> tuple[Tensor, dict[str, float]]:
        """What this rank's episodes score: float32 (N,), and metrics by name."""
        columns = [reward.of_episodes(episodes) for reward in self.rewards]
        return self._summed(columns), {}

    def judge(self, posts: Tokenised, written: list[Summaries], tokenizer, batch_size: int,
              title: str = "") -> list[list[float]]:
        """What summaries of held-out posts score, a list for each of `written`.

        The summaries of one post are one prompt group; the posts are shared out over the ranks.
        """
        completions = [list(group) for group in zip(*(one.tokens for one in written), strict=True)]
        columns = []
        for reward in self.rewards:
            reward.model.eval()
            rows = measure_groups(reward.measure, tokenizer, posts.prompts, completions, batch_size,
                                  reward.model.device, title)
            columns.append(torch.tensor(rows, dtype=torch.float64))  # (posts, policies)
        return self._summed(columns).T.tolist()

    def _summed(self, columns: list[Tensor]) -> Tensor:
        """The weighted sum of the rewards' scores, in their shape and type."""
        total = columns[0] * self.rewards[0].entry.weight
        for reward, column in zip(self.rewards[1:], columns[1:], strict=True):
            total = total + column * reward.entry.weight
        return total


def open_rewards(config) -> Rewards:
    """The rewards that a configuration names; no weight is loaded.

    Raises:
        UserError: when there is none, or something that an entry names is not there.
    """
    if config.rewards is None and config.reward_model is None:
        raise UserError("reward_model: nothing scores the answers; name a reward model, or rewards")

    def parent(entry) -> Parent:
        field = "reward_model" if config.rewards is None else f"rewards.{entry.name}"
        return Parent(field, entry.model, stages=("reward",))

    return Rewards([ModelReward(entry, parent(entry)) for entry in entries_of(config)])
