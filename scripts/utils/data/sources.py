"""Where rows come from: a local file, a folder saved by `datasets`, a set of the hub, or a mixture of these.

A data key of the configuration holds a name, a mapping with `name` and options, or a list of both. `weight`
says how often the rows of one set are used in training: 2 is each row twice, 0.5 is a random half that the
seed fixes, 1.5 is each row once and a half of them again. It is a factor on the set's own size, not a share
of the mix. It applies to the rows that are trained on. Rows that are held out of them, or named for
validation and test, are used once.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import yaml

from utils.config import UserError, find_input, key
from utils.data.files import FILE_ENDINGS, BadRow, read_file
from utils.paths import find_local, is_hub_name

_HELD_OUT = ["validation", "valid", "valid1"]
# part of a data key's name -> splits that serve it, best first; keys without such a part take train
_SPLITS = {
    "validation": _HELD_OUT, "test": ["test", "valid2"],
    "centring": _HELD_OUT, "rating": ["test", *_HELD_OUT],
}


class Source(NamedTuple):
    """One data set that a data key names."""

    name: str  # a file, a folder, or owner/name on the hub
    config: str | None = None  # hub only: the set's configuration
    split: str | None = None  # hub and folders only; None: the split that fits the data key
    revision: str | None = None  # hub only: branch, tag or commit
    data_dir: str | None = None  # hub only: a folder in the repository
    weight: float = 1.0


def data_key(default: str | None, help: str):
    """A configuration field that names data; see `parse_sources`."""
    return key(default, f"{help} A file, folder or hub name; a mapping with {', '.join(Source._fields)}; or "
               "a list of these, which is mixed (weight 2: each row twice, 0.5: a random half). Mappings and "
               "lists are JSON on the command line.",
               parse=parse_sources)


def parse_sources(value):
    """Check the value of a data key: a name, a mapping, or a list of these.

    Raises:
        ValueError: its text says what is wrong with the value.
    """
    if isinstance(value, str) and value.startswith(("[", "{")):  # JSON from the command line
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"is not JSON ({getattr(error, 'problem', None) or error})") from None
    entries = value if isinstance(value, list) else [value]
    if not entries:
        raise ValueError("is an empty list; name a data set")
    for entry in entries:
        _check_entry(entry)
    return value


def _check_entry(entry) -> None:
    if isinstance(entry, str) and entry:
        return
    if not isinstance(entry, dict):
        raise ValueError(f"must be a name, a mapping with 'name', or a list of these, found {entry!r}")
    for name, value in entry.items():
        if name not in Source._fields:
            why = "; code of a data set is never run" if name == "trust_remote_code" else ""
            raise ValueError(f"has an unknown key '{name}'{why}; valid keys: {', '.join(Source._fields)}")
        if name == "weight":
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"has a weight of {value!r}; a number above 0 is needed")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"has {value!r} for '{name}'; text is needed")
    if "name" not in entry:
        raise ValueError(f"has no 'name' in {entry!r}")


def sources_of(value) -> list[Source]:
    """The data sets that the value of a data key names. The value has been checked by `parse_sources`."""
    return [Source(entry) if isinstance(entry, str) else Source(**entry)
            for entry in (value if isinstance(value, list) else [value])]


class Opened(NamedTuple):
    """A data set that exists and can be read."""

    label: str  # for messages, in which a row's place is `label:number`
    content: list[str]  # identifies the bytes and how they are read; part of the cache key
    rows: Iterator[tuple[int, dict | BadRow]]  # (number, row); numbers start at 1


def open_source(source: Source, field: str) -> Opened:
    """Open a data set, to be read row by row.

    Args:
        field: data key that names it, such as `actor_training_data`; for messages and to choose a split.

    Raises:
        UserError: when the data set does not exist, cannot be read, or has no split that fits the key.
    """
    name = source.name
    if is_hub_name(name) and not name.endswith(FILE_ENDINGS) and find_local(name) is None:
        return _open_hub(source, field)
    path = find_input(name, field)
    hub_only = ["config", "revision", "data_dir", *(["split"] if path.is_file() else [])]
    unusable = [option for option in hub_only if getattr(source, option) is not None]
    if unusable:
        raise UserError(f"{field}: '{name}' is on this disk and has no {' or '.join(unusable)}; leave that "
                        "out")
    if path.is_dir():
        return _open_saved(path, source.split, field)
    # the same bytes under another ending are other rows
    ending = next(filter(path.name.endswith, FILE_ENDINGS), "")
    return Opened(str(path), [_digest([path]), ending], read_file(path, field))


def _digest(paths: list[Path]) -> str:
    """SHA-256 of the bytes of files."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _open_saved(path: Path, split: str | None, field: str) -> Opened:
    """Open a folder that `datasets` has saved."""
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(str(path))
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException):
        raise UserError(f"{field}: '{path}' is a folder that `datasets` did not save; name a file in it, one "
                        f"of {', '.join(FILE_ENDINGS)}") from None
    content = [_digest(sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json")))]
    if not isinstance(rows, DatasetDict):
        if split is not None:
            raise UserError(f"{field}: '{path}' has no splits; leave split out")
        return Opened(str(path), content, _numbered(rows))
    split = _split_of(list(rows), split, field, str(path))
    return Opened(f"{path}[{split}]", [*content, split], _numbered(rows[split]))


def _open_hub(source: Source, field: str) -> Opened:
    """Open a data set of the hub."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError

    given = {"revision": source.revision, "data_dir": source.data_dir}
    options = {option: value for option, value in given.items() if value}
    config = [source.config] if source.config else []
    try:
        split = source.split
        if split is None:
            splits = get_dataset_split_names(source.name, *config, **options)
            split = _split_of(splits, None, field, source.name)
        rows = load_dataset(source.name, *config, split=split, **options)
    # RuntimeError: a set with a loading script
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: '{source.name}' is neither a file nor a data set of the hub that can be "
                        f"reached ({reason}); without a network, name a local copy: a file, or a folder "
                        "saved by `datasets`") from None
    part = "/".join(value for value in (source.name, source.config, source.data_dir) if value)
    return Opened(f"{part}[{split}]", [_content_of(rows), split], _numbered(rows))


def _content_of(rows) -> str:
    """SHA-256 of a `datasets.Dataset`: of its Arrow files, or of its rows when they are in memory."""
    if files := [Path(file["filename"]) for file in rows.cache_files]:
        return _digest(files)
    content = hashlib.sha256()
    for row in rows:
        content.update(json.dumps(row, default=str).encode() + b"\n")
    return content.hexdigest()


def _numbered(rows):
    return enumerate(rows, start=1)


def _split_of(splits: list[str], asked: str | None, field: str, name: str) -> str:
    """The split that was asked for, or the one of a set's `splits` that fits the data key `field`."""
    fitting = next((names for part, names in _SPLITS.items() if part in field), ["train"])
    wanted = [asked] if asked else fitting
    split = next((split for split in wanted if split in splits), None)
    if split is None:
        raise UserError(f"{field}: '{name}' has no split {' or '.join(wanted)} (it has {', '.join(splits)}); "
                        + ("take one of these" if asked else "name one with 'split', or a local file "
                           "instead"))
    return split
