"""Input files: whatever a user names is opened here, so that no start waits for ever or fills the memory.

A named pipe without a writer blocks `open`, `/dev/zero` has no end, and both can hide behind a link.
"""

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

SMALL = 1 << 24  # bytes; no file that is read whole is larger
ROW_BYTES = 10_000_000  # the default of max_row_bytes

_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device",
          stat.S_IFBLK: "a device", stat.S_IFDIR: "a folder"}


def open_input(path: Path) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        UserError: naming the path, when it is something else or cannot be read.
    """
    try:
        # with O_NONBLOCK, opening a named pipe does not wait for its writer
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:  # a socket cannot be opened at all
        raise UserError(f"{path}: {_special(path) or f'cannot be read ({error.strerror})'}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UserError(f"{path}: {_special(path)}")
    return os.fdopen(handle, "rb")


def _special(path) -> str | None:
    """What is wrong with a path that is no regular file; None when it is one, or is not there."""
    try:
        kind = _KINDS.get(stat.S_IFMT(os.stat(path).st_mode))
    except OSError:
        return None
    return kind and f"is {kind}; a regular file is needed"


def refuse_special(folder: Path, pattern: str) -> None:
    """Raise UserError for something in a folder that is neither a folder nor a regular file that can be read.

    Args:
        pattern: of the paths from there that a library is going to open; "**/*" are all.
    """
    try:
        paths = sorted(path for path in folder.glob(pattern) if path.exists() and not path.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    for path in paths:
        open_input(path).close()


def read_bytes(path: Path, most: int = SMALL) -> bytes:
    """The content of a regular file.

    Raises:
        UserError: naming the path, when it cannot be read, or has more than `most` bytes.
    """
    try:
        with open_input(path) as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > most:
        raise UserError(f"{path}: has more than {most} bytes, which no file of this kind has")
    return content


def read_text(path: Path, most: int = SMALL) -> str:
    """The UTF-8 text in a regular file; a byte order mark is left out. Raises UserError as `read_bytes`."""
    content = read_bytes(path, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        utf16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise UserError(f"{path}: is {'UTF-16' if utf16 else 'not UTF-8'}; save the file as UTF-8 text"
                        ) from None


def read_json(path: Path):
    """The value in a JSON file.

    Raises:
        UserError: as `read_bytes`, or when the text is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except RecursionError:
        raise UserError(f"{path}: is not JSON that is read here (nested too deeply)") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: is not JSON ({error.msg})") from None
    except ValueError:  # Python refuses a number of thousands of digits
        raise UserError(f"{path}: is not JSON that is read here (a number of too many digits)") from None
