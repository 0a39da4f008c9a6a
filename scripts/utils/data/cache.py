"""Work on data that is kept, so that a second start need not do it again.

A result is a folder, named by a hash of all that it was made of: the bytes of the data, the keys that matter, and the
code that made it. It lies in `opt-rlhf/` of the cache of `datasets`, which the environment variables HF_HOME and
HF_DATASETS_CACHE move (by default ~/.cache/huggingface/datasets). All of it may be deleted at any time. Nothing in it
is executed when it is read: it holds Arrow and JSON only.
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

_CODE = ("files", "layouts", "sources", "store", "validation", "tokens")


def cache_folder() -> Path:
    """Where results are kept."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "opt-rlhf"


def cached(kind: str, ingredients: list, build: Callable[[Path], None]) -> Path:
    """The folder of a result, made first when it is not there.

    It is written under another name and then renamed, so that it is whole, also when two runs make it at once. Of several
    processes on a node the first makes it while the others wait.

    Args:
        kind: the first part of the folder's name.
        ingredients: all that the result depends on, as JSON.
        build: writes the result into the folder it is given.
    """
    parts = [*ingredients, _code()]
    target = cache_folder() / f"{kind}-{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]}"
    with first_of_a_node():
        if not target.exists():
            _make(target, build)
    return target


def _make(target: Path, build) -> None:
    try:
        aside = target.with_name(f"{target.name}.{uuid.uuid4().hex}")  # mkdtemp's would be its owner's alone
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"HF_DATASETS_CACHE: '{target.parent}' cannot be written to ({error.strerror}); set this environment "
                        "variable to another folder") from None
    try:
        build(aside)
        os.rename(aside, target)
    except OSError:
        if not target.exists():  # else another run was faster
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _code() -> str:
    """A hash of the modules that decide what a row becomes: what older code made is no longer found."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / f"{name}.py").read_bytes() for name in _CODE)).hexdigest()
