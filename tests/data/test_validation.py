"""The pass over the data: every problem is found and named, nothing is kept in memory, and it is not made
twice.
"""

import json
import os
import random
import re
import threading
import tracemalloc
from collections import Counter, defaultdict
from random import Random
from types import SimpleNamespace

import datasets.config
import pytest

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import PROJECT, UserError
from utils.data import cache, validation
from utils.data.layouts import Example
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, load_rankings
from utils.data.sources import Source
from utils.data.validation import read_set, split_group
from utils.runs.run import Run

BAD = {  # a line, what is said of it
    b'{"prompt": "P", "completion": ""}': "column 'completion' is empty; text is needed",
    b'{"prompt": "P"}': "has columns prompt; the nearest layout is 'prompt, completion', which lacks "
                        "completion",
    b'{"prompt": 3, "completion": "c"}': "column 'prompt' is a number; text is needed",
    b'{"prompt": "caf\xe9", "completion": "c"}': "is not UTF-8; save the file as UTF-8 text",
    b'{"prompt": "P", "comp': "is not JSON (Unterminated string starting at column 17); one "
                              "object a line is needed",
    b'["P", "c"]': 'must be a JSON object such as {"prompt": ..., "completion": ...}',
    b'{"prompt": "\\ud83d", "completion": "c"}': "holds half of an emoji (a lone surrogate such as "
                                                 "\\ud83d); remove it",
}
GOOD = b'{"prompt": "P%d", "completion": " c"}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def write_rows(path, rows):
    return write(path, [json.dumps(row).encode() for row in rows])


def mixed(name, folder):
    """Good rows with a bad one behind each; their lines."""
    lines = [line for number, bad in enumerate(BAD) for line in (GOOD % number, bad)]
    return write(folder / name, lines), range(2, len(lines) + 1, 2)


def sft_config(folder, **more):
    more = {"actor_validation_data": None, "actor_test_data": None, "max_prompt_tokens": 64,
            "report_to": ["none"],
            "output_dir": str(folder / "run"), **more}
    return train_sft.SFTStageConfig(**more)


def splits(config):
    report = DataReport()
    return train_sft.load_splits(config, mini_tokenizer(), report), report


# --------------------------------------------------------------------------------------------------- findings


def test_every_problem_of_every_set_is_named_at_once(tmp_path):
    training, lines = mixed("training.jsonl", tmp_path)
    test = write(tmp_path / "test.jsonl", [b"{", GOOD % 99])
    with pytest.raises(UserError) as caught:
        splits(sft_config(tmp_path, actor_training_data=training, actor_test_data=test))
    first, *findings = str(caught.value).split("\n")
    assert first == f"{len(BAD) + 1} rows cannot be used; mend them, or leave them out with on_bad_rows: skip"
    assert (findings[:-1] == [f"{training}:{line}: {said}"
                              for line, said in zip(lines, BAD.values(), strict=True)])
    assert findings[-1].startswith(f"{test}:1: is not JSON")
    assert not (tmp_path / "run").exists()


def test_a_single_finding_is_one_line(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD % 1, b"{}"])
    with pytest.raises(UserError) as caught:
        load_examples(path, "actor_training_data")
    assert str(caught.value).startswith(f"{path}:2: has no columns; the nearest layout is")
    assert (str(caught.value).endswith("(or leave bad rows out: on_bad_rows: skip)")
            and "\n" not in str(caught.value))


def test_skipped_rows_are_counted_and_written_down(tmp_path):
    path, lines = mixed("rows.jsonl", tmp_path)
    config = sft_config(tmp_path, actor_training_data=path, on_bad_rows="skip")
    (train, *held), report = splits(config)
    assert (sorted(e.prompt for part in (train, *held) for e in part.examples)
            == [f"P{n}" for n in range(len(BAD))])
    Run(config, "sft", report)
    rejected = [json.loads(line)
                for line in (tmp_path / "run" / "rejected_rows.jsonl").read_text().splitlines()]
    assert [row["place"] for row in rejected] == [f"{path}:{line}" for line in lines]
    assert [row["reason"] for row in rejected] == list(BAD.values())
    assert {row["key"] for row in rejected} == {"actor_training_data"}
    assert (rejected[0]["row"] == {"prompt": "P", "completion": ""} and rejected[4]["row"]
            == '{"prompt": "P", "comp')
    log = (tmp_path / "run" / "train.log").read_text()
    assert (f"actor_training_data: left out 7 bad rows of 14 (on_bad_rows: skip), see rejected_rows.jsonl; "
            f"the first is {path}:2" in log)
    figures = json.loads((tmp_path / "run" / "data.json").read_text())["actor_training_data"]["sources"][0]
    assert (figures["read"], figures["rejected"], figures["rows"]) == (14, 7, 7)


def test_without_bad_rows_no_file_of_them_is_written(tmp_path):
    config = sft_config(tmp_path, actor_training_data=write(tmp_path / "rows.jsonl",
                                                            [GOOD % n for n in range(9)]))
    Run(config, "sft", splits(config)[1])
    assert not (tmp_path / "run" / "rejected_rows.jsonl").exists()


def test_a_set_of_bad_rows_alone_is_refused_even_when_they_are_skipped(tmp_path):
    config = sft_config(tmp_path, actor_training_data=write(tmp_path / "rows.jsonl", [b"{}"] * 3),
                        on_bad_rows="skip")
    with pytest.raises(UserError, match="^actor_training_data: '.*rows.jsonl' holds no usable row"):
        splits(config)


LONG = "SUBREDDIT: r/tea\n\nTITLE: " + "Which pot? " * 60 + "\n\nPOST: Mine leaks.\n\nTL;DR:"


@pytest.mark.parametrize(("load", "config", "key"), [
    (train_sft.load_splits, train_sft.SFTStageConfig, "actor_training_data"),
    (train_reward.load_splits, train_reward.RewardStageConfig, "reward_training_data"),
    (train_ppo.load_posts, train_ppo.PPOStageConfig, "rlhf_training_data"),
], ids=["sft", "reward", "ppo"])
def test_a_prompt_that_cannot_fit_is_a_finding_in_every_stage(load, config, key, tmp_path):
    answers = {"chosen": " a", "rejected": " b"} if key.startswith("reward") else {"completion": " a"}
    rows = [{"prompt": f"P{n}" if n != 3 else LONG, **answers} for n in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config, report = config(**{key: path}, max_prompt_tokens=64), DataReport()
    with pytest.raises(UserError, match=rf"^{path}:4: the prompt cannot fit into max_prompt_tokens=64 "
                                        rf"even without its post"):
        load(config, mini_tokenizer(), report)
    config.on_bad_rows = "skip"
    training, validation, test, *_ = load(config, mini_tokenizer(), report)
    [found] = list(report.rejected())
    assert (found["place"] == f"{path}:4"
            and found["row"]["prompt"].startswith("SUBREDDIT: r/tea\n\nTITLE: Which pot?"))
    # of PPO the training part is the prompts alone
    rows = [getattr(part, "prompts", part) for part in (training, validation, test)]
    assert sum(map(len, rows)) == 8


def test_what_a_public_set_holds_is_dropped_and_counted_with_its_lines(tmp_path):
    rows = [{"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": "P", "chosen": "a", "rejected": " a"},
            {"prompt": "P", "chosen": "", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": "a"}]
    stored = read_set(Source(write_rows(tmp_path / "a.jsonl", rows)), "reward_training_data", "rankings",
                      max_completions=9,
                      min_score_ratio=1.0, max_pairs_per_prompt=None)
    dropped = {"equal answers": {"rows": 2, "first": [2, 4]}, "an empty answer": {"rows": 1, "first": [3]}}
    content = stored.meta["content"]
    assert stored.meta == {"kind": "rankings", "content": content, "dropped": dropped,
                           "layouts": {"prompt, chosen, rejected": 4}, "read": 4, "rejected": 0, "rows": 1,
                           "unread": {}}


# --------------------------------------------------------------------------------------------------- grouping


def naive_groups(rows):
    """From the definition: the pairs of each prompt."""
    pairs = defaultdict(Counter)
    for row in rows:
        pairs[row["prompt"]][f" {row['chosen']}", f" {row['rejected']}"] += 1
    return pairs


@pytest.mark.parametrize("cap", [2, 3, 9])
def test_groups_hold_the_pairs_of_their_prompt_and_each_completion_once(cap, tmp_path):
    draw = Random(cap)
    rows = []
    for _ in range(3000):  # three batches
        chosen, rejected = draw.sample("abcdefg", 2)
        rows.append({"prompt": f"P{draw.randrange(300)}", "chosen": chosen, "rejected": rejected})
    groups = load_rankings(write_rows(tmp_path / "a.jsonl", rows), "reward_training_data", cap, print)
    found = defaultdict(Counter)
    for group in groups:
        assert len(set(group.completions)) == len(group.completions) <= cap
        found[group.prompt].update((group.completions[a], group.completions[b]) for a, b in group.pairs)
    assert found == naive_groups(rows)
    if cap == 9:
        assert (len(groups) == len(found) and [g.prompt for g in groups]
                == list(dict.fromkeys(row["prompt"] for row in rows)))


def test_a_pair_goes_into_the_first_group_that_has_room():
    assert split_group([(7, 8, 0), (7, 9, 1), (8, 9, 2), (5, 7, 3), (9, 7, 4)], 3) == [
        ([7, 8, 9], [(0, 1), (0, 2), (1, 2), (2, 0)], [0, 1, 2, 4]), ([5, 7], [(0, 1)], [3])]


def first_with_room(triples, most):
    """The definition, looking at all groups for each pair."""
    groups = []
    for better, worse, note in triples:
        group = next((group for group in groups if len({*group[0], better, worse}) <= most), None)
        if group is None:
            groups.append(group := ([], [], []))
        group[0].extend(text for text in (better, worse) if text not in group[0])
        group[1].append((group[0].index(better), group[0].index(worse)))
        group[2].append(note)
    return groups


@pytest.mark.parametrize("most", [2, 3, 4, 9])
@pytest.mark.parametrize("texts", [3, 8, 30, 400])
def test_groups_are_those_of_the_definition(texts, most):
    draw = random.Random(texts * most)
    triples = [(*draw.sample(range(texts), 2), number) for number in range(300)]
    assert split_group(triples, most) == first_with_room(triples, most)
    ranked = [(a, b, 0) for a in range(min(texts, 20)) for b in range(a + 1, min(texts, 20))]
    assert split_group(ranked, most) == first_with_room(ranked, most)


def test_a_ranking_of_very_many_completions_is_a_bad_row(tmp_path):
    """Each with each is 5 * 10^9 pairs for a row of 1 MB."""
    row = {"prompt": "P", "completions": [f"a{n}" for n in range(100_000)]}
    path = write_rows(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="a.jsonl:1: column 'completions' has 100000 texts; at most 1000 are"):
        load_rankings(path, "reward_training_data", 9, print)


def test_rankings_of_either_kind_can_stand_in_one_file(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [
        {"prompt": "P", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "completions": ["x", "y", "z"],
                                                          "ranks": [2, 1, 2]},
        {"prompt": "P", "chosen": "c", "rejected": "b"}])
    found = [(g.prompt, g.completions, g.pairs) for g in load_rankings(path, "reward_training_data", 9,
                                                                       print)]
    assert found == [("Q", [" x", " y", " z"], [(1, 0), (1, 2)]), ("P", [" a", " b", " c"], [(0, 1), (2, 1)])]


def test_comparisons_give_each_of_their_prompts_once_to_ppo(tmp_path):
    info = {"subreddit": "tea", "title": "t", "post": "p"}
    path = write_rows(tmp_path / "a.jsonl", [
        {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Hi\n\nAssistant: b"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: c", "rejected": "\n\nHuman: Hi\n\nAssistant: d"},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: c", "rejected": "\n\nHuman: Ho\n\nAssistant: d"},
        {"info": info, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 0},
        {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1},
        {"prompt": "P", "completions": ["a", "b"]},
        {"prompt": "P"},
    ])
    found = load_examples(path, "rlhf_training_data", need_completion=False)
    assert [e.prompt for e in found if "completions" not in e] == [
        "Human: Hi\n\nAssistant:", "SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", "Why?", "P", "P"]
    assert found.sets[0].meta["dropped"] == {"share no prompt": {"rows": 1, "first": [3]}}


@pytest.mark.parametrize("kind", ["examples", "rankings"])
def test_memory_does_not_grow_with_the_text(kind, tmp_path):
    path, size, count = tmp_path / "a.jsonl", 200_000, 200
    with path.open("w") as file:
        for n in range(count):
            answers = {"completion": "c"} if kind == "examples" else {"chosen": f"a{n}", "rejected": "b"}
            row = {"prompt": f"P{n} " + "word " * (size // 5), **answers}
            file.write(json.dumps(row) + "\n")
    limits = ({"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}
              if kind == "rankings" else {})
    tracemalloc.start()
    stored = read_set(Source(str(path)), "data", kind, **limits)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert stored.table.num_rows == count and stored.row(count - 1).prompt.startswith(f"P{count - 1} word")
    assert peak < size * count / 2


# ------------------------------------------------------------------------------------------------------ cache


def no_pass(*_):
    raise AssertionError("read again")


def test_a_second_start_reads_nothing_and_reports_the_same(tmp_path, monkeypatch):
    path, _ = mixed("rows.jsonl", tmp_path)
    config = sft_config(tmp_path, actor_training_data=path, on_bad_rows="skip")
    (train, *_), first = splits(config)
    monkeypatch.setattr(validation, "_build", no_pass)
    monkeypatch.setattr("utils.data.tokens._build", no_pass)
    (again, *_), second = splits(config)
    assert list(again.examples) == list(train.examples) and list(again.prompts) == list(train.prompts)
    assert second.notes == first.notes and list(second.rejected()) == list(first.rejected())
    config.on_bad_rows = "error"
    with pytest.raises(UserError, match="^7 rows cannot be used"):
        splits(config)


def test_content_counts_and_not_the_name(tmp_path, monkeypatch):
    content = [GOOD % 1, b"{}"]
    first = write(tmp_path / "a.jsonl", content)
    with pytest.raises(UserError, match=f"^{first}:2: "):
        load_examples(first, "x")
    with monkeypatch.context() as patch:
        patch.setattr(validation, "_build", no_pass)
        moved = write(tmp_path / "b.jsonl", content)
        with pytest.raises(UserError, match=f"^{moved}:2: "):
            load_examples(moved, "x")
        with pytest.raises(AssertionError, match="read again"):  # other keys that matter
            load_examples(moved, "x", need_completion=False)
    write(tmp_path / "a.jsonl", [GOOD % 2])
    assert list(load_examples(first, "x")) == [Example("P2", " c", None)]


def test_the_ending_counts_too(tmp_path):
    """It says how the bytes are read: the same ones are other rows, or none, under another ending."""
    content = [b"[", GOOD % 1 + b",", GOOD % 2, b"]"]
    assert [row.prompt for row in load_examples(write(tmp_path / "a.json", content), "x")] == ["P1", "P2"]
    for name, said in (("a.jsonl", "is not JSON"), ("a.csv", "has columns "),
                       ("a.parquet", "is not a complete Parquet file"),
                       ("a.txt", "is not a file of rows; its name must end with one of"),
                       ("a", "is not a file of rows")):
        with pytest.raises(UserError, match=said):
            load_examples(write(tmp_path / name, content), "x")
    same = b'{"prompt": "P3"}'  # a row of JSON, and the header of a CSV file
    assert ([row.prompt for row in load_examples(write(tmp_path / "b.jsonl", [same]), "x",
                                                 need_completion=False)] == ["P3"])
    with pytest.raises(UserError, match="is empty; it needs rows"):
        load_examples(write(tmp_path / "b.csv", [same]), "x", need_completion=False)


def test_other_code_does_not_find_what_older_code_made(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [GOOD % 1])
    load_examples(path, "x")
    monkeypatch.setattr(cache, "_code", lambda: "other")
    monkeypatch.setattr(validation, "_build", no_pass)
    with pytest.raises(AssertionError, match="read again"):
        load_examples(path, "x")


def imported(name, found):
    """The modules of this folder that one of them imports, directly or not; `cache` decides nothing."""
    code = (PROJECT / "scripts" / "utils" / "data" / f"{name}.py").read_text()
    for other in re.findall(r"^from utils\.data\.(\w+) import", code, re.MULTILINE):
        if other not in {*found, "cache"}:
            found.add(other)
            imported(other, found)
    return found


def test_all_code_that_decides_what_a_row_becomes_counts():
    """What an edited module made before is not used."""
    assert set(cache._CODE) == imported("validation", {"validation"}) | imported("tokens", {"tokens"})


def test_a_pass_that_is_broken_off_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [GOOD % 1])
    monkeypatch.setattr(validation, "_Examples", no_pass)
    with pytest.raises(AssertionError):
        load_examples(path, "x")
    assert list(cache.cache_folder().iterdir()) == []


def test_a_result_gets_its_name_when_it_is_whole():
    made = []

    def build(folder):
        (folder / "a").write_text("half")
        made.append(folder.stat().st_ino)
        assert [path.stat().st_ino for path in cache.cache_folder().iterdir()] == made and "." in folder.name
        (folder / "a").write_text("whole")

    found = cache.cached("rows", [1], build)
    assert (found.stat().st_ino == made[0] and "." not in found.name and list(cache.cache_folder().iterdir())
            == [found])
    assert cache.cached("rows", [1], build) == found and len(made) == 1


@pytest.mark.parametrize("umask", [0o022, 0o007, 0o077])
def test_who_may_read_a_result_is_for_the_umask_to_say(umask):
    before = os.umask(umask)
    try:
        found = cache.cached("rows", [umask], lambda folder: (folder / "a").write_text("x"))
    finally:
        os.umask(before)
    for path in (cache.cache_folder(), found):
        assert path.stat().st_mode & 0o777 == 0o777 & ~umask
    assert (found / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_two_at_once_make_the_same(tmp_path):
    made, both = [], threading.Barrier(2)

    def build(folder):
        (folder / "a").write_text("x" * 1000)
        both.wait(10)  # neither is there yet

    threads = [threading.Thread(target=lambda: made.append(cache.cached("rows", [1], build)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made[0] == made[1] and {p.name for p in made[0].iterdir()} == {"a", "checksums.json"}
    assert list(cache.cache_folder().iterdir()) == [made[0]]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="^HF_DATASETS_CACHE: '.*' cannot be written to"):
        load_examples(write(tmp_path / "a.jsonl", [GOOD % 1]), "x")


def test_only_arrow_and_json_are_kept(tmp_path):
    splits(sft_config(tmp_path, actor_training_data=write(tmp_path / "a.jsonl",
                                                          [GOOD % n for n in range(9)])))
    kept = {path.suffix for path in cache.cache_folder().rglob("*") if path.is_file()}
    assert kept == {".arrow", ".json", ".jsonl"}


def test_the_rows_of_a_reward_run_are_those_of_its_sets(tmp_path):
    """Tokens are looked up by row: with several sets mixed, text and tokens must stay together."""
    tokenizer = mini_tokenizer()
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl",
                   [{"prompt": f"{name} {n}", "chosen": f"{name}{n} c", "rejected": "d"}
                    for n in range(5)])
    config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**6, max_dropped_share=1.0,
                             max_prompt_tokens=32)
    named = {"data": NamedSet([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "rankings")}
    limits = {"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}
    rows = load_data(config, named, tokenizer, DataReport(), limits)["data"].select([7, 2, 9])
    assert [row.prompt for row in rows] == ["b 2", "a 2", "b 4"]
    table = rows.dataset()
    for row, prompt, completions in zip(rows, table["prompt"], table["completions"], strict=True):
        assert tokenizer.decode(prompt, skip_special_tokens=True).strip() == row.prompt
        assert tokenizer.decode(completions[0][:-1]) == row.completions[0]
