"""Rows that are dropped from a data set: named with set, key and share; too many stop the run."""

import math
from collections.abc import Iterator

import numpy as np

from utils.config import UserError
from utils.data.report import DataReport

# reasons that a key asked for, or that take nothing from training: any share of a set may go
_ASKED_FOR = ("a score_ratio that is too small", "more pairs of one prompt than max_pairs_per_prompt",
              "no overall rating")


def refuse_many_dropped(rows, field: str, most: float) -> None:
    """Raise UserError when more than a share `most` of a set was dropped while it was read (detail 6)."""
    for stored in rows.sets:
        dropped = {reason: drop["rows"] for reason, drop in stored.meta["dropped"].items()
                   if reason not in _ASKED_FOR}
        read, count = stored.meta["read"] - stored.meta["rejected"], sum(dropped.values())
        if count > most * read:
            why = ", ".join(f"{number} {reason}" for reason, number in dropped.items())
            raise UserError(f"{field}: {count} of the {read} rows of '{stored.label}' are dropped ({why}); "
                            f"mend them, or accept it with max_dropped_share: {_rounded_up(count / read)}")


def drop_long(rows, field: str, limit: int, most: float, report: DataReport):
    """The rows without those that have a completion of more than `limit` tokens.

    Args:
        rows: `Rows` with tokens.
        field: data key that names them. most: the largest share of a set that may be dropped.

    Raises:
        UserError: when more are dropped, or when none is left.
    """
    longest, dropped = rows.token_column("longest"), {}
    unit = {"rankings": "groups", "ratings": "groups"}.get(rows.sets[0].meta["kind"], "rows")
    for label, own in _by_set(rows):
        long = longest[own] > limit
        count, total = int(long.sum()), len(own)
        if not count:
            continue
        what = f"{count} of the {total} {unit} of '{label}' ({count / total:.1%})"
        why = (f"a completion of more than max_completion_tokens ({limit}); the longest has "
               f"{longest[own].max()}")
        if count > most * total:
            raise UserError(f"{field}: {what} have {why}; raise max_completion_tokens, or accept it with "
                            f"max_dropped_share: {_rounded_up(count / total)}")
        report.log(f"{field}: dropped {what} with {why}")
        dropped[label] = count
    if not (longest <= limit).any():
        raise UserError(f"{field}: nothing is left, since the shortest completion has {longest.min()} "
                        f"tokens; raise max_completion_tokens ({limit})")
    report.figures[field]["completions_too_long"] = sum(dropped.values())
    return rows.select(longest <= limit)


def _by_set(rows) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each set that rows are mixed from, and the places of its rows among them."""
    owners = rows.owners()
    for number, stored in enumerate(rows.sets):
        own = np.flatnonzero(owners == number)
        if len(own):
            yield stored.label, own


def _rounded_up(share: float) -> float:
    """A share with two decimals that is not below it."""
    return math.ceil(share * 100) / 100
