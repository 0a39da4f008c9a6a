"""What the data of a run was found to be: lines for the log, figures for data.json, rows for rejected_rows.jsonl."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from utils.data.tokens import CUT, CUT_INSIDE


class DataReport:
    """Filled while the data is read, before there is a run folder, and then saved by the run."""

    def __init__(self):
        self.notes: list[str] = []  # for people
        self.figures: dict[str, dict] = {}  # by configuration key
        self._left_out: list[tuple[str, Callable]] = []

    def say(self, line: str) -> None:
        self.notes.append(line)

    def read(self, field: str, rows) -> None:
        """Note what each set of a data key held, and what of it was dropped (detail 6)."""
        self.figures[field] = {"sources": [{"name": stored.label, **stored.meta} for stored in rows.sets]}
        for stored in rows.sets:
            counts = {reason: found["rows"] for reason, found in stored.meta["dropped"].items()}
            if counts:
                why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
                self.say(f"{stored.label}: dropped {sum(counts.values())} rows ({why})")

    def leave_out(self, field: str, count: int, findings: Callable[[], Iterator[dict]]) -> None:
        """Note rows that `on_bad_rows: skip` leaves out."""
        first = next(findings())
        self.say(f"{field}: left out {count} bad rows (on_bad_rows: skip), see rejected_rows.jsonl; the first is "
                 f"{first['place']}: {first['reason']}")
        self._left_out.append((field, findings))

    def rejected(self) -> Iterator[dict]:
        """Lines of rejected_rows.jsonl: where a row stood, what is wrong with it, and the row."""
        for field, findings in self._left_out:
            yield from ({"key": field, **found} for found in findings())

    def tokens(self, field: str, table: Dataset) -> None:
        """Note how long the rows of a data key are that are used, and how many of their prompts were cut."""
        lengths = token_lengths(table)
        cut = np.concatenate([batch["cut"].to_numpy(zero_copy_only=False) for batch in _batches(table.select_columns("cut"))])
        self.figures.setdefault(field, {}).update({
            "rows": len(cut), "prompts_cut": int(np.isin(cut, (CUT, CUT_INSIDE)).sum()),
            "prompts_cut_inside": int((cut == CUT_INSIDE).sum()),  # at no end of a sentence or turn
            **{f"{name}_tokens": _spread(sizes) for name, sizes in lengths.items()},
        })

    def groups(self, field: str, rows) -> None:
        """Note and say how much prompt groups share in a data key's rankings, each taken once whatever its weight."""
        rows = rows.once()
        found = group_statistics(rows.dataset(), len(set(rows.prompts())))
        self.figures.setdefault(field, {})["groups"] = found
        self.say(f"{field}: {found['posts']} posts in {found['groups']} prompt groups, "
                 f"{found['completions_per_post']:.2f} completions and {found['pairs_per_post']:.2f} pairs a post, "
                 f"{found['contradictions']} pairs labelled both ways; {found['tokens_grouped']} tokens in place of "
                 f"{found['tokens_ungrouped']}, a factor of {found['factor']:.2f}")


def token_lengths(table: Dataset) -> dict[str, np.ndarray]:
    """Tokens of every `prompt` after cutting, and of every `completion` with its EOS, in a table of `utils/data/tokens.py`."""
    prompts, completions = [], []
    for batch in _batches(table):
        prompts.append(_sizes(batch["prompt"]))
        completions.append(_sizes(batch["completions"].flatten() if "completions" in batch else batch["completion"]))
    lengths = {"prompt": np.concatenate(prompts), "completion": np.concatenate(completions)}
    return {name: sizes[sizes > 0] for name, sizes in lengths.items() if sizes.any()}  # prompts may stand alone


def group_statistics(table: Dataset, posts: int) -> dict[str, float]:
    """How much prompt groups save on a set of rankings.

    Returns:
        `tokens_grouped`: those of each group's prompt once and of each of its completions once. `tokens_ungrouped`: what
        a model computes that takes a pair as two rows, each with the prompt. `factor`: the second over the first.
        `contradictions`: pairs of completions that were labelled both ways (both are kept).

    Args:
        table: rows of `utils/data/tokens.py`.
        posts: the number of different prompts; a large group is split into several.
    """
    sums = np.zeros(5, dtype=np.int64)
    for batch in _batches(table):
        prompts, counts, pair_counts = (_sizes(batch[name]) for name in ("prompt", "completions", "pairs"))
        sizes = _sizes(batch["completions"].flatten())
        owner = np.repeat(np.arange(len(counts)), pair_counts)
        better, worse = batch["pairs"].flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 2).T
        first = np.cumsum(counts) - counts
        ungrouped = 2 * prompts[owner] + sizes[first[owner] + better] + sizes[first[owner] + worse]
        pairs = set(zip(owner.tolist(), better.tolist(), worse.tolist(), strict=True))
        both = sum((group, b, a) in pairs for group, a, b in pairs) // 2
        sums += [counts.sum(), len(owner), both, prompts.sum() + sizes.sum(), ungrouped.sum()]
    completions, pairs, both, grouped, ungrouped = sums.tolist()
    return {"posts": posts, "groups": len(table), "completions_per_post": completions / posts, "pairs_per_post": pairs / posts,
            "contradictions": both, "tokens_grouped": grouped, "tokens_ungrouped": ungrouped, "factor": ungrouped / grouped}


def _batches(table: Dataset) -> Iterator[dict[str, pa.Array]]:
    """Columns of a thousand rows at a time."""
    for batch in table.with_format("arrow").iter(1000):
        yield {name: batch[name].combine_chunks() for name in batch.column_names}


def _sizes(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False)


def _spread(sizes: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(sizes, (5, 50, 95)).tolist()
    return {"mean": float(sizes.mean()), "p5": low, "p50": middle, "p95": high, "max": int(sizes.max())}
