"""The gold judge of the embedded data: what it asks for, what it reports, and that other data never meets it.

The gold score itself is tested with the data that it belongs to, in tests/data/test_tldr_mini.py.
"""

import json
import math
from types import SimpleNamespace

import pytest

from utils.config import UserError
from utils.judge.evaluation import Summaries
from utils.judge.gold import GoldJudge, labeller_figures, load_rules, refuse_missing_facts, table_rows
from utils.judge.metrics import length_controlled_win_rate

RULES = {"slots": {"who": {"weight": 1.0, "values": ["my sister", "my brother"]}}, "need_words": 5,
         "penalties": {"extra_word": 0.1, "repeated_trigram": 0.1, "repeated_trigram_cap": 0.2,
                       "no_proper_end": 0.2}}
RIGHT, WRONG, NOTHING = "My sister.", "My brother.", "Nobody."  # 1, -1 and 0 where the fact is my sister
POSTS = [SimpleNamespace(prompt=prompt, facts={"who": "my sister"}) for prompt in "pqr"]


@pytest.fixture
def rules(tmp_path):
    (tmp_path / "gold.json").write_text(json.dumps(RULES))
    return str(tmp_path / "gold.json")


def written(texts, lengths=(1, 1, 1), ended=(True, True, True)):
    return Summaries([[5] * length for length in lengths], list(texts), list(ended), [])


def test_each_summary_is_held_against_the_facts_of_its_own_post(rules):
    """A summary that was cut off pays for its missing end, once."""
    posts = [*POSTS[:2], SimpleNamespace(prompt="p", facts={"who": "my brother"})]
    judge = GoldJudge(rules, posts)
    assert judge.scores(posts, written([RIGHT, WRONG, WRONG])) == [1.0, -1.0, 1.0]
    cut = written([RIGHT] * 3, ended=[False, True, True])
    assert judge.scores(posts, cut) == pytest.approx([0.8, 1.0, -1.0])


def test_figures_of_two_policies_by_hand(rules):
    """Sampled: a tie, a win, a tie. Greedy: three wins. Only of the sampled ones are lengths looked at."""
    lengths = {"before": [3, 5, 4], "after": [2, 9, 7]}
    figures = GoldJudge(rules, POSTS).compare(POSTS, {
        ("before", "sampled"): written([RIGHT, NOTHING, NOTHING], lengths["before"]),
        ("after", "sampled"): written([RIGHT, RIGHT, NOTHING], lengths["after"]),
        ("before", "greedy"): written([NOTHING] * 3), ("after", "greedy"): written([RIGHT] * 3),
    }, seed=0)
    low, high = figures.pop("gold_win_rate_low"), figures.pop("gold_win_rate_high")
    controlled = length_controlled_win_rate([1, 1, 0], [1, 0, 0], lengths["after"], lengths["before"])
    assert figures == pytest.approx({
        "gold_before": 1 / 3, "gold_after": 2 / 3, "gold_win_rate": 2 / 3, "gold_win_rate_greedy": 1.0,
        "gold_win_rate_length_controlled": controlled})
    assert 0.5 <= low < 2 / 3 < high <= 1  # of ties and wins alone
    assert controlled != pytest.approx(2 / 3, abs=0.01), "the test wants lengths that matter"


def test_rows_of_one_post_do_not_narrow_the_win_rate(rules):
    """Each post stands in five rows, as where it has five references."""
    def interval(times):
        posts = POSTS * times
        before, after = written([RIGHT, NOTHING, NOTHING] * times), written([RIGHT, RIGHT, NOTHING] * times)
        before, after = (w._replace(tokens=[[5]] * 3 * times, ended=[True] * 3 * times) for w in (before,
                                                                                                 after))
        figures = GoldJudge(rules, posts).compare(posts, {
            (name, kind): which for name, which in (("before", before), ("after", after))
            for kind in ("sampled", "greedy")}, seed=0)
        return [figures[f"gold_win_rate{end}"] for end in ("", "_low", "_high")]
    assert interval(5) == pytest.approx(interval(1))


def test_the_table_has_rows_for_what_is_known_of_a_stage():
    gold = {"gold_before": 0.5, "gold_after": 0.75, "gold_win_rate": 0.8, "gold_win_rate_low": 0.7,
            "gold_win_rate_high": 0.9, "gold_win_rate_length_controlled": 0.725, "gold_win_rate_greedy": 0.85}
    reward = {"accuracy": 0.6, "label_ceiling": 0.8}
    assert list(table_rows(reward)) == [("  of the labels' ceiling", "", "75%", "")]
    assert list(table_rows(gold)) == [
        ("gold score", "0.500", "0.750", ""),
        ("gold win rate over SFT, sampled", "", "0.800", "0.700 - 0.900"),
        ("  at equal length", "", "0.725", ""),
        ("gold win rate over SFT, greedy", "", "0.850", "")]
    assert list(table_rows({"accuracy": 0.6, "score_after": 1.0, "kl": 2.0})) == []


def test_a_known_labeller_has_a_ceiling_and_a_curve():
    """Differences of ln 3, 0, -ln 3: the labeller is right with 3/4, 1/2, 3/4; the model is, is not, is."""
    rows = {"label_scores": [[math.log(3), 0.0, 0.0], [0.0, math.log(3)]],
            "pairs": [[(0, 1), (1, 2)], [(0, 1)]]}
    figures, curves = labeller_figures(rows, [[2.0, 0.0, 1.0], [5.0, 0.0]])
    assert figures == {"label_ceiling": pytest.approx((0.75 + 0.5 + 0.75) / 3)}
    assert curves == {"labeller's confidence": [(0.5, 0.0, 1), (pytest.approx(0.75), 1.0, 2)]}


@pytest.mark.parametrize("label_scores", [[None, None], [[1.0, 0.0], None]])
def test_of_an_unknown_labeller_nothing_is_said(label_scores):
    rows = {"label_scores": label_scores, "pairs": [[(0, 1)]] * 2}
    assert labeller_figures(rows, [[1.0, 0.0]] * 2) == ({}, {})


# ------------------------------------------------------------------------------------------ rules and facts


def test_rules_of_the_gold_score_are_read(rules):
    assert load_rules(rules)["need_words"] == 5


def changed(slot=None, **more):
    """RULES with one slot's keys, or keys of its own, changed."""
    slots = {name: spec | (slot or {}) for name, spec in RULES["slots"].items()}
    return {**RULES, "slots": slots, **more}


ODD_NUMBERS = [
    *(changed(slot={"weight": weight}) for weight in ("0.5", None, True, [1], float("nan"), float("inf"))),
    *(changed(penalties={**RULES["penalties"], name: "0.1"}) for name in RULES["penalties"]),
    changed(need_words="5"), changed(slot={"values": "Anna"}), changed(slot={"values": []}),
    changed(slot={"values": [5]}),
]


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "[]", '{"slots": {"who": {}}}', '{"slots": {}}',
                                  json.dumps({**RULES, "penalties": {}}),
                                  json.dumps({**RULES, "need_words": "five"}),
                                  *map(json.dumps, ODD_NUMBERS)])
def test_rules_that_are_none_are_refused_before_they_are_needed(text, tmp_path):
    (tmp_path / "gold.json").write_text(text)
    with pytest.raises(UserError, match="^gold_rules: .* holds no rules of a gold score"):
        load_rules(str(tmp_path / "gold.json"))
    with pytest.raises(UserError, match="^gold_rules: .* does not exist"):
        load_rules(str(tmp_path / "none.json"))


@pytest.mark.parametrize("facts", [None, "my sister", {}, {"when": "today"}, {"who": 3}, ["who"]])
def test_a_row_without_the_facts_is_refused(facts, rules):
    complete = SimpleNamespace(prompt="p", facts={"who": "my sister", "when": "today"})
    refuse_missing_facts(RULES, [complete])
    bad = [complete, SimpleNamespace(prompt="p", facts=facts)]
    for refuse in (lambda: refuse_missing_facts(RULES, bad), lambda: GoldJudge(rules, bad)):
        with pytest.raises(UserError, match="^gold_rules: .* no column 'facts' with a text for 'who'"):
            refuse()
