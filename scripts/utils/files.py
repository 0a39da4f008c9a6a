"""Rows of a local file, one at a time, each with where it stands: JSON lines, JSON, CSV or Parquet, packed or not."""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from utils.config import UserError


def _open_zst(path, mode):
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


_PACKED = {".gz": gzip.open, ".zst": _open_zst}
FILE_ENDINGS = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".parquet") for packed in ("", *_PACKED))
# CSV has text only: in these columns of `utils/layouts.py`, which hold something else, a cell is JSON
_CSV_JSON = ("completions", "ranks", "label_scores", "messages", "facts", "labels", "score_ratio", "info", "summaries",
             "choice", "extra")


def read_file(path: Path, field: str) -> Iterator[tuple[str, dict]]:
    """Rows of a file with `file:line` each (Parquet: `file:row`).

    A .json file holds a list of objects, or one object a line as .jsonl does. In CSV the first line names the columns.

    Args:
        field: the configuration key it came from, for messages.

    Raises:
        UserError: naming file and line, for what is not what the file's name says.
    """
    if not path.name.endswith(FILE_ENDINGS):
        raise UserError(f"{field}: '{path}' is not a file of rows; its name must end with one of {', '.join(FILE_ENDINGS)}")
    packed = path.suffix if path.suffix in _PACKED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    read = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}[kind]
    number, empty = 0, True
    try:
        with _PACKED.get(packed, open)(path, "rb") as file:
            for number, row in read(file, path):
                empty = False
                yield f"{path}:{number}", row
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # of the disk, not of what is on it
            raise
        raise UserError(f"{path}:{number + 1}: is no whole {packed} file; copy it again, or name it unpacked") from None
    if empty:
        raise UserError(f"{field}: '{path}' is empty; it needs rows")


def _text_lines(file, path) -> Iterator[tuple[int, str]]:
    """Numbered lines, decoded one by one: a text file decodes ahead, and the line would not be known."""
    for number, line in enumerate(file, start=1):
        try:
            yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")  # some programs put a mark in front
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: is not UTF-8; save the file as UTF-8 text") from None


def _read_json_lines(file, path):
    yield from _objects(_text_lines(file, path), path)


def _read_json(file, path):
    lines = _text_lines(file, path)
    first = next((numbered for numbered in lines if numbered[1].strip()), (1, ""))
    if not first[1].lstrip().startswith("["):
        yield from _objects(itertools.chain([first], lines), path)
        return
    text = first[1] + "".join(line for _, line in lines)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = first[0] + getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: is not JSON ({_problem(error)}); a list of objects is needed") from None
    for number, row in enumerate(rows, start=1):
        yield number, _object(row, text, f"{path}:{number}")


def _objects(lines, path):
    """One object a line; blank lines are nothing."""
    for number, line in lines:
        if line.strip():
            where = f"{path}:{number}"
            yield number, _object(_parsed(line.rstrip("\r\n"), where, "one object a line is needed"), line, where)


def _read_csv(file, path):
    reader = csv.reader((line for _, line in _text_lines(file, path)), strict=True)
    csv.field_size_limit(2**31 - 1)  # a post may be long
    header, place = None, 1
    try:
        for cells in reader:
            if header is None:
                header = cells
                if twice := [name for index, name in enumerate(cells) if name in cells[:index]]:
                    raise UserError(f"{path}:{place}: names the column '{twice[0]}' twice; give each column its own name")
            elif cells:
                if len(cells) != len(header):
                    raise UserError(f"{path}:{place}: has {len(cells)} cells, but the first line names {len(header)} columns")
                row = dict(zip(header, cells, strict=True))
                yield place, row | {name: _parsed(row[name], f"{path}:{place}", f"column '{name}' needs JSON")
                                    for name in _CSV_JSON if row.get(name)}
            place = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{place}: is not CSV ({error})") from None


def _read_parquet(file, path):
    try:
        # packed it cannot be searched, and the index is at its end
        table = pyarrow.parquet.ParquetFile(file if file.seekable() and isinstance(file, io.BufferedReader)
                                            else io.BytesIO(file.read()))
        rows = (row for batch in table.iter_batches(1000) for row in batch.to_pylist())
        yield from enumerate(rows, start=1)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path}:1: is no whole Parquet file ({str(error).splitlines()[0]:.100})") from None


def _parsed(text, where, needed):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({_problem(error)}); {needed}") from None


def _problem(error: Exception) -> str:
    """What Python says of a text that is no JSON, in words for the one who wrote it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


def _object(row, text: str, where: str) -> dict:
    if not isinstance(row, dict):
        raise UserError(f"{where}: must be a JSON object such as {{\"prompt\": ..., \"completion\": ...}}")
    if "\\ud" in text.lower():  # emoji are pairs of these; half a pair is no text, and no tokenizer takes it
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(f"{where}: holds half of an emoji (a lone surrogate such as \\ud83d); remove it") from None
    return row
