"""Which comparisons there are, and how much work a repetition of each is."""

from typing import NamedTuple

PEERS = {"sft": ["SFTTrainer", "SFTTrainer, packed"], "reward": ["RewardTrainer"], "ppo": ["PPOTrainer"],
         "generation": ["generate"]}
UNITS = {"sft": "tokens", "reward": "pairs", "ppo": "episodes", "generation": "tokens"}
KS = {"sft": [1], "reward": [2, 4, 9], "ppo": [1, 4], "generation": [1, 4]}
# posts of a repetition: so many that the peer takes seconds, at 125m minutes. PPO takes the same 8 for each K
# (4 at 125m, for time): how much the peer pads depends on the longest of them.
POSTS = {
    "mini": {("sft", 1): 8, ("reward", 2): 16, ("reward", 4): 8, ("reward", 9): 4, ("ppo", 1): 8,
             ("ppo", 4): 8,
             ("generation", 1): 16, ("generation", 4): 8},
    "30m": {("sft", 1): 8, ("reward", 2): 8, ("reward", 4): 8, ("reward", 9): 2, ("ppo", 1): 8, ("ppo", 4): 8,
            ("generation", 1): 16, ("generation", 4): 8},
    "125m": {("sft", 1): 8, ("reward", 2): 8, ("reward", 4): 4, ("reward", 9): 1, ("ppo", 1): 8,
             ("ppo", 4): 4,
             ("generation", 1): 8, ("generation", 4): 8},
}
# measured after one that is not
REPETITIONS = {"mini": 5, "30m": 3, "125m": 2}
PPO_REPETITIONS = 3  # at most
QUICK_REPETITIONS = 2
# the least ratio that we want: (stage, peer, K), then by shape; None: every shape
GOALS = {
    ("reward", "RewardTrainer", 2): {None: 1.7},
    ("reward", "RewardTrainer", 4): {None: 8.0},
    ("reward", "RewardTrainer", 9): {None: 30.0},
    ("ppo", "PPOTrainer", 4): {"mini": 6.0, "125m": 4.0},
    ("ppo", "PPOTrainer", 1): {"mini": 3.0, "125m": 1.6},
    ("sft", "SFTTrainer", 1): {"mini": 5.0, "125m": 1.8},
    ("sft", "SFTTrainer, packed", 1): {"mini": 3.0, "125m": 1.35},
    ("generation", "generate", 4): {None: 2.5},
}


class Comparison(NamedTuple):
    """One row of the table."""

    stage: str
    shape: str
    k: int
    peer: str
    posts: int
    repetitions: int

    @property
    def goal(self) -> float | None:
        by_shape = GOALS.get((self.stage, self.peer, self.k), {})
        return by_shape.get(self.shape, by_shape.get(None))


def comparisons(stages: list[str], shapes: list[str], peers: list[str], ks: list[int],
                repetitions: int | None,
                quick: bool) -> list[Comparison]:
    """Those asked for; an empty list of peers or of K is all of them. Quick: the mini shape, and K = 4 where
    there is a K.
    """
    found = []
    for shape in ["mini"] if quick else shapes:
        for stage in stages:
            for k in [max(k for k in KS[stage] if k <= 4)] if quick else KS[stage]:
                if ks and k not in ks:
                    continue
                usual = min(REPETITIONS[shape], PPO_REPETITIONS) if stage == "ppo" else REPETITIONS[shape]
                count = repetitions or (QUICK_REPETITIONS if quick else usual)
                posts = POSTS[shape][stage, k] // (2 if quick and stage in ("sft", "ppo") else 1)
                found += [Comparison(stage, shape, k, peer, posts, count)
                          for peer in PEERS[stage] if not peers or peer in peers]
    return found
