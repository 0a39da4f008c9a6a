"""The folder of a run: what may lie in it, and the lock that keeps a second run out of it."""

import fcntl
import json
import os
import socket
import stat
import time
from datetime import datetime
from pathlib import Path

from utils.errors import UserError

LOCK = "run.lock"
FILES = ("config.yaml", "config.tmp", "data.json", "data.tmp", "metrics.jsonl", "samples.jsonl",
         "samples.tmp", "train.log", "summary.json", "summary.tmp", "rejected_rows.jsonl",
         "rejected_rows.tmp", "broken_batch.jsonl", "wandb_id", LOCK)
FOLDERS = ("plots", "checkpoints", "tensorboard", "wandb", "final.tmp")
_SECONDS = 2.0  # a start that only looks holds the lock for a moment
_held: dict[str, object] = {}  # of the last claim: folder, process, descriptor


class _NoLocksError(Exception):
    """The file system cannot lock."""


def refuse_other_kinds(folder: Path) -> None:
    """Raise UserError for a folder in place of a file that the run writes, or the other way round.

    A pipe or device would stop the run for ever, or swallow what it writes.
    """
    for names, kind, fits in ((FILES, "file", stat.S_ISREG), (FOLDERS, "folder", stat.S_ISDIR)):
        for path in (folder / name for name in names):
            try:
                mode = path.stat().st_mode
            except FileNotFoundError:
                continue
            except OSError as error:  # links in a circle
                raise UserError(f"output_dir: '{path}' cannot be used ({error.strerror}); "
                                "remove it") from None
            if not fits(mode):
                raise UserError(f"output_dir: '{path}' is no {kind}, and the run writes a {kind} there; move "
                                "it away, or name another output_dir")


def refuse_running(folder: Path) -> None:
    """Raise UserError when another process has claimed the folder. Nothing is written."""
    if folder == claimed() or not (folder / LOCK).is_file():
        return  # closing the file would drop this process's own lock
    try:
        descriptor = _open(folder / LOCK, os.O_RDONLY)
        try:
            if not _locked(descriptor, fcntl.LOCK_SH):
                raise _in_use(folder, descriptor)
        except _NoLocksError:
            pass
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"output_dir: '{folder / LOCK}' cannot be read ({error.strerror})") from None


def claim(folder: Path) -> str | None:
    """Keep other runs out of the folder until this process ends, however it ends, or claims another.

    The lock is a POSIX record lock: it also works on NFS, and a forked child does not inherit it. It is lost
    when any descriptor of the file is closed, so nothing in the process may open the file again.

    Returns:
        None, or why the file system cannot lock.

    Raises:
        UserError: when another process has claimed it.
        OSError: when the file cannot be written.
    """
    path = folder / LOCK
    if claimed() is not None:
        if folder == claimed() and _same(path, _held["descriptor"]):
            return None
        os.close(_held["descriptor"])  # of another folder, or of one that was removed and made again
        _held.clear()
    until = time.monotonic() + _SECONDS
    while True:
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            locked = _locked(descriptor, fcntl.LOCK_EX)
        except _NoLocksError as error:
            os.close(descriptor)
            return str(error)
        if locked and _same(path, descriptor):
            break
        refusal = None if locked else _in_use(folder, descriptor)
        os.close(descriptor)
        if refusal and time.monotonic() > until:
            raise refusal
        time.sleep(0.05)
    _held.update(folder=folder, process=os.getpid(), descriptor=descriptor)
    who = {"process": os.getpid(), "host": socket.gethostname(),
           "since": datetime.now().isoformat(" ", "seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(who).encode(), 0)
    return None


def refuse_lost(folder: Path) -> None:
    """Raise UserError when the folder that this process has claimed is gone, or is another one by now."""
    if folder == claimed() and not _same(folder / LOCK, _held["descriptor"]):
        raise UserError(f"output_dir: '{folder}' was removed or replaced during the run, so what it saved is "
                        "lost; start again")


def claimed() -> Path | None:
    """The folder that this process has claimed. A forked one has claimed nothing."""
    return _held["folder"] if _held.get("process") == os.getpid() else None


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def _locked(descriptor: int, kind: int) -> bool:
    try:
        fcntl.lockf(descriptor, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows both for a lock that another process holds
        return False
    except OSError as error:  # ENOLCK, ENOTSUP, ...
        raise _NoLocksError(error.strerror) from None
    return True


def _same(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _in_use(folder: Path, descriptor: int) -> UserError:
    try:
        who = json.loads(os.pread(descriptor, 1000, 0))
        who = f"process {who['process']!r:.20} on {who['host']!r:.80}, since {who['since']!r:.40}"
    except (ValueError, LookupError, TypeError, RecursionError):
        who = "another process"
    return UserError(f"output_dir: '{folder}' is in use by a run that goes on ({who}); wait for it or stop "
                     "it, or name another output_dir")
