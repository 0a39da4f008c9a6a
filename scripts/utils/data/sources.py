"""Where rows come from: a file, a database of ratings, a folder saved by `datasets`, a data set of the hub,
or a mix of them.

A data key of the configuration holds a name, a mapping with `name` and more, or a list of both. `weight` says
how often the rows of a set are taken for training: 2 is each row twice, 0.5 a random half that the seed
fixes, 1.5 each row once and a random half once more. It is a factor on the set's own size, not a share of the
mix. Rows that are held out, or named for validation and test, are taken once.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow

from utils.config import UserError, find_input, key
from utils.data.arrow_rows import rows_of
from utils.data.files import FILE_ENDINGS, BadRow, read_file
from utils.data.ratings import DATABASE_ENDINGS, is_database, read_database
from utils.input_files import ROW_BYTES, open_input, refuse_special
from utils.paths import find_local, is_hub_name
from utils.yaml_files import YamlError, parse_yaml

_HELD_OUT = ["validation", "valid", "valid1"]
_TEST = ["test", "valid2"]
# data key -> splits that it takes, best first; all other keys take train
_SPLITS = {
    "actor_validation_data": _HELD_OUT, "actor_test_data": _TEST,
    "reward_validation_data": _HELD_OUT, "reward_test_data": _TEST,
    "rlhf_validation_data": _HELD_OUT, "rlhf_test_data": _TEST,
    "centring_data": _HELD_OUT, "rating_data": ["test", *_HELD_OUT],
}


class Source(NamedTuple):
    """One data set that a data key names."""

    name: str  # a file, a folder, or owner/name on the hub
    config: str | None = None  # hub only: the set's configuration
    split: str | None = None  # hub and folders only; None: the split that the data key takes
    revision: str | None = None  # hub only: branch, tag or commit
    data_dir: str | None = None  # hub only: a folder in the repository
    weight: float = 1.0
    columns: dict[str, str] | None = None  # our name of a column -> its name in this set
    only_wanted: bool = False  # of answers with a `label`, take those that are wanted as examples


def data_key(default: str | None, help: str):
    """A configuration field that names data; see `parse_sources`."""
    return key(default, f"{help} A file, folder or hub name; or a mapping or list of these (data/README.md).",
               parse=parse_sources, there=refuse_missing_sources)


def parse_sources(value):
    """Check the value of a data key: a name, a mapping, or a list of these.

    Raises:
        ValueError: its text says what is wrong with the value.
    """
    if isinstance(value, str) and value.startswith(("[", "{")):  # JSON from the command line
        try:
            value = parse_yaml(value)
        except YamlError as error:
            raise ValueError(f"is not JSON: {error}") from None
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
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1000:
                raise ValueError(f"has a weight of {value!r}; a number above 0, at most 1000, is needed")
        elif name == "only_wanted":
            if not isinstance(value, bool):
                raise ValueError(f"has {value!r} for 'only_wanted'; true or false is needed")
        elif name == "columns":
            if not isinstance(value, dict) or not value or not all(
                    isinstance(text, str) and text for pair in value.items() for text in pair):
                raise ValueError("has 'columns' that are no mapping of names, such as {prompt: question}")
        elif not isinstance(value, str) or not value:
            raise ValueError(f"has {value!r} for '{name}'; text is needed")
    if "name" not in entry:
        raise ValueError(f"has no 'name' in {entry!r}")


def sources_of(value) -> list[Source]:
    """The data sets that the value of a data key names. `parse_sources` has checked it."""
    return [Source(entry) if isinstance(entry, str) else Source(**entry)
            for entry in (value if isinstance(value, list) else [value])]


def refuse_missing_sources(field: str, value) -> None:
    """Raise UserError when a file or folder among the data sets does not exist; the hub is not asked."""
    for source in sources_of(value):
        if not _is_on_hub(source.name):
            find_input(source.name, field)


def _is_on_hub(name: str) -> bool:
    here = (*FILE_ENDINGS, *DATABASE_ENDINGS)
    return is_hub_name(name) and not name.endswith(here) and find_local(name) is None


class Opened(NamedTuple):
    """A data set that exists and can be read."""

    label: str  # for messages, in which a row's place is `label:number`
    content: list[str]  # identifies the rows and how they are read; part of the cache key
    rows: Iterator[tuple[int, dict | BadRow]]  # (number, row); numbers start at 1


def open_source(source: Source, field: str, most: int = ROW_BYTES) -> Opened:
    """Open a data set, to be read row by row, with its columns called as here.

    Args:
        field: data key that names it, such as `actor_training_data`. It chooses the split, and messages name
            it.
        most: bytes of a row (`max_row_bytes`).

    Raises:
        UserError: when the data set does not exist, cannot be read, or has no split that the key takes.
    """
    opened = _opened(source, field, most)
    if not source.columns and not source.only_wanted:
        return opened
    changes = json.dumps([source.columns, source.only_wanted], sort_keys=True)
    return opened._replace(content=[*opened.content, changes], rows=_changed(opened.rows, source))


def _changed(rows, source: Source):
    """Rows with their columns renamed; with `only_wanted` those with a true label, without it."""
    for number, row in rows:
        try:
            if not isinstance(row, BadRow):
                row = _renamed(row, source.columns or {})
                if source.only_wanted and not is_wanted(row.pop("label", None)):
                    continue
        except UserError as error:
            row = BadRow(str(error), row)
        yield number, row


def _renamed(row: dict, columns: dict[str, str]) -> dict:
    for ours, theirs in columns.items():
        if theirs not in row:
            raise UserError(f"column '{theirs}' is missing, which 'columns' calls the {ours}")
        if ours in row and ours not in columns.values():
            raise UserError(f"has a column '{ours}' already, which 'columns' takes from '{theirs}'")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return others | {ours: row[theirs] for ours, theirs in columns.items()}


def is_wanted(label) -> bool:
    """Whether a column `label` says that an answer is wanted.

    Raises:
        UserError: when it says neither.
    """
    marks = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    wanted = marks.get(str(label).strip().lower())
    if wanted is None:
        raise UserError(f"column 'label' is {str(label)[:40]!r}; it must be true (the answer is wanted) or "
                        "false")
    return wanted


def _opened(source: Source, field: str, most: int) -> Opened:
    name = source.name
    if _is_on_hub(name):
        return _open_hub(source, field, most)
    path = find_input(name, field)
    hub_only = ["config", "revision", "data_dir", *(["split"] if path.is_file() else [])]
    unusable = [option for option in hub_only if getattr(source, option) is not None]
    if unusable:
        raise UserError(f"{field}: '{name}' is on this disk and has no {' or '.join(unusable)}; leave that "
                        "out")
    if path.is_dir():
        return _open_saved(path, source.split, field, most)
    if is_database(path):
        if source.columns or source.only_wanted:
            raise UserError(f"{field}: '{name}' is a database of ratings, whose columns are known; leave "
                            "columns and only_wanted out")
        content, rows = read_database(path, field, most)
        return Opened(str(path), [content], rows)
    # the ending is part of the content, because the same bytes under another ending are other rows
    ending = next(filter(path.name.endswith, FILE_ENDINGS), "")
    return Opened(str(path), [_digest([path]), ending], read_file(path, field, most))


def _digest(paths: list[Path]) -> str:
    """SHA-256 of the bytes of files."""
    hashes = []
    for path in paths:
        with open_input(path) as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _open_saved(path: Path, split: str | None, field: str, most: int) -> Opened:
    """Open a folder that `datasets` has saved."""
    from datasets import DatasetDict, load_from_disk

    refuse_special(path, "**/*")
    try:
        rows = load_from_disk(str(path))
    except Exception as error:  # the library raises anything for a damaged state.json or dataset_info.json
        if any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
            raise UserError(f"{field}: '{path}' was saved by `datasets` and is damaged "
                            f"({type(error).__name__}: {error}); save it again") from None
        raise UserError(f"{field}: '{path}' is a folder that `datasets` did not save; name a file in it, one "
                        f"of {', '.join(FILE_ENDINGS)}") from None
    content = [_digest(sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json")))]
    if not isinstance(rows, DatasetDict):
        if split is not None:
            raise UserError(f"{field}: '{path}' has no splits; leave split out")
        return Opened(str(path), content, _numbered(rows, most, path))
    split = _split_of(list(rows), split, field, str(path))
    return Opened(f"{path}[{split}]", [*content, split], _numbered(rows[split], most, path))


def _open_hub(source: Source, field: str, most: int) -> Opened:
    """Open a data set of the hub."""
    from datasets import get_dataset_split_names, load_dataset
    from datasets.exceptions import DatasetsError

    given = {"revision": source.revision, "data_dir": source.data_dir}
    options = {option: value for option, value in given.items() if value}
    config = [source.config] if source.config else []
    try:
        names = [] if source.split else get_dataset_split_names(source.name, *config, **options)
        split = source.split or _split_of(names, None, field, source.name)
        rows = load_dataset(source.name, *config, split=split, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # Runtime: a loading script
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field}: '{source.name}' is neither a file nor a data set of the hub that can be "
                        f"reached ({reason}); without a network, name a local copy: a file, or a folder "
                        "saved by `datasets`") from None
    part = "/".join(value for value in (source.name, source.config, source.data_dir) if value)
    return Opened(f"{part}[{split}]", [_digest_of_rows(rows)], _numbered(rows, most, part))


def _digest_of_rows(rows) -> str:
    """SHA-256 of the columns and cells of a data set."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=1000):
        digest.update(json.dumps(table.to_pydict(), default=str).encode())
    return digest.hexdigest()


def _numbered(rows, most: int, name):
    """The rows as they are stored: `datasets` would open images and sounds that stand beside the text."""
    def tables():
        try:
            for table in rows.with_format("arrow").iter(batch_size=1000):
                table.validate(full=True)  # a damaged number could point anywhere into the memory
                yield table
        except (pyarrow.ArrowException, OSError, IndexError) as error:
            raise UserError(f"{name}: is damaged ({error}); save it again") from None

    return enumerate(rows_of(tables(), most), start=1)


def _split_of(splits: list[str], asked: str | None, field: str, name: str) -> str:
    """The split that was asked for, or the first of `splits` that a data key takes."""
    wanted = [asked] if asked else _SPLITS.get(field, ["train"])
    for split in wanted:
        if split in splits:
            return split
    raise UserError(f"{field}: '{name}' has no split {' or '.join(wanted)} (it has {', '.join(splits)}); "
                    + ("take one of these" if asked else "name one with 'split', or a local file instead"))
