"""How much better the better answer is: margins of pairs, from the data to the token table."""

import json
from types import SimpleNamespace

import pytest

import prepare_data
import train_reward
from loops import TOKENIZER
from utils.config import UserError, parse_config
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_rankings

PAIR = {"prompt": "P", "chosen": "a", "rejected": "b"}
TURNS = {"chosen": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "a"}],
         "rejected": [{"role": "user", "content": "P"}, {"role": "assistant", "content": "b"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "P"}], "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"}}
HH = {"chosen": "\n\nHuman: P\n\nAssistant: a", "rejected": "\n\nHuman: P\n\nAssistant: b"}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def margins(path, most=9):
    """(better, worse) -> margins, as they are read."""
    found = {}
    for group in load_rankings(path, "reward_training_data", most, print):
        known = group.margins or [None] * len(group.pairs)
        for (better, worse), margin in zip(group.pairs, known, strict=True):
            pair = group.completions[better].strip(), group.completions[worse].strip()
            found.setdefault(pair, []).append(margin)
    return found


@pytest.mark.parametrize("row", [PAIR, TURNS, SHAREGPT, HH])
@pytest.mark.parametrize(("columns", "margin"), [
    ({"margin": 1.5}, 1.5), ({"margin": "2"}, 2.0), ({"score_chosen": 8, "score_rejected": 3.5}, 4.5),
    ({"margin": 1, "score_chosen": 8, "score_rejected": 3.5}, 1.0), ({"score_chosen": 8}, None),
    ({"margin": "significantly"}, None), ({"margin": None}, None), ({}, None), ({"margin": 0}, 0.0)])
def test_a_pair_has_the_margin_of_its_columns(row, columns, margin, tmp_path):
    assert margins(write(tmp_path, row | columns)) == {("a", "b"): [margin]}


RATED = {("a", "b"): [2.5], ("a", "c"): [4.0], ("b", "c"): [1.5]}


@pytest.mark.parametrize("rows", [
    [{"prompt": "P", "completions": ["c", "a", "b"], "scores": [1, 5, 2.5]}],
    [{"prompt": "P", "responses": ["c", "a", "b"], "scores": [1, 5, 2.5]}],
    [{"instruction": "P", "completions": [{"response": "c", "overall_score": 1},
                                          {"response": "a", "overall_score": 5},
                                          {"response": "b", "fine-grained_score": 2.5}]}],
    [{"prompt": "P", "response": answer, "helpfulness": score}
     for answer, score in (("c", 1), ("a", 5), ("b", 2.5))]])
@pytest.mark.parametrize("most", [9, 2])
def test_margins_stay_with_their_pairs_where_answers_are_rated(rows, most, tmp_path):
    """Also where the group is too large and is split."""
    assert margins(write(tmp_path, *rows), most) == RATED


def test_ranks_and_marks_are_no_scale(tmp_path):
    ranked = {"prompt": "P", "completions": ["a", "b"], "ranks": [1, 2]}
    assert margins(write(tmp_path, ranked)) == {("a", "b"): [None]}
    marked = [{"prompt": "P", "completion": text, "label": text == "a"} for text in "ab"]
    assert margins(write(tmp_path, *marked)) == {("a", "b"): [None]}


def test_labels_of_one_pair_have_each_its_margin(tmp_path):
    rows = [PAIR | {"margin": 1}, PAIR | {"margin": 3, "confidence": 2}, PAIR,
            {"prompt": "P", "chosen": "b", "rejected": "a", "margin": 0.5}]
    assert margins(write(tmp_path, *rows)) == {("a", "b"): [1.0, 3.0, None], ("b", "a"): [0.5]}


@pytest.mark.parametrize("rows", [
    [PAIR | {"margin": 1}, PAIR | {"margin": 0.1}, PAIR | {"rejected": "c"}],
    [{"prompt": "P", "completions": ["c", "a", "b", "d"], "scores": [1, 5, 2.5, 1]}]])
def test_what_prepare_data_writes_has_the_same_margins(rows, tmp_path):
    data = write(tmp_path, *rows)
    config = parse_config(prepare_data.PrepareConfig, None,
                          ["--data", data, "--output_dir", str(tmp_path / "out")])
    prepare_data.main(config)
    assert margins(str(tmp_path / "out" / "rows.jsonl")) == margins(data)


# ----------------------------------------------------------------------------------------------- margin_scale


def loaded(folder, *rows):
    config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**6, max_dropped_share=1.0,
                             max_prompt_tokens=100)
    limits = {"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}
    named = {"reward_training_data": NamedSet(write(folder, *rows), "rankings")}
    return load_data(config, named, TOKENIZER, DataReport(), limits)["reward_training_data"]


def test_margins_of_the_data_are_reported(tmp_path):
    report, rows = DataReport(), loaded(tmp_path, PAIR | {"margin": 1}, PAIR | {"margin": 3},
                                        PAIR | {"prompt": "Q", "margin": 0.5})
    assert rows.dataset()["margins"][:] == [[1.0, 3.0], [0.5]]
    report.margins("reward_training_data", rows)
    assert report.figures["reward_training_data"]["margins"] == {"min": 0.5, "mean": 1.5, "max": 3.0}
    assert report.notes == ["reward_training_data: margins of the data from 0.5 to 3, mean 1.5"]


@pytest.mark.parametrize("lacks", [[PAIR | {"prompt": "Q"}],
                                   [PAIR | {"prompt": "Q"}, PAIR | {"prompt": "Q", "margin": 2}]])
def test_a_pair_without_a_margin_is_named(lacks, tmp_path):
    rows = loaded(tmp_path, PAIR | {"margin": 1}, *lacks)
    with pytest.raises(UserError, match=rf"^margin_scale: 1 of the {1 + len(lacks)} pairs of \w+ have no "
                                        r"margin, first in the group of \S+rows.jsonl:2; give"):
        DataReport().margins("reward_training_data", rows)


def test_the_script_refuses_margin_scale_without_margins(tmp_path):
    rows = [PAIR | {"prompt": f"Which tea, {n}?"} for n in range(20)]
    words = ("--model assets/opt-mini --margin_scale 1 --max_steps 1 --report_to none --eval_rows 2 "
             f"--test_rows 2 --reward_training_data {write(tmp_path, *rows)} --output_dir {tmp_path / 'run'}")
    config = parse_config(train_reward.RewardStageConfig, None, words.split())
    with pytest.raises(UserError, match="^margin_scale: 16 of the 16 pairs of reward_training") as one:
        train_reward.main(config)
    assert "\n" not in str(one.value) and not (tmp_path / "run" / "metrics.jsonl").exists()
