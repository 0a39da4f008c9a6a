"""Names of files and models: where a relative path is looked up, and what can be a name on the hub."""

import difflib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def find_local(path: str) -> Path | None:
    """The file or folder of that name, from the current folder else from the project's; None: in neither."""
    try:
        return next((found for found in (Path(path).expanduser(), PROJECT / path) if found.exists()), None)
    except (OSError, RuntimeError):  # the name is too long for a file, or its ~user does not exist
        return None


def nearest(path: str) -> str | None:
    """The existing file or folder whose name, in the same folder, is the most like that of a missing one."""
    folder, _, name = path.rpartition("/")
    there = find_local(folder or ".")
    try:
        names = {entry.name.split(".")[0]: entry.name for entry in there.iterdir()} if there else {}
    except OSError:  # no folder, or not ours to read
        return None
    # without endings, which all files of a folder may have in common
    match = difflib.get_close_matches(name.split(".")[0], names, n=1, cutoff=.75)
    return f"{path.removesuffix(name)}{names[match[0]]}" if match else None


def is_hub_name(name: str) -> bool:
    """Whether a name that is not found here may be on the hub: owner/name, where owner is no folder here."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return False
    owner = name.split("/")[0]
    return owner != "outputs" and find_local(owner) is None
