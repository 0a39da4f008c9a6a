"""A cache for work on data, so that a second start does not repeat it.

A result is a folder. Its name has a hash of everything that the result depends on: the bytes of the data, the
keys that matter, and the code that made it. It is stored in `opt-rlhf/` in the cache folder of `datasets`, by
default ~/.cache/huggingface/datasets. The environment variables HF_HOME and HF_DATASETS_CACHE set another
one. The folder can be deleted at any time. It holds Arrow and JSON only, so reading it executes nothing.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import datasets.config

from utils.config import UserError
from utils.distributed import first_of_a_node

# modules of this folder that decide what a row becomes
_CODE = ("arrow_rows", "columns", "comparisons", "dialogues", "examples", "files", "json_rows", "layouts",
         "sources", "store", "tokens", "unpacking", "validation")


def cache_folder() -> Path:
    """The folder of all results."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "opt-rlhf"


def cached(kind: str, ingredients: list, build: Callable[[Path], None]) -> Path:
    """The folder of a result. A result that is not in the cache is built.

    It is built under a temporary name and then renamed, so a folder is never incomplete, even when two runs
    build the same result. On each node the first process builds it while the others wait.

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
        if not target.exists():
            _make(target, build)
    return target


def _make(target: Path, build) -> None:
    try:
        # not mkdtemp: other users could not read it
        aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"HF_DATASETS_CACHE: '{target.parent}' cannot be written to ({error.strerror}); set "
                        "this environment variable to another folder") from None
    try:
        build(aside)
        os.rename(aside, target)
    except OSError:
        if not target.exists():  # if it exists, another run was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _code() -> str:
    """A hash of the modules in _CODE, so that results of older code are not used."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in _CODE)).hexdigest()
