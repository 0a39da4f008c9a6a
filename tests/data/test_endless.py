"""Files that never end, or that are few bytes on the disk and very many in memory."""

import gzip
import json
import os
import resource
import socket

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from utils.data import unpacking
from utils.data.files import BadRow, read_file
from utils.data.sources import Source, open_source
from utils.errors import UserError

GOOD = {"prompt": "P", "completion": "c"}
LINE = json.dumps(GOOD).encode() + b"\n"
HEADER = b"prompt,completion\n"
SPECIAL = {"a named pipe": os.mkfifo, "a device": lambda path: os.symlink("/dev/zero", path),
           "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(path)}


def said(path, most=1000):
    with pytest.raises(UserError) as caught:
        list(read_file(path, "data", most))
    return str(caught.value)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("ending", [".jsonl", ".json.gz", ".csv.zst", ".parquet"])
def test_what_never_ends_is_no_data(kind, ending, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    SPECIAL[kind](f"a{ending}")
    for call in (lambda: open_source(Source(f"a{ending}"), "data"),
                 lambda: list(read_file(type(tmp_path)(f"a{ending}"), "data"))):
        with pytest.raises(UserError, match=f"^a{ending}: is {kind}; a regular file is needed$"):
            call()


def test_a_folder_of_datasets_with_a_pipe_in_it_is_refused(tmp_path):
    datasets.Dataset.from_list([GOOD]).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    state.unlink()
    os.mkfifo(state)
    with pytest.raises(UserError, match=f"^{state}: is a named pipe; a regular file is needed$"):
        open_source(Source(str(tmp_path / "set")), "data")


def row_of(size):
    """A line of so many bytes."""
    line = json.dumps({"prompt": "", "completion": "c"}).encode()
    return line.replace(b'""', b'"' + b"x" * (size - len(line)) + b'"')


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
def test_a_line_may_have_as_many_bytes_as_said_and_no_more(end, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + row_of(1000) + (end or b"\n") + row_of(1001) + end)
    rows = dict(read_file(path, "data", 1000))
    assert rows[1] == GOOD and len(rows[2]["prompt"]) > 900 and len(rows) == 3
    assert rows[3].reason == "has more than 1000 bytes; shorten it, or raise max_row_bytes"


def test_rows_behind_a_row_that_is_too_long_are_read_with_their_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINE + row_of(3 << 20) + b"\n" + LINE + row_of(1002) + b"\n" + LINE)
    assert {number: isinstance(row, BadRow) for number, row in read_file(path, "data", 1000)} == {
        1: False, 2: True, 3: False, 4: True, 5: False}


LISTS = [[GOOD], [GOOD] * 3, [{"prompt": "x" * size, "completion": "]},{"}
                              for size in (0, 65_530, 65_536, 200_000)],
         [{"prompt": "\\\"[{", "completion": "ü" * 70_000, "facts": {"a": [[], {}, 1.5, -2, None, True]}}]]


@pytest.mark.parametrize("rows", LISTS)
@pytest.mark.parametrize("write", [json.dumps,
                                   lambda rows: json.dumps(rows, ensure_ascii=False, indent=3) + "\n\n",
                                   lambda rows: "\ufeff [" + " \r\n,".join(map(json.dumps, rows)) + "]"])
def test_a_list_is_read_value_by_value_to_what_json_says(rows, write, tmp_path):
    (tmp_path / "a.json").write_text(write(rows), encoding="utf-8")
    assert list(read_file(tmp_path / "a.json", "data")) == list(enumerate(rows, start=1))


BROKEN_LISTS = {  # text -> what is said; each as one line, and with a row of 70,000 characters before it
    "[{}, {]": "is not JSON (Expecting property name enclosed in double quotes at column 7)",
    "[{}, {\"a\": tru": "is not JSON (Expecting value at column 12)",
    "[{}, {\"a\": \"b": "is not JSON (Unterminated string starting at column 12)",
    "[{}": "is not JSON (Expecting ',' delimiter at column 4)",
    "[{} {}]": "is not JSON (Expecting ',' delimiter at column 5)",
    "[{},]": "is not JSON (Expecting value at column 5)",
    "[{}] []": "is not JSON (Extra data at column 6)",
    "[{}, " + "[" * 100_000: "is not JSON (nested too deeply)",
    "[{}, {\"a\": " + "1" * 5000 + "}]": "is not JSON (a number of too many digits)",
}


@pytest.mark.parametrize("text", BROKEN_LISTS)
@pytest.mark.parametrize("before", ["", "\n" * 70_000])
def test_a_list_that_is_broken_is_named_by_line_and_column(text, before, tmp_path):
    (tmp_path / "a.json").write_text(text[0] + before + text[1:])
    message = said(tmp_path / "a.json", 10**6)
    column = BROKEN_LISTS[text].partition(" at column ")[2].removesuffix(")")
    # a line break behind the bracket takes one character off the line
    expected = BROKEN_LISTS[text].replace(f"column {column}", f"column {int(column) - 1}"
                                          ) if before and column else BROKEN_LISTS[text]
    assert message == f"{tmp_path / 'a.json'}:{1 + len(before)}: {expected}; a list of objects is needed"


def test_a_value_of_a_list_that_is_too_long_ends_the_reading(tmp_path):
    (tmp_path / "a.json").write_bytes(b"[" + LINE + b"," + row_of(200_000) + b"]")
    assert said(tmp_path / "a.json") == (f"{tmp_path / 'a.json'}:2: a row has more than 1000 bytes; shorten "
                                         "it, or raise max_row_bytes")


@pytest.mark.parametrize("body", [b"p," + b"x" * 2000 + b"\n", b'p,"' + b"x\n" * 1000 + b'"\n',
                                  b'p,c\nq,"' + b"never closed\n" * 99, b"," * 2000 + b"\n"])
def test_a_csv_row_that_is_too_long_ends_the_reading(body, tmp_path):
    (tmp_path / "a.csv").write_bytes(HEADER + body)
    assert "a row has more than 1000 bytes; shorten it, or raise max_row_bytes (or close its" in said(
        tmp_path / "a.csv")


def test_a_csv_header_of_very_many_columns_is_one_short_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b",".join(b"c%d" % n for n in range(10**6)) + b",c5\n")
    assert said(tmp_path / "a.csv", 10**8).endswith(
        ":1: names the column 'c5' twice; give each column its own name")


def test_lines_in_quotes_keep_their_ends(tmp_path):
    (tmp_path / "a.csv").write_bytes(HEADER + b'"a\r\nb","c\nd"\r\n')
    assert list(read_file(tmp_path / "a.csv", "data")) == [(2, {"prompt": "a\r\nb", "completion": "c\nd"})]


@pytest.mark.parametrize("depth", [99, 100, 900, 100_000])
def test_a_row_that_is_too_deep_to_be_written_is_a_bad_row(depth, tmp_path):
    """Python reads lists in each other to a depth of about 1,000, and writes fewer."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "P", "x": ' + "[" * depth + "]" * depth + "}")
    [(_, row)] = read_file(tmp_path / "a.jsonl", "data")
    assert isinstance(row, dict) == (depth < 100)
    assert depth < 100 or "nested" in row.reason


def test_wide_rows_are_not_deep(tmp_path):
    row = {**GOOD, "facts": [{"a": [1]}] * 1000}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert list(read_file(tmp_path / "a.jsonl", "data")) == [(1, row)]


# -------------------------------------------------------------------------------------- few bytes, many texts


def pack(path, piece, count):
    """Write a piece so many times, packed."""
    opened = (gzip.open(path, "wb") if path.suffix == ".gz"
              else pyarrow.output_stream(str(path), compression="zstd"))
    with opened as file:
        for _ in range(count):
            file.write(piece)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(("piece", "count"), [(b"x", 300), (b"\n", 12)])
def test_a_bomb_is_refused_while_it_is_unpacked(ending, kind, piece, count, tmp_path, monkeypatch):
    """Of 300 MiB in a line no more is kept than a row may have."""
    monkeypatch.setattr(unpacking, "_ALWAYS_FINE", 1 << 20)
    path = tmp_path / f"a{kind}{ending}"
    pack(path, piece * (1 << 20), count)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = said(path, 10**6)
    assert "unpacks to more than 250 times its" in message or "has more than 1000000 bytes" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10  # KiB


def test_text_that_repeats_itself_is_no_bomb(tmp_path):
    """70 MB of rows that are equal but for a number, 20 times as large as packed."""
    row = b'{"prompt": "%s", "completion": "c"}\n' % (b"a sentence of a post. " * 40)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(row * 10, 9) * 8000)
    assert sum(1 for _ in read_file(tmp_path / "a.jsonl.gz", "data")) == 80_000


def write_parquet(path, table, **options):
    pyarrow.parquet.write_table(table, path, compression="zstd", **options)
    return path


def repeated(text, count):
    return pyarrow.table({"prompt": pyarrow.DictionaryArray.from_arrays([0] * count, [text])})


@pytest.mark.parametrize("table", [
    pyarrow.table({"prompt": ["x" * (80 << 20)]}),  # one giant page
    pyarrow.table({"prompt": pyarrow.nulls(80 << 20, pyarrow.string())}),  # rows of nothing
], ids=["a page", "nothing"])
def test_a_parquet_file_that_stands_for_very_much_is_refused(table, tmp_path):
    path = write_parquet(tmp_path / "a.parquet", table)
    assert "unpacks to more than 250 times its" in said(path)


def test_a_long_list_of_nothing_is_a_row_that_is_too_long(tmp_path):
    table = pyarrow.table({"prompt": pyarrow.array([[None] * 10**6, [1]], pyarrow.list_(pyarrow.int32()))})
    rows = dict(read_file(write_parquet(tmp_path / "a.parquet", table), "data", 1000))
    assert rows[1].reason.startswith("has more than 1000 bytes") and rows[2] == {"prompt": [1]}


def test_a_text_that_is_stored_once_for_many_rows_is_not_unfolded(tmp_path):
    """8 MB that stand in 500 rows of a file of 800 bytes: 4 GB when all rows of a batch are made at once."""
    path = write_parquet(tmp_path / "a.parquet", repeated("x" * 8_000_000, 500))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(len(row["prompt"]) for _, row in read_file(path, "data")) == 500 * 8_000_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 << 10  # KiB
    assert {row.reason for _, row in read_file(path, "data", 10**6)} == {
        "has more than 1000000 bytes; shorten it, or raise max_row_bytes"}


@pytest.mark.parametrize("make", [lambda table, path: write_parquet(path / "a.parquet", table),
                                  lambda table, path: datasets.Dataset(table).save_to_disk(path / "set")])
def test_a_row_of_a_table_that_is_too_long_is_the_only_one_left_out(make, tmp_path):
    make(pyarrow.table({"prompt": ["a", "b" * 5000, "c"], "n": [1, 2, 3]}), tmp_path)
    [path] = tmp_path.iterdir()
    rows = dict(open_source(Source(str(path)), "actor_training_data", 1000).rows)
    assert (rows[1], rows[3]) == ({"prompt": "a", "n": 1}, {"prompt": "c", "n": 3})
    assert rows[2].reason == "has more than 1000 bytes; shorten it, or raise max_row_bytes"
