"""Rows on the disk in one form, whatever their layout was: each text once, and rows that point at texts.

Files of a stored set, all Arrow streams that are mapped into memory, or JSON:
    texts.arrow       text
    rows.arrow        a row is a prompt with its completions and the compared pairs; an example has one completion or none
    rejected.jsonl    rows that are none: `number`, `reason`, `row`
    meta.json         counts
"""

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa

from utils.data.layouts import NOTES, Example, Ranking

_TEXTS = pa.schema([("text", pa.string())])
ROW_COLUMNS = {
    "pairs": pa.list_(pa.list_(pa.int32())),
    "label_scores": pa.list_(pa.float64()),
    "notes": pa.list_(pa.struct([(column, pa.string()) for column in NOTES])),
}
_ROWS = pa.schema([
    ("prompt", pa.int64()),  # number of a text
    ("completions", pa.list_(pa.int64())),
    *ROW_COLUMNS.items(),
    ("facts", pa.string()),  # as JSON
    ("number", pa.int64()),  # of the (first) row it was made of
    ("digest", pa.binary(16)),  # of the prompt
])
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 22


def digest(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return blake2b(text.encode(), digest_size=16).digest()


class SetWriter:
    """Writes a stored set; a context manager. In memory are hashes and numbers, and a few MB of what is not written yet."""

    def __init__(self, folder: Path):
        self._folder, self.rejected_count, self.row_count = folder, 0, 0
        self._numbers: dict[bytes, int] = {}  # of texts, by digest
        self._digests: list[bytes] = []
        self._texts, self._characters, self._rows = [], 0, []

    def __enter__(self):
        self._text_file = pa.ipc.new_stream(str(self._folder / "texts.arrow"), _TEXTS)
        self._row_file = pa.ipc.new_stream(str(self._folder / "rows.arrow"), _ROWS)
        self._rejected_file = (self._folder / "rejected.jsonl").open("w", encoding="utf-8")
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self._flush_texts()
            self._flush_rows()
        for file in (self._text_file, self._row_file, self._rejected_file):
            file.close()

    def text(self, text: str) -> int:
        """The number of a text, which is written when it is new."""
        mark = digest(text)
        number = self._numbers.get(mark)
        if number is None:
            number = self._numbers[mark] = len(self._digests)
            self._digests.append(mark)
            self._texts.append(text)
            self._characters += len(text)
            if self._characters > _BATCH_CHARACTERS:
                self._flush_texts()
        return number

    def row(self, number: int, prompt: int, completions: list[int], pairs=(), label_scores=None, notes=None, facts=None) -> None:
        """Write a row; texts by their numbers."""
        self._rows.append((prompt, completions, pairs, label_scores, notes, facts, number, self._digests[prompt]))
        self.row_count += 1
        if len(self._rows) == _BATCH_ROWS:
            self._flush_rows()

    def reject(self, number: int, reason: str, row) -> None:
        """Write down a row that is none."""
        line = json.dumps({"number": number, "reason": reason, "row": row}, ensure_ascii=False, default=str)
        self._rejected_file.write(line.encode("utf-8", "replace").decode() + "\n")
        self.rejected_count += 1

    def _flush_texts(self):
        self._text_file.write_batch(pa.record_batch([pa.array(self._texts, pa.string())], schema=_TEXTS))
        self._texts, self._characters = [], 0

    def _flush_rows(self):
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(_ROWS)
        self._row_file.write_batch(pa.record_batch([pa.array(column, field.type) for column, field
                                                    in zip(columns, _ROWS, strict=True)], schema=_ROWS))
        self._rows = []


class Pairs:
    """The compared pairs of one prompt, as numbers: better, worse, note."""

    def __init__(self, number: int):
        self.number, self.values = number, array("q")

    def __len__(self):
        return len(self.values) // 3

    def triples(self) -> list[tuple[int, int, int]]:
        found = iter(self.values)
        return list(zip(found, found, found, strict=True))


class StoredSet:
    """A set that is on the disk. `label` is what its rows are named by in messages: it may have moved since it was read."""

    def __init__(self, folder: Path, label: str):
        self.folder, self.label = folder, label
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.table = read_arrow(folder / "rows.arrow")
        self._texts = read_arrow(folder / "texts.arrow").column("text")

    def text(self, number: int) -> str:
        return self._texts[number].as_py()

    def place(self, index: int) -> str:
        """Where the row (the first one of its prompt) stands: `file:line`."""
        return f"{self.label}:{self.table.column('number')[index].as_py()}"

    def row(self, index: int) -> Example | Ranking:
        """The row as the scripts know it; its kind is that of the set."""
        row = {name: self.table.column(name)[index].as_py() for name in self.table.column_names if name != "digest"}
        prompt, completions = self.text(row["prompt"]), [self.text(number) for number in row["completions"]]
        if self.meta["kind"] in ("rankings", "ratings"):
            notes = row["notes"] and [{name: value for name, value in note.items() if value is not None} for note in row["notes"]]
            return Ranking(prompt, completions, [tuple(pair) for pair in row["pairs"]], row["label_scores"], notes)
        return Example(prompt, completions[0] if completions else None, row["facts"] and json.loads(row["facts"]))

    def rejected(self) -> Iterator[dict]:
        """Rows that are none: `place`, `reason`, `row`."""
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as file:
            for line in file:
                found = json.loads(line)
                yield {"place": f"{self.label}:{found['number']}", "reason": found["reason"], "row": found["row"]}


def read_arrow(path: Path) -> pa.Table:
    """A table whose columns stay on the disk until they are looked at."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
