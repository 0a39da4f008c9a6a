"""The configuration law: dataclass defaults <- YAML files <- command line, and nothing else.

Of several files a later one wins. A file may hold sections `sft:`, `reward:` and `ppo:`, whose keys are for
that stage only.

trl's `TrlParser` makes options of a dataclass. What is added here is strictness: an unknown key, a wrong
type, a value out of range or a key without effect stops the script with one line that names file, line and
key.
"""

import dataclasses
import math
import re
import sys
import typing
from pathlib import Path

from utils.command_line import (
    LINE,
    defaults_of,
    first_options,
    key_options,
    mistyped,
    parsed,
    print_help,
    refuse_other_digits,
)
from utils.durable import move
from utils.errors import UserError, quoted
from utils.paths import PROJECT, find_local, nearest
from utils.suggestions import suggestion
from utils.yaml_files import dump_yaml, kind_of, read_yaml

SECTIONS = ("sft", "reward", "ppo")  # of a YAML file: keys for one stage


class _Help(str):
    """A key's help text that carries its valid range: the parser hands all other metadata on to argparse."""

    low = high = choices = parse = there = None


def key(default, help, *, unit="", source="own", low=None, high=None, choices=None, parse=None,
        there=None):
    """A configuration field.

    Args:
        default: its value when neither a file nor the command line has one.
        help: what it means, as a sentence.
        unit: of its value.
        source: where the default comes from; "own": our choice. `--help` explains the abbreviations.
        low, high: the smallest and the largest valid number.
        choices: the valid texts.
        parse: for values that are neither text nor number: returns the checked value, or raises ValueError
            that says what is wrong.
        there: for names of files: called by `refuse_missing` with the key's name and its value.
    """
    if choices:
        help += f" One of: {', '.join(choices)}."
    text = help + (f" [{unit}]" if unit else "") + f" (source: {source})"
    described = _Help(text.replace("%", "%%"))
    described.low, described.high, described.choices = low, high, choices
    described.parse, described.there = parse, there
    metadata = {"help": described}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Setting(typing.NamedTuple):
    """The value of a key, and where it was given: `file:line`, or the command line."""

    value: typing.Any
    place: str

    @property
    def file(self) -> str:
        return self.place.rpartition(":")[0]


def parse_config(config_class, default_file: Path | None, argv: list[str], description: str = ""):
    """The resolved configuration of a script.

    Args:
        config_class: dataclass whose fields are made by `key`. `section` and `without_effect()` are used if
            it has them, see `utils.stage_keys.StageConfig`.
        default_file: YAML file that is used when `--config` is not given; None: the dataclass's defaults are.
        argv: the command line without the program's name.
        description: what `--help` says first.

    Raises:
        UserError: naming file, line and key, when anything does not fit.
    """
    options = first_options()
    for word in argv:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{LINE}: {quoted(word)} is not UTF-8; rename the file, or correct the text")
    # the deepspeed launcher adds its --local_rank
    argv = [word for word in argv if not re.fullmatch("--local[_-]rank=-?[0-9]+", word)]
    first, words = parsed(options, argv, LINE)
    if len(first.config) > 1:
        raise UserError(f"{LINE}: --config stands twice; give it once, with all files: --config A B")
    named = [find_input(path, "--config") for path in sum(first.config, [])]
    parser = key_options(config_class, description, options)
    embedded = {} if named or default_file is None else _file_settings(parser, config_class, default_file)
    layers = [embedded, *(_file_settings(parser, config_class, path) for path in named)]
    if first.help:
        settings, _ = _layered(config_class, layers)
        print_help(parser, config_class, settings, named or ([default_file] if embedded else []))
        sys.exit(0)
    layers.append(checked_all(config_class, _typed(parser, config_class, words)))
    settings, notes = _layered(config_class, layers)
    try:
        config = config_class(**{name: setting.value for name, setting in settings.items()})
    except UserError as error:  # of __post_init__, whose messages begin with the key
        place = settings.get(str(error).split(":")[0], Setting(None, LINE)).place
        raise UserError(f"{place}: {error}") from None
    given = {name: setting for layer in layers[1:] for name, setting in layer.items()}
    _refuse_without_effect(config, given)
    config.notes = notes
    return config


def _layered(config_class, layers: list[dict[str, Setting]]) -> tuple[dict[str, Setting], list[str]]:
    """The settings of all layers, of which a later one wins; and what is to be said of them.

    What belongs to a data set (`StageConfig.belongs_to`) goes with it when a later layer names another set:
    nobody is judged on the posts of somebody else's training set without having asked for it.
    """
    settings, left = {}, []
    homes = {}  # data key -> the files that named its present value
    for layer in layers:
        for data, belonging in getattr(config_class, "belongs_to", {}).items():
            if data not in layer:
                continue
            if data in settings and settings[data].value != layer[data].value:
                gone = [name for name in belonging if name in settings and settings[name].value is not None
                        and settings[name].file in homes[data]]
                left.append((data, ", ".join(sorted(homes[data])), gone))
                settings = {name: setting for name, setting in settings.items() if name not in gone}
                homes[data] = set()
            homes.setdefault(data, set()).add(layer[data].file)
        settings |= layer
    notes = []
    for data, files, gone in left:
        if names := [name for name in gone if name not in settings]:
            notes.append(f"not used, since they belong to the {data} of {files}: {', '.join(names)}; name "
                         "your own if you want some")
    return settings, notes


def _refuse_without_effect(config, given: dict[str, Setting]) -> None:
    """Refuse the given keys that act on nothing beside the values of the others, unless at their default.

    A key that only the default file sets goes back to its default: the user did not ask for it, and the saved
    configuration must pass this check when it is read again.

    Raises:
        UserError: naming all of these keys, where each stands and why it has no effect.
    """
    defaults, refused = defaults_of(type(config)), []
    reasons = config.without_effect() if hasattr(config, "without_effect") else {}
    for name, why in reasons.items():
        if getattr(config, name) == defaults[name]:
            continue
        if name in given:
            refused.append(f"{given[name].place}: '{name}' has no effect ({why})")
        setattr(config, name, defaults[name])
    if refused:
        raise UserError(f"{'; '.join(refused)}; leave {'it' if len(refused) == 1 else 'them'} out")


# ------------------------------------------------------------------------------ settings of a line or a file


def _typed(parser, config_class, words) -> dict[str, Setting]:
    """The keys on the command line."""
    refuse_other_digits(config_class, words, LINE)
    given, unknown = parsed(parser, words, LINE)
    if unknown:
        raise UserError(f"{LINE}: {mistyped(unknown[0], config_class)}")
    return {name: Setting(value, LINE) for name, value in vars(given).items()}


def _file_settings(parser, config_class, path: Path) -> dict[str, Setting]:
    """What a YAML file sets, checked."""
    section = getattr(config_class, "section", "")
    settings = read_settings(path, section)
    for name, (value, place) in settings.items():
        if name not in defaults_of(config_class):
            known = [*defaults_of(config_class), *(SECTIONS if section else ())]
            raise UserError(f"{place}: unknown key '{name}'{suggestion(name, known, section)}")
        if isinstance(value, str):  # `yes`, or a number in quotes: read it as the command line would
            refuse_other_digits(config_class, [f"--{name}={value}"], place)
            given, _ = parsed(parser, [f"--{name}={value}"], place)
            settings[name] = Setting(vars(given)[name], place)
    return checked_all(config_class, settings)


def read_settings(path: Path, section: str) -> dict[str, Setting]:
    """The keys of a YAML file that are for a stage: the common ones, and those of its section, which win.

    Keys in the sections of other stages are not looked at: this stage does not know which of them exist.

    Args:
        section: of the stage; "": the script is no stage, and has no sections.
    """
    values, lines = read_yaml(path)
    settings = {name: Setting(value, f"{path}:{lines[name,]}") for name, value in values.items()}
    for other in filter(values.__contains__, SECTIONS if section else ()):
        keys, place = settings.pop(other)
        if not isinstance(keys, dict):
            raise UserError(f"{place}: '{other}' must hold 'key: value' lines, found {kind_of(keys)}")
        if other == section:
            settings |= {name: Setting(value, f"{path}:{lines[other, name]}") for name, value in keys.items()}
    return settings


# ----------------------------------------------------------------------------------------------------- checks


def checked_all(config_class, settings: dict[str, Setting]) -> dict[str, Setting]:
    """The settings with each value in the type of its field. Raises UserError as `_checked`."""
    kinds = typing.get_type_hints(config_class)  # in field.type, the parser turns `str | None` into `str`
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    return {name: Setting(_checked(fields[name], kinds[name], value, place), place)
            for name, (value, place) in settings.items()}


def _checked(field, declared, value, place):
    """The value in its field's type: YAML does not know which type a key needs.

    Raises:
        UserError: when it is of another type or out of range.
    """
    kinds = typing.get_args(declared) or (declared,)
    if typing.get_origin(declared) is list:
        if not isinstance(value, list) or not all(isinstance(item, kinds[0]) for item in value):
            items = _PLURALS[kinds[0]]
            raise UserError(f"{place}: '{field.name}' must be a list of {items}, found {value!r}")
        return value
    if type(None) in kinds and value in (None, "none", "null"):  # on the command line, none is a text
        return None
    if parse := field.metadata["help"].parse:
        try:
            return parse(value)
        except ValueError as error:
            raise UserError(f"{place}: '{field.name}' {error}") from None
    kind, described = kinds[0], field.metadata["help"]
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{place}: '{field.name}' must be {_NAMES[kind]}, found {quoted(value)}")
    if kind is float and not _is_finite(value):
        raise UserError(f"{place}: '{field.name}' must be a finite number, found {quoted(value)}")
    value = kind(value)
    low, high, choices = described.low, described.high, described.choices
    if choices and value not in choices:
        raise UserError(f"{place}: '{field.name}' must be one of {', '.join(choices)}, found {quoted(value)}")
    if low is not None and value < low:
        raise UserError(f"{place}: '{field.name}' must be at least {low}, found {quoted(value)}")
    if high is not None and value > high:
        raise UserError(f"{place}: '{field.name}' must be at most {high}, found {quoted(value)}")
    return value


def _is_finite(number: int | float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond every float
        return False


_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
          dict: "a mapping"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def refuse_missing(config) -> None:
    """Raise UserError when what a key names is not there, before the libraries that read it are imported."""
    for field in dataclasses.fields(config):
        value, there = getattr(config, field.name), field.metadata["help"].there
        if there is not None and value is not None:
            there(field.name, value)


def refuse_missing_file(name: str, path: str) -> None:
    """Raise UserError when the file that the key `name` gives does not exist."""
    find_input(path, name)


def find_input(path: str, name: str) -> Path:
    """The file or folder that the key `name` gives, looked up by `find_local`.

    Raises:
        UserError: naming the key, when it does not exist.
    """
    found = find_local(path)
    if found is None:
        near = nearest(path)
        meant = f"; did you mean '{near}'?" if near else f" (looked in {Path.cwd()} and {PROJECT})"
        raise UserError(f"{name}: '{path}' does not exist{meant}")
    return found


def save_config(config, path: Path) -> None:
    """Write the resolved configuration as a YAML file that `--config` reads again to the same."""
    # a run from this file is a new one
    saved = {**dataclasses.asdict(config), "resume": False, "allow_changes": False}
    unfinished = path.with_suffix(".tmp")  # renamed when complete: a run killed here can still be resumed
    unfinished.write_text(dump_yaml(saved), encoding="utf-8")
    move(unfinished, path)
