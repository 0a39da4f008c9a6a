"""Files of JSON that a run writes and reads again: one object, or one in each line."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from utils.durable import move


def append_rows(path: Path, rows: Iterable[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_objects(path: Path) -> list[dict]:
    """All objects of a .jsonl file, none if it is not there. A line that a kill left half-written is none."""
    return [row for row in map(_object, _lines(path)) if row is not None]


def read_whole_rows(path: Path) -> list[dict]:
    """Rows of a metrics.jsonl: as `read_objects`, and a row without a step is none either."""
    return [row for row in map(_row, _lines(path)) if row is not None]


def broken_lines(path: Path) -> int:
    """How many lines `read_whole_rows` leaves out."""
    return sum(_row(line) is None for line in _lines(path))


def _lines(path):
    return path.read_bytes().splitlines() if path.exists() else []


def _object(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8
        return None
    return row if isinstance(row, dict) else None


def _row(line: bytes) -> dict | None:
    row = _object(line)
    return row if row is not None and type(row.get("step")) is int else None


def end_line(path: Path) -> None:
    """End a line that a killed run left half-written, so that the next row stands on its own."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    move(temporary, path)
