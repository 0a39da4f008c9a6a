"""A message is one line, short and printable, whatever a user's text in it holds."""

import pytest

from utils.errors import UserError, one_line, quoted

HOSTILE = {"line breaks": "a\nb\r\nc\u2028d\x85e", "an escape sequence": "\x1b]0;owned\x07\x1b[2J",
           "NUL": "a\0b", "right to left": "\u202eevil",
           "a byte that is no UTF-8": b"caf\xe9".decode("utf-8", "surrogateescape"),
           "a long text": "x" * 10**6, "a long text of escapes": "\x1b" * 10**6}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_message_with_a_hostile_text_is_one_short_line(case):
    message = str(UserError(f"file.yaml:1: column '{HOSTILE[case]}' is missing; write it"))
    assert message.isprintable() and len(message) < 900
    assert message.startswith("file.yaml:1: column '") and message.endswith("' is missing; write it")


@pytest.mark.parametrize("case", HOSTILE)
def test_a_quoted_text_is_short(case):
    assert quoted(HOSTILE[case]).isprintable() and len(quoted(HOSTILE[case])) <= 140


def test_ordinary_texts_stay_as_they_are():
    for text in ("P", "it's", "Grüße, 日本語 🙂", "a 'quoted' \"one\"", "x" * 800):
        assert one_line(text) == text
    assert (quoted("P"), quoted("it's"), quoted(3), quoted(None)) == ("'P'", '"it\'s"', "3", "None")


def test_lines_are_those_that_were_given():
    assert str(UserError("two rows", "a:1: one\nfalse line", "a:2: two")) == (
        "two rows\na:1: one\\nfalse line\na:2: two")
