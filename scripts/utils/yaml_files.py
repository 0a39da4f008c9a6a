"""YAML as configurations need it: mappings, lists, texts, numbers, true, false and null.

PyYAML splits the text into tokens and builds the tree. What a scalar means is decided here, as YAML 1.2 does:
PyYAML follows YAML 1.1, to which `1:30` is 90, `010` is 8 and `no` is false. Limits on size, depth and
repetition hold before anything is built, so that a file of a few bytes cannot take all memory or time.
"""

import re
from pathlib import Path

import yaml

from utils.errors import UserError, quoted
from utils.input_files import read_text

_MOST_BYTES, _MOST_NODES, _MOST_DEPTH, _MOST_DIGITS = 1 << 18, 10_000, 20, 40

_WORDS = {**dict.fromkeys(("", "~", "null", "Null", "NULL")), **dict.fromkeys(("true", "True", "TRUE"), True),
          **dict.fromkeys(("false", "False", "FALSE"), False)}
_INT = re.compile("[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_DIGITS = "[0-9]+(_[0-9]+)*"
_FLOAT = re.compile(rf"[-+]?({_DIGITS}\.?|({_DIGITS})?\.{_DIGITS})([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?\.(inf|Inf|INF))|\.(nan|NaN|NAN)")
_OCTAL = re.compile("[-+]?0[0-9_]+")


class YamlError(ValueError):
    """What is wrong with a YAML text, and in which line."""

    def __init__(self, reason: str, line: int):
        super().__init__(reason)
        self.line = line


def read_yaml(path: Path) -> tuple[dict, dict[tuple, int]]:
    """The mapping in a YAML file, and the line of each key: of `a: {b: 1}` those of ("a",) and ("a", "b").

    Raises:
        UserError: naming file and line, when it cannot be read or holds something else.
    """
    text = read_text(path, _MOST_BYTES)
    lines = {}
    try:
        values = parse_yaml(text, lines)
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    values = {} if values is None else values  # comments alone
    if not isinstance(values, dict):
        raise UserError(f"{path}:1: must be a YAML mapping of 'key: value' lines, found {kind_of(values)}")
    return values, lines


def parse_yaml(text: str, lines: dict[tuple, int] | None = None):
    """The value of a YAML text; None when it is empty.

    Args:
        lines: gets the line of each key, by its path.

    Raises:
        YamlError: when it is not YAML, or beyond what a configuration needs.
    """
    try:
        _refuse_excess(yaml.parse(text, Loader=yaml.SafeLoader))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:  # a control character
        raise YamlError(f"is not valid YAML (it holds the character {chr(error.character)!r})",
                        text.count("\n", 0, error.position) + 1) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise YamlError(f"is not valid YAML ({problem})", mark.line + 1 if mark else 1) from None
    except YamlError:
        raise
    except (ValueError, OverflowError):  # "\UFFFFFFFF" in a quoted text
        raise YamlError("is not valid YAML (an escape that is no character)", 1) from None
    return None if node is None else _value(node, (), {} if lines is None else lines)


def dump_yaml(values: dict) -> str:
    """YAML that `read_yaml` reads to the same values, as does any reader of YAML 1.1."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def kind_of(value) -> str:
    """What a YAML value is, for messages."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list",
             dict: "a mapping", type(None): "nothing"}
    return kinds[type(value)]


class _Dumper(yaml.SafeDumper):
    """Puts a text in quotes when YAML 1.1 or we would read something else."""


for tag, pattern in (("int", _INT), ("int", _OCTAL), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern.pattern})\Z"),
                                  list("-+.0123456789"))


def _refuse_excess(events) -> None:
    """Raise YamlError for what a configuration does not need, before it is built.

    An alias counts as all that it stands for: ten lines of aliases of aliases can stand for 10^9 texts.
    """
    nodes, documents, sizes = 0, 0, {}
    opened: list[tuple[str | None, int]] = []  # lists and mappings that have not ended: anchor, nodes before
    for event in events:
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise YamlError("is not valid YAML here (a second document begins); one is read", line)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in opened}:
                raise YamlError(f"the alias {quoted(event.anchor)} stands inside of what it names", line)
            nodes += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            nodes += 1
            if event.tag is not None:
                raise YamlError(f"has the tag {quoted(event.tag)}; tags are not read, leave it out", line)
            if isinstance(event, yaml.ScalarEvent):
                sizes[event.anchor] = 1
            else:
                opened.append((event.anchor, nodes - 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = opened.pop()
            sizes[anchor] = nodes - before
        if len(opened) > _MOST_DEPTH:
            raise YamlError(f"is nested more than {_MOST_DEPTH} deep", line)
        if nodes > _MOST_NODES:
            raise YamlError(f"holds more than {_MOST_NODES} values (aliases written out)", line)


def _value(node: yaml.Node, path: tuple, lines: dict[tuple, int]):
    """What a node stands for."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, (*path, place), lines) for place, item in enumerate(node.value)]
    values = {}
    for name_node, inner in node.value:
        line = name_node.start_mark.line + 1
        if not isinstance(name_node, yaml.ScalarNode):
            raise YamlError("a key is a list or a mapping; text is needed", line)
        name = _scalar(name_node)
        if not isinstance(name, str):  # 1, true, null, ...
            raise YamlError(f"key {quoted(name_node.value)} is not text", line)
        if name == "<<" and name_node.style is None:
            raise YamlError("'<<' merges no mappings here; write the keys out, or give a second file", line)
        if name in values:
            raise YamlError(f"key {quoted(name)} stands twice (line {lines[*path, name]})", line)
        lines[*path, name] = line
        values[name] = _value(inner, (*path, name), lines)
    return values


def _scalar(node: yaml.ScalarNode):
    """The value of a scalar. What has no single meaning is refused."""
    text, line = node.value, node.start_mark.line + 1
    if node.style is not None:  # in quotes, or a block
        if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
            raise YamlError(f"the text {quoted(text)} holds a character that no name can have", line)
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _OCTAL.fullmatch(text):
        raise YamlError(f"{quoted(text)} is 8-based to some programs; write the number without the zero in "
                        "front, or a text in quotes", line)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    kind = int if _INT.fullmatch(text) else float if _FLOAT.fullmatch(text) else str
    if kind is not str and len(text) > _MOST_DIGITS:
        raise YamlError(f"has a number of {len(text)} characters; no key takes that", line)
    return kind(text)
