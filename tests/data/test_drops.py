"""What is dropped of a data set is named with set, key and share; too much stops the run before it starts."""

import json
import re

import pytest

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import UserError
from utils.data.report import DataReport

TOKENIZER = mini_tokenizer()
SHORT, LONG = "a", " ".join("a" * 90)
STAGES = {"actor": (train_sft.load_splits, train_sft.SFTStageConfig),
          "reward": (train_reward.load_splits, train_reward.RewardStageConfig),
          "rlhf": (train_ppo.load_posts, train_ppo.PPOStageConfig)}


def size(text):
    return len(TOKENIZER(f" {text}", add_special_tokens=False)["input_ids"]) + 1  # and EOS


def write(folder, rows, name="rows"):
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def example(number, completion=SHORT):
    return {"prompt": f"P{number}", "completion": completion}


def pair(number, rejected=SHORT):
    return {"prompt": f"P{number}", "chosen": "b", "rejected": rejected}


ROWS = {"actor": example, "reward": pair, "rlhf": example}


def load(role, **keys):
    """What a stage loads, and the lines it says."""
    function, config = STAGES[role]
    report = DataReport()
    config = config(**{"max_prompt_tokens": 64, "max_completion_tokens": 20, **keys})
    return function(config, TOKENIZER, report), report


@pytest.mark.parametrize("role", ["actor", "reward"])
@pytest.mark.parametrize(("long", "most", "refused"), [
    (9, 0.2, True), (8, 0.2, False), (9, 0.23, False), (1, 0.0, True), (42, 0.9, True), (42, 1.0, False)])
def test_more_than_a_share_is_refused_with_set_key_share_and_longest(role, long, most, refused, tmp_path):
    path = write(tmp_path, [ROWS[role](n, LONG if n < long else SHORT) for n in range(43)])
    keys = {f"{role}_training_data": path, "max_dropped_share": most}
    unit = "rows" if role == "actor" else "groups"
    found = (f"{long} of the 43 {unit} of '{path}' ({long / 43:.1%})", "a completion of more than "
             f"max_completion_tokens (20); the longest has {size(LONG)}")
    if long == 42 and not refused:
        with pytest.raises(UserError, match="1 different prompts are too few to hold some out"):
            load(role, **keys)
    elif refused:
        with pytest.raises(UserError) as caught:
            load(role, **keys)
        message = str(caught.value)
        assert message.startswith(f"{role}_training_data: {found[0]} have {found[1]}; raise max_completion_")
        accepted = float(re.search(r"accept it with max_dropped_share: ([0-9.]+)$", message)[1])
        assert long / 43 <= accepted <= long / 43 + 0.01
        if long < 42:
            load(role, **keys | {"max_dropped_share": accepted})
    else:
        _, report = load(role, **keys)
        assert f"{role}_training_data: dropped {found[0]} with {found[1]}" in report.notes
        assert report.figures[f"{role}_training_data"]["completions_too_long"] == long


@pytest.mark.parametrize("seed", range(5))
def test_held_out_rows_are_drawn_from_those_that_stay(seed, tmp_path):
    """6 of 48 rows are short, as in the report of a run with one test post: all six are used."""
    rows = [example(n, SHORT if n % 8 == 0 else LONG) for n in range(48)]
    parts, report = load("actor", actor_training_data=write(tmp_path, rows), max_dropped_share=0.9, seed=seed,
                         eval_rows=1, test_rows=1)
    assert [len(part.prompts) for part in parts] == [4, 1, 1]
    assert {row.prompt for part in parts for row in part.examples} == {f"P{n}" for n in range(0, 48, 8)}
    assert all(len(tokens) == size(SHORT) for part in parts for tokens in part.completions)
    assert report.notes[-1] == (
        "actor_training_data: 4 rows; actor_validation_data: 1 row held out of actor_training_data, too few "
        "for figures that say much; actor_test_data: 1 row held out of actor_training_data, too few for "
        "figures that say much")


@pytest.mark.parametrize("key", ["actor_validation_data", "actor_test_data"])
def test_a_named_held_out_set_is_not_hollowed_out_either(key, tmp_path):
    training = write(tmp_path, [example(n) for n in range(40)])
    held = write(tmp_path, [example(n, LONG if n > 100 else SHORT) for n in range(100, 110)], "held")
    with pytest.raises(UserError, match=f"^{key}: 9 of the 10 rows of '{held}'"):
        load("actor", actor_training_data=training, **{key: held})


@pytest.mark.parametrize("key", ["centring_data", "rating_data"])
def test_the_other_sets_of_the_reward_stage_are_named_too(key, tmp_path):
    info = {"subreddit": "tea", "title": "t", "post": "p"}
    rows = {"centring_data": [example(n, LONG if n % 2 else SHORT) for n in range(9)],
            "rating_data": [{"info": {**info, "title": str(n)},
                             "summary": {"text": LONG if n % 2 else SHORT, "axes": {"overall": 3}}}
                            for n in range(9)]}
    path = write(tmp_path, rows[key], "other")
    training = write(tmp_path, [pair(n + 50) for n in range(40)])
    with pytest.raises(UserError, match=f"^{key}: 4 of the 9 .* of '{path}'"):
        load("reward", reward_training_data=training, **{key: path})


def test_the_examples_of_ptx_are_named_too(tmp_path):
    prompts = write(tmp_path, [{"prompt": f"Q{n}"} for n in range(40)], "prompts")
    path = write(tmp_path, [example(n, LONG if n % 2 else SHORT) for n in range(9)])
    keys = {"rlhf_training_data": prompts, "actor_training_data": path, "ptx_coef": 0.1}
    with pytest.raises(UserError, match=f"^actor_training_data: 4 of the 9 rows of '{path}'"):
        load("rlhf", **keys)
    posts, _ = load("rlhf", **keys, max_dropped_share=0.5)
    assert len(posts.supervised.prompts) == 5


def test_ppo_drops_no_prompt_for_a_long_completion(tmp_path):
    posts, report = load("rlhf", rlhf_training_data=write(tmp_path, [example(n, LONG) for n in range(40)]))
    assert len(posts.prompts) + len(posts.validation.prompts) + len(posts.test.prompts) == 40
    assert not any("dropped" in note for note in report.notes)


def test_each_set_of_a_mixture_counts_for_itself(tmp_path):
    good = write(tmp_path, [example(n) for n in range(90)], "good")
    bad = write(tmp_path, [example(n + 100, LONG if n < 5 else SHORT) for n in range(10)], "bad")
    with pytest.raises(UserError, match=f"^actor_training_data: 5 of the 10 rows of '{bad}'"):
        load("actor", actor_training_data=[good, {"name": bad, "weight": 2}])


@pytest.mark.parametrize(("role", "row", "why"), [
    ("reward", lambda n: pair(n, "b"), "equal answers"),
    ("reward", lambda n: pair(n, " "), "an empty answer"),
    ("reward", lambda n: {"prompt": f"P{n}", "completions": ["a", "b"], "scores": [1, 1]}, "ties alone"),
    ("rlhf", lambda n: {"chosen": f"\n\nHuman: {n}\n\nAssistant: a",
                        "rejected": "\n\nHuman: x\n\nAssistant: b"}, "share no prompt"),
])
def test_rows_that_compare_nothing_count_too(role, row, why, tmp_path):
    rows = [row(n) if n < 9 else ROWS[role](n) for n in range(40)]
    path = write(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        load(role, **{f"{role}_training_data": path})
    assert str(caught.value) == (f"{role}_training_data: 9 of the 40 rows of '{path}' are dropped (9 {why}); "
                                 "mend them, or accept it with max_dropped_share: 0.23")
    _, report = load(role, **{f"{role}_training_data": path, "max_dropped_share": 0.3})
    assert f"{role}_training_data: dropped 9 of the 40 rows of '{path}' (22.5%): 9 {why}" in report.notes


def test_what_a_key_asks_for_is_not_refused(tmp_path):
    answers = {"human_ref_A": "a", "human_ref_B": "b", "labels": 1}
    rows = [{"history": f"P{n}", **answers, "score_ratio": 1.0 + n % 2} for n in range(40)]
    _, report = load("reward", reward_training_data=write(tmp_path, rows), min_score_ratio=2.0)
    assert any("dropped 20 of the 40 rows" in note for note in report.notes)
