"""The configuration law: dataclass defaults <- YAML files <- command line, and nothing else.

Of several files a later one wins. A file may hold sections `sft:`, `reward:` and `ppo:`, whose keys are for
that stage only.

trl's `TrlParser` makes options of a dataclass. What is added here is strictness: an unknown key, a wrong
type, a value out of range or a key without effect stops the script with one line that names file, line and
key.
"""

import argparse
import dataclasses
import itertools
import math
import re
import sys
import typing
from pathlib import Path

from trl import TrlParser

from utils.durable import move
from utils.errors import UserError, quoted
from utils.input_files import ROW_BYTES
from utils.paths import PROJECT, find_local, nearest
from utils.suggestions import suggestion
from utils.yaml_files import dump_yaml, kind_of, read_yaml

SECTIONS = ("sft", "reward", "ppo")  # of a YAML file: keys for one stage
LINE = "command line"  # the place of what was typed

EPILOG = """\
sources of the defaults:
  detail N  row N of docs/details.md, the list of the details that decide whether RLHF works
  own       our choice
  N+        Huang et al., The N+ Implementation Details of RLHF with PPO, arXiv 2403.17031
  ST        Stiennon et al., Learning to Summarize from Human Feedback, arXiv 2009.01325
  IG        Ouyang et al., InstructGPT, arXiv 2203.02155
  LMHP      Ziegler et al., Fine-Tuning Language Models from Human Preferences, arXiv 1909.08593
  DSC       Yao et al., DeepSpeed-Chat, arXiv 2308.01320
"""


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
        source: where the default comes from; "own": our choice. `EPILOG` explains the abbreviations.
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
            it has them, see `StageConfig`.
        default_file: YAML file that is used when `--config` is not given; None: the dataclass's defaults are.
        argv: the command line without the program's name.
        description: what `--help` says first.

    Raises:
        UserError: naming file, line and key, when anything does not fit.
    """
    options = _first_options()
    for word in argv:
        if not word.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in word):
            raise UserError(f"{LINE}: {quoted(word)} is not UTF-8; rename the file, or correct the text")
    # the deepspeed launcher adds its --local_rank
    argv = [word for word in argv if not re.fullmatch("--local[_-]rank=-?[0-9]+", word)]
    first, words = _parsed(options, argv, LINE)
    if len(first.config) > 1:
        raise UserError(f"{LINE}: --config stands twice; give it once, with all files: --config A B")
    named = [find_input(path, "--config") for path in sum(first.config, [])]
    parser = _parser(config_class, description, options)
    embedded = {} if named or default_file is None else _file_settings(parser, config_class, default_file)
    layers = [embedded, *(_file_settings(parser, config_class, path) for path in named)]
    if first.help:
        settings, _ = _layered(config_class, layers)
        _print_help(parser, config_class, settings, named or ([default_file] if embedded else []))
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
    defaults, refused = _defaults(type(config)), []
    reasons = config.without_effect() if hasattr(config, "without_effect") else {}
    for name, why in reasons.items():
        if getattr(config, name) == defaults[name]:
            continue
        if name in given:
            refused.append(f"{given[name].place}: '{name}' has no effect ({why})")
        setattr(config, name, defaults[name])
    if refused:
        raise UserError(f"{'; '.join(refused)}; leave {'it' if len(refused) == 1 else 'them'} out")


def _defaults(config_class) -> dict:
    """The default of each key."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
    }


# ----------------------------------------------------------------------------------------------- command line


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of description and epilogue as they are, and shows one spelling of each key."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action):
        if action.dest in ("help", "config"):
            return super()._format_action_invocation(action)
        return action.option_strings[0]


def _first_options() -> argparse.ArgumentParser:
    """The options that are read before all keys."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    options.add_argument("-h", "--help", action="store_true",
                         help="Show this text. `default`: the value of a key that no file of --config and no "
                         "option names. `here`: the value that the files of this command give it.")
    options.add_argument("--config", metavar="FILE", nargs="+", action="append", default=[],
                         help="YAML files with any of the keys below, all behind one --config. A later file "
                         "wins over an earlier one, the command line over all. Keys in a section `sft:`, "
                         "`reward:` or `ppo:` are for that stage only.")
    return options


def _parser(config_class, description, options) -> TrlParser:
    """The keys of a dataclass as options. What is not given is left out of the result."""
    cites = any("source: own" not in field.metadata["help"] for field in dataclasses.fields(config_class))
    parser = TrlParser(
        config_class, parents=[options], add_help=False, allow_abbrev=False, exit_on_error=False,
        usage="%(prog)s [--config FILE [FILE ...]] [--key value ...]",
        description=description, epilog=EPILOG if cites else None, formatter_class=_HelpFormatter,
    )
    names = [*_defaults(config_class), "help", "config"]
    parser.set_defaults_with_config(**dict.fromkeys(names, argparse.SUPPRESS))
    return parser


def _parsed(parser, words, place):
    """argparse's namespace and the words that it does not know."""
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = error.argument_name.split("/")[0]  # --learning_rate/--learning-rate
        raise UserError(f"{place}: {name}: {error.message}") from None


def _typed(parser, config_class, words) -> dict[str, Setting]:
    """The keys on the command line."""
    _refuse_other_digits(config_class, words, LINE)
    given, unknown = _parsed(parser, words, LINE)
    if unknown:
        raise UserError(f"{LINE}: {_unknown(unknown[0], config_class)}")
    return {name: Setting(value, LINE) for name, value in vars(given).items()}


def _refuse_other_digits(config_class, words, place) -> None:
    """Raise UserError for numbers in the digits of another script, all of which Python reads."""
    kinds = typing.get_type_hints(config_class)
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.lstrip("-").partition("=")
        kind, value = kinds.get(name.replace("-", "_")), value if equals else following
        if {int, float} & {kind, *typing.get_args(kind)} and not value.isascii():
            raise UserError(f"{place}: --{name}: {quoted(value)} is no number in the digits 0 to 9")


def _unknown(word: str, config_class) -> str:
    """What is wrong with a word that no option takes."""
    name, known = word.lstrip("-").split("=")[0].replace("-", "_"), list(_defaults(config_class))
    if word.endswith((".yaml", ".yml")):
        return f"{quoted(word)} is behind no option; all YAML files stand behind one --config"
    if not word.startswith("-") and "=" not in word and name not in known:
        return (f"{quoted(word)} is behind no option; write --key value (a list of data is one value: "
                "'[A, B]')")
    return f"unknown key '{word}'{suggestion(name, known, getattr(config_class, 'section', ''))}"


def _print_help(parser, config_class, settings, files) -> None:
    """`--help`: each key's default, and where this command would use another value, that one, too."""
    defaults = {name: _spelled(value) for name, value in _defaults(config_class).items()}
    here = {name: _spelled(setting.value) for name, setting in settings.items()}
    shown = {name: value if here.get(name, value) == value else f"{value}; here: {here[name]}"
             for name, value in defaults.items()}
    parser.set_defaults_with_config(config=" ".join(map(str, files)) or "none", **shown)
    parser.print_help()


def _spelled(value):
    """A value as in YAML and on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else value


# ------------------------------------------------------------------------------------------------- YAML files


def _file_settings(parser, config_class, path: Path) -> dict[str, Setting]:
    """What a YAML file sets, checked."""
    section = getattr(config_class, "section", "")
    settings = read_settings(path, section)
    for name, (value, place) in settings.items():
        if name not in _defaults(config_class):
            known = [*_defaults(config_class), *(SECTIONS if section else ())]
            raise UserError(f"{place}: unknown key '{name}'{suggestion(name, known, section)}")
        if isinstance(value, str):  # `yes`, or a number in quotes: read it as the command line would
            _refuse_other_digits(config_class, [f"--{name}={value}"], place)
            given, _ = _parsed(parser, [f"--{name}={value}"], place)
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


# --------------------------------------------------------------------------------------- what all stages have


@dataclasses.dataclass
class StageConfig:
    """The keys of every stage. Defaults are those of the reference task (OPT on TL;DR)."""

    section: typing.ClassVar[str] = ""  # of YAML files: the one of SECTIONS that is for this stage
    belongs_to: typing.ClassVar[dict] = {}  # a data key -> keys whose values are for that data set only
    notes: typing.ClassVar[typing.Sequence[str]] = ()  # what is to be said of how the keys were read

    output_dir: str = key("outputs/run/stage", "Folder of this run; must be new or empty unless `resume`.")
    resume: bool = key(False, "Continue from the newest checkpoint in `output_dir`.")
    allow_changes: bool = key(False, "With `resume`: go on although data, models, code or libraries are not "
                                     "what the run began with.")
    seed: int = key(0, "Seed of everything random.", low=0, high=2**32 - 1)
    on_bad_rows: str = key("error", "What to do with data rows that cannot be used: stop before training, or "
                           "skip them and write them to rejected_rows.jsonl.", choices=["error", "skip"])
    max_row_bytes: int = key(ROW_BYTES, "A larger row of a data file is a bad row. It is not kept in memory.",
                             unit="bytes", low=1000, high=10**9)
    max_dropped_share: float = key(0.2, "Stop when a larger share of a data set is dropped: completions that "
                                   "are too long, pairs of equal answers, and so on.", low=0.0, high=1.0)
    allow_overlap: bool = key(False, "Accept a prompt that is in two of training, validation and test data.",
                              source="detail 7")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="detail 1",
                                 low=8, high=10_000_000)
    per_device_batch_size: int = key(8, "Rows (prompt groups) in one forward pass.", unit="rows",
                                     low=1, high=100_000)
    learning_rate: float | None = key(None, "Peak learning rate; none: 3e-6 from 1B parameters on, more for "
                                      "a smaller model (docs/options.md).", source="detail 9", low=1e-12,
                                      high=1.0)
    adam_eps: float = key(1e-5, "Epsilon of AdamW.", source="detail 9", low=1e-20, high=1.0)
    adam_beta2: float = key(0.999, "Decay of AdamW's second moment.", source="PyTorch", low=0.0,
                            high=0.999999)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", low=0.0, high=100.0)
    warmup_steps: int = key(0, "Optimizer steps of linear warm-up.", unit="steps", low=0, high=10**8)
    max_grad_norm: float = key(1.0, "Gradients are clipped to this norm; 0: no clipping.", low=0.0, high=1e12)
    lora_rank: int = key(0, "Train adapters of this rank in place of the weights; 0: train the weights.",
                         source="LoRA, 2106.09685", low=0, high=4096)
    lora_alpha: int = key(16, "Adapters are scaled by lora_alpha / lora_rank.", source="LoRA, 2106.09685",
                          low=1, high=65_536)
    load_in_4bit: bool = key(False, "Store the frozen weights under the adapters in 4 bits: an eighth of the "
                             "memory, rounded weights (needs lora_rank).", source="QLoRA, 2305.14314")
    save_adapters: bool = key(False, "With load_in_4bit: final/ holds the adapters alone, for peft, in place "
                              "of the merged model.")
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass: less memory, more "
                                       "time.")
    mixed_precision: str = key("no", "Arithmetic of the forward pass. Weights stay float32; with DeepSpeed, "
                               "those of its optimizer do.", choices=["no", "bf16", "fp16"])
    deepspeed: str | None = key(None, "DeepSpeed configuration: a file of configs/deepspeed/, or your own; "
                                "none: no DeepSpeed.", source="ZeRO, 1910.02054",
                                there=refuse_missing_file)
    save_total_limit: int = key(2, "Checkpoints kept in `checkpoints/`.", unit="checkpoints",
                                low=1, high=10_000)
    chat_template: str | None = key(None, "Jinja file with a chat template for conversations; none: that of "
                                    "the tokenizer, or the plain layout where it has none.")
    push_to_hub: str | None = key(None, "Repository user/name on the hub that final/ is uploaded to, private "
                                  "when it is new; none: nothing is uploaded.")
    report_to: list[str] = key(["tensorboard"], "Experiment trackers: tensorboard, wandb, ...; none: no "
                               "tracker.")

    def __post_init__(self):
        if self.load_in_4bit and not self.lora_rank:
            raise UserError("load_in_4bit: weights in 4 bits cannot be trained, so nothing could be without "
                            "adapters; give lora_rank too (the paper takes 64), or leave load_in_4bit out")

    def without_effect(self) -> dict[str, str]:
        """The keys that act on nothing beside the values of the others, each with the reason.

        `parse_config` refuses a value other than the default for them, if the user gave it. A subclass adds
        its own keys.
        """
        idle = {} if self.lora_rank else {"lora_alpha": "lora_rank is 0, so there are no adapters"}
        if not self.load_in_4bit:
            idle["save_adapters"] = "it is for load_in_4bit, which is off"
        return idle if self.resume else idle | {"allow_changes": "it is for resume"}


def save_config(config, path: Path) -> None:
    """Write the resolved configuration as a YAML file that `--config` reads again to the same."""
    # a run from this file is a new one
    saved = {**dataclasses.asdict(config), "resume": False, "allow_changes": False}
    unfinished = path.with_suffix(".tmp")  # renamed when complete: a run killed here can still be resumed
    unfinished.write_text(dump_yaml(saved), encoding="utf-8")
    move(unfinished, path)
