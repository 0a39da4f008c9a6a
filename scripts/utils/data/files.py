"""Rows of a local file, one at a time, each with its line:

JSON lines, JSON, CSV or Parquet, also compressed.
"""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from utils.config import UserError
from utils.data.columns import NOTES


def _open_zst(path, mode):
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_COMPRESSED = {".gz": gzip.open, ".zst": _open_zst}
FILE_ENDINGS = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".parquet")
                     for packed in ("", *_COMPRESSED))
# CSV has text only. A cell in one of these columns of `utils/data/layouts.py`, which hold other types, is
# JSON.
_CSV_JSON = ("completions", "ranks", "scores", "label_scores", "messages", "facts", "labels", "score_ratio",
             "info", "summaries", "choice", "extra")
# These columns are optional. An empty cell in one of them means the same as a missing column.
_CSV_OPTIONAL = ("completion", "label", "summary", "ranks", "scores", "label_scores", "facts", "score_ratio",
                 *NOTES)


class BadRow(NamedTuple):
    """A part of a file that is not a row."""

    reason: str  # what is wrong with it
    raw: object  # as much of it as could be read


def read_file(path: Path, field: str) -> Iterator[tuple[int, dict | BadRow]]:
    """Read a file row by row, each with the number of its line (Parquet and lists: of the row).

    A .json file holds one list of objects, or one object on each line as .jsonl does. In CSV the first line
    names the columns. One row at a time is in memory. The exceptions are a .json list and a compressed
    Parquet file, which are read whole because their end must be known.

    Args:
        field: data key that names the file, for messages.

    Yields:
        (number, row). What is not a row is a `BadRow`, and reading goes on.

    Raises:
        UserError: with the file's name, when the rest of it cannot be read.
    """
    if not path.name.endswith(FILE_ENDINGS):
        raise UserError(f"{field}: '{path}' is not a file of rows; its name must end with one of "
                        f"{', '.join(FILE_ENDINGS)}")
    packed = path.suffix if path.suffix in _COMPRESSED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    readers = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    number, empty = 0, True
    try:
        with _COMPRESSED.get(packed, open)(path, "rb") as file:
            if not packed and kind != ".parquet":
                _refuse_binary(file, path)
            for number, row in readers[kind](file, path):
                empty = False
                yield number, row
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the disk, not of the file's content
            raise
        raise UserError(f"{path}:{number + 1}: is not a complete {packed} file; copy it again, or "
                        "decompress it") from None
    if empty:
        raise UserError(f"{field}: '{path}' is empty; it needs rows")


# the first bytes of files that are not text
_BINARY = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}


def _refuse_binary(file, path) -> None:
    """Raise UserError for a binary file with a text file's ending, which would give thousands of bad rows."""
    begin = file.peek(4)[:4]
    ending = next((ending for mark, ending in _BINARY.items() if begin.startswith(mark)), None)
    if ending:
        raise UserError(f"{path}:1: is not text but a {ending} file; give its name the ending {ending}")
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: is UTF-16; save the file as UTF-8 text")


_NOT_UTF8 = "is not UTF-8; save the file as UTF-8 text"


def _decoded(line: bytes, number: int) -> str | BadRow:
    """A line as text. (A file in text mode decodes ahead, so the number of a bad line would not be known.)"""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # some programs write a byte order mark
    except UnicodeDecodeError:
        return BadRow(_NOT_UTF8, line.decode("utf-8", "replace"))


def _read_json_lines(file, path):
    return _objects(enumerate(file, start=1))


def _read_json(file, path):
    lines = enumerate(file, start=1)
    first = next((numbered for numbered in lines if numbered[1].strip()), (1, b""))
    if not first[1].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _objects(itertools.chain([first], lines))
        return
    texts = []
    for number, line in itertools.chain([first], lines):
        texts.append(_decoded(line, number))
        if isinstance(texts[-1], BadRow):
            raise UserError(f"{path}:{number}: {_NOT_UTF8}")
    text = "".join(texts)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first[0] + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: is not JSON ({_problem(error)}); a list of objects is "
                        "needed") from None
    suspect = _may_hold_half(text)
    for number, row in enumerate(rows, start=1):
        yield number, BadRow(_HALF_EMOJI, str(row)) if suspect and _holds_half(row) else _object(row, row)


def _objects(lines):
    """One object from each line. Blank lines are skipped."""
    for number, line in lines:
        if not line or line.isspace():
            continue
        text = _decoded(line.rstrip(b"\r\n"), number)
        yield number, text if isinstance(text, BadRow) else _object(_parsed(text, "one object a line is "
                                                                            "needed"), text)


def _read_csv(file, path):
    csv.field_size_limit(2**31 - 1)  # the default limit, 131,072 characters, is too small for a long post
    damaged = False  # whether the current row has a line that is not UTF-8

    def lines():  # yields bad lines too: a missing line could leave a quote open until the end of the file
        nonlocal damaged
        for number, line in enumerate(file, start=1):
            text = _decoded(line, number)
            damaged = damaged or isinstance(text, BadRow)
            yield line.decode("utf-8", "surrogateescape") if isinstance(text, BadRow) else text

    reader, header, place = csv.reader(lines(), strict=True), None, 1
    try:
        for cells in reader:
            if header is None:
                header = _header(cells, damaged, path)
            elif cells:
                yield place, _csv_row(cells, header, damaged)
            place, damaged = reader.line_num + 1, False
    except csv.Error as error:
        raise UserError(f"{path}:{place}: is not CSV ({error})") from None


def _header(names: list[str], damaged: bool, path) -> list[str]:
    """Check the names of the columns."""
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if damaged:
        raise UserError(f"{path}:1: {_NOT_UTF8}")
    if twice is not None:
        raise UserError(f"{path}:1: names the column '{twice}' twice; give each column its own name")
    return names


def _csv_row(cells: list[str], header: list[str], damaged: bool) -> dict | BadRow:
    if damaged:
        readable = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
        return BadRow(_NOT_UTF8, readable)
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells, but the first line names {len(header)} columns", cells)
    row = dict(zip(header, cells, strict=True))
    row |= {name: None for name in _CSV_OPTIONAL if row.get(name) == ""}
    for name in _CSV_JSON:
        if row.get(name):
            value = _parsed(row[name], f"column '{name}' needs JSON")
            if isinstance(value, BadRow):
                return value._replace(raw=row)
            row[name] = value
    return row


def _read_parquet(file, path):
    try:
        # Parquet has its index at the end. A compressed file cannot seek there, so it is read into memory.
        seekable = file.seekable() and isinstance(file, io.BufferedReader)
        table = pyarrow.parquet.ParquetFile(file if seekable else io.BytesIO(file.read()))
        rows = (row for batch in table.iter_batches(1000) for row in _parquet_rows(batch))
        yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the disk
            raise
        raise UserError(f"{path}:1: is not a complete Parquet file "
                        f"({str(error).splitlines()[0]:.100}); copy it again") from None


def _parquet_rows(batch) -> list[dict | BadRow]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_parquet_row(batch.slice(index, 1)) for index in range(len(batch))]


def _parquet_row(batch) -> dict | BadRow:
    """The row of a batch of one.

    A cell can contradict the type of its column: text that is not UTF-8, a date out of Python's range. Then
    the row is a `BadRow`.
    """
    row, reason = {}, None
    for name, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = cells[0].as_py()
        except (ValueError, OverflowError) as error:
            unreadable = f"holds a value that cannot be read ({error})"
            problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else unreadable
            reason = f"column '{name}' {problem}; write it again"
    return BadRow(reason, row) if reason else row


def _parsed(text: str, needed: str):
    """The value of a JSON text, or a `BadRow`.

    Args:
        needed: what the message says is needed there.
    """
    try:
        value = json.loads(text)
    # ValueError: not JSON, or a number of thousands of digits. RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON ({_problem(error)}); {needed}", text)
    return BadRow(_HALF_EMOJI, text) if _may_hold_half(text) and _holds_half(value) else value


def _problem(error) -> str:
    """Python's error for a text that is not JSON, reworded for the author of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


# JSON escapes an emoji as a pair of surrogates. Half of a pair is not valid text, and tokenizers refuse it.
_HALF_EMOJI = "holds half of an emoji (a lone surrogate such as \\ud83d); remove it"


def _may_hold_half(text: str) -> bool:
    """A fast check of the JSON text, which few texts pass."""
    return "\\ud" in text or "\\uD" in text


def _holds_half(value) -> bool:
    """Whether a string somewhere in a value has a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _object(row, raw) -> dict | BadRow:
    """The row if it is a JSON object (or a `BadRow` already), else a `BadRow`."""
    if isinstance(row, dict | BadRow):
        return row
    return BadRow("must be a JSON object such as {\"prompt\": ..., \"completion\": ...}", raw)
