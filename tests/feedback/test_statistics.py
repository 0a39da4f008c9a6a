"""What ratings say, against figures by hand, known strengths, and intervals that cover what they should."""

import numpy as np
import pytest

from utils.feedback.statistics import (
    bradley_terry,
    curve,
    look,
    policy_win_rates,
    rater_agreement,
    reward_model_agreement,
    reward_model_curve,
    self_agreement,
)


def row(ranks, prompt="p", rater="Ann", policies=None, task=1, repeat_of=None, kind="ranking", better=None,
        time=0.0, names="abcdefgh"):
    count = len(ranks) if ranks else 2
    return {"prompt": prompt, "rater": rater, "task": task, "repeat_of": repeat_of, "kind": kind,
            "ranks": ranks, "completions": list(names[:count]), "policies": policies or ["x"] * count,
            "better": better, "time": time, "confidence": None, "id": task}


def shuffled(rows, seed=0):
    """The same rankings with the answers shown in another order."""
    random, again = np.random.default_rng(seed), []
    for one in rows:
        order = random.permutation(len(one["completions"]))
        again.append(one | {name: [one[name][place] for place in order]
                            for name in ("completions", "policies", "ranks") if one[name] is not None})
    return again


# -------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize(("first", "second", "expected"), [
    ([1, 2, 3], [1, 2, 3], 1.0), ([1, 2, 3], [3, 2, 1], 0.0),
    ([1, 2, 3], [2, 1, 3], 2 / 3),  # one of three pairs is turned
    ([1, 1, 3], [1, 1, 3], 1.0),  # the same tie
    ([1, 1, 3], [1, 2, 3], (0.5 + 1 + 1) / 3), ([1, 1, 1], [1, 2, 3], 0.5),
])
def test_agreement_of_two_raters_by_hand(first, second, expected):
    rows = [row(first), row(second, rater="Bob", task=2)]
    for order in (rows, shuffled(rows), rows[::-1]):
        share = rater_agreement(order)
        assert share["rate"] == pytest.approx(expected) and share["pairs"] == 3
        assert 0 <= share["low"] <= share["rate"] <= share["high"] <= 1


def test_only_shared_prompts_and_the_first_ranking_of_each_rater_count():
    rows = [row([1, 2]), row([2, 1], task=2, repeat_of=1), row([1, 2], rater="Bob", task=3),
            row([1, 2], "other", "Cem", task=4), row(None, rater="Dan", kind="skip", task=5)]
    assert rater_agreement(rows)["pairs"] == 1 and rater_agreement(rows)["rate"] == 1.0
    assert rater_agreement(rows[:2]) is None


def test_three_raters_are_three_pairs_of_raters():
    rows = [row([1, 2]), row([1, 2], rater="Bob", task=2), row([2, 1], rater="Cem", task=3)]
    assert rater_agreement(rows)["pairs"] == 3 and rater_agreement(rows)["rate"] == pytest.approx(1 / 3)


def test_agreement_with_oneself_compares_a_task_with_its_repetition():
    rows = [row([1, 2, 3], task=1), row([2, 1, 3], task=9, repeat_of=1), row([1, 2, 3], rater="Bob", task=4),
            row([1, 2], "q", task=2), row(None, "q", kind="all_bad", task=8, repeat_of=2)]
    assert self_agreement(shuffled(rows)) | {"low": 0, "high": 1} == {
        "rate": pytest.approx(2 / 3), "low": 0, "high": 1, "pairs": 3}
    assert self_agreement(rows[2:]) is None


def test_an_interval_of_full_agreement_is_wilsons_over_prompts():
    """Six pairs of one prompt are one observation: Wilson's lower end for 1 of 1 is 1 / (1 + 1.96^2)."""
    one = rater_agreement([row([1, 2, 3, 4]), row([1, 2, 3, 4], rater="Bob")])
    assert (one["pairs"], one["high"]) == (6, 1.0)
    assert one["low"] == pytest.approx(1 / (1 + 1.959964**2), abs=1e-6)
    rows = [row([1, 2], f"p{n}", rater) for n in range(30) for rater in ("Ann", "Bob")]
    assert rater_agreement(rows)["low"] == pytest.approx(30 / (30 + 1.959964**2), abs=1e-6)


def test_pairs_of_one_prompt_do_not_narrow_the_interval():
    def width(k):
        rows = []
        for n in range(20):
            same = list(range(1, k + 1))
            rows += [row(same, f"p{n}"), row(same if n % 2 else same[::-1], f"p{n}", "Bob")]
        share = rater_agreement(rows)
        assert share["rate"] == 0.5
        return share["high"] - share["low"]

    assert width(5) == pytest.approx(width(2)) and width(2) > 0.35  # not the tenth part of it


def test_the_reward_model_is_asked_about_strict_pairs_alone():
    rows = [row([1, 2, 2]), row([2, 1], "q", rater="Bob"), row(None, "q", kind="skip")]
    scores = {("p", "a"): 2.0, ("p", "b"): 1.0, ("p", "c"): 2.0, ("q", "a"): 0.5}
    share = reward_model_agreement(shuffled(rows), scores)  # a > b right, a > c a tie of the model's
    assert (share["pairs"], share["rate"]) == (2, 0.75)
    share = reward_model_agreement(rows, scores | {("q", "b"): 0.0})  # the rater prefers b
    assert (share["pairs"], share["rate"]) == (3, 0.5)
    assert reward_model_agreement(rows, {}) is None


def test_the_curve_of_the_reward_model_is_over_the_last_twenty_rankings():
    rows = [row([1, 2], f"p{n}", time=float(n)) for n in range(22)]
    scores = {(f"p{n}", name): value for n in range(22) for name, value in
              (("a", 1.0 if n < 20 else -1.0), ("b", 0.0))}  # right 20 times, then wrong twice
    ties = [row([1, 1], "tie", time=0.5), row(None, "skipped", kind="skip", time=0.6)]
    found = reward_model_curve(sorted(rows + ties, key=lambda one: one["time"]), scores)
    assert found == [[19.0, 1.0], [20.0, 0.95], [21.0, 0.9]] and reward_model_curve(rows[:19], scores) == []


# -------------------------------------------------------------------------------------------------- win rates


def two(*ranks):
    return [row([a, b], f"p{n}", policies=["new", "old"]) for n, (a, b) in enumerate(ranks)]


def test_two_policies_by_hand():
    """3 wins, 1 tie, 1 loss of 5: 0.7, whatever the model; and it adds up to 1."""
    new, old = policy_win_rates(shuffled(two((1, 2), (1, 2), (1, 2), (1, 1), (2, 1))))
    assert (new["name"], new["rankings"], old["name"], old["rankings"]) == ("new", 5, "old", 5)
    assert new["win_rate"] == pytest.approx(0.7, abs=1e-4) and old["win_rate"] == pytest.approx(0.3, abs=1e-4)
    assert new["low"] == pytest.approx(1 - old["high"], abs=1e-3) and new["low"] < 0.7 < new["high"]


def test_answers_of_the_same_policy_are_no_game():
    rows = [row([1, 2, 3, 4], policies=["new", "old", "new", "old"])]  # new beats old in 3 of 4
    assert policy_win_rates(rows)[0]["win_rate"] == pytest.approx(0.75, abs=1e-4)
    [alone] = policy_win_rates([row([1, 2])])
    assert alone == {"name": "x", "rankings": 0, "win_rate": None, "low": None, "high": None}


def test_who_always_wins_is_not_certain():
    new, old = policy_win_rates(two(*[(1, 2)] * 10))
    assert new["win_rate"] > 0.999 and new["low"] == pytest.approx(10 / (10 + 1.959964**2), abs=2e-3)
    assert old["high"] == pytest.approx(1 - new["low"], abs=2e-3)


def test_a_chain_of_comparisons_leads_from_one_policy_to_another():
    """a beats b in 3 of 4, b beats c in 3 of 4. Odds multiply: a beats c by 9 to 1, which nobody has seen."""
    rows = [row([1, 2] if n else [2, 1], f"p{n}", policies=["a", "b"]) for n in range(4)]
    rows += [row([1, 2] if n else [2, 1], f"q{n}", policies=["b", "c"]) for n in range(4)]
    a, b, c = policy_win_rates(rows)
    assert a["win_rate"] == pytest.approx((0.75 + 0.9) / 2, abs=1e-3)
    assert (b["win_rate"], c["win_rate"]) == (pytest.approx(0.5, abs=1e-3), pytest.approx(0.175, abs=1e-3))


def test_policies_that_nothing_connects_are_not_compared():
    rows = [row([1, 2], "p", policies=["a", "b"]), row([1, 2], "q", policies=["c", "d"])]
    a, b, c, d = policy_win_rates(rows)
    assert a["win_rate"] > 0.99 and d["win_rate"] < 0.01  # against b alone, against c alone


def test_strengths_are_the_likeliest_ones():
    """An independent search: no small step from the fit makes the wins likelier."""
    random = np.random.default_rng(0)
    wins = random.integers(0, 20, (3, 4, 4)).astype(float) * (1 - np.eye(4))

    def log_likelihood(strengths, games):
        return sum(games[i, j] * -np.log1p(np.exp(strengths[j] - strengths[i]))
                   for i in range(4) for j in range(4))

    for strengths, games in zip(bradley_terry(wins), wins, strict=True):
        best = log_likelihood(strengths, games)
        for _ in range(200):
            step = random.normal(size=4) * 0.02
            assert log_likelihood(strengths + step - step.mean(), games) < best


def simulated(random, strengths, prompts, k=4, ties=0.0):
    """Rankings by a Plackett-Luce rater (its pairs are Bradley-Terry's), policies taking turns."""
    names, rows = list(strengths), []
    for n in range(prompts):
        policies = [names[(n + place) % len(names)] for place in range(k)]
        noisy = np.array([strengths[name] for name in policies]) + random.gumbel(size=k)
        rows.append(row((1 + (noisy > noisy[:, None]).sum(axis=1)).tolist(), f"p{n}", policies=policies))
    return rows


def test_intervals_cover_the_true_win_rates():
    """A standard error of 100 independent intervals is 2 %; the three of a simulation are not independent."""
    random, strengths = np.random.default_rng(1), {"a": 0.0, "b": 0.7, "c": 1.5}
    truth = {one: np.mean([1 / (1 + np.exp(strengths[other] - strengths[one]))
                           for other in strengths if other != one]) for one in strengths}
    inside = [policy["low"] <= truth[policy["name"]] <= policy["high"]
              for _ in range(100) for policy in policy_win_rates(simulated(random, strengths, 30))]
    assert 0.89 < np.mean(inside) < 0.995


def test_many_ratings_find_the_strengths():
    strengths = {"a": 0.0, "b": 0.7, "c": 1.5}
    found = policy_win_rates(simulated(np.random.default_rng(2), strengths, 3000))
    for policy in found:
        truth = np.mean([1 / (1 + np.exp(strengths[other] - strengths[policy["name"]]))
                         for other in strengths if other != policy["name"]])
        assert policy["win_rate"] == pytest.approx(truth, abs=0.02)
        assert policy["high"] - policy["low"] < 0.05


# ----------------------------------------------------------------------------------------------- all together


def test_nothing_is_said_of_no_ratings():
    assert look([]) == {"raters": [], "agreement": None, "policies": [], "reward_model": None, "curve": [],
                        "reward_curve": [],
                        "kinds": {"ranking": 0, "all_bad": 0, "skip": 0, "edits": 0}}
    only = look([row(None, kind="skip"), row(None, kind="all_bad", better="x")])
    assert only["kinds"] == {"ranking": 0, "all_bad": 1, "skip": 1, "edits": 1}
    assert only["policies"][0]["win_rate"] is None


def test_the_curve_counts_ratings_and_ends_with_the_last():
    rows = [row([1, 2], time=float(n)) for n in range(1237)]
    points = curve(rows)
    assert len(points) <= 501 and points[-1] == [1236.0, 1237]
    assert all(count == time + 1 for time, count in points)
    assert curve(rows[:3]) == [[0.0, 1], [1.0, 2], [2.0, 3]]
