"""The data of a run: every set that its configuration names, read, checked and tokenised before a weight is
loaded.

`layouts.py` says what a row means, `validation.py` reads, `tokens.py` tokenises; both keep their results on
the disk. What the scripts hold are numbers of rows.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from utils.config import UserError
from utils.data.drops import drop_long, refuse_many_dropped
from utils.data.layouts import Example, Ranking
from utils.data.report import DataReport
from utils.data.sources import sources_of
from utils.data.store import StoredSet
from utils.data.tokens import TOO_LONG, cannot_fit, token_rows
from utils.data.validation import read_set, refuse_findings
from utils.input_files import ROW_BYTES

FEW = 10  # held-out rows whose figures say little


class Tokenised(NamedTuple):
    """Examples with their token ids; a completion ends with EOS. Columns of a `datasets` table stay on the
    disk.
    """

    examples: Sequence[Example]
    prompts: Sequence[list[int]]
    completions: Sequence[list[int]] | None


class Rows(Sequence):
    """Rows of one or several stored sets, read from the disk when they are asked for: `Example`s or
    `Ranking`s.

    Args:
        sets: what is mixed.
        tokens: the same rows as token ids, a table for each set; None where only text is wanted.
        weights: how often the rows of each set are to be taken in training.
        indices: (N,) rows, counted through all sets; None: all.
    """

    def __init__(self, sets: list[StoredSet], tokens: list[Dataset] | None, weights: list[float],
                 indices=None):
        self.sets, self.tokens, self.weights = sets, tokens, weights
        self.starts = np.cumsum([0] + [stored.table.num_rows for stored in sets])
        self.indices = np.arange(self.starts[-1]) if indices is None else np.asarray(indices, dtype=np.int64)

    def select(self, indices) -> "Rows":
        """Some of these rows by their places among them, in that order; or those where a mask is True."""
        return Rows(self.sets, self.tokens, self.weights, self.indices[indices])

    def first(self, count: int) -> "Rows":
        """The first rows, at most so many; of a mixture the first of each set, in proportion to what there is
        of it.
        """
        owners = self.owners()
        ends = np.cumsum(np.bincount(owners, minlength=len(self.sets)))
        shares = np.diff(ends * min(count, len(self)) // len(self), prepend=0)
        return (self.select(np.concatenate([np.flatnonzero(owners == owner)[:share]
                                            for owner, share in enumerate(shares)])))

    def once(self) -> "Rows":
        """Each of these rows once, whatever the weight of its set."""
        return Rows(self.sets, self.tokens, self.weights, np.unique(self.indices))

    def owners(self) -> np.ndarray:
        """(N,) the number of the set that each row is from."""
        return np.searchsorted(self.starts, self.indices, side="right") - 1

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.select(index)
        stored, row = self._find(index)
        return stored.row(row)

    def __iter__(self) -> Iterator[Example | Ranking]:
        return (self[index] for index in range(len(self)))

    def _find(self, index: int) -> tuple[StoredSet, int]:
        number = int(self.indices[index])
        owner = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sets[owner], number - int(self.starts[owner])

    def place(self, index: int) -> str:
        """Where a row stands, `file:line`; of a group the first of its rows."""
        stored, row = self._find(index)
        return stored.place(row)

    def messages(self, index: int) -> list[dict] | None:
        """The conversation that a row's prompt is; None: it is plain text."""
        stored, row = self._find(index)
        return stored.messages(row)

    def stored_prompt(self, index: int) -> str:
        """A row's prompt as `utils/data/conversations.py` stores it."""
        stored, row = self._find(index)
        return stored.prompt(row)

    def prompts(self) -> np.ndarray:
        """(N,) 16 bytes that stand for each row's prompt."""
        marks = [mark for stored in self.sets for mark in stored.table.column("digest").to_pylist()]
        return np.array(marks, dtype=object)[self.indices]

    def weighed(self, seed: int) -> "Rows":
        """The rows as often as the weights of their sets say; where a part of a set is taken, `seed` says
        which.
        """
        if all(weight == 1 for weight in self.weights):
            return self
        parts = []
        for number, weight in enumerate(self.weights):
            own = np.flatnonzero((self.indices >= self.starts[number])
                                 & (self.indices < self.starts[number + 1])).tolist()
            part = random.Random(f"{seed}-{number}").sample(own, round(len(own) * (weight % 1)))
            parts += own * int(weight) + sorted(part)
        return self.select(np.array(parts, dtype=np.int64))

    def dataset(self) -> Dataset:
        """The rows as token ids: the table of `utils/data/tokens.py`, which stays on the disk."""
        table = self.tokens[0] if len(self.tokens) == 1 else concatenate_datasets(self.tokens)
        return table if np.array_equal(self.indices, np.arange(len(table))) else table.select(self.indices)

    def finding_count(self) -> int:
        """How many rows cannot be used: those that are none, and those whose prompt cannot fit."""
        unfit = np.count_nonzero(self.token_column("cut") == TOO_LONG) if self.tokens else 0
        return sum(stored.meta["rejected"] for stored in self.sets) + int(unfit)

    def findings(self, config) -> Iterator[dict]:
        """These rows: `place`, `reason`, `row`."""
        for stored in self.sets:
            yield from stored.rejected()
        for index in np.flatnonzero(self.token_column("cut") == TOO_LONG).tolist() if self.tokens else ():
            yield {"place": self.place(index), "reason": cannot_fit(config.max_prompt_tokens),
                   "row": self[index]._asdict()}

    def token_column(self, name: str) -> np.ndarray:
        """(N,) a column of numbers of the token table, such as `length`, `longest` or `cut`."""
        return np.concatenate([table.data.column(name).to_numpy() for table in self.tokens])[self.indices]


class NamedSet(NamedTuple):
    """A data set that a configuration names: the value of its key, and what its rows are (see `read_set`)."""

    value: object
    kind: str
    max_completion_tokens: int | None = None  # rows with a longer completion are dropped; None: none is
    turns: bool = False  # whether all answers of a conversation are to be learnt, see `token_rows`


def load_data(config, named: dict[str, NamedSet], tokenizer, report: DataReport,
              limits: dict | None = None) -> dict[str, Rows]:
    """Every set that a configuration names, checked and tokenised.

    Args:
        named: configuration key -> its set. A key whose value is none is left out.
        tokenizer: None where only text is wanted.
        report: gets what was dropped, and the figures.
        limits: of rankings, see `read_set`.

    Raises:
        UserError: with the findings in all of them, unless `on_bad_rows` is skip; or when nothing is left of
            one, or more is dropped of it than `max_dropped_share`.
    """
    loaded = {}
    for field, (value, kind, _, turns) in named.items():
        if value is not None:
            sources = sources_of(value)
            own = limits or {} if kind == "rankings" else {}
            sets = [read_set(source, field, kind, config.max_row_bytes, **own) for source in sources]
            tokens = (tokenizer and [token_rows(stored, tokenizer, config.max_prompt_tokens, turns)
                                     for stored in sets])
            loaded[field] = Rows(sets, tokens, [source.weight for source in sources])
    if config.on_bad_rows == "error":
        refuse_findings((one for rows in loaded.values() for one in rows.findings(config)),
                        sum(rows.finding_count() for rows in loaded.values()))
    return {field: _usable(rows, field, named[field].max_completion_tokens, config, report)
            for field, rows in loaded.items()}


def _usable(rows: Rows, field: str, max_completion_tokens: int | None, config, report: DataReport) -> Rows:
    """The rows without those that cannot be used; what is left out is reported."""
    whole = rows
    report.read(field, rows)
    if count := rows.finding_count():
        report.leave_out(field, count, partial(rows.findings, config))
    if rows.tokens:
        rows = rows.select(rows.token_column("cut") != TOO_LONG)
    if not len(rows):
        what = "comparison" if rows.sets[0].meta["kind"] == "rankings" else "row"
        names = ", ".join(stored.label for stored in rows.sets)
        bad, dropped = next(whole.findings(config), None), [*rows.sets[0].meta["dropped"]]
        why = (f"; the first is {bad['place']}: {bad['reason']}" if bad
               else f"; they are dropped: {', '.join(dropped)}" if dropped else "")
        raise UserError(f"{field}: '{names}' holds no usable {what}{why}")
    refuse_many_dropped(rows, field, config.max_dropped_share)
    if max_completion_tokens is not None:
        rows = drop_long(rows, field, max_completion_tokens, config.max_dropped_share, report)
    return rows


# the keys that decide what is read, for those who want its text
_TEXT_ONLY = SimpleNamespace(on_bad_rows="error", max_row_bytes=ROW_BYTES, max_dropped_share=1.0)


def load_examples(value, field: str, need_completion: bool = True) -> Rows:
    """The text of every example of a data set.

    Args:
        value: that of a data key: a file, a folder, a hub name, or a mixture. field: the configuration key it
        came from, such as `actor_training_data`, for messages and the choice of a split. need_completion:
        False for prompts only (PPO).

    Raises:
        UserError: naming file and line, for anything that is not an example.
    """
    kind = "examples" if need_completion else "prompts"
    return load_data(_TEXT_ONLY, {field: NamedSet(value, kind)}, None, DataReport())[field]


def load_rankings(value, field: str, max_completions: int, log, min_score_ratio: float = 1.0,
                  max_pairs_per_prompt: int | None = None) -> Rows:
    """The text of every ranking of a data set; pairwise rows are grouped by prompt. The limits are those of
    `_Rankings`.

    Args:
        log: called with a line about what was dropped and why (detail 6).

    Raises:
        UserError: naming file and line, for anything that is not a comparison.
    """
    report = DataReport()
    limits = {"max_completions": max_completions, "min_score_ratio": min_score_ratio,
              "max_pairs_per_prompt": max_pairs_per_prompt}
    rows = load_data(_TEXT_ONLY, {field: NamedSet(value, "rankings")}, None, report, limits)[field]
    for note in report.notes:
        log(note)
    return rows


def split_rows(config, loaded: dict[str, Rows], training: str, validation: str, test: str, report: DataReport
               ) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test rows, no prompt in two of them (detail 7). What is not named is held out.

    Args:
        loaded: what `load_data` returned.
        training, validation, test: the configuration keys of the three sets.
    """
    for note in config.notes:
        report.log(note)
    train, held = loaded[training], {}
    for field, most in ((validation, config.eval_rows), (test, config.test_rows)):
        held[field] = loaded.get(field)
        if held[field] is None:
            train, held[field] = split_off(train, min(0.1, most / len(train)), config.seed)
        held[field] = held[field].first(most)
    refuse_overlap({training: train, **held}, config.allow_overlap, report.log)
    train = train.weighed(config.seed)
    if not len(train):
        raise UserError(f"{training}: its weights leave no row to train on; raise them")
    _log_sizes(loaded, {training: train, **held}, training, report)
    return train, *held.values()


def _log_sizes(loaded: dict[str, Rows], parts: dict[str, Rows], training: str, report: DataReport) -> None:
    """Say how many rows each part has, and which were held out of the training data."""
    said = []
    for field, rows in parts.items():
        count = f"{len(rows)} row{'s' if len(rows) != 1 else ''}"
        origin = "" if field in loaded else f" held out of {training}"
        few = ", too few for figures that say much" if field != training and len(rows) < FEW else ""
        said.append(f"{field}: {count}{origin}{few}")
    report.log("; ".join(said))


def split_off(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows]:
    """Hold some prompts out: (rows that stay, rows held out). No prompt is in both (detail 7)."""
    marks = rows.prompts()
    prompts = sorted(set(marks))
    if len(prompts) < 4:
        names = ", ".join(stored.label for stored in rows.sets)
        raise UserError(f"{names}: {len(prompts)} different prompts are too few to hold some out; name "
                        f"validation and test data "
                        "too")
    random.Random(seed).shuffle(prompts)
    held = set(prompts[: max(1, round(len(prompts) * share))])
    mask = np.array([mark in held for mark in marks])
    return rows.select(~mask), rows.select(mask)


def refuse_overlap(splits: dict[str, Rows], allow: bool, log) -> None:
    """Raise UserError, or `log` it when that is allowed, when one prompt stands in two of the named splits
    (detail 7).
    """
    owner, clashes = {}, {}
    for name, rows in splits.items():
        for index, mark in enumerate(rows.prompts()):
            first, place = owner.setdefault(mark, (name, index))
            if first != name:
                clashes.setdefault((first, name), {}).setdefault(mark, (place, index))
    if not clashes:
        return
    lines = []
    for (first, second), places in clashes.items():
        shown = [f"{splits[second][b].prompt[:40]!r} ({splits[first].place(a)} and {splits[second].place(b)})"
                 for a, b in list(places.values())[:3]]
        more = f" and {len(places) - len(shown)} more" if len(places) > len(shown) else ""
        lines.append(f"the same prompt stands in {first} and in {second}: {', '.join(shown)}{more}")
    if allow:
        log("; ".join(lines) + " (allow_overlap)")
    else:
        raise UserError("; ".join(lines) + "; remove it from one, or accept it with allow_overlap: true")


def tokenised(rows: Rows, prompts_only: bool = False) -> Tokenised:
    """Examples with their tokens."""
    table = rows.dataset()
    return Tokenised(rows, table["prompt"], None if prompts_only else table["completion"])
