"""A script's command line: the keys of its configuration as options, `--help`, and what is said of a mistyped
key.
"""

import argparse
import dataclasses
import itertools
import typing

from trl import TrlParser

from utils.errors import UserError, quoted
from utils.suggestions import suggestion

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


def defaults_of(config_class) -> dict:
    """The default of each key."""
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config_class)
    }


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of description and epilogue as they are, and shows one spelling of each key."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=120)

    def _format_action_invocation(self, action):
        if action.dest in ("help", "config"):
            return super()._format_action_invocation(action)
        return action.option_strings[0]


def first_options() -> argparse.ArgumentParser:
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


def key_options(config_class, description, options) -> TrlParser:
    """The keys of a dataclass as options. What is not given is left out of the result."""
    cites = any("source: own" not in field.metadata["help"] for field in dataclasses.fields(config_class))
    parser = TrlParser(
        config_class, parents=[options], add_help=False, allow_abbrev=False, exit_on_error=False,
        usage="%(prog)s [--config FILE [FILE ...]] [--key value ...]",
        description=description, epilog=EPILOG if cites else None, formatter_class=_HelpFormatter,
    )
    names = [*defaults_of(config_class), "help", "config"]
    parser.set_defaults_with_config(**dict.fromkeys(names, argparse.SUPPRESS))
    return parser


def parsed(parser, words, place):
    """argparse's namespace and the words that it does not know."""
    try:
        return parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        name = error.argument_name.split("/")[0]  # --learning_rate/--learning-rate
        raise UserError(f"{place}: {name}: {error.message}") from None


def refuse_other_digits(config_class, words, place) -> None:
    """Raise UserError for numbers in the digits of another script, all of which Python reads."""
    kinds = typing.get_type_hints(config_class)
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.lstrip("-").partition("=")
        kind, value = kinds.get(name.replace("-", "_")), value if equals else following
        if {int, float} & {kind, *typing.get_args(kind)} and not value.isascii():
            raise UserError(f"{place}: --{name}: {quoted(value)} is no number in the digits 0 to 9")


def mistyped(word: str, config_class) -> str:
    """What is wrong with a word that no option takes."""
    name, known = word.lstrip("-").split("=")[0].replace("-", "_"), list(defaults_of(config_class))
    if word.endswith((".yaml", ".yml")):
        return f"{quoted(word)} is behind no option; all YAML files stand behind one --config"
    if not word.startswith("-") and "=" not in word and name not in known:
        return (f"{quoted(word)} is behind no option; write --key value (a list of data is one value: "
                "'[A, B]')")
    return f"unknown key '{word}'{suggestion(name, known, getattr(config_class, 'section', ''))}"


def print_help(parser, config_class, settings, files) -> None:
    """`--help`: each key's default, and where this command would use another value, that one, too."""
    defaults = {name: _spelled(value) for name, value in defaults_of(config_class).items()}
    here = {name: _spelled(setting.value) for name, setting in settings.items()}
    shown = {name: value if here.get(name, value) == value else f"{value}; here: {here[name]}"
             for name, value in defaults.items()}
    parser.set_defaults_with_config(config=" ".join(map(str, files)) or "none", **shown)
    parser.print_help()


def _spelled(value):
    """A value as in YAML and on the command line."""
    return str(value).lower() if value is None or isinstance(value, bool) else value
