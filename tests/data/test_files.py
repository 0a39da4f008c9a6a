"""Files of rows: every kind reads alike, packed or not, and what is broken is named by file and line."""

import csv
import datetime
import gzip
import io
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from utils.config import UserError
from utils.data.files import FILE_ENDINGS, BadRow, read_file
from utils.data.rows import load_examples, load_rankings
from utils.data.sources import Source, open_source

ROWS = [
    {"prompt": 'Where is it?\nShe said "here", I think; ☂', "completions": [" There.", " Here, by the door."],
     "ranks": [2, 1]},
    {"prompt": "And why\n\n,?", "completions": [" So.", " Because\nit is."], "ranks": [1, 3]},
    {"prompt": "When?", "completions": [" Now, they say.", " Then."], "ranks": [1, 2]},
]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, codec="zstd",
                                                                                  asbytes=True)}


def read_rows(name, field):
    """What a source gives: the rows with their places."""
    opened = open_source(Source(name), field)
    return [(f"{opened.label}:{number}", row) for number, row in opened.rows]


def as_jsonl(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(rows[0])
    writer.writerows([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()]
                     for row in rows)
    return text.getvalue().encode()


def as_parquet(rows):
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


WRITE = {".jsonl": as_jsonl, ".json": lambda rows: json.dumps(rows, indent=1).encode(), ".csv": as_csv,
         ".parquet": as_parquet}


def kind_and_pack(ending):
    packed = next((pack for pack in PACK if pack and ending.endswith(pack)), "")
    return ending.removesuffix(packed), packed


@pytest.mark.parametrize("ending", FILE_ENDINGS)
def test_every_kind_of_file_holds_the_same_rows(ending, tmp_path):
    kind, packed = kind_and_pack(ending)
    path = tmp_path / f"rows{ending}"
    path.write_bytes(PACK[packed](WRITE[kind](ROWS)))
    assert [row for _, row in read_file(path, "data")] == ROWS
    assert [number for number, _ in read_file(path, "data")] == ([2, 4, 7] if kind == ".csv" else [1, 2, 3])
    assert [group.completions for group in load_rankings(str(path), "reward_training_data", 9, print)] == [
        row["completions"] for row in ROWS]


def test_the_endings_are_all_that_is_promised():
    assert set(FILE_ENDINGS) == {kind + pack for kind in WRITE for pack in PACK}


@pytest.mark.parametrize(("name", "content"), [
    ("a.json", as_jsonl(ROWS)),  # the hub calls JSON lines so
    ("a.jsonl", b"\xef\xbb\xbf" + as_jsonl(ROWS)),
    ("a.csv", b"\xef\xbb\xbf" + as_csv(ROWS)),  # as Excel writes it
    ("a.csv", as_csv(ROWS).replace(b"\r\n", b"\n") + b"\n"),
    ("a.jsonl", b"\n" + as_jsonl(ROWS).replace(b"\n", b"\r\n") + b" \n"),
])
def test_marks_and_line_ends_of_other_programs_are_read(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert [row for _, row in read_file(tmp_path / name, "data")] == ROWS


HUB_ROWS = [
    {"history": "Why?", "human_ref_A": "So.", "human_ref_B": "Because.", "labels": 0, "score_ratio": 2.5},
    {"info": {"subreddit": "tea", "title": "t", "post": "p"}, "summaries": [{"text": "a"}, {"text": "b"}],
     "choice": 1},
]


@pytest.mark.parametrize("kind", WRITE)
@pytest.mark.parametrize("row", HUB_ROWS, ids=["SHP", "OpenAI"])
def test_comparisons_of_the_hub_are_the_same_in_every_kind_of_file(kind, row, tmp_path):
    """The second answer is the better one in both; a number of a CSV file is a number."""
    path = tmp_path / f"rows{kind}"
    path.write_bytes(WRITE[kind]([row]))
    [group] = load_rankings(str(path), "reward_training_data", 9, print, min_score_ratio=2.0)
    better, worse = (group.completions[index] for index in group.pairs[0])
    assert (better, worse) in {(" Because.", " So."), (" b", " a")}


OPTIONAL = {  # columns of a CSV file, and of the same row in JSON lines, which leaves out what is empty
    "completion": {"prompt": "P", "completion": ""},
    "label": {"prompt": "P", "label": ""},
    "summary": {"subreddit": "tea", "title": "t", "post": "p", "summary": ""},
    "facts": {"prompt": "P", "completion": "c", "facts": ""},
    "ranks": {"prompt": "P", "completions": ["a", "b"], "ranks": "", "label_scores": ""},
    "notes": {"prompt": "P", "chosen": "a", "rejected": "b", "confidence": "", "policies": "", "batch": "",
              "worker": "w"},
    "score_ratio": {"history": "P", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": ""},
}


def load_optional(case, path):
    if case in ("completion", "label", "summary", "facts"):
        return list(load_examples(path, "rlhf_training_data", need_completion=False))
    return list(load_rankings(path, "reward_training_data", 9, print, min_score_ratio=2.0))


def test_an_answer_is_not_optional(tmp_path):
    """An empty one is an answer, which is left out and counted as in any other file."""
    (tmp_path / "a.csv").write_bytes(as_csv([{"prompt": "P", "chosen": chosen, "rejected": "b"}
                                             for chosen in ("a", "")]))
    said = []
    assert len(load_rankings(str(tmp_path / "a.csv"), "reward_training_data", 9, said.append)) == 1
    assert "1 an empty answer" in said[0]


@pytest.mark.parametrize("case", OPTIONAL)
def test_an_empty_cell_of_an_optional_column_is_not_given(case, tmp_path):
    row = OPTIONAL[case]
    (tmp_path / "a.csv").write_bytes(as_csv([row]))
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{name: value for name, value in row.items()
                                                  if value != ""}]))
    given, left_out = (load_optional(case, str(tmp_path / f"a.{ending}")) for ending in ("csv", "jsonl"))
    assert given == left_out and len(given) == 1


def test_facts_may_be_dates(tmp_path):
    """Parquet has them; facts are kept as JSON, which has not."""
    facts = [{"day": datetime.date(2026, 11, 25)}, {"day": datetime.date(2026, 11, 26)}]
    (tmp_path / "a.parquet").write_bytes(as_parquet([{"prompt": "P", "completion": "c", "facts": fact}
                                                     for fact in facts]))
    found = load_examples(str(tmp_path / "a.parquet"), "actor_training_data")
    assert [example.facts for example in found] == [{"day": "2026-11-25"}, {"day": "2026-11-26"}]


def test_a_parquet_row_that_is_not_utf8_is_the_only_one_left_out(tmp_path):
    """In the second of its batches; what could be read of it is kept."""
    column = pyarrow.array([b"caf\xe9" if number == 1501 else b"c" for number in range(2000)])
    texts = pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"P{n}" for n in range(2000)],
                                               "completion": texts}),
                                tmp_path / "a.parquet")
    rows = dict(read_file(tmp_path / "a.parquet", "data"))
    assert rows.pop(1502) == BadRow("column 'completion' is not UTF-8; write it again", {"prompt": "P1501"})
    assert rows == {n + 1: {"prompt": f"P{n}", "completion": "c"} for n in range(2000) if n != 1501}


def test_a_row_is_named_by_the_line_it_begins_at(tmp_path):
    """The first two CSV rows are two and three lines long."""
    (tmp_path / "a.csv").write_bytes(as_csv(ROWS))
    assert [number for number, _ in read_file(tmp_path / "a.csv", "data")] == [2, 4, 7]


def test_a_folder_that_datasets_saved(tmp_path):
    train = datasets.Dataset.from_list(ROWS)
    train.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=train, valid=train.select([2])).save_to_disk(tmp_path / "splits")
    assert [row for _, row in read_rows(str(tmp_path / "one"), "reward_training_data")] == ROWS
    assert [row for _, row in read_rows(str(tmp_path / "splits"), "reward_training_data")] == ROWS
    assert (list(read_rows(str(tmp_path / "splits"), "reward_validation_data"))
            == [(f"{tmp_path / 'splits'}[valid]:1", ROWS[2])])
    with pytest.raises(UserError, match=r"^reward_test_data: .* has no split test or valid2 \(it "
                                        r"has train, valid\)"):
        list(read_rows(str(tmp_path / "splits"), "reward_test_data"))


WHOLE = as_jsonl([{"prompt": f"P{i * 7919}", "completion": "c"} for i in range(5000)])
PARQUET = as_parquet(ROWS)
BROKEN = {
    "zst cut off": ("a.jsonl.zst", PACK[".zst"](WHOLE)[:2000],
                    ": is not a complete .zst file; copy it again"),
    "no zst": ("a.jsonl.zst", WHOLE, ":1: is not a complete .zst file"),
    "no gzip": ("a.csv.gz", as_csv(ROWS), ":1: is not a complete .gz file"),
    "parquet cut off": ("a.parquet", PARQUET[:-9], ":1: is not a complete Parquet file"),
    "no parquet": ("a.parquet", b"prompt,completion\n", ":1: is not a complete Parquet file"),
    "parquet damaged": ("a.parquet", PARQUET[:4] + bytes(60) + PARQUET[64:],
                        ":1: is not a complete Parquet file"),
    "packed parquet cut off": ("a.parquet.gz", gzip.compress(PARQUET[:99]),
                               ":1: is not a complete Parquet file"),
    "empty parquet file": ("a.parquet", b"", ":1: is not a complete Parquet file"),
    "parquet of its first bytes": ("a.parquet", b"PAR1", ":1: is not a complete Parquet file"),
    "csv with too few cells": ("a.csv", b"prompt,completion\np,c\np\n",
                               ":3: has 1 cells, but the first line names 2 columns"),
    "csv with too many cells": ("a.csv", b"prompt,completion\np,c,d\n", ":2: has 3 cells"),
    "csv with an open quote": ("a.csv", b'prompt,completion\np,c\n"p,c\n', ":3: is not CSV"),
    "csv of a header alone": ("a.csv", b"prompt,completion\n", "' is empty; it needs rows"),
    "csv not UTF-8": ("a.csv", b"prompt,completion\np,c\np,\xff\n", ":3: is not UTF-8"),
    "csv list that is none": ("a.csv", b'prompt,completions\np,"[1, 2"\n',
                              ":2: is not JSON .*; column 'completions' needs JSON"),
    "json cut off": ("a.json", b'[{"prompt": "p"},\n {"pro',
                     ":2: is not JSON .*; a list of objects is needed"),
    "json list of texts": ("a.json", b'["p"]', ":1: must be a JSON object"),
    "json not UTF-8": ("a.json", b'[{"prompt":\n "\xff"}]', ":2: is not UTF-8"),
    "json half an emoji": ("a.json", b'[{"prompt": "a"}, {"prompt": "\\ud83d"}]',
                           ":2: holds half of an emoji"),
    "json empty list": ("a.json", b"[]", "' is empty; it needs rows"),
    "json blank": ("a.json", b" \n", "' is empty; it needs rows"),
    "another ending": ("a.xlsx", b"PK", "' is not a file of rows; its name must end with one of .jsonl, "),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line(case, tmp_path):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_examples(str(tmp_path / name), "actor_training_data", need_completion=False)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_no_data_set_is_one_line(tmp_path):
    with pytest.raises(UserError, match="^actor_training_data: .* is a folder that `datasets` did not save; "
                                        "name a file in it"):
        load_examples(str(tmp_path), "actor_training_data")
