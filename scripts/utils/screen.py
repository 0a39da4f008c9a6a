"""A terminal or a pipe may go away while a script runs: `| head -1`, a lost connection."""

import errno
import os
import sys


class Screen:
    """A stream like the one it is made of, but what is written after its reader has gone is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def outlive_readers() -> None:
    """Let the script end as it would, with its own exit status, when nobody reads what it prints."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # started with `2>&-`; its number must not become that of a file
            setattr(sys, name, open(os.devnull, "w"))
        elif stream in (sys.__stdout__, sys.__stderr__):  # not one that a test put there
            setattr(sys, name, Screen(stream))
