"""Rows on the disk in one form: each distinct text is stored once, and rows refer to texts by number.

Files of a stored set. The Arrow files are streams that are mapped into memory.
    texts.arrow       the texts
    rows.arrow        a row is a prompt, its completions and compared pairs; an example has 0 or 1 completion
    rejected.jsonl    rejected rows: `number`, `reason`, `row`
    meta.json         counts
"""

import json
import math
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from utils.data.columns import NOTES
from utils.data.conversations import messages_of, readable
from utils.data.layouts import Example, Ranking

_TEXTS = pa.schema([("text", pa.string())])
ROW_COLUMNS = {
    "pairs": pa.list_(pa.list_(pa.int32())),
    "label_scores": pa.list_(pa.float64()),
    "notes": pa.list_(pa.struct([(column, pa.string()) for column in NOTES])),
    "margins": pa.list_(pa.float64()),
}
_ROWS = pa.schema([
    ("prompt", pa.int64()),  # number of its text
    ("completions", pa.list_(pa.int64())),  # numbers of their texts
    *ROW_COLUMNS.items(),
    ("facts", pa.string()),  # as JSON
    ("columns", pa.string()),  # of a row of prompts: its other columns, as JSON
    ("number", pa.int64()),  # of the first source row that it was made from
    ("digest", pa.binary(16)),  # of the prompt's text
])
_BATCH_ROWS, _BATCH_CHARACTERS = 1000, 1 << 22  # kept in memory before they are written


def digest(text: str) -> bytes:
    """A hash of a text, 16 bytes. Texts with equal digests are taken to be equal."""
    return blake2b(text.encode(), digest_size=16).digest()


class SetWriter:
    """Writes a stored set; a context manager.

    It keeps digests and numbers in memory, and at most a few MB of texts and rows that are not written yet.
    """

    def __init__(self, folder: Path):
        self._folder, self.rejected_count, self.row_count = folder, 0, 0
        self._numbers: dict[bytes, int] = {}  # of texts, by digest
        self._digests: list[bytes] = []
        self._texts, self._characters, self._rows, self._row_characters = [], 0, [], 0

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
        """The number of a text. A new text is written."""
        text_digest = digest(text)
        number = self._numbers.get(text_digest)
        if number is None:
            number = self._numbers[text_digest] = len(self._digests)
            self._digests.append(text_digest)
            self._texts.append(text)
            self._characters += len(text)
            if self._characters > _BATCH_CHARACTERS:
                self._flush_texts()
        return number

    def row(self, number: int, prompt: int, completions: list[int], pairs=(), label_scores=None, notes=None,
            margins=None, facts=None, columns=None) -> None:
        """Write a row. `prompt` and `completions` are numbers of texts; `facts` and `columns` are JSON."""
        self._rows.append((prompt, completions, pairs, label_scores, notes, margins, facts, columns, number,
                           self._digests[prompt]))
        self._row_characters += len(facts or "") + len(columns or "")
        self.row_count += 1
        if len(self._rows) == _BATCH_ROWS or self._row_characters > _BATCH_CHARACTERS:
            self._flush_rows()

    def reject(self, number: int, reason: str, row) -> None:
        """Write a rejected row."""
        line = json.dumps({"number": number, "reason": reason, "row": row}, ensure_ascii=False, default=str)
        # lone surrogates become "?"
        self._rejected_file.write(line.encode("utf-8", "replace").decode() + "\n")
        self.rejected_count += 1

    def _flush_texts(self):
        self._text_file.write_batch(pa.record_batch([pa.array(self._texts, pa.string())], schema=_TEXTS))
        self._texts, self._characters = [], 0

    def _flush_rows(self):
        columns = zip(*self._rows, strict=True) if self._rows else [[]] * len(_ROWS)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, _ROWS, strict=True)]
        self._row_file.write_batch(pa.record_batch(arrays, schema=_ROWS))
        self._rows, self._row_characters = [], 0


class Pairs:
    """The compared pairs of one prompt in 32 bytes each, because a large set has millions of them."""

    def __init__(self, number: int):
        self.number = number  # of the prompt's first row
        self._values = array("q")  # better, worse, note; better, worse, note; ...: numbers of texts and notes
        self._margins = array("d")  # of each pair; NaN: not known

    def __len__(self):
        return len(self._margins)

    def add(self, better: int, worse: int, note: int, margin: float | None) -> None:
        self._values.extend((better, worse, note))
        self._margins.append(math.nan if margin is None else margin)

    def triples(self) -> list[tuple[int, int, tuple[int, float | None]]]:
        """(better, worse, (note, margin)) of each pair."""
        values = iter(self._values)
        return [(better, worse, (note, None if math.isnan(margin) else margin))
                for better, worse, note, margin in zip(values, values, values, self._margins, strict=True)]


class StoredSet:
    """A stored set.

    Args:
        label: names the set in messages. It is not stored, because the same content can be read from another
            path.
    """

    def __init__(self, folder: Path, label: str):
        self.folder, self.label = folder, label
        self.meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.table = read_arrow(folder / "rows.arrow")
        self._texts = read_arrow(folder / "texts.arrow").column("text")

    def text(self, number: int) -> str:
        return self._texts[number].as_py()

    def text_sizes(self) -> np.ndarray:
        """(T,) the bytes of each text."""
        return pc.binary_length(self._texts).to_numpy().astype(np.int64)

    def place(self, index: int) -> str:
        """The place of a row's first source row: `file:line`."""
        return f"{self.label}:{self.table.column('number')[index].as_py()}"

    def row(self, index: int) -> Example | Ranking:
        """A row with its texts; a Ranking in a set of rankings or ratings."""
        names = [name for name in self.table.column_names if name != "digest"]
        row = {name: self.table.column(name)[index].as_py() for name in names}
        prompt = readable(self.text(row["prompt"]))
        completions = [self.text(number) for number in row["completions"]]
        if self.meta["kind"] not in ("rankings", "ratings"):
            facts, columns = (row[name] and json.loads(row[name]) for name in ("facts", "columns"))
            return Example(prompt, completions[0] if completions else None, facts, columns)
        pairs, notes = [tuple(pair) for pair in row["pairs"]], row["notes"]
        if notes:  # Arrow fills in None for every note that is missing
            notes = [{name: value for name, value in note.items() if value is not None} for note in notes]
        return Ranking(prompt, completions, pairs, row["label_scores"], notes, row["margins"])

    def messages(self, index: int) -> list[dict] | None:
        """The conversation that a row's prompt is; None: it is plain text."""
        return messages_of(self.prompt(index))

    def prompt(self, index: int) -> str:
        """A row's prompt as `utils/data/conversations.py` stores it."""
        return self.text(self.table.column("prompt")[index].as_py())

    def rejected(self) -> Iterator[dict]:
        """The rejected rows: `place` (`file:line`), `reason`, `row`."""
        with (self.folder / "rejected.jsonl").open(encoding="utf-8") as file:
            for line in file:
                finding = json.loads(line)
                place = f"{self.label}:{finding['number']}"
                yield {"place": place, "reason": finding["reason"], "row": finding["row"]}


def read_arrow(path: Path) -> pa.Table:
    """A table whose columns stay on the disk until they are used."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
