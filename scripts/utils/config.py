"""Configuration law: dataclass defaults <- YAML file <- command line, and nothing else.

Parsing is trl's `TrlParser`. What is added here is what people need when they mistype: an unknown key, a
wrong type or a value out of range stops at once with one line that names the file, the line and the key.
"""

import argparse
import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from pathlib import Path

import yaml
from trl import TrlParser

from utils.paths import PROJECT, find_local


class UserError(Exception):
    """A mistake in what the user gave us. Printed as one line, without a traceback; exit status 2."""


class _Help(str):
    """A key's help text that carries its valid range: the parser passes any other metadata on to argparse."""

    low = high = choices = parse = None


def key(default, help, *, unit="", source="own", low=None, high=None, choices=None, parse=None):
    """A configuration field: its default, what it means, its unit, where the default comes from ("own": us), its range.

    Args:
        parse: for a value that is no text or number: returns it checked, or raises ValueError saying what is wrong.
    """
    if choices:
        help += f" One of: {', '.join(choices)}."
    text = help + (f" [{unit}]" if unit else "") + f" (source: {source})"
    described = _Help(text.replace("%", "%%"))
    described.low, described.high, described.choices, described.parse = low, high, choices, parse
    metadata = {"help": described}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the description's lines, its commands among them, and shows one spelling of each key."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action):
        return action.option_strings[-1] if action.dest == "help" else action.option_strings[0]


class _Parser(TrlParser):
    """`TrlParser` whose complaints are one line and exit status 2, and which takes no abbreviated keys."""

    def __init__(self, config_class, description):
        super().__init__(config_class, description=description, allow_abbrev=False, formatter_class=_HelpFormatter,
                         usage="%(prog)s [--config FILE] [--key value ...]")
        self.add_argument("--config", metavar="FILE", help="YAML file with any of the other keys.")

    def print_help_with(self, defaults):
        """`--help` with what this command would use: the values of its YAML file before those of the dataclass."""
        for action in self._actions:
            value = defaults.get(action.dest, action.default)
            # as YAML and the command line spell them
            action.default = str(value).lower() if value is None or isinstance(value, bool) else value
        self.print_help()

    def error(self, message):
        raise UserError(message.removeprefix("argument "))

    def names(self):
        return [action.dest for action in self._actions if action.dest not in ("help", "config")]

    def parse_args_into_dataclasses(self, args):
        config, *_, unknown = super().parse_args_into_dataclasses(args, True, look_for_args_file=False)
        if unknown:
            word = unknown[0].lstrip("-").split("=")[0]
            raise UserError(f"unknown key '{unknown[0]}'{_closest(word.replace('-', '_'), self.names())}")
        return config


def parse_config(config_class, default_file: Path | None, argv: list[str], description: str = ""):
    """The resolved configuration of a script.

    Args:
        config_class: dataclass whose fields are made by `key`.
        default_file: YAML file that is used when `--config` is not given; None: only the dataclass's defaults are.
        argv: the command line without the program's name.
        description: what `--help` says first.

    Raises:
        UserError: naming file, line and key, when anything does not fit.
    """
    parser = _Parser(config_class, description)
    argv = [word for word in argv if not re.fullmatch("--local[_-]rank=-?[0-9]+", word)]  # the deepspeed launcher's own
    path, argv = _config_path(argv, default_file)
    values, lines = ({}, {}) if path is None else read_yaml(path)
    for name in values:
        if name not in parser.names():
            raise UserError(f"{path}:{lines[name]}: unknown key '{name}'{_closest(name, parser.names())}")
    if "-h" in argv or "--help" in argv:
        parser.print_help_with({**values, "config": path})
        sys.exit(0)
    parser.set_defaults_with_config(**{k: v for k, v in values.items() if not isinstance(v, str)})
    strings = [f"--{k}={v}" for k, v in values.items() if isinstance(v, str)]
    _parse(parser, strings, lambda name: f"{path}:{lines.get(name, 1)}")
    config = _parse(parser, strings + argv, lambda name: "command line")
    given = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    kinds = typing.get_type_hints(config_class)  # not field.type: the parser has turned its `str | None` into `str`
    for field in dataclasses.fields(config):
        in_file = field.name in lines and field.name not in given
        where = f"{path}:{lines[field.name]}" if in_file else "command line"
        setattr(config, field.name, _checked(field, kinds[field.name], getattr(config, field.name), where))
    return config


def _parse(parser, argv, where):
    try:
        return parser.parse_args_into_dataclasses(argv)
    except (UserError, ValueError) as error:
        name = str(error).split(":")[0].split("/")[0].strip().lstrip("-")
        raise UserError(f"{where(name)}: {error}".replace("command line: command line", "command line")) from None


def _config_path(argv, default_file):
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in argv:
        return default_file, argv
    index = argv.index("--config")
    if index + 1 == len(argv):
        raise UserError("command line: --config needs a file, for example --config configs/tldr_mini/sft.yaml")
    rest = argv[:index] + argv[index + 2 :]
    if "--config" in rest:
        raise UserError("command line: --config stands twice; settings of several files do not add up")
    return find_input(argv[index + 1], "--config"), rest


def read_yaml(path: Path) -> tuple[dict, dict]:
    """The mapping in a YAML file, and the line number of each key."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = {} if node is None else yaml.safe_load(text)  # None: nothing but comments
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; a configuration is a YAML file") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", error)
        raise UserError(f"{path}:{line}: is not valid YAML ({problem})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a YAML mapping of 'key: value' lines, found a {type(values).__name__}")
    lines = {}
    for name_node, _ in node.value if node else []:
        if not isinstance(name_node.value, str) or name_node.value not in values:  # 1, true, null, ...
            raise UserError(f"{path}:{name_node.start_mark.line + 1}: key '{name_node.value}' is not text")
        if name_node.value in lines:
            first = lines[name_node.value]
            raise UserError(f"{path}:{name_node.start_mark.line + 1}: key '{name_node.value}' stands twice (line {first})")
        lines[name_node.value] = name_node.start_mark.line + 1
    return values, lines


def _closest(word, names):
    match = difflib.get_close_matches(str(word), names, n=1)
    return f"; did you mean '{match[0]}'?" if match else f"; valid keys: {', '.join(sorted(set(names)))}"


def _checked(field, declared, value, where):
    """The value in its field's type. YAML gives no type guarantee (`3e-6` is a string to PyYAML, `1` an int)."""
    kinds = typing.get_args(declared) or (declared,)
    if typing.get_origin(declared) is list:
        ok = isinstance(value, list) and all(isinstance(item, kinds[0]) for item in value)
        if not ok:
            raise UserError(f"{where}: '{field.name}' must be a list of {kinds[0].__name__}, found {value!r}")
        return value
    if type(None) in kinds and value in (None, "none", "null"):  # the command line has no other way to say it
        return None
    if parse := field.metadata["help"].parse:
        try:
            return parse(value)
        except ValueError as error:
            raise UserError(f"{where}: '{field.name}' {error}") from None
    kind = kinds[0]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if kind is float and isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{where}: '{field.name}' must be a finite number, found {value!r}")
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise UserError(f"{where}: '{field.name}' must be {_article(kind)}, found {value!r}")
    described = field.metadata["help"]
    low, high, choices = described.low, described.high, described.choices
    if choices and value not in choices:
        raise UserError(f"{where}: '{field.name}' must be one of {', '.join(choices)}, found {value!r}")
    # written so that not-a-number, which is neither below nor above anything, is refused as well
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        span = f"between {low} and {high}" if high is not None and low is not None else f"at least {low}"
        raise UserError(f"{where}: '{field.name}' must be {span}, found {value!r}")
    return value


def _article(kind):
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def find_input(path: str, name: str) -> Path:
    """`find_local` of something that must be there.

    Raises:
        UserError: naming the key `name`, when it is not.
    """
    found = find_local(path)
    if found is None:
        raise UserError(f"{name}: '{path}' does not exist (looked in {Path.cwd()} and {PROJECT})")
    return found


def save_config(config, path: Path) -> None:
    """Write the resolved configuration as a YAML file that `--config` takes again."""
    saved = {**dataclasses.asdict(config), "resume": False}  # so that it starts a run, and does not go on with one
    aside = path.with_suffix(".tmp")  # a run that is killed here can still be resumed
    aside.write_text(yaml.safe_dump(saved, sort_keys=False), encoding="utf-8")
    os.replace(aside, path)


@dataclasses.dataclass
class StageConfig:
    """What every stage needs. Defaults are those of the reference task (OPT on TL;DR)."""

    output_dir: str = key("outputs/run/stage", "Folder of this run; must be new or empty unless `resume`.")
    resume: bool = key(False, "Go on from the newest checkpoint in `output_dir`.")
    seed: int = key(0, "Seed of everything random.", low=0, high=2**32 - 1)
    on_bad_rows: str = key("error", "Rows of the data that cannot be used: stop before training, or skip them and write them to "
                           "rejected_rows.jsonl.", choices=["error", "skip"])
    allow_overlap: bool = key(False, "Accept that a prompt stands in two of training, validation and test data.",
                              source="detail 7")
    max_prompt_tokens: int = key(512, "Longer prompts are cut.", unit="tokens", source="N+ detail 1", low=8)
    per_device_batch_size: int = key(8, "Rows (prompt groups) in one forward pass.", unit="rows", low=1)
    learning_rate: float = key(3e-6, "Peak learning rate.", source="N+ detail 9", low=0.0)
    adam_eps: float = key(1e-5, "Epsilon of AdamW.", source="N+ detail 9", low=0.0)
    adam_beta2: float = key(0.999, "Second moment decay of AdamW.", source="PyTorch", low=0.0, high=0.999999)
    weight_decay: float = key(0.0, "Weight decay of AdamW.", low=0.0)
    warmup_steps: int = key(0, "Optimizer steps of linear warm-up.", unit="steps", low=0)
    max_grad_norm: float = key(1.0, "Gradient norm is clipped to this; 0: no clipping.", low=0.0)
    lora_rank: int = key(0, "Train adapters of this rank in place of the weights; 0: train the weights.",
                         source="LoRA, 2106.09685", low=0)
    lora_alpha: int = key(16, "Adapters are scaled by lora_alpha / lora_rank.", source="LoRA, 2106.09685", low=1)
    gradient_checkpointing: bool = key(False, "Recompute activations in the backward pass: less memory, more time.")
    mixed_precision: str = key("no", "Arithmetic of the forward pass; weights stay float32, under DeepSpeed those "
                               "of its optimizer.", choices=["no", "bf16", "fp16"])
    deepspeed: str | None = key(None, "DeepSpeed configuration: one of configs/deepspeed/, or your own; none: no DeepSpeed.",
                                source="ZeRO, 1910.02054")
    save_total_limit: int = key(2, "Checkpoints kept in `checkpoints/`.", unit="checkpoints", low=1)
    report_to: list[str] = key(["tensorboard"], "Experiment trackers: tensorboard, wandb, ...; none for no tracker.")
