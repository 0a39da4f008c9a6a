"""What is said of the data of a run: group statistics by hand, and the files that hold it."""

import json
from random import Random

import pytest

import train_reward
from tiny_models import mini_tokenizer
from utils.data.report import DataReport, group_statistics
from utils.data.rows import NamedSet, load_data
from utils.runs.run import Run

TOKENIZER = mini_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def loaded(path, max_completions=9):
    limits = {"max_completions": max_completions, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}
    named = {"data": NamedSet(path, "rankings")}
    return load_data(train_reward.RewardStageConfig(), named, TOKENIZER, DataReport(), limits)["data"]


def size(text, prompt):
    # a completion has an EOS
    return len(TOKENIZER(text, add_special_tokens=prompt)["input_ids"]) + (not prompt)


def naive(rows):
    """From the definition, row by row: a pair as two rows; and every prompt and each of its completions once.
    """
    ungrouped = sum(2 * size(row["prompt"], True) + size(f" {row['chosen']}", False)
                    + size(f" {row['rejected']}", False)
                    for row in rows)
    texts = {(row["prompt"], f" {row[column]}") for row in rows for column in ("chosen", "rejected")}
    grouped = (sum(size(prompt, True) for prompt in {prompt for prompt, _ in texts})
               + sum(size(c, False) for _, c in texts))
    pairs = {(row["prompt"], row["chosen"], row["rejected"]) for row in rows}
    return {"posts": len({row["prompt"] for row in rows}), "completions": len(texts),
            "tokens_grouped": grouped,
            "tokens_ungrouped": ungrouped, "contradictions": sum((p, b, a) in pairs for p, a, b in pairs)
            // 2}


def drawn(count):
    draw, rows = Random(0), []
    for _ in range(count):
        a, b = draw.sample(["tea", "a pot", "two pots of tea", "my sister told me", "no"], 2)
        rows.append(pair(f"I went to work {draw.randrange(count // 5)} times.", a, b))
    return rows


def test_group_statistics_are_those_of_the_definition(tmp_path):
    rows = drawn(6000)  # more than one batch of groups
    expected = naive(rows)
    posts = expected["posts"]
    found = group_statistics(loaded(write(tmp_path / "a.jsonl", rows)).dataset(), posts)
    assert posts > 1000 and expected["contradictions"] > 100
    assert ({name: found[name] for name in ("posts", "contradictions", "tokens_grouped", "tokens_ungrouped")}
            == {
        name: expected[name] for name in ("posts", "contradictions", "tokens_grouped", "tokens_ungrouped")})
    assert (found["completions_per_post"] == expected["completions"] / posts and found["pairs_per_post"]
            == 6000 / posts)
    assert (found["factor"] == expected["tokens_ungrouped"] / expected["tokens_grouped"] and found["groups"]
            == posts)


def test_group_statistics_of_four_rows_by_hand(tmp_path):
    rows = [pair("P", "a", "b"), pair("P", "b", "a"), pair("P", "a", "b"), pair("Q", "a", "b")]
    found = group_statistics(loaded(write(tmp_path / "a.jsonl", rows)).dataset(), 2)
    prompt, answer = size("P", True), size(" a", False)
    assert size("Q", True) == prompt and size(" b", False) == answer
    assert found == {"posts": 2, "groups": 2, "completions_per_post": 2.0, "pairs_per_post": 2.0,
                     "contradictions": 1,
                     "tokens_grouped": 2 * prompt + 4 * answer, "tokens_ungrouped": 8 * prompt + 8 * answer,
                     "factor": (8 * prompt + 8 * answer) / (2 * prompt + 4 * answer)}


def test_only_rows_that_are_used_count(tmp_path):
    rows = [pair(f"P{n}", "a", "b") for n in range(9)] + [pair("long " * 50, "a", "b")]
    found = loaded(write(tmp_path / "a.jsonl", rows)).select([0, 3, 5])
    report = DataReport()
    report.groups("data", found)
    report.tokens("data", found.dataset())
    assert report.figures["data"]["groups"]["posts"] == report.figures["data"]["rows"] == 3
    assert report.figures["data"]["prompt_tokens"]["max"] == size("P0", True)


def test_lengths_are_those_of_the_rows(tmp_path, monkeypatch):
    texts = ["a", "a b", "a b c d", "a b c d e f g h"]
    report = DataReport()
    report.tokens("data",
                  loaded(write(tmp_path / "a.jsonl",
                               [pair(text, "yes", "no no") for text in texts])).dataset())
    sizes = [size(text, True) for text in texts]
    assert report.figures["data"]["prompt_tokens"]["mean"] == sum(sizes) / 4
    assert report.figures["data"]["prompt_tokens"]["max"] == sizes[-1]
    assert report.figures["data"]["prompt_tokens"]["p50"] == (sizes[1] + sizes[2]) / 2
    assert (report.figures["data"]["completion_tokens"]["mean"]
            == (size(" yes", False) + size(" no no", False)) / 2)


def test_the_reward_stage_says_and_saves_how_much_groups_share(tmp_path):
    rows = drawn(100)
    config = train_reward.RewardStageConfig(reward_training_data=write(tmp_path / "a.jsonl", rows),
                                            report_to=["none"],
                                            output_dir=str(tmp_path / "run"), eval_rows=1, test_rows=1)
    report = DataReport()
    train, *_ = train_reward.load_splits(config, TOKENIZER, report)
    Run(config, "reward", report)
    saved = json.loads((tmp_path / "run" / "data.json").read_text())["reward_training_data"]
    groups = saved["groups"]
    assert groups == group_statistics(train, len(train)) and groups["posts"] == len(train) == 18
    assert saved["sources"][0]["read"] == 100
    line = (f"reward_training_data: 18 posts in 18 prompt groups, "
            f"{groups['completions_per_post']:.2f} completions and {groups['pairs_per_post']:.2f} pairs a "
            f"post, {groups['contradictions']} pairs labelled both ways; {groups['tokens_grouped']} tokens "
            f"in place of {groups['tokens_ungrouped']}, a factor of {groups['factor']:.2f}")
    assert line in (tmp_path / "run" / "train.log").read_text()


def test_a_weight_makes_no_groups(tmp_path):
    """A set that is taken three times has no more completions of a post, pairs or contradictions than when it
    is taken once.
    """
    path, found = write(tmp_path / "a.jsonl", drawn(100)), []
    for weight in (1, 3):
        report = DataReport()
        config = train_reward.RewardStageConfig(reward_training_data={"name": path, "weight": weight},
                                                eval_rows=1, test_rows=1)
        train, *_ = train_reward.load_splits(config, TOKENIZER, report)
        assert len(train) == 18 * weight
        found.append(report.figures["reward_training_data"]["groups"])
    assert found[0] == found[1] and found[0]["posts"] == found[0]["groups"] == 18


@pytest.mark.parametrize("cap", [2, 9])
def test_a_post_in_several_groups_is_one_post(cap, tmp_path):
    rows = [pair("P", a, b) for a, b in ("ab", "cd", "ac")]
    report = DataReport()
    report.groups("data", loaded(write(tmp_path / "a.jsonl", rows), max_completions=cap))
    found = report.figures["data"]["groups"]
    assert (found["posts"], found["groups"], found["pairs_per_post"]) == (1, 3 if cap == 2 else 1, 3.0)
