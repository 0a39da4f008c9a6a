"""Rows of JSON: one object a line, or one list of objects."""

import codecs
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.data.unpacking import limited_lines
from utils.errors import UserError, quoted

NOT_UTF8 = "is not UTF-8; save the file as UTF-8 text"
_MOST_DEPTH = 100  # a row that is deeper could be read, but not written: Python's limit is near 1,000


class _Decoder(json.JSONDecoder):
    """Remembers a name that stands twice in an object: Python would take its last value and say nothing."""

    def __init__(self):
        super().__init__(object_pairs_hook=self._object)
        self.twice: str | None = None  # a name of the last value that was decoded

    def _object(self, pairs: list[tuple]) -> dict:
        row = dict(pairs)
        if len(row) < len(pairs):
            self.twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        return row


_DECODER = _Decoder()


class BadRow(NamedTuple):
    """A part of a file that is not a row."""

    reason: str  # what is wrong with it
    raw: object  # as much of it as could be read


def too_long(most: int) -> str:
    return f"has more than {most} bytes; shorten it, or raise max_row_bytes"


def decoded(line: bytes, number: int) -> str | BadRow:
    """A line as text. (A file in text mode decodes ahead, so the number of a bad line would not be known.)"""
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")  # some programs write a byte order mark
    except UnicodeDecodeError:
        return BadRow(NOT_UTF8, line.decode("utf-8", "replace"))


def read_json_lines(file: BinaryIO, path: Path, most: int) -> Iterator[tuple[int, dict | BadRow]]:
    """One object from each line. Blank lines are skipped."""
    for number, line, whole in limited_lines(file, most):
        if not whole:
            yield number, BadRow(too_long(most), line.decode("utf-8", "replace"))
            continue
        if not line or line.isspace():
            continue
        text = decoded(line.rstrip(b"\r\n"), number)
        yield number, text if isinstance(text, BadRow) else _object(parsed(text, "one object a line is "
                                                                           "needed"), text)


def read_json(file: BinaryIO, path: Path, most: int) -> Iterator[tuple[int, dict | BadRow]]:
    """The objects of one list, or one from each line as in a .jsonl file."""
    begin = file.peek(1 << 12)
    if begin.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        return _read_list(_Text(file, path), most)
    return read_json_lines(file, path, most)


def parsed(text: str, needed: str):
    """The value of a JSON text, or a `BadRow`.

    Args:
        needed: what the message says is needed there.
    """
    _DECODER.twice = None
    try:
        value = _DECODER.decode(text)
    # ValueError: not JSON, or a number of thousands of digits. RecursionError: thousands of brackets.
    except (ValueError, RecursionError) as error:
        return BadRow(f"is not JSON ({_problem(error, getattr(error, 'colno', None))}); {needed}", text)
    return _checked(value, text)


def _checked(value, text: str):
    """The value that was decoded last if it can be written and tokenised, else a `BadRow`."""
    if _DECODER.twice is not None:
        return BadRow(f"names {quoted(_DECODER.twice)} twice; leave one of the two out", text)
    if _may_hold_half(text) and _holds_half(value):
        return BadRow(_HALF_EMOJI, text)
    if text.count("[") + text.count("{") > _MOST_DEPTH and _is_deep(value):
        return BadRow(f"is nested more than {_MOST_DEPTH} deep", text)
    return value


def _problem(error, column) -> str:
    """Python's error for a text that is not JSON, reworded for the author of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {column}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number of too many digits"


# JSON escapes an emoji as a pair of surrogates. Half of a pair is not valid text, and tokenizers refuse it.
_HALF_EMOJI = "holds half of an emoji (a lone surrogate such as \\ud83d); remove it"


def _may_hold_half(text: str) -> bool:
    """A fast check of the JSON text, which few texts pass."""
    return "\\ud" in text or "\\uD" in text


def _holds_half(value) -> bool:
    """Whether a string somewhere in a value has a lone surrogate."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except RecursionError:  # too deep, which is found next
        return False
    return False


def _is_deep(value) -> bool:
    """Whether a value has lists or objects in each other deeper than _MOST_DEPTH."""
    level = [value]
    for _ in range(_MOST_DEPTH):
        level = [inner for outer in level if isinstance(outer, dict | list)
                 for inner in (outer.values() if isinstance(outer, dict) else outer)]
    return any(isinstance(value, dict | list) for value in level)


def _object(row, raw) -> dict | BadRow:
    """The row if it is a JSON object (or a `BadRow` already), else a `BadRow`."""
    if isinstance(row, dict | BadRow):
        return row
    return BadRow("must be a JSON object such as {\"prompt\": ..., \"completion\": ...}", raw)


# ------------------------------------------------------------------------------------------------------ lists


class _Text:
    """The text of a file from a place in it on, with the place's line and column; read as it is needed."""

    def __init__(self, file: BinaryIO, path: Path):
        self._file, self._decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.path, self.text, self.at, self.ended = path, "", 0, False
        self._line, self._column = 1, 1  # of the text's first character

    def read(self, size: int) -> None:
        """Read some more, and forget what lies before the place."""
        (self._line, self._column), self.text, self.at = self.place(self.at), self.text[self.at :], 0
        content = self._file.read(size)
        self.ended = not content
        try:
            self.text += self._decoder.decode(content, final=self.ended)
        except UnicodeDecodeError as error:
            line = self.place(len(self.text))[0] + error.object.count(b"\n", 0, error.start)
            raise UserError(f"{self.path}:{line}: {NOT_UTF8}") from None

    def place(self, at: int) -> tuple[int, int]:
        """Line and column of a character of the text."""
        lines = self.text.count("\n", 0, at)
        column = at - self.text.rfind("\n", 0, at) if lines else self._column + at
        return self._line + lines, column

    def next(self) -> str:
        """The next character that is no white space, which stays; "" at the end."""
        while True:
            rest = len(self.text)
            while self.at < rest and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < rest or self.ended:
                return self.text[self.at : self.at + 1]
            self.read(1 << 16)

    def refuse(self, error, at: int | None = None) -> UserError:
        """The error that a text which is not JSON becomes."""
        line, column = self.place(self.at if at is None else at)
        return UserError(f"{self.path}:{line}: is not JSON ({_problem(error, column)}); a list of objects is "
                         "needed")


def _read_list(text: _Text, most: int) -> Iterator[tuple[int, dict | BadRow]]:
    """The values of a list, one at a time in memory."""
    text.next()
    text.at += 1  # behind [
    number, separator = 0, ","
    if text.next() == "]":
        separator = "]"
        text.at += 1
    while separator == ",":
        number += 1
        text.next()
        value, raw = _next_value(text, most)
        value = _checked(value, raw)
        yield number, _object(value, value)
        separator = text.next()
        if separator not in (",", "]") or not separator:
            raise text.refuse(json.JSONDecodeError("Expecting ',' delimiter", "", 0))
        text.at += 1
    if text.next():
        raise text.refuse(json.JSONDecodeError("Extra data", "", 0))


def _next_value(text: _Text, most: int):
    """The value that begins at the place, and its JSON text; the place moves behind it."""
    while True:
        _DECODER.twice = None
        try:
            value, end = _DECODER.raw_decode(text.text, text.at)
        except json.JSONDecodeError as error:
            # the text may end inside of the value: in a string, or in its last characters
            inside = error.msg.startswith("Unterminated") or error.pos > len(text.text) - 12
            if text.ended or not inside:
                raise text.refuse(error, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise text.refuse(error) from None
        else:
            if end - text.at <= most and (end < len(text.text) or text.ended):  # else a number may go on
                raw, text.at = text.text[text.at : end], end
                return value, raw
        if len(text.text) - text.at > most:
            raise UserError(f"{text.path}:{text.place(text.at)[0]}: a row {too_long(most)}")
        text.read(max(1 << 16, len(text.text)))  # twice as much: a value is not tried more often than needed
