"""A reward model as one of the rewards of a run."""

import torch

from utils.models.outputs import scores
from utils.models.parents import Parent
from utils.rewards.entries import ModelEntry


class ModelReward:
    """A frozen reward model that reads the policy's own tokens.

    Attributes:
        model: the loaded model; `load_models` puts it here.
    """

    def __init__(self, entry: ModelEntry, parent: Parent, model=None):
        self.entry, self.parent, self.model = entry, parent, model

    def measure(self, groups) -> torch.Tensor:
        """The score of each completion of a batch of prompt groups, float32 (n,)."""
        return scores(self.model, groups)

    def of_episodes(self, episodes) -> torch.Tensor:
        """The score of each episode, float32 (N,)."""
        return episodes.measure(self.measure)
