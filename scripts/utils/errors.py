"""The error that a user's mistake becomes, and texts of a user in messages."""

_LINE = 800  # characters of a line of a message
_QUOTED = 120  # characters of a user's text in a message


class UserError(Exception):
    """A mistake in what the user gave us: `launch.start` prints it, and exits with status 2.

    Args:
        lines: the message. A text of the user in it cannot begin a line of its own, write to the terminal, or
            fill the screen: see `one_line`.
    """

    def __init__(self, *lines):
        super().__init__("\n".join(map(one_line, lines)))


def one_line(text) -> str:
    """The text with control characters as escapes. A line that is too long loses its middle."""
    return cut(escaped(cut(str(text), _LINE)), _LINE)


def quoted(value) -> str:
    """A value of the user for a message: in Python's spelling, and short."""
    return cut(repr(cut(value, _QUOTED) if isinstance(value, str) else value), _QUOTED + 10)


def cut(text: str, most: int) -> str:
    """At most so many characters of a text, from its start and its end."""
    return text if len(text) <= most else f"{text[: most - most // 4]} ... {text[-(most // 4):]}"


def escaped(text: str) -> str:
    """The text with everything as an escape that a terminal would act on or could not print."""
    return text if text.isprintable() else "".join(
        letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
