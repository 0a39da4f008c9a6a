"""Rows of a local file, one at a time, each with its line:

JSON lines, JSON, CSV or Parquet, also compressed.
"""

import csv
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from utils.data.arrow_rows import read_parquet
from utils.data.columns import NOTES
from utils.data.json_rows import NOT_UTF8, BadRow, decoded, parsed, read_json, read_json_lines, too_long
from utils.data.unpacking import COMPRESSED, limited_lines, open_rows
from utils.errors import UserError, quoted
from utils.input_files import ROW_BYTES

FILE_ENDINGS = tuple(f"{kind}{packed}" for kind in (".jsonl", ".json", ".csv", ".parquet")
                     for packed in ("", *COMPRESSED))
# CSV has text only. A cell in one of these columns of `utils/data/layouts.py`, which hold other types, is
# JSON.
_CSV_JSON = ("completions", "ranks", "scores", "label_scores", "messages", "facts", "labels", "score_ratio",
             "info", "summaries", "choice", "extra")
# These columns are optional. An empty cell in one of them means the same as a missing column.
_CSV_OPTIONAL = ("completion", "label", "summary", "ranks", "scores", "label_scores", "facts", "score_ratio",
                 *NOTES)


def read_file(path: Path, field: str, most: int = ROW_BYTES) -> Iterator[tuple[int, dict | BadRow]]:
    """Read a file row by row, each with the number of its line (Parquet and lists: of the row).

    A .json file holds one list of objects, or one object on each line as .jsonl does. In CSV the first line
    names the columns. One row at a time is in memory.

    Args:
        field: data key that names the file, for messages.
        most: bytes of a row (`max_row_bytes`).

    Yields:
        (number, row). What is not a row is a `BadRow`, and reading goes on.

    Raises:
        UserError: with the file's name, when the rest of it cannot be read.
    """
    if not path.name.endswith(FILE_ENDINGS):
        raise UserError(f"{field}: '{path}' is not a file of rows; its name must end with one of "
                        f"{', '.join(FILE_ENDINGS)}")
    packed = path.suffix if path.suffix in COMPRESSED else ""
    kind = Path(path.name.removesuffix(packed)).suffix
    number, empty = 0, True
    try:
        with open_rows(path, packed) as file:
            if not packed and kind != ".parquet":
                _refuse_binary(file, path)
            for number, row in _READERS[kind](file, path, most):
                empty = False
                yield number, row
    except (EOFError, zlib.error, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the disk, not of the file's content
            raise UserError(f"{path}:{number + 1}: cannot be read ({error.strerror})") from None
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
    if b"\0" in begin:
        raise UserError(f"{path}:1: is not text (it begins with NUL); save the file as UTF-8 text")


def _read_csv(file, path, most):
    csv.field_size_limit(2**31 - 1)  # the default limit, 131,072 characters, is too small for a long post
    damaged, size = False, 0  # of the current row: whether a line is not UTF-8; bytes

    def lines():  # yields bad lines too: a missing line could leave a quote open until the end of the file
        nonlocal damaged, size
        for number, line, whole in limited_lines(file, most):
            size += len(line)
            if not whole or size > most:
                raise UserError(f"{path}:{place}: a row {too_long(most)} (or close its quotation mark)")
            text = decoded(line, number)
            damaged = damaged or isinstance(text, BadRow)
            yield line.decode("utf-8", "surrogateescape") if isinstance(text, BadRow) else text

    reader, header, place = csv.reader(lines(), strict=True), None, 1
    try:
        for cells in reader:
            if header is None:
                header = _header(cells, damaged, path)
            elif cells:
                yield place, _csv_row(cells, header, damaged)
            place, damaged, size = reader.line_num + 1, False, 0
    except csv.Error as error:
        raise UserError(f"{path}:{place}: is not CSV ({error})") from None


def _header(names: list[str], damaged: bool, path) -> list[str]:
    """Check the names of the columns."""
    if damaged:
        raise UserError(f"{path}:1: {NOT_UTF8}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}:1: names the column {quoted(twice[0])} twice; give each column its own name")
    return names


def _csv_row(cells: list[str], header: list[str], damaged: bool) -> dict | BadRow:
    if damaged:
        readable = [cell.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for cell in cells]
        return BadRow(NOT_UTF8, readable)
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells, but the first line names {len(header)} columns", cells)
    row = dict(zip(header, cells, strict=True))
    row |= {name: None for name in _CSV_OPTIONAL if row.get(name) == ""}
    # beside one pair it is text, "a and b"
    policies = ("policies",) if "completions" in row else ()
    for name in (*_CSV_JSON, *policies):
        if row.get(name):
            value = parsed(row[name], f"column '{name}' needs JSON")
            if isinstance(value, BadRow):
                return value._replace(raw=row)
            row[name] = value
    return row


_READERS = {".jsonl": read_json_lines, ".json": read_json, ".csv": _read_csv, ".parquet": read_parquet}
