"""Looking at a set before training: its counts are those of a count by hand, and what is written loads again
to the same.
"""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

import prepare_data
from hub_layouts import COMPARED, PROMPTS, SUPERVISED, openai_axis, rows_of, stories, write
from rated import TALK, database, rank_all
from real_posts import data_folder
from utils.config import PROJECT, UserError, parse_config
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, load_rankings

TOKENIZER = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
COUNT = 5


def prepare(data, out=None, *words):
    """The real script's `main`; the figures it wrote."""
    words = ["--data", data, *(["--output_dir", str(out)] if out else []), *words]
    prepare_data.main(parse_config(prepare_data.PrepareConfig, None, words))
    return json.loads((out / "data.json").read_text()) if out else None


def examples(path):
    return [(row.prompt, row.completion, row.facts) for row in load_examples(str(path), "rlhf_training_data",
                                                                             False)]


def rankings(path, cap=9):
    return [row._replace(pairs=[tuple(pair) for pair in row.pairs])
            for row in load_rankings(str(path), "reward_training_data", cap, print)]


def tokens(text):
    return len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


# -------------------------------------------------------------------------------------- what a set looks like


@pytest.mark.parametrize("name", [*SUPERVISED, "prompt alone", "messages without an answer"])
def test_examples_are_counted_and_load_again_to_the_same(name, tmp_path, capsys):
    layout = (SUPERVISED | PROMPTS)[name]
    data = write(tmp_path, rows_of(layout, COUNT))
    figures = prepare(data, tmp_path / "out")
    copies = list(map(layout, stories(COUNT)))
    assert figures["key"] == ("actor_training_data" if name in SUPERVISED else "rlhf_training_data")
    assert (figures["sources"][0]["read"], figures["rows"], figures["rejected"],
            figures["prompts_cut"]) == (COUNT, COUNT, 0, 0)
    sizes = [1 + tokens(copy.prompt) for copy in copies]  # a BOS in front
    assert (figures["prompt_tokens"]["mean"] == pytest.approx(sum(sizes) / COUNT)
            and figures["prompt_tokens"]["max"] == max(sizes))
    meant = [(copy.prompt, copy.completion, None) for copy in copies]
    assert examples(tmp_path / "out" / "rows.jsonl") == examples(data) == meant
    printed = capsys.readouterr().out
    assert f"{COUNT} read, 0 rejected" in printed
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "out" / "rejected_rows.jsonl").exists()


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_are_counted_and_load_again_to_the_same(name, tmp_path):
    data = write(tmp_path, rows_of(COMPARED[name], COUNT))
    figures = prepare(data, tmp_path / "out")
    copies = list(map(COMPARED[name], stories(COUNT)))
    pairs = [(copy.prompt, *pair) for copy in copies for pair in copy.pairs]
    texts = {(prompt, text) for prompt, *both in pairs for text in both}
    assert figures["key"] == "reward_training_data"
    assert figures["sources"][0]["read"] == sum(len(copy.rows) for copy in copies)
    groups = figures["groups"]
    assert (groups["posts"], groups["groups"], groups["contradictions"]) == (COUNT, COUNT, 0)
    assert (groups["completions_per_post"] == len(texts) / COUNT and groups["pairs_per_post"] == len(pairs)
            / COUNT)
    # with a BOS in front of a prompt and an EOS behind a completion
    grouped = sum(1 + tokens(copy.prompt) for copy in copies) + sum(1 + tokens(text) for _, text in texts)
    apart = sum(2 * (1 + tokens(prompt)) + tokens(better) + tokens(worse) + 2
                for prompt, better, worse in pairs)
    assert (groups["tokens_grouped"], groups["tokens_ungrouped"]) == (grouped, apart)
    assert rankings(tmp_path / "out" / "rows.jsonl") == rankings(data)


def test_ratings_are_counted_and_load_again_to_the_same(tmp_path):
    data = write(tmp_path, rows_of(openai_axis, COUNT))
    figures = prepare(data, tmp_path / "out")
    assert (figures["key"] == "rating_data" and figures["rows"] == COUNT and figures["sources"][0]["read"]
            == 4 * COUNT)
    assert figures["sources"][0]["dropped"]["no overall rating"]["rows"] == COUNT
    limits = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**6, max_dropped_share=1.0)
    for path in (data, str(tmp_path / "out" / "rows.jsonl")):
        named = {"rating_data": NamedSet(path, "ratings")}
        found = load_data(limits, named, None, DataReport())["rating_data"]
        assert [(row.prompt, row.completions, row.label_scores) for row in found] == [
            (openai_axis(story).prompt, [f" {text}" for text in story.summaries[:2]], [5.5, 3])
            for story in stories(COUNT)]


def pair(better, worse, prompt="P", **more):
    return {"prompt": prompt, "chosen": better, "rejected": worse, **more}


def test_bad_and_dropped_rows_are_counted_with_their_reasons(tmp_path, capsys):
    rows = [pair("a", "b"), {"prompt": "P", "chosen": "a"}, pair("a", "a"), pair("", "b"), pair("b", "a"),
            pair(3, "b"),
            pair("a", "c", "Q")]
    data = write(tmp_path, rows)
    figures = prepare(data, tmp_path / "out")
    source = figures["sources"][0]
    assert (source["read"], source["rejected"], figures["rejected"], figures["rows"]) == (7, 2, 2, 2)
    assert ({reason: found["rows"] for reason, found in source["dropped"].items()}
            == {"equal answers": 1, "an empty answer": 1})
    assert figures["groups"]["contradictions"] == 1
    rejected = [json.loads(line)
                for line in (tmp_path / "out" / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(row["place"], row["row"]) for row in rejected] == [(f"{data}:2", rows[1]),
                                                                (f"{data}:6", rows[5])]
    printed = capsys.readouterr().out
    assert f"rejected: {data}:2: has columns" in printed and f"rejected: {data}:6: column 'chosen'" in printed
    assert "1 pairs labelled both ways" in printed


def test_what_is_written_holds_contradictions_notes_and_groups_of_any_size(tmp_path):
    letters = "abcdefgh"
    rows = [pair(x, y, confidence=n, batch="b")
            for n, (x, y) in enumerate(zip(letters, letters[1:], strict=False))]
    data = write(tmp_path, [*rows, pair("b", "a"), pair("x", "y", "Q"), pair("a", "b")])
    prepare(data, tmp_path / "out", "--max_completions", "3")
    for cap in (2, 3, 9):
        assert rankings(tmp_path / "out" / "rows.jsonl", cap) == rankings(data, cap)


def test_rankings_keep_ties_scores_and_their_order(tmp_path):
    rows = [{"prompt": "P", "completions": list("dcba"), "ranks": [2, 2, 7, 1],
             "label_scores": [1, 1, 0.5, 3]},
            {"prompt": "Q", "completions": list("abcdef")}, {"prompt": "R", "completions": ["a", "b"]}]
    data = write(tmp_path, rows)
    prepare(data, tmp_path / "out", "--max_completions", "2")
    for cap in (2, 9):
        assert rankings(tmp_path / "out" / "rows.jsonl", cap) == rankings(data, cap)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "load"), [
    ("reddit_tldr.jsonl.gz", examples), ("hh_rlhf/harmless-base_test.jsonl.gz", rankings)])
def test_real_rows_load_again_to_the_same(name, load, tmp_path):
    folder = data_folder()
    if folder is None or not (folder / name).exists():
        pytest.skip(f"no {name}; set TLDR_DATA_DIR to the folder that holds it")
    prepare(str(folder / name), tmp_path / "out")
    assert load(tmp_path / "out" / "rows.jsonl") == load(folder / name)


def test_prompts_that_are_cut_are_counted(tmp_path):
    """The mini tokenizer makes at least a token of a word."""
    post = {"subreddit": "tea", "title": "t", "summary": "s"}
    rows = [{**post, "post": "\n".join(["some words."] * lines)} for lines in (1, 2, 90)]
    figures = prepare(write(tmp_path, rows), tmp_path / "out", "--max_prompt_tokens", "64")
    assert (figures["rows"], figures["prompts_cut"]) == (3, 1) and figures["prompt_tokens"]["max"] <= 64


@pytest.mark.parametrize("text", ["Why is tea green?\n\nAsk me.", "naïve ☕ 日本 \N{GRINNING FACE}!", "a  b",
                                  " "])
def test_pieces_are_the_text_and_one_for_each_token(text):
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    found = prepare_data.pieces(TOKENIZER, ids)
    assert "".join(found) == TOKENIZER.decode(ids) == text
    assert all(found) and "\ufffd" not in "".join(found) and len(found) <= len(ids)
    if text.isascii():
        assert [TOKENIZER.decode([token]) for token in ids] == found


def test_a_row_is_shown_with_the_borders_of_its_tokens(tmp_path, capsys):
    prepare(write(tmp_path, [{"prompt": "Tea or\ncoffee?", "completion": "Tea."}]))
    ids = TOKENIZER("Tea or\ncoffee?")["input_ids"], TOKENIZER(" Tea.", add_special_tokens=False)["input_ids"]
    prompt, completion = ("│".join(TOKENIZER.decode([token]) for token in part).replace("\n", "\\n")
                          for part in ids)
    printed = capsys.readouterr().out
    assert f"prompt: {prompt}\n" in printed and f"completion: {completion}│</s>\n" in printed


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    data = write(tmp_path, rows_of(COMPARED["ranking"], 2))
    monkeypatch.chdir(tmp_path)
    prepare(data)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# --------------------------------------------------------------------------------------------------- mistakes


def used(folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")


MISTAKES = {
    "no set": (None, [], "data: name a data set"),
    "no rows that are known": ([{"text": "a"}], ["--data", "rows.jsonl"],
                               "data: 'rows.jsonl' has no row of a known layout"),
    "nothing that can be used": ([{"prompt": "", "completion": "c"}], ["--data", "rows.jsonl"],
                                 "data: 'rows.jsonl' holds no usable row; the first is rows.jsonl:1: column "
                                 "'prompt' is empty"),
    "no model": ([{"prompt": "P"}], ["--data", "rows.jsonl", "--model", "no/where"], "model: "),
    "a used folder": ([{"prompt": "P"}], ["--data", "rows.jsonl"],
                      "output_dir: 'out' is in use; name a new one"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_leaves_nothing_behind(case, tmp_path, monkeypatch):
    rows, words, expected = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    if rows:
        write(tmp_path, rows)
    if case == "a used folder":
        used(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"^{expected}"):
        prepare_data.main(parse_config(prepare_data.PrepareConfig, None, [*words, "--output_dir", "out"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    data = write(tmp_path, [{"prompt": "P"}])

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare_data, "plot_lengths", fail)
    with pytest.raises(OSError, match="No space"):
        prepare(data, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_database_of_ratings_loads_again_to_the_same(tmp_path):
    ratings = database(tmp_path / "r.db", ["a", TALK, "b"], ("old", "new"))
    rank_all(ratings, "Ann")
    figures = prepare(str(tmp_path / "r.db"), tmp_path / "out")
    assert figures["key"] == "reward_training_data" and figures["rows"] == 3
    assert rankings(tmp_path / "out/rows.jsonl") == rankings(tmp_path / "r.db")


def test_a_ranking_keeps_who_ranked_and_who_wrote(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"prompt": "P", "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "policies": ["x", "y", "z"],
           "worker": "Ann"}
    path.write_text(json.dumps(row) + "\n")
    prepare(str(path), tmp_path / "out")

    def noted(name):
        [group] = rankings(name)
        return {(group.prompt, group.completions[better], group.completions[worse]): note
                for (better, worse), note in zip(group.pairs, group.notes, strict=True)}

    assert noted(tmp_path / "out/rows.jsonl") == noted(path) and len(noted(path)) == 2
