"""Errors that are not a bug: a disk that takes no more, a folder that is gone, a process that is lost."""

import re
import threading

from utils.errors import UserError
from utils.runs.folder import claimed, refuse_lost

# torch and safetensors raise other types than OSError, with the reason in the text only or not at all
_WRITERS = re.compile(r"(?P<reason>[^:()]+) \(os error \d+\)|No space left|PytorchStreamWriter failed|"
                      "enforce fail at inline_container|basic_ios::clear|"
                      "(?P<gone>Parent directory .* does not exist)")
_UNKNOWN = "no space left on the disk, or a limit on the size of files"


def broken_output(error: BaseException) -> str | None:
    """Why a file cannot be written, in one line with its path; None for any other error."""
    system = _system_error(error)
    text = _WRITERS.search(str(error))
    if system is None and text is None:
        return None
    reason = system.strerror if system is not None else (text["reason"] or text["gone"] or _UNKNOWN).strip()
    path = system.filename if system is not None else None
    if (folder := claimed()) is None:
        return f"{path or 'output'}: {reason}"
    try:
        refuse_lost(folder)
    except UserError as lost:
        return str(lost)
    return f"{path or folder}: {reason}; what was saved so far is intact"


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the operating system that is this one, or the reason of it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
            return error
        # torch's writer raises one of its own while it ends
        error = error.__cause__ or error.__context__ if _WRITERS.search(str(error)) else None
    return None


def lost_process(error: BaseException) -> str | None:
    """How the communication with another process failed; None for any other error."""
    import torch

    # gloo raises RuntimeError, with the reason in the text only
    known = "Connection closed by peer|Connection reset by peer|Broken pipe|Timed out waiting"
    text = re.search(known, str(error))
    if text or isinstance(error, torch.distributed.DistError):
        return text[0] if text else type(error).__name__
    return None


def errors_of_threads(arguments) -> None:
    """`threading.excepthook`: the threads of experiment trackers meet the same disk, and say a traceback."""
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)
