"""Every change that a process makes below a folder, and its death before one of them.

Python tells an audit hook of each file that is opened, renamed or removed, before it happens. Files that
safetensors and torch write themselves are not among these, but what comes before and after them is.
"""

import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

# how a process dies; the last two also change what it leaves
KILLED = "killed"  # between two operations
TORN = "torn"  # while it wrote the last file: half of that is there
POWER = "power loss"  # nothing is left of what was not synced
HOW = (KILLED, TORN, POWER)

# event -> which of its arguments are paths
_CHANGES = {"os.rename": (0, 1), "os.remove": (0,), "os.rmdir": (0,), "os.mkdir": (0,), "os.truncate": (0,),
            "os.link": (0, 1), "os.symlink": (1,), "open": (0,)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Operation(NamedTuple):
    """A change to a file or folder: the event, the path below the folder, and whether a file was written
    since the operation before, which may then be there in half.
    """

    event: str
    path: str
    written: bool


class Operations:
    """Counts the operations of this process below `folder`, as the audit hook that it installs.

    Args:
        dies_at: number of the operation, from 0 on, before which the process dies; None: it lives.
        how: one of `HOW`.
    """

    def __init__(self, folder: Path, dies_at: int | None = None, how: str = KILLED):
        self.folder, self.dies_at, self.how = str(folder), dies_at, how
        self.done: list[Operation] = []
        self._busy, self._sizes = False, self._files()
        self._synced = dict(self._sizes)  # path -> bytes that a loss of power leaves
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple) -> None:
        if event not in _CHANGES or self._busy:
            return
        self._busy = True  # what follows makes events, too
        try:
            paths = [path for place in _CHANGES[event] if (path := self._below(event, args, place))]
            if not paths:
                return
            if event == "open" and not args[2] & _WRITES:
                if args[1] is None and os.path.isfile(paths[0]):  # os.open: durable.fsync does that
                    self._synced[paths[0]] = os.path.getsize(paths[0])
                return
            self._operation(event, args, paths)
        finally:
            self._busy = False

    def end(self) -> None:
        """One more: the process has come to its end."""
        self._busy = True
        self._operation("end", (), [self.folder])

    def _below(self, event, args, place) -> str | None:
        """The path of an event when it is below the folder."""
        path = args[place]
        if isinstance(path, int):  # a file that is open already
            return None
        path = os.fsdecode(path)
        descriptors = [arg for arg in args[len(_CHANGES[event]):] if isinstance(arg, int) and arg >= 0]
        if not os.path.isabs(path) and event in ("os.remove", "os.rmdir") and descriptors:
            path = os.path.join(os.readlink(f"/proc/self/fd/{descriptors[0]}"), path)
        path = os.path.abspath(path)
        return path if path.startswith(self.folder + os.sep) else None

    def _operation(self, event, args, paths) -> None:
        sizes = self._files()
        written = [path for path, size in sizes.items() if size and self._sizes.get(path) != size]
        if len(self.done) == self.dies_at:
            self._die(written, sizes)
        self._sizes = sizes
        self.done.append(Operation(event, os.path.relpath(paths[0], self.folder), bool(written)))
        if event == "open" and args[2] & os.O_TRUNC:
            self._synced[paths[0]] = self._sizes[paths[0]] = 0
        if event == "os.rename" and len(paths) == 2:
            for known in (self._synced, self._sizes):
                for path in [path for path in known if (path + os.sep).startswith(paths[0] + os.sep)]:
                    known[paths[1] + path[len(paths[0]):]] = known.pop(path)

    def _files(self) -> dict[str, int]:
        return {os.path.join(place, name): os.path.getsize(os.path.join(place, name))
                for place, _, names in os.walk(self.folder) for name in names
                if os.path.isfile(os.path.join(place, name))}

    def _die(self, written, sizes) -> None:
        if self.how == TORN:
            for path in written[-1:]:
                before = self._sizes.get(path, 0)
                os.truncate(path, before + (sizes[path] - before) // 2 if before < sizes[path]
                            else sizes[path] // 2)
        if self.how == POWER:
            for path, size in sizes.items():
                os.truncate(path, min(size, self._synced.get(path, 0)))
        os.kill(os.getpid(), signal.SIGKILL)
