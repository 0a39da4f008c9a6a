"""The columns of a row are read as they are meant, refused with the reason, or named as not read."""

import csv
import itertools
import json

import pytest

from utils.config import UserError
from utils.data.columns import LAYOUTS, layouts_of, listed
from utils.data.rows import load_examples, load_rankings

CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
EXAMPLE = {"prompt": "P", "completion": "c"}
PAIR = {"prompt": "P", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "P", "completions": ["a", "b"]}
POST = {"subreddit": "tea", "title": "t", "post": "p"}
SHP = {"history": "P", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def examples(folder, *rows):
    return [tuple(row)[:2] for row in load_examples(write(folder, *rows), "actor_training_data")]


def prompts(folder, *rows):
    return [tuple(row)[:2] for row in load_examples(write(folder, *rows), "rlhf_training_data", False)]


def pairs(folder, *rows, said=None):
    groups = load_rankings(write(folder, *rows), "reward_training_data", 9,
                           ([] if said is None else said).append)
    return sorted((group.prompt, group.completions[b].strip(), group.completions[w].strip())
                  for group in groups for b, w in group.pairs)


def reason(load, folder, *rows):
    with pytest.raises(UserError) as caught:
        load(folder, *rows)
    return str(caught.value)


# ------------------------------------------------------------------------------------------- order of answers


@pytest.mark.parametrize(("more", "expected"), [
    ({"scores": [1.0, 5.0]}, [("b", "a")]),  # against the order of the list
    ({"scores": [5, 1]}, [("a", "b")]),
    ({"scores": [-1, -5.5]}, [("a", "b")]),
    ({"scores": [1, 5], "ranks": [2, 1]}, [("b", "a")]),
    ({"scores": [1, 5], "ranks": None}, [("b", "a")]),
    ({"scores": None}, [("a", "b")]),
])
def test_scores_order_completions(more, expected, tmp_path):
    assert pairs(tmp_path, RANKED | more) == [("P", *pair) for pair in expected]


def test_equal_scores_make_no_pair(tmp_path):
    row = {"prompt": "P", "completions": ["a", "b", "c"], "scores": [1, 3, 3]}
    assert pairs(tmp_path, row) == [("P", "b", "a"), ("P", "c", "a")]
    assert "holds no usable comparison" in reason(pairs, tmp_path, row | {"scores": [2, 2, 2]})


def test_scores_in_csv_order_completions(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completions", "scores"], ["P", '["a", "b"]', "[1, 5]"]])
    [group] = load_rankings(str(path), "reward_training_data", 9, print)
    assert group.pairs == [(1, 0)]


@pytest.mark.parametrize("more", [
    {"scores": [1]}, {"scores": ["1", "5"]}, {"scores": [1, None]}, {"scores": [True, False]}, {"scores": 5},
    {"scores": [float("nan"), 1]},
    {"scores": [1, 5], "ranks": [1, 2]}, {"scores": [1, 1], "ranks": [1, 2]},  # two orders
    *({column: [1, 5]} for column in ("ratings", "rewards", "overall_scores", "votes", "label", "rank")),
    {"is_good": [False, True]}, {"votes": ["1", "5"]}, {"Scores": [1, 5]},
    *({column: 1} for column in ("choice", "label", "best", "preferred", "preference", "winner", "rating")),
    {"chosen": "b"}, {"rejected": "a"}, {"weight": 0.5},
])
def test_a_ranking_whose_order_is_not_certain_is_refused(more, tmp_path):
    message = reason(pairs, tmp_path, RANKED | more)
    assert all(column in message for column in more), message


GRADES = [("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
          ("chosen_rating", "rejected_rating"), ("chosen_avg_rating", "rejected_avg_rating"),
          ("reward_chosen", "reward_rejected"), ("Score_Chosen", "Score_Rejected"),
          ("rejected_rank", "chosen_rank")]  # rank 1 is the best


@pytest.mark.parametrize("names", GRADES)
def test_grades_must_not_contradict_their_pair(names, tmp_path):
    for grades, right in (((5, 1), True), ((1.0, 1.0), True), ((None, 9), True), ((1, 5), False),
                          (("1.5", "5"), False)):
        row, said = PAIR | dict(zip(names, grades, strict=True)), []
        if right:
            assert pairs(tmp_path, row, said=said) == [("P", "a", "b")]
            read = names[0] == "score_chosen" or grades[0]  # these are, for the margin
            assert read or f"that are not read: {names[1]}" in said[0]
        else:
            message = reason(pairs, tmp_path, row)
            assert f"'{names[0]}'" in message and f"'{names[1]}'" in message and "better one" in message


def test_a_margin_below_0_and_scores_against_a_label_contradict_their_pair(tmp_path):
    message = reason(pairs, tmp_path, PAIR | {"margin": -0.5})
    assert "column 'margin' (-0.5) says that the rejected answer" in message
    assert pairs(tmp_path, PAIR | {"margin": 0.5}) == [("P", "a", "b")]
    assert "column 'labels' is 1" in reason(pairs, tmp_path, SHP | {"score_A": 1, "score_B": 2})
    assert "column 'labels' is 0" in reason(pairs, tmp_path, SHP | {"labels": 0, "score_A": 2, "score_B": 1})
    assert pairs(tmp_path, SHP | {"score_A": 2, "score_B": 2}) == [("P", "a", "b")]


@pytest.mark.parametrize("column", ["label", "labels", "choice", "preferred", "winner", "swapped", "weight",
                                    "ranks"])
def test_what_may_turn_a_pair_round_is_refused(column, tmp_path):
    assert f"{column}" in reason(pairs, tmp_path, PAIR | {column: 0})


# -------------------------------------------------------------------------------- wanted and unwanted answers


@pytest.mark.parametrize("label", [True, False, 0, 1, 0.0, "false"])
@pytest.mark.parametrize("row", [EXAMPLE, {"messages": CHAT}])
def test_answers_with_a_label_are_no_supervised_data(row, label, tmp_path):
    message = reason(examples, tmp_path, row | {"label": label})
    assert "column 'label' beside the answer says whether it is wanted" in message
    prompt = "P" if "prompt" in row else "Human: Q\n\nAssistant:"
    assert prompts(tmp_path, row | {"label": label}, row | {"label": label}) == [(prompt, None)]


@pytest.mark.parametrize("label", ["true", "False", " 0", "1"])
def test_a_mark_is_no_answer(label, tmp_path):
    assert "which marks an answer and is none" in reason(examples, tmp_path, {"prompt": "P", "label": label})
    assert prompts(tmp_path, {"prompt": "P", "label": label}) == [("P", None)]


def marked(prompt, answer, label):
    return {"prompt": prompt, "completion": answer, "label": label}


def test_both_labels_for_a_prompt_are_comparisons(tmp_path):
    rows = [marked("P", "good", True), marked("Q", "alone", True), marked("P", "bad", False),
            marked("P", "worse", 0), marked("P", "fine", "true"), marked("R", "no", False),
            marked("S", "same", True), marked("S", "same", False)]
    said = []
    assert pairs(tmp_path, *rows, said=said) == [("P", good, bad) for good in ("fine", "good")
                                                 for bad in ("bad", "worse")]
    assert "dropped 4 of the 8 rows" in said[-1] and "2 no unwanted answer to the same prompt" in said[-1]
    chat = [{"messages": [CHAT[0], {"role": "assistant", "content": text}], "label": label}
            for text, label in (("good", True), ("bad", False))]
    assert pairs(tmp_path, *chat) == [("Human: Q\n\nAssistant:", "good", "bad")]
    assert "column 'label' is 'maybe'" in reason(pairs, tmp_path, marked("P", "a", "maybe"))


# ---------------------------------------------------------------------------------------------- other columns

ASKS = {"system_prompt": "Be brief.", "input": "2 + 2", "context": "C", "history": [["Hi", "Hello"]],
        "functions": [{"name": "search"}], "images": ["a.png"], "image": {"bytes": "x"}}
ASKS_BESIDE_TEXT = {"system": "Be brief.", "tools": [{"name": "search"}]}  # read beside messages
JUDGES = {"rank": 4, "ranks": [1], "rating": 1, "weight": 0, "preferred": False, "choice": 1, "chosen": "a",
          "rejected": "a", "reward": -1.0, "is_correct": False, "Label": False}


@pytest.mark.parametrize("column", ASKS)
@pytest.mark.parametrize(("load", "row"), [(examples, EXAMPLE), (examples, {"messages": CHAT}), (pairs, PAIR),
                                           (pairs, RANKED), (prompts, {"prompt": "P"}), (prompts, PAIR)])
def test_a_part_of_the_question_is_refused_and_an_empty_one_is_nothing(load, row, column, tmp_path):
    message = reason(load, tmp_path, row | {column: ASKS[column]})
    assert f"column '{column}' is a part of what is asked" in message
    for empty in (None, "", [], {}):
        assert load(tmp_path, row | {column: empty}) == load(tmp_path, row)


@pytest.mark.parametrize("column", ASKS_BESIDE_TEXT)
@pytest.mark.parametrize(("load", "row"), [(examples, EXAMPLE), (pairs, PAIR), (pairs, RANKED),
                                           (prompts, PAIR), (prompts, RANKED)])
def test_instructions_and_tools_beside_a_text_are_refused(load, row, column, tmp_path):
    message = reason(load, tmp_path, row | {column: ASKS_BESIDE_TEXT[column]})
    assert f"column '{column}' is a part of what is asked" in message


@pytest.mark.parametrize("column", JUDGES)
@pytest.mark.parametrize("row", [EXAMPLE, {"messages": CHAT}, {**POST, "summary": "s"}])
def test_what_says_that_an_answer_is_bad_is_refused_by_sft(row, column, tmp_path):
    row = row | {column: JUDGES[column]}
    assert f"column '{column}' says how good an answer is" in reason(examples, tmp_path, row)
    assert len(prompts(tmp_path, row)) == 1, "PPO needs the prompt only"


def test_a_weight_of_1_is_nothing(tmp_path):
    for weight in (1, 1.0, "1", "1.0"):
        assert examples(tmp_path, EXAMPLE | {"weight": weight}) == [("P", " c")]


def test_what_is_not_read_is_named_once(tmp_path):
    rows = [PAIR | {"id": 1, "chosen_score": 5}, PAIR | {"id": 2, "date": "today"}, PAIR | {"date": None}]
    said = []
    pairs(tmp_path, *rows, said=said)
    assert said == [f"reward_training_data: columns of '{tmp_path}/rows.jsonl' that are not read: "
                    "chosen_score, date, id"]
    loaded = load_rankings(write(tmp_path, *rows), "reward_training_data", 9, print)
    assert loaded.sets[0].meta["unread"] == {"id": 2, "chosen_score": 1, "date": 1}
    assert pairs(tmp_path, PAIR, said=said) and len(said) == 1, "nothing to name, nothing said"


def test_names_of_columns_are_short_and_printable():
    assert listed(["b", "a"]) == "a, b"
    assert listed(["a\nb", "\x1b[31m", "x" * 1000]) == f"\\x1b[31m, a\\nb, {'x' * 40}..."
    assert listed(map(str, range(10, 40))).endswith("20, 21 and 18 more")


# ------------------------------------------------------------------------------------------------ two layouts


@pytest.mark.parametrize(("load", "row", "names"), [
    (examples, {"messages": CHAT} | EXAMPLE, ("messages", "prompt, completion")),
    (examples, {"messages": CHAT, "prompt": "P"}, ("messages", "prompt")),
    (examples, {"messages": CHAT} | PAIR, ("messages", "prompt, chosen, rejected")),
    (examples, EXAMPLE | PAIR, ("prompt, completion", "prompt, chosen, rejected")),
    (examples, EXAMPLE | POST, ("prompt, completion", "subreddit, title, post")),
    (pairs, EXAMPLE | PAIR, ("prompt, completion", "prompt, chosen, rejected")),
    (pairs, RANKED | PAIR, ("prompt, completions", "prompt, chosen, rejected")),
    (pairs, SHP | PAIR, ("history, human_ref_A, human_ref_B, labels", "prompt, chosen, rejected")),
    (pairs, PAIR | {"messages": CHAT}, ("messages", "prompt, chosen, rejected")),
    (prompts, {"messages": CHAT, "prompt": "P"}, ("messages", "prompt")),
    (prompts, SHP | {"prompt": "P"}, ("prompt", "history, human_ref_A, human_ref_B")),
    (prompts, POST | {"prompt": "P"}, ("prompt", "subreddit, title, post")),
])
def test_a_row_that_fits_two_layouts_is_refused_with_both(load, row, names, tmp_path):
    for columns in (row, dict(reversed(row.items()))):
        message = reason(load, tmp_path, columns)
        assert all(f"'{name}'" in message for name in names), message


@pytest.mark.parametrize(("one", "other"), itertools.combinations(LAYOUTS, 2))
def test_columns_of_two_layouts_are_those_of_one_only_if_it_holds_the_other(one, other):
    """Property: no layout is preferred in silence."""
    fits = layouts_of({*one.needs, *other.needs})
    if len(fits) == 1:
        assert {*one.needs, *other.needs} <= fits[0].columns


def test_an_empty_column_counts_as_missing(tmp_path):
    """As in a table of rows with different layouts."""
    nothing = dict.fromkeys(("messages", "chosen", "rejected", "completions", "label", "info", "tools"))
    assert examples(tmp_path, nothing | EXAMPLE, nothing | {"messages": CHAT}) == [
        ("P", " c"), ("Human: Q\n\nAssistant:", " A")]
    assert pairs(tmp_path, nothing | {"completion": None} | PAIR) == [("P", "a", "b")]


# --------------------------------------------------------------------------------------------------- messages


def test_instructions_and_parts_of_text_are_read(tmp_path):
    def turns(*turns):
        return {"messages": [{"role": role, "content": content} for role, content in turns]}

    question, answer = ("user", "Q"), ("assistant", "A")
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    for empty in ("", None, " \n", [], [{"type": "text", "text": ""}]):
        found = examples(tmp_path, turns(("system", empty), question, answer))
        assert found == [("Human: Q\n\nAssistant:", " A")]
    for role in ("system", "developer"):
        assert examples(tmp_path, turns((role, "Be kind."), question, answer)) == [
            ("System: Be kind.\n\nHuman: Q\n\nAssistant:", " A")]
    assert examples(tmp_path, turns(("user", parts), ("assistant", parts))) == [
        ("Human: one\ntwo\n\nAssistant:", " one\ntwo")]


# ------------------------------------------------------------------------------------------ PPO needs prompts

ASKED = "Human: Q\n\nAssistant:"
UNUSABLE = [  # rows whose answers are of no use to anybody, and their prompt
    (EXAMPLE | {"completion": ""}, "P"), (EXAMPLE | {"completion": 5}, "P"),
    (EXAMPLE | {"completion": None}, "P"), (EXAMPLE | {"completion": ["c"]}, "P"),
    ({"prompt": "P", "label": 3}, "P"),
    (PAIR | {"chosen": 1}, "P"), (PAIR | {"rejected": "a"}, "P"),
    (PAIR | {"chosen": "", "rejected": None}, "P"), ({"prompt": "P", "chosen": "a"}, "P"),
    (PAIR | {"score_chosen": 1, "score_rejected": 2}, "P"),
    (PAIR | {"chosen": CHAT, "rejected": CHAT}, "P"), (PAIR | EXAMPLE, "P"),
    (RANKED | {"completions": ["a"]}, "P"), (RANKED | {"completions": ["a", "a"]}, "P"),
    (RANKED | {"completions": "a"}, "P"), (RANKED | {"ranks": [1]}, "P"), (RANKED | {"ranks": [1, 1]}, "P"),
    (SHP | {"labels": 7}, "P"), (SHP | {"human_ref_A": 5}, "P"),
    ({"info": {"article": "P"}, "summaries": "none", "choice": 9}, "P\n\nTL;DR:"),
    ({"info": {"article": "P"}, "summaries": []}, "P\n\nTL;DR:"),
    ({"info": {"article": "P"}, "summary": "none"}, "P\n\nTL;DR:"),
    ({**POST, "summary": 5}, "SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"),
    ({"messages": [CHAT[0], {"role": "assistant", "content": ""}]}, ASKED),
    ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, ASKED),
    ({"messages": [CHAT[0]]}, ASKED),
]


@pytest.mark.parametrize(("row", "prompt"), UNUSABLE)
def test_ppo_takes_the_prompt_whatever_the_answers_are(row, prompt, tmp_path):
    [(found, completion)] = prompts(tmp_path, row)
    assert found == prompt and completion in (None, " c")


# -------------------------------------------------------------------------------- who ranked, and who wrote


def notes(folder, row, most=9):
    """(better, worse) -> what is known of the pair, whatever groups it stands in."""
    groups = load_rankings(write(folder, row), "reward_training_data", most, print)
    return {(group.completions[b].strip(), group.completions[w].strip()): note
            for group in groups for (b, w), note in zip(group.pairs, group.notes or (), strict=True)}


@pytest.mark.parametrize("most", [9, 2])  # 2: the group is split
def test_each_pair_of_a_ranking_has_its_own_notes(most, tmp_path):
    row = {"prompt": "P", "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "policies": ["new", "old", "1"],
           "worker": "Ann", "confidence": 3, "batch": None}
    common = {"worker": "Ann", "confidence": "3"}
    assert notes(tmp_path, row, most) == {("b", "a"): common | {"policies": "new and old"},
                                          ("b", "c"): common | {"policies": "1 and old"}}
    assert notes(tmp_path, {"prompt": "P", "completions": ["a", "b"], "worker": "w"}) == {
        ("a", "b"): {"worker": "w"}}


@pytest.mark.parametrize("policies", ["new and old", ["new"], ["new", 1], ["new", None], 3])
def test_policies_of_a_ranking_are_one_name_for_each_completion(policies, tmp_path):
    assert "column 'policies' must name one for each of the 2 completions" in reason(
        pairs, tmp_path, RANKED | {"policies": policies})


def test_policies_of_a_ranking_in_csv(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completions", "policies"], ["P", '["a", "b"]', '["x", "y"]']])
    [group] = load_rankings(str(path), "reward_training_data", 9, print)
    assert group.notes == [{"policies": "x and y"}]


def test_a_ranking_of_answers_in_a_conversation(tmp_path):
    row = {"prompt": CHAT[:1], "completions": ["a", "b"], "tools": [{"name": "f"}]}
    [[prompt, *_]] = pairs(tmp_path, row)
    assert [[prompt, None]] == [list(one) for one in prompts(tmp_path, row)]
    assert [[prompt, None]] == [list(one) for one in prompts(
        tmp_path, {"messages": CHAT[:1], "tools": [{"name": "f"}]})]
