"""Files of rows, opened and unpacked while they are read.

A few MB of a compressed file can stand for terabytes. What is unpacked is counted while it is read: see
`refuse_bomb`.
"""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow

from utils.errors import UserError
from utils.input_files import open_input

# gzip makes text of rows 3 to 10 times smaller, zst up to 50 times when rows repeat each other
_MOST_RATIO, _ALWAYS_FINE = 250, 1 << 26


def _zst(file):
    return pyarrow.input_stream(file, compression="zstd")


COMPRESSED = {".gz": lambda file: gzip.GzipFile(fileobj=file), ".zst": _zst}


def open_rows(path: Path, packed: str) -> BinaryIO:
    """The unpacked bytes of a file.

    Args:
        packed: one of `COMPRESSED`, or "".

    Raises:
        UserError: naming the path, when it is no regular file or cannot be read. Reading raises it, too, as
            soon as more comes out than any text of rows holds.
    """
    file = open_input(path)
    if not packed:
        return file
    return io.BufferedReader(_Counted(COMPRESSED[packed](file), path), 1 << 17)


class _Counted(io.RawIOBase):
    """A stream that refuses to give more than a compressed file of its size can mean."""

    def __init__(self, stream, path: Path):
        self._stream, self._path, self._size, self._count = stream, path, path.stat().st_size, 0

    def readable(self):
        return True

    def readinto(self, buffer):
        part = self._stream.read(len(buffer))
        buffer[: len(part)] = part
        self._count += len(part)
        refuse_bomb(self._path, self._count, self._size)
        return len(part)


def refuse_bomb(path: Path, unpacked: int, packed: int) -> None:
    """Raise UserError when a file becomes so much larger that it was made to fill a memory or a disk.

    Args:
        unpacked, packed: its sizes in bytes.
    """
    if unpacked > max(_ALWAYS_FINE, _MOST_RATIO * packed):
        raise UserError(f"{path}: unpacks to more than {_MOST_RATIO} times its {packed} bytes, which no text "
                        "does; unpack it yourself if you trust it")


def limited_lines(file: BinaryIO, most: int) -> Iterator[tuple[int, bytes, bool]]:
    """Lines with their numbers, one in memory at a time.

    Yields:
        (number, line, whole). Of a line of more than `most` bytes there are the first bytes, and it is not
        whole; the rest is skipped.
    """
    number = 0
    while line := file.readline(most + 2):  # with room for \r\n
        number += 1
        whole = len(line.rstrip(b"\r\n")) <= most
        yield number, line if whole else line[:1000], whole
        while not line.endswith(b"\n") and line:
            line = file.readline(1 << 20)
