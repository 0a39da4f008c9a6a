"""Rows of Arrow tables: a Parquet file, or a data set of `datasets`."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from utils.data.json_rows import BadRow, too_long
from utils.data.unpacking import refuse_bomb
from utils.errors import UserError, quoted

_BATCH_ROWS, _BATCH_BYTES = 1000, 1 << 27


def read_parquet(file: BinaryIO, path: Path, most: int) -> Iterator[tuple[int, dict | BadRow]]:
    """The rows of a Parquet file, numbered from 1."""
    try:
        with tempfile.TemporaryFile() as unpacked:
            if not file.seekable():  # Parquet has its index at the end, where a compressed file cannot seek
                shutil.copyfileobj(file, unpacked)
                file = unpacked
            table = pyarrow.parquet.ParquetFile(file)
            names = table.schema_arrow.names
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise UserError(f"{path}:1: names the column {quoted(twice[0])} twice; give each column its "
                                "own name")
            batches = table.iter_batches(_rows_at_once(table.metadata, file, path))
            yield from enumerate(rows_of(batches, most), start=1)
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # an error of the disk
            raise
        raise UserError(f"{path}:1: is not a complete Parquet file "
                        f"({str(error).splitlines()[0]:.100}); copy it again") from None


def _rows_at_once(metadata, file: BinaryIO, path: Path) -> int:
    """How many rows a batch may have. Refuses columns whose few bytes stand for very many.

    A text of a dictionary page is stored once and can stand in every row of a batch.
    """
    most, all_bytes = _BATCH_ROWS, 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            size = column.total_uncompressed_size + column.num_values
            all_bytes += size
            refuse_bomb(path, size, column.total_compressed_size)
            refuse_bomb(path, all_bytes, path.stat().st_size)
            if column.has_dictionary_page and column.physical_type == "BYTE_ARRAY":
                size = _unpacked_page_size(file, column.dictionary_page_offset)
                most = min(most, _BATCH_BYTES // max(size, 1))
    return max(most, 1)


def _unpacked_page_size(file: BinaryIO, offset: int) -> int:
    """Bytes of a page when it is unpacked, from its header: the second of its numbers.

    The header is in Thrift's compact protocol: a byte before each number, 7 bits of a number in each byte,
    and its sign in the last bit (PageHeader in parquet.thrift of apache/parquet-format).
    """
    file.seek(offset)
    header, at, number = file.read(16), 0, 0
    for _ in range(2):
        at, number, shift = at + 1, 0, 0
        while at < len(header):
            number |= (header[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if header[at - 1] < 128:
                break
    return number >> 1


def rows_of(batches: Iterable, most: int) -> Iterator[dict | BadRow]:
    """The rows of record batches or tables. One of more than `most` bytes is a `BadRow`."""
    for batch in batches:
        if batch.nbytes <= most:  # so is each of its rows
            yield from _rows(batch)
            continue
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            sizes = Counter({name: column.nbytes for name, column in zip(row.column_names, row.columns,
                                                                         strict=True)})
            yield from [BadRow(too_long(most), {name: f"{size} bytes" for name, size in sizes.items()})
                        ] if sizes.total() > most else _rows(row)


def _rows(batch) -> list[dict | BadRow]:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_row(batch.slice(index, 1)) for index in range(batch.num_rows)]


def _row(batch) -> dict | BadRow:
    """The row of a batch of one.

    A cell can contradict the type of its column: text that is not UTF-8, a date out of Python's range. Then
    the row is a `BadRow`.
    """
    row, reason = {}, None
    for name, cells in zip(batch.column_names, batch.columns, strict=True):
        try:
            row[name] = cells[0].as_py()
        except (ValueError, OverflowError) as error:
            unreadable = f"holds a value that cannot be read ({error})"
            problem = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else unreadable
            reason = f"column {quoted(name)} {problem}; write it again"
    return BadRow(reason, row) if reason else row
