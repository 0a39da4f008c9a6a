"""Names of files and models: where a relative path is looked up, and what can be a name on the hub."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def find_local(path: str) -> Path | None:
    """The file or folder of that name, from the current folder else from the project's; None: in neither."""
    try:
        return next((found for found in (Path(path).expanduser(), PROJECT / path) if found.exists()), None)
    except (OSError, RuntimeError):  # the name is too long for a file, or its ~user does not exist
        return None


def is_hub_name(name: str) -> bool:
    """Whether a name that is not found here may be on the hub: owner/name, where owner is no folder here."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return False
    owner = name.split("/")[0]
    return owner != "outputs" and find_local(owner) is None
