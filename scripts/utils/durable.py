"""Writing and removing that survive a kill and a loss of power: what has its final name is whole.

A rename may reach the disk before the bytes of what it names. After a loss of power a file that was written
and renamed can then be empty.
"""

import errno
import os
import shutil
from contextlib import suppress
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

    A file that has the final name is replaced. A folder that has it must be empty. Files get the mode that
    the umask says: safetensors writes weights that nobody else can read.
    """
    _share_tree(temporary)
    fsync_tree(temporary)
    os.replace(temporary, final)
    fsync(final.parent)


def _share_tree(path: Path) -> None:
    os.umask(umask := os.umask(0o077))  # it can only be read by setting it
    for file in path.rglob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def remove(path: Path) -> None:
    """Remove a file or folder. A kill in between leaves it under its name with `.old.tmp`, never half of it.

    What cannot be deleted (a file that is open on a network file system) stays under that name, too.
    """
    aside = path.with_name(f"{path.name}.old.tmp")
    delete(aside)
    os.replace(path, aside)
    fsync(path.parent)
    delete(aside)


def delete(temporary: Path) -> None:
    """Delete what nobody reads, whole or half, if it is there. What cannot be deleted stays."""
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
    else:
        with suppress(OSError):
            temporary.unlink()
