"""One pass over a data set: each row is checked and its content stored in one form (`utils/data/store.py`).

A row that its layout does not allow is *rejected*: a column is missing or has the wrong type, a prompt or
completion is empty, ranks do not match, or the line is not JSON or not UTF-8. The user has to do something
about it, see `on_bad_rows`. A well-formed comparison that compares nothing is *dropped* and counted (detail
6): equal answers, an empty answer, two dialogues that share no prompt, a ranking with ties only. The public
sets have a few such rows, and nobody should have to repair a public set to train on it.

All pairwise rows of one prompt become one group, in which each distinct completion occurs once. A ranking is
a group of its own.
"""

import itertools
import json
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from utils.config import UserError
from utils.console import progress_bar
from utils.data.cache import cached
from utils.data.columns import Reading, read_columns
from utils.data.comparisons import (
    comparison_of,
    margin_of,
    ranking_of,
    rating_of,
    score_ratio,
    scored_of,
)
from utils.data.examples import example_of, prompt_of, unpaired_of
from utils.data.files import BadRow
from utils.data.layouts import Example
from utils.data.sources import Opened, Source, open_source
from utils.data.store import Pairs, SetWriter, StoredSet
from utils.input_files import ROW_BYTES

SHOWN = 20  # reasons that a message lists, and numbers of dropped rows that are kept for each reason
COLUMNS_KEPT = 100  # names of columns that nobody reads


def read_set(source: Source, field: str, kind: str, max_row_bytes: int = ROW_BYTES, **limits) -> StoredSet:
    """Read a data set, or take it from the cache if the same content has been read before.

    Args:
        field: data key that names the set.
        kind: "examples" (a prompt with its completion), "prompts" (the completion may be missing),
            "rankings", or "ratings" (completions with a number each).
        max_row_bytes: a larger row is rejected.
        limits: arguments of `_Rankings`, for rankings only.

    Raises:
        UserError: when the set does not exist or cannot be read to its end. Rejected rows raise nothing here,
            see `refuse_findings`.
    """
    opened = open_source(source, field, max_row_bytes)
    key = [opened.content, kind, max_row_bytes, limits]
    folder = cached("rows", key, partial(_build, opened, kind, limits))
    return StoredSet(folder, opened.label)


def refuse_findings(findings: Iterator[dict], count: int) -> None:
    """Raise UserError with what is wrong. Does nothing without findings.

    Args:
        findings: each has `place` (`file:line`) and `reason`.
        count: how many findings there are.
    """
    if not count:
        return
    lines = finding_lines(findings)
    if len(lines) == 1:
        raise UserError(f"{lines[0]} (or leave bad rows out: on_bad_rows: skip)")
    raise UserError(f"{count} rows cannot be used; mend them, or leave them out with on_bad_rows: "
                    "skip", *lines)


def finding_lines(findings: Iterator[dict]) -> list[str]:
    """A line for each different reason, at most SHOWN: the place of the first row, and how many rows follow.
    The last line counts the rows with other reasons.
    """
    found, others = {}, 0  # reason -> place of the first, count
    for finding in findings:
        if finding["reason"] in found or len(found) < SHOWN:
            place, count = found.get(finding["reason"], (finding["place"], 0))
            found[finding["reason"]] = place, count + 1
        else:
            others += 1
    lines = [f"{place}{f' and {count - 1} more such rows' if count > 1 else ''}: {reason}"
             for reason, (place, count) in found.items()]
    return lines + ([f"and {others} more rows"] if others else [])


def _build(opened: Opened, kind: str, limits: dict, folder: Path) -> None:
    """Read all rows and write the stored set into a folder."""
    layouts, unread, read = Counter(), Counter(), 0
    classes = {"rankings": _Rankings, "ratings": _Ratings, "prompts": _Prompts, "examples": _Examples}
    with SetWriter(folder) as writer:
        collector = classes[kind](writer, **limits)
        for number, row in _progress(opened):
            read += 1
            if isinstance(row, BadRow):
                writer.reject(number, row.reason, row.raw)
                continue
            try:
                reading = read_columns(row, kind)
                collector.take(row, reading, number)
                layouts[reading.layout.name] += 1
                unread[reading.unread] += 1
            except UserError as error:
                writer.reject(number, str(error).removeprefix(f"{number}: "), row)
        collector.finish()
    dropped = {reason: {"rows": len(numbers), "first": numbers[:SHOWN]}
               for reason, numbers in collector.dropped.items()}
    columns = Counter()
    for names, count in unread.items():
        columns.update(dict.fromkeys(names, count))
    meta = {"kind": kind, "content": opened.content, "layouts": dict(layouts), "read": read,
            "rejected": writer.rejected_count, "dropped": dropped, "rows": writer.row_count,
            "unread": dict(columns.most_common(COLUMNS_KEPT))}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _progress(opened: Opened):
    """The rows, with a progress bar if the output is a terminal."""
    with progress_bar(desc=f"reading {opened.label}", unit=" rows", leave=False) as bar:
        for count, numbered in enumerate(opened.rows, start=1):
            yield numbered
            if count % 1000 == 0:
                bar.update(1000)


class _Examples:
    """Stores examples.

    `dropped` has the numbers of dropped rows by reason. `take` stores a row; it raises UserError for a row to
    reject. `finish` stores what is stored at the end only. The classes below have the same interface.
    """

    def __init__(self, writer: SetWriter):
        self.writer, self.dropped = writer, {}

    def take(self, row: dict, reading: Reading, number: int) -> None:
        self._write(example_of(row, reading, str(number)), number)

    def _write(self, example: Example, number: int, columns: dict | None = None) -> None:
        completions = [] if example.completion is None else [self.writer.text(example.completion)]
        facts, columns = (None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                          for value in (example.facts, columns or None))
        self.writer.row(number, self.writer.text(example.prompt), completions, facts=facts, columns=columns)

    def finish(self):
        pass


class _Prompts(_Examples):
    """Stores prompts, with a completion and other columns where there are some.

    Prompts of compared, rated or marked answers occur in several rows. Each is stored once, without
    completion.
    """

    def __init__(self, writer: SetWriter):
        super().__init__(writer)
        self._seen = set()

    def take(self, row: dict, reading: Reading, number: int) -> None:
        example = prompt_of(row, reading, str(number))
        if example is None:
            self.dropped.setdefault("share no prompt", []).append(number)
        elif reading.layout.kind in ("examples", "prompts"):
            self._write(example, number, {name: row[name] for name in reading.unread})
        elif (text := self.writer.text(example.prompt)) not in self._seen:
            self._seen.add(text)
            self.writer.row(number, text, [])


class _Ratings:
    """Stores the rated completions of each prompt as one row.

    A completion's label score is its mean rating.
    """

    def __init__(self, writer: SetWriter):
        self.writer, self.dropped = writer, {}
        # prompt -> completion -> ratings; texts by number
        self._ratings: dict[int, dict[int, list[float]]] = {}
        self._numbers: dict[int, int] = {}  # prompt -> number of its first row

    def take(self, row: dict, reading: Reading, number: int) -> None:
        prompt, completion, rating = rating_of(row, str(number))
        if rating is None:
            self.dropped.setdefault("no overall rating", []).append(number)
            return
        text = self.writer.text(prompt)
        self._numbers.setdefault(text, number)
        self._ratings.setdefault(text, {}).setdefault(self.writer.text(completion), []).append(rating)

    def finish(self):
        for prompt, ratings in self._ratings.items():
            means = [fmean(values) for values in ratings.values()]
            self.writer.row(self._numbers[prompt], prompt, list(ratings), label_scores=means)


class _Rankings:
    """Stores rankings as they come. Pairwise rows are gathered by prompt and stored at the end.

    Args:
        max_completions: larger groups are split, so that each pair is in one of the parts.
        min_score_ratio: rows with a smaller `score_ratio` are dropped (SHP: votes of the better / votes of
            the worse).
        max_pairs_per_prompt: pairwise rows of a prompt beyond this number are dropped.
    """

    def __init__(self, writer: SetWriter, max_completions: int, min_score_ratio: float,
                 max_pairs_per_prompt: int | None):
        self.writer, self.dropped = writer, {}
        self.max_completions, self.min_score_ratio = max_completions, min_score_ratio
        self.max_pairs = max_pairs_per_prompt
        self._groups: dict[int, Pairs] = {}  # by the number of the prompt's text
        self._notes: dict[tuple, int] = {(): 0}  # distinct notes, numbered in the order they occur
        # prompt -> row, answer, its grade: a number, or whether it is wanted
        self._graded: dict[int, list[tuple[int, int, float | bool]]] = {}

    def take(self, row: dict, reading: Reading, number: int) -> None:
        graded = reading.layout.name == "prompt, response, helpfulness"
        if graded or reading.layout.kind == "unpaired":
            read = scored_of(row, str(number)) if graded else unpaired_of(row, reading, str(number))
            prompt, answer, grade = read
            of_prompt = self._graded.setdefault(self.writer.text(prompt), [])
            of_prompt.append((number, self.writer.text(answer), grade))
            return
        ranked = {"completions", "responses"} & set(reading.layout.needs)
        take = self._take_ranking if ranked else self._take_pair
        reason = take(row, reading, number)
        if reason:
            self._drop(reason, number)

    def _drop(self, reason: str, number: int) -> None:
        self.dropped.setdefault(reason, []).append(number)

    def _take_pair(self, row, reading, number) -> str | None:
        """Keep a pair, or return the reason why it is dropped."""
        prompt, chosen, rejected, note = comparison_of(row, reading, str(number))
        if score_ratio(row, str(number)) < self.min_score_ratio:
            return "a score_ratio that is too small"
        elif prompt is None:
            return "share no prompt"
        elif chosen.strip() == rejected.strip():
            return "equal answers"
        elif not chosen.strip() or not rejected.strip():
            return "an empty answer"
        note_number = self._notes.setdefault(tuple(note.items()), len(self._notes))
        texts = map(self.writer.text, (prompt, chosen, rejected))
        return self._add_pair(number, *texts, note_number, margin_of(row, reading))

    def _add_pair(self, number: int, prompt: int, chosen: int, rejected: int, note: int,
                  margin: float | None) -> str | None:
        """Put a pair into its prompt's group, or return the reason why it is dropped."""
        group = self._groups.get(prompt)
        if group is None:
            group = self._groups[prompt] = Pairs(number)
        if self.max_pairs is not None and len(group) >= self.max_pairs:
            return "more pairs of one prompt than max_pairs_per_prompt"
        group.add(chosen, rejected, note, margin)
        return None

    def _pair_graded(self) -> None:
        """Pair each answer of a prompt with each one of a lower grade."""
        for prompt, graded in self._graded.items():
            pairs = [(number, answer, other, None if isinstance(grade, bool) else float(grade - lower))
                     for number, answer, grade in graded
                     for _, other, lower in graded if grade > lower and other != answer]
            if not pairs:
                for number, _, grade in graded:
                    lacks = "other" if not isinstance(grade, bool) else "unwanted" if grade else "wanted"
                    self._drop(f"no {lacks} answer to the same prompt", number)
            for number, answer, other, margin in pairs:
                if reason := self._add_pair(number, prompt, answer, other, 0, margin):
                    self._drop(reason, number)

    def _take_ranking(self, row, reading, number) -> str | None:
        """Store a ranking, or return the reason why it is dropped."""
        ranking = ranking_of(row, reading, str(number))
        if not ranking.pairs:
            return "ties alone"
        prompt = self.writer.text(ranking.prompt)
        texts = [self.writer.text(text) for text in ranking.completions]
        if len(texts) <= self.max_completions:
            self.writer.row(number, prompt, texts, ranking.pairs, ranking.label_scores, ranking.notes,
                            ranking.margins)
            return None
        scores = dict(zip(texts, ranking.label_scores, strict=True)) if ranking.label_scores else None
        triples = [(texts[i], texts[j], place) for place, (i, j) in enumerate(ranking.pairs)]
        for part, pairs, places in split_group(triples, self.max_completions):
            self.writer.row(number, prompt, part, pairs, scores and [scores[text] for text in part],
                            ranking.notes and [ranking.notes[place] for place in places],
                            ranking.margins and [ranking.margins[place] for place in places])
        return None

    def finish(self):
        self._pair_graded()
        notes = [dict(note) for note in self._notes]
        for prompt, group in self._groups.items():
            for texts, pairs, kept in split_group(group.triples(), self.max_completions):
                note_numbers, margins = zip(*kept, strict=True)
                pair_notes = [notes[i] for i in note_numbers] if any(note_numbers) else None
                known = any(margin is not None for margin in margins)
                self.writer.row(group.number, prompt, texts, pairs, notes=pair_notes,
                                margins=list(margins) if known else None)


def split_group(
    triples: list[tuple[int, int, Any]], max_completions: int
) -> list[tuple[list[int], list, list]]:
    """Split a group into groups of at most `max_completions`, each pair in one of them.

    A pair goes into the first group that has room for it.

    Args:
        triples: (better, worse, what is known) of each pair; texts by number.

    Returns:
        For each group its completions, its pairs as indices into the completions, and what is known of each
        pair.
    """
    groups: list[tuple[dict, list, list]] = []  # (completion -> index, pairs, notes)
    # numbers of groups, so that not all are looked at for each pair: by completion those with room and those
    # without; and those with room for two more
    with_room, full, roomy = defaultdict(set), defaultdict(set), deque()
    for better, worse, note in triples:
        def has_room(number, pair=(better, worse)):
            places = groups[number][0]
            return len(places) + sum(text not in places for text in pair) <= max_completions

        while roomy and not has_room(roomy[0], (None, None)):
            roomy.popleft()
        known = with_room[better] | with_room[worse] | full[better] & full[worse]
        number = min(filter(has_room, [*known, *itertools.islice(roomy, 1)]), default=len(groups))
        if number == len(groups):
            groups.append(({}, [], []))
            roomy.append(number)
        places, pairs, notes = groups[number]
        pairs.append((places.setdefault(better, len(places)), places.setdefault(worse, len(places))))
        notes.append(note)
        for text in places if len(places) == max_completions else (better, worse):
            with_room[text].discard(number)
            (full if len(places) == max_completions else with_room)[text].add(number)
    return [(list(places), pairs, notes) for places, pairs, notes in groups]
