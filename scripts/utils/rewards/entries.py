"""What the key `rewards` says: a list of mappings, one for each reward. Imports no heavy library.

The kind of an entry is the one key of KINDS that it has. All of its keys are fields of that kind's dataclass,
made by `key` like those of a stage, so that the same law holds for them.
"""

import dataclasses
import re
import typing

from utils.config import Setting, UserError, checked_all, key
from utils.errors import quoted
from utils.models.folders import model_folder
from utils.yaml_files import YamlError, kind_of, parse_yaml

_NAME = re.compile(r"[\w.-]{1,40}")  # part of the names of metrics


@dataclasses.dataclass
class Entry:
    """One reward of a run: the keys that every kind has."""

    name: str | None = key(None, "Its name in the logs; none: its kind, or the name of its function.")
    weight: float = key(1.0, "Factor of its scores in the sum of all rewards.", low=-1e6, high=1e6)


@dataclasses.dataclass
class ModelEntry(Entry):
    """A reward model."""

    model: str | None = key(None, "Reward model: a folder or a hub name.")

    def default_name(self) -> str:
        return "model"


KINDS: dict[str, type[Entry]] = {"model": ModelEntry}


def parse_rewards(value):
    """Check the value of the key `rewards`, a list of mappings or its YAML text, and return the list.

    Raises:
        ValueError: its text says what is wrong with the value.
    """
    if isinstance(value, str):  # from the command line
        try:
            value = parse_yaml(value)
        except YamlError as error:
            raise ValueError(f"is not YAML: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"must be a list of mappings with one of {', '.join(KINDS)} in each, found "
                         f"{'an empty list' if value == [] else kind_of(value)}")
    names = [_entry_of(entry, f"entry {number}").name for number, entry in enumerate(value, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has {names.count(name)} entries of the name '{name}'; give each a 'name' of "
                             "its own")
    return value


def entries_of(config) -> list[Entry]:
    """The rewards that a configuration names. `parse_rewards` has checked them."""
    given = config.rewards if config.rewards is not None else [{"model": config.reward_model}]
    return [_entry_of(entry, f"entry {number}") for number, entry in enumerate(given, start=1)]


def _entry_of(entry, place: str) -> Entry:
    """An entry with its defaults. Raises ValueError, which begins with `place`, for what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {kind_of(entry)}; a mapping is needed, such as model: FOLDER")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        found = f"has {' and '.join(kinds)}" if kinds else f"has none of {', '.join(KINDS)}"
        raise ValueError(f"{place} {found}; exactly one says what kind of reward it is")
    [kind] = kinds
    known = [field.name for field in dataclasses.fields(KINDS[kind])]
    for name in entry:
        if name not in known:
            raise ValueError(f"{place} ('{kind}') has an unknown key '{name}'; valid keys: "
                             f"{', '.join(known)}")
    if entry[kind] is None:
        raise ValueError(f"{place}: '{kind}' says nothing")
    try:
        settings = {name: Setting(value, f"{place} ('{kind}')") for name, value in entry.items()}
        checked = checked_all(KINDS[kind], settings)
        made = KINDS[kind](**{name: setting.value for name, setting in checked.items()})
    except UserError as error:
        raise ValueError(str(error)) from None
    if made.name is None:
        made.name = made.default_name()
    if not _NAME.fullmatch(made.name):
        raise ValueError(f"{place} has the name {quoted(made.name)}; letters, digits, _, - and . are taken, "
                         "at most 40")
    return made


def refuse_missing_rewards(field: str, value: list) -> None:
    """Raise UserError when a file or folder that an entry names does not exist; the hub is not asked."""
    for entry in value:
        if "model" in entry:
            model_folder(f"{field}: model", entry["model"])


def rewards_key(help: str) -> typing.Any:
    """The configuration field `rewards`; see `parse_rewards`."""
    return key(None, help, parse=parse_rewards, there=refuse_missing_rewards)
