"""A cache for work on data, so that a second start does not repeat it.

A result is a folder. Its name has a hash of everything that the result depends on: the bytes of the data, the
keys that matter, and the code that made it. It is stored in `opt-rlhf/` in the cache folder of `datasets`, by
default ~/.cache/huggingface/datasets. The environment variables HF_HOME and HF_DATASETS_CACHE set another
one. The folder can be deleted at any time. It holds Arrow and JSON only, so reading it executes nothing.

A result is built under a temporary name, which has a point, and then renamed. Its checksums are compared
before it is used: a result that is not what was written is made again.
"""

import fcntl
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import datasets.config

from utils.distributed import first_of_a_node, world
from utils.durable import delete, move
from utils.errors import UserError
from utils.input_files import open_input, read_json

# modules of this folder that decide what a row becomes
_CODE = ("arrow_rows", "chat", "columns", "comparisons", "conversations", "dialogues", "examples", "files",
         "json_rows", "layouts", "ratings", "sources", "store", "tokens", "turns", "unpacking",
         "validation")


def cache_folder() -> Path:
    """The folder of all results."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "opt-rlhf"


def cached(kind: str, ingredients: list, build: Callable[[Path], None]) -> Path:
    """The folder of a result. A result that is not in the cache, or is damaged there, is built.

    On each node the first process builds it while the others wait.

    Args:
        kind: first part of the folder's name.
        ingredients: everything that the result depends on; must be JSON.
        build: function that writes the result into a folder.

    Raises:
        UserError: when the cache folder cannot be written to.
    """
    parts = json.dumps([*ingredients, _code()], sort_keys=True)
    target = cache_folder() / f"{kind}-{hashlib.sha256(parts.encode()).hexdigest()[:32]}"
    with first_of_a_node():
        if world().is_local_main_process:
            _discard_damaged(target)
        if not target.exists():
            _make(target, build)
    return target


def _make(target: Path, build) -> None:
    aside = _aside(target)
    try:
        _remove_leftovers(target.parent)
        aside.mkdir(parents=True)  # not mkdtemp: other users could not read it
        with _locked(aside):
            build(aside)
            (aside / _CHECKSUMS).write_text(json.dumps(_checksums(aside)), encoding="utf-8")
            move(aside, target)
    except OSError as error:
        if not target.exists():  # if it exists, another run was faster
            raise UserError(f"HF_DATASETS_CACHE: '{target.parent}' cannot be written to "
                            f"({error.strerror or error}); set this environment variable to another folder"
                            ) from None
    finally:
        delete(aside)


def _aside(target: Path) -> Path:
    """A temporary name for a result."""
    return target.with_name(f"{target.name}.{uuid.uuid4().hex}")


# ------------------------------------------------------------------------------------------- damaged and half

_CHECKSUMS = "checksums.json"  # of a result: size and SHA-256 of each of its files, by name
_YOUNG = 60  # seconds in which a folder may be made and not be locked yet


def _checksums(folder: Path) -> dict[str, list]:
    return {path.name: _checksum(path) for path in sorted(folder.iterdir())}


def _checksum(path: Path) -> list:
    with open_input(path) as file:
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _is_whole(folder: Path) -> bool:
    """Whether the files of a result are those that were written. What was added later does not matter."""
    try:
        expected = read_json(folder / _CHECKSUMS)
        return bool(expected) and all(_checksum(folder / name) == value for name, value in expected.items())
    except (UserError, OSError, ValueError, AttributeError):
        return False


def _discard_damaged(target: Path) -> None:
    """Remove a result that is not whole, so that it is made again."""
    try:
        found = target.lstat()
        if _is_whole(target):
            return
        aside = _aside(target)
        if target.lstat().st_ino == found.st_ino:  # else another run has made it again meanwhile
            target.rename(aside)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"HF_DATASETS_CACHE: '{target}' is damaged and cannot be removed ({error.strerror}); "
                        "remove it") from None
    delete(aside)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed runs have left half-built. A process that is building holds a lock on its folder."""
    for path in folder.glob("*-*.*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > _YOUNG:
                with _locked(path, fcntl.LOCK_EX) as alone:
                    if alone:
                        delete(path)


@contextmanager
def _locked(path: Path, kind: int = fcntl.LOCK_SH) -> Iterator[bool]:
    """Try to lock a folder until the body ends. The lock ends with its process, too.

    Yields:
        Whether it is locked. A file system without locks never does; then leftovers stay.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _code() -> str:
    """A hash of the modules in _CODE, so that results of older code are not used."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in _CODE)).hexdigest()
