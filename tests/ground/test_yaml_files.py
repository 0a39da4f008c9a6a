"""YAML: what a scalar means, what is refused, and that a few bytes never take all time or memory."""

import math
import os
import socket

import pytest
import yaml

from utils.errors import UserError
from utils.yaml_files import YamlError, dump_yaml, parse_yaml, read_yaml

# by YAML 1.2's core schema, https://yaml.org/spec/1.2.2/#103-core-schema, written down by hand
SCALARS = {
    "": None, "~": None, "null": None, "NULL": None, "true": True, "True": True, "FALSE": False,
    "0": 0, "-7": -7, "+12": 12, "1_000": 1000, "3e-6": 3e-6, "1E+5": 1e5, ".5": 0.5, "5.": 5.0,
    "-0.25": -0.25, "0.000_003": 3e-6, "010.5": 10.5, "-.inf": -math.inf,
    # words, to YAML 1.1 something else
    "yes": "yes", "no": "no", "on": "on", "off": "off", "y": "y", "1:30": "1:30", "-1:30:00": "-1:30:00",
    "0x10": "0x10", "0x_": "0x_", "0b11": "0b11", "0o17": "0o17", "2024-02-30": "2024-02-30",
    "2024-02-28": "2024-02-28", "1__0": "1__0", "_1": "_1", "1e": "1e", ".": ".", "+": "+", "=": "=",
    "'5'": "5", '"null"': "null", "'010'": "010", "1 000": "1 000", "١٢": "١٢", "nan": "nan", "None": "None",
    "3 # three": 3, "a#b": "a#b",
}


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_what_yaml_1_2_says(text):
    found = parse_yaml(f"key: {text}\n")["key"]
    assert found == SCALARS[text] and type(found) is type(SCALARS[text])


def test_not_a_number_is_a_number_that_is_none():
    assert math.isnan(parse_yaml("a: .nan")["a"])


def laughs(levels):
    names = "abcdefghijklmnop"[:levels]
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]"
             for old, new in zip(names, names[1:], strict=False)]
    return "\n".join(["a: &a [ha]", *lines])


REFUSED = {  # text, line, part of the reason
    "a billion laughs": (laughs(10), 5, "more than 10000 values"),
    "an alias of itself": ("a: 1\nb: &b [*b]", 2, "the alias 'b' stands inside of what it names"),
    "an alias of nothing": ("a: *b", 1, "undefined alias"),
    "20,000 lists in each other": ("[" * 20_000, 1, "nested more than 20 deep"),
    "20,000 dashes": ("- " * 20_000, 1, "nested more than 20 deep"),
    "20,000 mappings": ("{a: " * 20_000, 1, "nested more than 20 deep"),
    "keys of keys": ("? " * 20_000, 1, "nested more than 20 deep"),
    "a tag on wrong text": ("a: !!int abc", 1, "tags are not read"),
    "a tag that runs code": ("a: !!python/object/apply:os.system [ls]", 1, "tags are not read"),
    "a tag of one's own": ("a: 1\nb: !mine {c: 1}", 2, "tags are not read"),
    "a set": ("!!set {a, b}", 1, "tags are not read"),
    "a long tag": ("a: !" + "x" * 100_000, 1, "tags are not read"),
    "base 8 or 10": ("a: 010", 1, "'010' is 8-based to some programs"),
    "5,000 digits": ("a: " + "1" * 5000, 1, "a number of 5000 characters"),
    "5,000 digits and a point": ("a: " + "1" * 5000 + ".5", 1, "a number of 5002 characters"),
    "NUL": ("a: b\nc: \0", 2, r"the character '\x00'"),
    "NUL as an escape": ('a: "x\\0y"', 1, r"'x\x00y' holds a character that no name can have"),
    "half an emoji": ('a: "\\ud83d"', 1, "holds a character that no name can have"),
    "an escape behind Unicode": ('a: "\\U00110000"', 1, "an escape that is no character"),
    "an escape far behind Unicode": ('a: "\\UFFFFFFFF"', 1, "an escape that is no character"),
    "an escape sequence": ("a: \x1b[31m", 1, r"the character '\x1b'"),
    "a key twice": ("a: 1\nb: 2\na: 3", 3, "key 'a' stands twice (line 1)"),
    "a key twice, inside": ("a:\n  b: 1\n  b: 2", 3, "key 'b' stands twice (line 2)"),
    "a key twice in a list": ("- {b: 1,\n   b: 2}", 2, "key 'b' stands twice (line 1)"),
    "a list as key": ("[a]: 1", 1, "a key is a list or a mapping"),
    "a mapping as key": ("? {a: 1}\n: 2", 1, "a key is a list or a mapping"),
    "null as key": ("null: 1", 1, "key 'null' is not text"),
    "a number as key": ("a: {1: 2}", 1, "key '1' is not text"),
    "merged mappings": ("a: &a {b: 1}\nc:\n  <<: *a", 3, "'<<' merges no mappings here"),
    "two documents": ("a: 1\n---\nb: 2", 2, "a second document begins"),
    "a tab": ("a:\n\tb: 1", 2, "cannot start any token"),
    "YAML 2": ("%YAML 2.0\n---\na: 1", 1, "incompatible YAML document"),
    "100,000 values": ("[" + "a," * 100_000 + "]", 1, "more than 10000 values"),
    "10,000 anchors": ("".join(f"a{i}: &a{i} x\n" for i in range(10_000)), 5000, "more than 10000 values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_one_short_line_that_names_the_line(case, tmp_path):
    text, line, reason = REFUSED[case]
    (tmp_path / "a.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "a.yaml")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'a.yaml'}:{line}: ") and reason in message
    assert message.isprintable() and len(message) < len(str(tmp_path)) + 300


@pytest.mark.parametrize("text", ["a: &a [1, 2]\nb: *a\n", "a: &a {c: 1}\nb: [*a, *a]\n", "a: &a x\nb: *a\n"])
def test_an_alias_stands_for_its_value(text):
    assert parse_yaml(text) == yaml.safe_load(text)


def test_keys_know_their_lines(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbfa: 1\r\n\r\nb:\r\n  c: 2\r\n  d: [{e: 3}]\r\n")
    values, lines = read_yaml(tmp_path / "a.yaml")
    assert values == {"a": 1, "b": {"c": 2, "d": [{"e": 3}]}}
    assert lines == {("a",): 1, ("b",): 3, ("b", "c"): 4, ("b", "d"): 5, ("b", "d", 0, "e"): 5}


TEXTS = [*SCALARS, "010", "08", "0_1", "a: b", "# a", "<<", "a\nb", " a ", "\t", "ü", "\x1b[31m", "1e400",
         "1_0", "-", "?", "[a", "{a: b}", "*a", "&a", "!a", "%a", "@a", "`a", "'", '"', "---", "...",
         "\x85", "\u2028", "\ufeff"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_written_is_read_as_the_same_text(text):
    """By us and by any reader of YAML 1.1."""
    written = dump_yaml({"a": text, "b": {"c": [text]}})
    for read in (parse_yaml, yaml.safe_load):
        assert read(written) == {"a": text, "b": {"c": [text]}}


@pytest.mark.parametrize("value", [0, -5, 2**63, 3e-6, 1e20, -0.1, 1e-300, math.inf, True, False, None,
                                   [], {}])
def test_a_value_that_is_written_is_read_as_the_same_value(value):
    written = dump_yaml({"a": value})
    for read in (parse_yaml, yaml.safe_load):
        assert read(written)["a"] == value and type(read(written)["a"]) is type(value)


SPECIAL = {"a named pipe": lambda path: os.mkfifo(path), "a folder": lambda path: path.mkdir(),
           "a device": lambda path: path.symlink_to("/dev/zero"),
           "a socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path))}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_never_ends_is_refused(kind, linked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    path = type(tmp_path)("special.yaml")
    SPECIAL[kind](path)
    if linked:
        (tmp_path / "link.yaml").symlink_to(path)
        path = type(tmp_path)("link.yaml")
    with pytest.raises(UserError, match=rf"^{path}: is {kind}; a regular file is needed$"):
        read_yaml(path)


@pytest.mark.parametrize(("content", "reason"), [
    (b"a: caf\xe9", "is not UTF-8; save the file as UTF-8 text"),
    ("a: 1".encode("utf-16"), "is UTF-16; save the file as UTF-8 text"),
    (b"#" * 300_000, "has more than 262144 bytes, which no file of this kind has"),
])
def test_a_file_of_another_kind_is_refused(content, reason, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=f"{reason}$"):
        read_yaml(tmp_path / "a.yaml")


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    with (tmp_path / "a.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="has more than 262144 bytes"):
        read_yaml(tmp_path / "a.yaml")


def test_comments_alone_are_nothing(tmp_path):
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert read_yaml(tmp_path / "a.yaml") == ({}, {}) and parse_yaml("# nothing") is None
    with pytest.raises(YamlError):
        parse_yaml("a: b: c")
