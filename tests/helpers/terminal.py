"""A pseudo-terminal of a given width, and what a person sees on it."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n\b])|([^\x1b\r\n\b]+)|(.)", re.DOTALL)


class Screen:
    """A terminal with endless lines: text, line feeds, returns, cursor up, erasing; colours are dropped."""

    def __init__(self, columns: int):
        self.columns, self.rows, self.row, self.column = columns, [[]], 0, 0
        self.wrapped = set()  # rows that the terminal began because a line was full

    def feed(self, text: str) -> None:
        for numbers, command, control, words, _ in _TOKEN.findall(text):
            if command == "A":
                self.row = max(0, self.row - int(numbers or 1))
            elif command == "K":  # from the cursor to the end of the line
                del self.rows[self.row][self.column :]
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self._down()
            for letter in words:
                if self.column == self.columns:
                    self._down()
                    self.column = 0
                    self.wrapped.add(self.row)
                line = self.rows[self.row]
                line += " " * (self.column + 1 - len(line))
                line[self.column] = letter
                self.column += 1

    def _down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])

    @property
    def rows_of_text(self) -> list[str]:
        """What stands on the screen."""
        return ["".join(row).rstrip() for row in self.rows]

    @property
    def lines(self) -> list[str]:
        """The same, with what did not fit into a row joined to it again."""
        lines = []
        for number, row in enumerate(self.rows):
            if number in self.wrapped:
                lines[-1] += "".join(row)
            else:
                lines.append("".join(row))
        return [line.rstrip() for line in lines]


@contextmanager
def terminal(columns: int) -> Iterator[tuple[int, Screen]]:
    """The file descriptor of a new terminal, and its screen, which is complete when the block has ended."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    screen, parts = Screen(columns), []

    def read():
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield theirs, screen
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
        screen.feed(b"".join(parts).decode())


def run_in_terminal(command: list[str], columns: int, **more) -> tuple[int, Screen]:
    """Exit status of a command that runs in a terminal, and its screen. `more` goes to `subprocess.call`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    with terminal(columns) as (end, screen):
        status = subprocess.call(command, stdin=end, stdout=end, stderr=end, start_new_session=True,
                                 env={**environment, "TERM": "xterm-256color"}, **more)
    return status, screen
