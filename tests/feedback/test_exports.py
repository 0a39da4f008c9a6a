"""Exports: what our own reader takes back, and what other programs' formats ask for."""

import json

import datasets
import pytest

from rated import TALK, database, next_task, rank_all, rate
from utils.data.rows import load_examples, load_rankings
from utils.errors import UserError
from utils.feedback.exports import (
    FORMATS,
    argilla,
    edits,
    export_file,
    jsonl,
    label_studio,
    label_studio_view,
)

TOOLS = "\x1e" + json.dumps([
    {"role": "tools", "content": '[{"type": "function", "function": {"name": "f"}}]'},
    {"role": "user", "content": "Shade?"}])
ODD = "\u202eright to left, \U0001f9b6 a foot, <script>alert(1)</script>\u2028\x00\x0b end"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def ratings(tmp_path):
    """Three raters, ties, all kinds, edits, a conversation, tools, and text that is hard on files."""
    ratings = database(tmp_path / "r.db", ["a post", TALK, TOOLS, ODD, *(f"more {n}" for n in range(6))],
                       ("old", "new"))
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" new 0", " old 0"], [" old 1"], [" new 1"]],
         confidence=3, seconds=4.5, better=ODD)
    bob = 'Bob, "B"'
    rate(ratings, bob, next_task(ratings, bob), [[" new 1"], [" old 0", " new 0", " old 1"]],
         better="In two\nlines.")
    rate(ratings, "Ann", next_task(ratings, "Ann"), [[" new 1"], [" old 1"], [" old 0"], [" new 0"]])
    rank_all(ratings, "Ann", key=lambda text: text[-1], repeat_share=0.5)
    rate(ratings, "Cem", next_task(ratings, "Cem", overlap_share=1.0), kind="skip")
    rate(ratings, "Cem", next_task(ratings, "Cem", overlap_share=1.0), kind="all_bad", better="Mine.")
    rate(ratings, "Cem", next_task(ratings, "Cem", overlap_share=1.0),
         [[" new 0", " new 1", " old 0", " old 1"]])  # ties alone
    return ratings


def labels(value):
    """Every compared pair with what is known of it, whatever groups they stand in."""
    return sorted((group.prompt, group.completions[better], group.completions[worse], sorted(note.items()))
                  for group in load_rankings(value, "reward_training_data", 9, print)
                  for (better, worse), note in zip(group.pairs, group.notes, strict=True))


def written(tmp_path, name, rows):
    function, ending, _ = FORMATS[name]
    path = tmp_path / f"{name}.{ending}"
    path.write_text("".join(function(rows)), encoding="utf-8", newline="")
    return path


def test_our_own_reader_takes_the_same_rankings_back(ratings, tmp_path):
    path = written(tmp_path, "jsonl", ratings.rated())
    assert labels(str(path)) == labels(str(tmp_path / "r.db"))
    assert any(row["repeat_of"] for row in ratings.rated())  # a repetition is among them


def test_our_own_reader_takes_the_same_edits_back(ratings, tmp_path):
    path = written(tmp_path, "edits", ratings.rated())
    key = "centring_data"  # takes edits alone; actor_training_data also takes the best answers
    in_file, in_database = ([tuple(example)[:2] for example in load_examples(str(name), key)]
                            for name in (path, tmp_path / "r.db"))
    assert in_file == in_database and len(in_file) == 3


def test_prompts_of_an_export_are_prompts_for_ppo(ratings, tmp_path):
    rows = ratings.rated()
    path = written(tmp_path, "jsonl", rows)
    prompts = [example.prompt for example in load_examples(str(path), "rlhf_training_data", False)]
    in_database = [example.prompt for example in
                   load_examples(str(tmp_path / "r.db"), "rlhf_training_data", False)]
    assert len(prompts) == len(set(prompts)) and set(prompts) <= set(in_database)


def test_every_ranking_is_one_line_with_rater_time_and_policies(ratings):
    rows = ratings.rated()
    lines = "".join(jsonl(rows)).split("\n")
    assert lines.pop() == "" and len(lines) == sum(row["kind"] == "ranking" for row in rows)
    first = json.loads(lines[0])
    assert (first["worker"], first["confidence"], first["id"]) == ("Ann", 3, 1)
    ranks = dict(zip(first["completions"], first["ranks"], strict=True))
    assert ranks == {" new 0": 1, " old 0": 1, " old 1": 3, " new 1": 4}
    assert all(text[1:4] == policy for text, policy in
               zip(first["completions"], first["policies"], strict=True))
    assert first["time"].endswith("+00:00") and first["time"].startswith(first["batch"])


def test_argilla_records(ratings):
    """As `Record.from_dict` of Argilla 2 takes them: plain values as metadata, one suggestion a question."""
    rows = [row for row in ratings.rated() if row["kind"] == "ranking"]
    records = json.loads("".join(argilla(rows)))
    assert len({record["id"] for record in records}) == len(rows)
    for record, row in zip(records, rows, strict=True):
        assert set(record) == {"id", "fields", "metadata", "suggestions", "responses", "vectors"}
        assert all(isinstance(text, str) for text in record["fields"].values())
        assert all(isinstance(value, str | int) for value in record["metadata"].values())
        ranking = record["suggestions"]["ranking"]["value"]
        assert sorted(ranking) == [f"answer_{place}" for place in range(1, 5)]
        rank_of = dict(zip(row["completions"], row["ranks"], strict=True))
        ranks = [rank_of[record["fields"][name]] for name in ranking]
        assert ranks == sorted(ranks) and json.loads(record["metadata"]["ranks"]) == row["ranks"]
    assert records[0]["suggestions"]["better"]["value"] == ODD
    assert records[1]["fields"]["prompt"] == "System: Be brief.\n\nHuman: Shade?\n\nAssistant:"


def test_label_studio_tasks(ratings):
    """A bucket for each rank: https://labelstud.io/tags/ranker.html; results name tags of the interface."""
    import xml.etree.ElementTree as xml

    rows = [row for row in ratings.rated() if row["kind"] == "ranking"]
    view = xml.fromstring(label_studio_view(4))
    tags = {tag.get("name"): tag for tag in view.iter() if tag.get("name")}
    variables = {tag.get("value")[1:] for tag in tags.values() if (tag.get("value") or "").startswith("$")}
    for task, row in zip(json.loads("".join(label_studio(rows))), rows, strict=True):
        assert variables <= set(task["data"])
        [annotation] = task["annotations"]
        for result in annotation["result"]:
            tag = tags[result["from_name"]]
            assert tag.get("toName") == result["to_name"] and tag.tag.lower() == result["type"]
        buckets = annotation["result"][0]["value"]["ranker"]
        assert set(buckets) <= set(tags)
        texts = {answer["id"]: answer["body"] for answer in task["data"]["answers"]}
        ranks = {texts[name]: int(bucket.removeprefix("rank_")) for bucket, names in buckets.items()
                 for name in names}
        assert ranks == dict(zip(row["completions"], row["ranks"], strict=True))


@pytest.mark.parametrize("layout", FORMATS)
def test_a_file_is_written_whole_from_a_database_that_is_in_use(layout, ratings, tmp_path):
    target = tmp_path / "out.json"
    target.write_text("an older one")
    export_file(tmp_path / "r.db", target, layout)
    assert target.read_text(encoding="utf-8") == "".join(FORMATS[layout][0](ratings.rated()))
    assert not list(tmp_path.glob("*.tmp"))


def test_an_export_that_cannot_be_written_is_one_line(ratings, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="export: .*cannot be written .No such file or directory"):
        export_file(tmp_path / "r.db", tmp_path / "no" / "out.jsonl", "jsonl")
    with pytest.raises(UserError, match="cannot be read .No such file or directory"):
        export_file(tmp_path / "no.db", tmp_path / "out.jsonl", "jsonl")
    assert not (tmp_path / "no.db").exists()
    (tmp_path / "out.jsonl").write_text("an older one")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.durable.os.fsync", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        export_file(tmp_path / "r.db", tmp_path / "out.jsonl", "jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "an older one" and not list(tmp_path.glob("*.tmp"))
    monkeypatch.undo()
    empty = database(tmp_path / "empty.db")
    rate(empty, "Ann", next_task(empty, "Ann"), kind="skip")
    for layout, what in (("jsonl", "ranking"), ("edits", "edited answer")):
        with pytest.raises(UserError, match=f"holds no {what} to export"):
            export_file(tmp_path / "empty.db", tmp_path / "out", layout)


def test_no_ratings_are_empty_files():
    assert ["".join(function([])) for function, _, _ in FORMATS.values()] == ["", "", "[]\n", "[]\n"]
    assert list(edits([])) == []
