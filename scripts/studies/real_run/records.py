"""Files of JSON that a run leaves: what is known so far, whole after a kill."""

import json
from pathlib import Path


class Figures(dict):
    """What is known so far, also in real.json of a run."""

    def __init__(self, out: Path):
        self.path = out / "real.json"
        super().__init__(read_json(self.path) if self.path.is_file() else {})

    def add(self, **more) -> None:
        self.update(more)
        write_json(self.path, self)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict) -> None:
    """A killed run leaves the file of before, or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    new.replace(path)
