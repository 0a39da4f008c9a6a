"""Writing that survives a loss of power: content is on the disk before its final name is.

A rename may reach the disk before the bytes of what it names. After a loss of power a file that was written
and renamed can then be empty.
"""

import errno
import os
from pathlib import Path


def fsync(path: Path) -> None:
    """Wait until a file, or the list of names of a folder, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot do it for a folder
            raise
    finally:
        os.close(handle)


def fsync_tree(path: Path) -> None:
    """`fsync` for a file, or for a folder and everything below it."""
    if path.is_dir():
        for inner in path.iterdir():
            fsync_tree(inner)
    fsync(path)


def move(temporary: Path, final: Path) -> None:
    """Rename a complete file or folder to its final name, and wait until both are on the disk.

    A file that has the final name is replaced. A folder that has it must be empty.
    """
    fsync_tree(temporary)
    os.replace(temporary, final)
    fsync(final.parent)
