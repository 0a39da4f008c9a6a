"""What ratings say: agreement between raters and with oneself, how often each policy wins, what came when.

Pure functions of the rows of `utils.data.ratings.rated_rows`. Every interval is one of 95 % in which prompts
are the unit: what is said of the answers to one prompt is not independent.

Two orders of the same two answers agree by 1 when they are the same (two ties are), by 0 when they are
opposite, and by one half when only one of them is a tie. Who orders at random without ties agrees by 0.5.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from statistics import NormalDist

import numpy as np

from utils.judge.metrics import bootstrap_interval, each_tail

_RESAMPLES = 1000
_MOST_POINTS = 500  # of a curve
_WINDOW = 20  # rankings of a moving mean
_RIDGE = 1e-6  # keeps strengths finite where a policy always wins


def look(rows: list[dict], scores: Mapping[tuple[str, str], float] | None = None) -> dict:
    """Everything that the page shows of the ratings, for JSON.

    Args:
        rows: all ratings that count, oldest first.
        scores: the reward model's score of each (prompt, completion) that it has looked at.

    Returns:
        `raters`: `name`, `rated`, `self` (agreement with oneself) of each; `agreement` between raters;
        `policies`: see `policy_win_rates`; `reward_model`: how often it orders a pair as the rater did;
        `reward_curve`: see `reward_model_curve`; `curve`: [Unix time, ratings so far];
        `kinds`: how many of each, and of edits. A share is {rate, low,
        high, pairs}, or None where nothing can be compared.
    """
    raters = Counter(row["rater"] for row in rows)
    kinds = Counter(row["kind"] for row in rows)
    return {
        "raters": [{"name": name, "rated": count,
                    "self": self_agreement([row for row in rows if row["rater"] == name])}
                   for name, count in raters.most_common()],
        "agreement": rater_agreement(rows),
        "policies": policy_win_rates(rows),
        "reward_model": reward_model_agreement(rows, scores or {}),
        "reward_curve": reward_model_curve(rows, scores or {}),
        "curve": curve(rows),
        "kinds": {kind: kinds[kind] for kind in ("ranking", "all_bad", "skip")}
                 | {"edits": sum(row["better"] is not None for row in rows)},
    }


def curve(rows: list[dict]) -> list[list[float]]:
    """[Unix time, ratings so far] of at most `_MOST_POINTS` of the ratings, the last one among them."""
    step = -(-len(rows) // _MOST_POINTS) or 1
    return [[row["time"], count] for count, row in enumerate(rows, start=1)
            if count % step == 0 or count == len(rows)]


# -------------------------------------------------------------------------------------------------- agreement


def self_agreement(rows: list[dict]) -> dict | None:
    """How far the raters agree with themselves on tasks that were repeated."""
    rankings = {row["task"]: row for row in rows if row["ranks"] is not None}
    repeated = [row for row in rankings.values() if row["repeat_of"] in rankings]
    return _share((row["prompt"], agreed) for row in repeated
                  for agreed in _agreements(rankings[row["repeat_of"]], row))


def rater_agreement(rows: list[dict]) -> dict | None:
    """How far two raters agree on prompts that both have ranked, each time the first ranking of each."""
    by_prompt: dict[str, dict[str, dict]] = defaultdict(dict)
    for row in rows:
        if row["ranks"] is not None:
            by_prompt[row["prompt"]].setdefault(row["rater"], row)
    return _share((prompt, agreed) for prompt, of_raters in by_prompt.items()
                  for first, second in itertools.combinations(of_raters.values(), 2)
                  for agreed in _agreements(first, second))


def reward_model_agreement(rows: list[dict], scores: Mapping[tuple[str, str], float]) -> dict | None:
    """How often the reward model scores the answer higher that the rater calls better; equal scores count one
    half. What the rater calls equal says nothing here.

    Args:
        scores: of (prompt, completion). Pairs without both are left out.
    """
    return _share((row["prompt"], agreed) for row in rows for agreed in _with_reward_model(row, scores))


def reward_model_curve(rows: list[dict], scores: Mapping[tuple[str, str], float]) -> list[list[float]]:
    """How the agreement with the reward model moves: [Unix time, share of the pairs on which it agrees] over
    the last `_WINDOW` rankings, from the first full window on.
    """
    compared = [(row["time"], list(_with_reward_model(row, scores))) for row in rows]
    compared = [(time, agreed) for time, agreed in compared if agreed]
    points = []
    for last in range(_WINDOW, len(compared) + 1):
        window = [value for _, agreed in compared[last - _WINDOW:last] for value in agreed]
        points.append([compared[last - 1][0], sum(window) / len(window)])
    return points[:: -(-len(points) // _MOST_POINTS) or 1]


def _with_reward_model(row: dict, scores: Mapping[tuple[str, str], float]) -> Iterator[float]:
    """How far the reward model agrees with each pair of a ranking that it has scored, without ties."""
    known = {text: scores[row["prompt"], text] for text in row["completions"]
             if (row["prompt"], text) in scores}
    for (first, second), order in _orders(row).items():
        if order and first in known and second in known:
            yield _agreed(order, _sign(known[first] - known[second]))


def _orders(row: dict) -> dict[tuple[str, str], int]:
    """(first, second) text, in the order of the alphabet -> 1: the first is better, -1: the second, 0: a tie.

    Empty unless the row is a ranking.
    """
    ranks = sorted(zip(row["completions"], row["ranks"] or (), strict=False))
    return {(first, second): _sign(other - rank)
            for (first, rank), (second, other) in itertools.combinations(ranks, 2)}


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _agreed(order: int, other: int) -> float:
    """How far two orders of one pair agree: 0, 0.5 or 1."""
    return 1 - abs(order - other) / 2


def _agreements(first: dict, second: dict) -> Iterator[float]:
    """For each pair of answers that both rankings have."""
    others = _orders(second)
    return (_agreed(order, others[pair]) for pair, order in _orders(first).items() if pair in others)


def _share(outcomes) -> dict | None:
    """The mean of outcomes in [0, 1] with its interval.

    Args:
        outcomes: (prompt, outcome) of each pair.
    """
    prompts, values = [], []
    for prompt, value in outcomes:
        prompts.append(prompt)
        values.append(value)
    if not values:
        return None
    rate, low, high = bootstrap_interval(values, [1.0] * len(values), prompts, seed=0, resamples=_RESAMPLES)
    low, high = _widened(rate, low, high, len(set(prompts)))
    return {"rate": rate, "low": low, "high": high, "pairs": len(values)}


def _widened(rate: float, low: float, high: float, prompts: int) -> tuple[float, float]:
    """The interval; Wilson's where the prompts do not differ at all, of which drawing again shows nothing."""
    if high - low > 1e-4:
        return low, high
    z = NormalDist().inv_cdf(0.975) ** 2 / prompts
    middle, half = (rate + z / 2) / (1 + z), (z * (rate * (1 - rate) + z / 4)) ** 0.5 / (1 + z)
    return max(0.0, middle - half), min(1.0, middle + half)


# -------------------------------------------------------------------------------------------------- win rates


def policy_win_rates(rows: list[dict]) -> list[dict]:
    """How often each policy's answer is better than one of the others.

    Bradley-Terry strengths are fitted to all pairs of answers of two policies in all rankings, a tie being
    half a win for both. A policy's win rate is its chance against one of the others, taken evenly, though it
    may never have been compared with some of them. With two policies it is wins and half the ties by pairs.
    The interval is from drawing prompts again.

    Returns:
        For each policy `name`, `rankings` (in which it is compared with another policy), `win_rate`, `low`,
        `high`. The rates are None where no chain of comparisons leads to another policy.
    """
    names = sorted({name for row in rows for name in row["policies"]})
    if not names:
        return []
    wins, rankings, prompts = _wins(rows, names)
    together = _connected(wins.sum(axis=0))
    rates = _win_rates(wins.sum(axis=0)[None], together)[0]
    low = high = rates
    if len(wins):
        drawn = np.random.default_rng(0).multinomial(len(wins), [1 / len(wins)] * len(wins), size=_RESAMPLES)
        again = np.einsum("rn,nij->rij", drawn.astype(float), wins)
        tail = each_tail(0.95, len(wins))
        low, high = np.quantile(_win_rates(again, together), [tail, 1 - tail], axis=0)
    table = []
    for place, name in enumerate(names):
        known = together[place].sum() > 1
        rate = float(rates[place])
        ends = _widened(rate, float(low[place]), float(high[place]), int(prompts[place])) if known else None
        table.append({"name": name, "rankings": int(rankings[place]), "win_rate": rate if known else None,
                      "low": ends and ends[0], "high": ends and ends[1]})
    return table


def _wins(rows: list[dict], names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wins of the first policy over the second, by prompt, (N, P, P); and of each policy in how many rankings
    and on how many prompts it is compared with another one, (P,) both.
    """
    places = {name: place for place, name in enumerate(names)}
    by_prompt: dict[str, np.ndarray] = {}
    rankings = np.zeros(len(names))
    for row in rows:
        if row["ranks"] is None or len(set(row["policies"])) < 2:
            continue
        wins = by_prompt.setdefault(row["prompt"], np.zeros((len(names), len(names))))
        answers = [(rank, places[name]) for rank, name in zip(row["ranks"], row["policies"], strict=True)]
        for (rank, one), (other, two) in itertools.permutations(answers, 2):
            if one != two:
                wins[one, two] += (rank < other) + 0.5 * (rank == other)
        rankings[list({place for _, place in answers})] += 1
    stacked = np.array(list(by_prompt.values())).reshape(len(by_prompt), len(names), len(names))
    met = stacked.sum(axis=2) + stacked.sum(axis=1) > 0  # (N, P)
    return stacked, rankings, met.sum(axis=0)


def _connected(wins: np.ndarray) -> np.ndarray:
    """(P, P): whether a chain of comparisons leads from one policy to the other, or they are the same."""
    linked = wins + wins.T + np.eye(len(wins)) > 0
    for _ in range(len(wins)):
        linked = linked @ linked
    return linked


def _win_rates(wins: np.ndarray, together: np.ndarray) -> np.ndarray:
    """The chance of each policy against the mean of the others that comparisons lead to: (R, P).

    Args:
        wins: (R, P, P). together: (P, P), see `_connected`.
    """
    strengths = bradley_terry(wins)
    chances = 1 / (1 + np.exp(strengths[:, None, :] - strengths[:, :, None]))  # of the first over the second
    others = together & ~np.eye(len(together), dtype=bool)
    return (chances * others).sum(axis=2) / np.maximum(others.sum(axis=1), 1)


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Strengths that make wins the likeliest, (R, P) with mean 0: P(i beats j) = sigmoid(s_i - s_j).

    Newton's method on R problems at once; a step is at most 1 long, so that it does not overshoot.

    Args:
        wins: (R, P, P), how often the first has beaten the second; any numbers that are not negative.
    """
    count = wins.shape[-1]
    games = wins + wins.transpose(0, 2, 1)
    won, ridge = wins.sum(axis=2), _RIDGE * np.maximum(games.sum(axis=(1, 2)), 1)[:, None]
    strengths = np.zeros(wins.shape[:2])
    for _ in range(100):
        chances = 1 / (1 + np.exp(strengths[:, None, :] - strengths[:, :, None]))
        gradient = won - (games * chances).sum(axis=2) - ridge * strengths
        weights = games * chances * (1 - chances)
        diagonal = weights.sum(axis=2) + ridge
        hessian = diagonal[:, :, None] * np.eye(count) - weights
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        strengths += step / np.maximum(np.abs(step).max(axis=1, keepdims=True, initial=0.0), 1)
        if np.abs(step).max(initial=0.0) < 1e-8:
            break
    return strengths - strengths.mean(axis=1, keepdims=True)
