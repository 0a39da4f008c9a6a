"""Rows of a local file, one at a time, each with its line: JSON lines, JSON, CSV or Parquet, packed or not."""

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
from utils.data.layouts import NOTES


def _open_zst(path, mode):
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_PACKED = {".gz": gzip.open, ".zst": _open_zst}
FILE_ENDINGS = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".parquet") for packed in ("", *_PACKED))
# CSV has text only: in these columns of `utils/data/layouts.py`, which hold something else, a cell is JSON
_CSV_JSON = ("completions", "ranks", "label_scores", "messages", "facts", "labels", "score_ratio", "info", "summaries",
             "choice", "extra")
# and in these, which need not be there, an empty cell says no more than an absent column
_CSV_OPTIONAL = ("completion", "label", "summary", "ranks", "label_scores", "facts", "score_ratio", *NOTES)


class BadRow(NamedTuple):
    """Something in a file that is no row: what is wrong with it, and as much of it as could be read."""

    reason: str
    raw: object


def read_file(path: Path, field: str) -> Iterator[tuple[int, dict | BadRow]]:
    """Rows of a file, each with the number of its line (Parquet and lists: of the row).

    A .json file holds a list of objects, or one object a line as .jsonl does. In CSV the first line names the columns.
    One row at a time is in memory; of a .json list and a packed Parquet file, whose end must be known, all are.

    Args:
        field: the configuration key it came from, for messages.

    Raises:
        UserError: naming the file, when it cannot be read on. A row that is none is a `BadRow`, and reading goes on.
    """
    if not path.name.endswith(FILE_ENDINGS):
        raise UserError(f"{field}: '{path}' is not a file of rows; its name must end with one of {', '.join(FILE_ENDINGS)}")
    packed = path.suffix if path.suffix in _PACKED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[kind]
    number, empty = 0, True
    try:
        with _PACKED.get(packed, open)(path, "rb") as file:
            if not packed and kind != ".parquet":
                _refuse_binary(file, path)
            for number, row in read(file, path):
                empty = False
                yield number, row
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of what is on it
            raise
        raise UserError(f"{path}:{number + 1}: is no whole {packed} file; copy it again, or name it unpacked") from None
    if empty:
        raise UserError(f"{field}: '{path}' is empty; it needs rows")


_BINARY = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}  # how such files begin


def _refuse_binary(file, path) -> None:
    """A packed file under a text file's name would be thousands of bad rows."""
    begin = file.peek(4)[:4]
    ending = next((ending for mark, ending in _BINARY.items() if begin.startswith(mark)), None)
    if ending:
        raise UserError(f"{path}:1: is no text but a {ending} file; let its name end so")
    if begin.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: is UTF-16; save the file as UTF-8 text")


_NOT_UTF8 = "is not UTF-8; save the file as UTF-8 text"


def _decoded(line: bytes, number: int) -> str | BadRow:
    """A line as text; a text file would decode ahead, and the line would not be known."""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # some programs put a mark in front
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
        raise UserError(f"{path}:{line}: is not JSON ({_problem(error)}); a list of objects is needed") from None
    suspect = _may_hold_half(text)
    for number, row in enumerate(rows, start=1):
        yield number, BadRow(_HALF_EMOJI, str(row)) if suspect and _holds_half(row) else _object(row, row)


def _objects(lines):
    """One object a line; blank lines are nothing."""
    for number, line in lines:
        if not line or line.isspace():
            continue
        text = _decoded(line.rstrip(b"\r\n"), number)
        yield number, text if isinstance(text, BadRow) else _object(_parsed(text, "one object a line is needed"), text)


def _read_csv(file, path):
    csv.field_size_limit(2**31 - 1)  # a post may be long
    damaged = False

    def lines():  # csv must be given every line, or it would take an open quote for the end of the file
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
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if damaged:
        raise UserError(f"{path}:1: {_NOT_UTF8}")
    if twice is not None:
        raise UserError(f"{path}:1: names the column '{twice}' twice; give each column its own name")
    return names


def _csv_row(cells: list[str], header: list[str], damaged: bool) -> dict | BadRow:
    if damaged:
        return BadRow(_NOT_UTF8, [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells])
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
        # packed it cannot be searched, and the index is at its end
        table = pyarrow.parquet.ParquetFile(file if file.seekable() and isinstance(file, io.BufferedReader)
                                            else io.BytesIO(file.read()))
        yield from enumerate((row for batch in table.iter_batches(1000) for row in _parquet_rows(batch)), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path}:1: is no whole Parquet file ({str(error).splitlines()[0]:.100})") from None


def _parquet_rows(batch) -> list[dict | BadRow]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_parquet_row(batch.slice(index, 1)) for index in range(len(batch))]


def _parquet_row(batch) -> dict | BadRow:
    """The row of a batch of one, whose cells need not be what their columns say: no UTF-8, a date behind all calendars."""
    row, reason = {}, None
    for name, cells in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = cells[0].as_py()
        except (ValueError, OverflowError) as error:
            problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else f"holds what cannot be read ({error})"
            reason = f"column '{name}' {problem}; write it again"
    return BadRow(reason, row) if reason else row


def _parsed(text: str, needed: str):
    """What a JSON text says, or the `BadRow` that it is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # no JSON; a number of thousands of digits; thousands of brackets
        return BadRow(f"is not JSON ({_problem(error)}); {needed}", text)
    return BadRow(_HALF_EMOJI, text) if _may_hold_half(text) and _holds_half(value) else value


def _problem(error) -> str:
    """What Python says of a text that is no JSON, in words for the one who wrote it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


# emoji are pairs of such escapes; half a pair is no text, and no tokenizer takes it
_HALF_EMOJI = "holds half of an emoji (a lone surrogate such as \\ud83d); remove it"


def _may_hold_half(text: str) -> bool:
    return "\\ud" in text or "\\uD" in text


def _holds_half(value) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _object(row, raw) -> dict | BadRow:
    if isinstance(row, dict | BadRow):
        return row
    return BadRow("must be a JSON object such as {\"prompt\": ..., \"completion\": ...}", raw)
