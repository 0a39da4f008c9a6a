"""What a run's data is like: lines for the log, figures for data.json, rows for rejected_rows.jsonl."""

from collections.abc import Callable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from utils.config import UserError
from utils.data.columns import listed
from utils.data.tokens import CUT, CUT_INSIDE


class DataReport:
    """Collects what is found while the data is read. There is no run folder yet; the run saves it later."""

    def __init__(self):
        self.notes: list[str] = []  # lines for the log
        self.figures: dict[str, dict] = {}  # by data key
        self._left_out: list[tuple[str, Callable]] = []  # (data key, function that yields its findings)

    def log(self, line: str) -> None:
        self.notes.append(line)

    def read(self, field: str, rows) -> None:
        """Record what each set of a data key held, and which of its rows were dropped (detail 6)."""
        self.figures[field] = {"sources": [{"name": stored.label, "weight": weight, **stored.meta}
                                           for stored, weight in zip(rows.sets, rows.weights, strict=True)]}
        for stored in rows.sets:
            if unread := stored.meta["unread"]:
                self.log(f"{field}: columns of '{stored.label}' that are not read: {listed(unread)}")
            counts = {reason: dropped["rows"] for reason, dropped in stored.meta["dropped"].items()}
            if counts:
                why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
                total, read = sum(counts.values()), stored.meta["read"]
                self.log(f"{field}: dropped {total} of the {read} rows of '{stored.label}' "
                         f"({total / read:.1%}): {why}")

    def leave_out(self, field: str, count: int, findings: Callable[[], Iterator[dict]]) -> None:
        """Record rows that `on_bad_rows: skip` leaves out."""
        first = next(findings())
        read = sum(source["read"] for source in self.figures[field]["sources"])
        self.log(f"{field}: left out {count} bad rows of {read} (on_bad_rows: skip), see "
                 f"rejected_rows.jsonl; the first is {first['place']}: {first['reason']}")
        self._left_out.append((field, findings))

    def rejected(self) -> Iterator[dict]:
        """Lines of rejected_rows.jsonl: data key, place, what is wrong, and the row."""
        for field, findings in self._left_out:
            yield from ({"key": field, **finding} for finding in findings())

    def tokens(self, field: str, table: Dataset) -> None:
        """Record the lengths of a data key's rows that are used, and how many of their prompts were cut."""
        lengths = token_lengths(table)
        cut = np.concatenate([batch["cut"].to_numpy(zero_copy_only=False)
                              for batch in _batches(table.select_columns("cut"))])  # (rows,)
        self.figures.setdefault(field, {}).update({
            "rows": len(cut), "prompts_cut": int(np.isin(cut, (CUT, CUT_INSIDE)).sum()),
            "prompts_cut_inside": int((cut == CUT_INSIDE).sum()),  # inside a sentence or turn
            **{f"{name}_tokens": _spread(sizes) for name, sizes in lengths.items()},
        })

    def turns(self, field: str, rows) -> None:
        """Record and log how many answers of a data key's conversations are learnt (`loss_on: turns`).

        Raises:
            UserError: when no conversation has an answer before its last.
        """
        answers, lengths = (rows.token_column(name) for name in ("answers", "length"))
        if answers.max() == 1:
            raise UserError(f"loss_on: 'turns' has no effect, since no row of {field} has an answer before "
                            "its last; leave it out")
        learnt = several = 0
        for batch in _batches(rows.dataset().select_columns("turns")):
            labels = pc.struct_field(batch["turns"], "labels")
            learnt += pc.sum(pc.greater_equal(labels.flatten().flatten(), 0)).as_py()
            several += int((_sizes(labels) > 1).sum())
        total = int(lengths.sum())
        self.figures.setdefault(field, {})["turns"] = {
            "answers": int(answers.sum()), "tokens": total, "tokens_learnt": learnt, "in_parts": several}
        more = (f"; {several} conversations are computed in parts, since an answer is written otherwise in "
                "the prompts behind it") if several else ""
        self.log(f"{field}: loss on {answers.sum()} answers of {len(rows)} rows, {learnt} of their {total} "
                 f"tokens{more}")

    def margins(self, field: str, rows) -> None:
        """Record and log the margins of a data key's pairs (`margin_scale`).

        Raises:
            UserError: when a pair has none.
        """
        found, counts, pairs = [], [], []
        for batch in _batches(rows.dataset().select_columns(["pairs", "margins"])):
            margins = pc.fill_null(batch["margins"], [])
            known = pc.is_valid(margins.flatten()).to_numpy(zero_copy_only=False)
            owners = pc.list_parent_indices(margins).to_numpy()[known]
            counts.append(np.bincount(owners, minlength=len(margins)))
            pairs.append(_sizes(batch["pairs"]))
            found.append(pc.drop_null(margins.flatten()).to_numpy())
        found, counts, pairs = map(np.concatenate, (found, counts, pairs))
        if lacks := int((pairs - counts).sum()):
            place = rows.place(int(np.flatnonzero(counts < pairs)[0]))
            raise UserError(f"margin_scale: {lacks} of the {pairs.sum()} pairs of {field} have no margin, "
                            f"first in the group of {place}; give every row 'margin', or 'score_chosen' and "
                            "'score_rejected', or 'scores' beside 'completions', or leave margin_scale out")
        figures = {"min": float(found.min()), "mean": float(found.mean()), "max": float(found.max())}
        self.figures.setdefault(field, {})["margins"] = figures
        self.log(f"{field}: margins of the data from {figures['min']:g} to {figures['max']:g}, mean "
                 f"{figures['mean']:.3g}")

    def groups(self, field: str, rows) -> None:
        """Record and log how much prompt groups save on a data key's rankings.

        Weights of a mixture do not count.
        """
        rows = rows.once()
        groups = group_statistics(rows.dataset(), len(set(rows.prompts())))
        self.figures.setdefault(field, {})["groups"] = groups
        self.log(f"{field}: {groups['posts']} posts in {groups['groups']} prompt groups, "
                 f"{groups['completions_per_post']:.2f} completions and {groups['pairs_per_post']:.2f} pairs "
                 f"a post, {groups['contradictions']} pairs labelled both ways; {groups['tokens_grouped']} "
                 f"tokens in place of {groups['tokens_ungrouped']}, a factor of {groups['factor']:.2f}")


def token_lengths(table: Dataset) -> dict[str, np.ndarray]:
    """Lengths in a table of `utils/data/tokens.py`: prompts after cutting, completions with their EOS.

    Without completions there is no entry `completion`.
    """
    prompts, completions = [], []
    for batch in _batches(table):
        prompts.append(_sizes(batch["prompt"]))
        several = "completions" in batch
        completions.append(_sizes(batch["completions"].flatten() if several else batch["completion"]))
    lengths = {"prompt": np.concatenate(prompts), "completion": np.concatenate(completions)}
    return {name: sizes[sizes > 0] for name, sizes in lengths.items() if sizes.any()}


def group_statistics(table: Dataset, posts: int) -> dict[str, float]:
    """How much prompt groups save on a set of rankings.

    Args:
        table: rows of `utils/data/tokens.py`.
        posts: number of distinct prompts. (It can be less than the number of groups, because large groups are
            split.)

    Returns:
        `tokens_grouped`: tokens when each prompt and each completion of a group is computed once.
        `tokens_ungrouped`: tokens when each pair is two rows with the prompt in both. `factor`: ungrouped /
        grouped. `contradictions`: pairs of completions that were labelled both ways (both labels are kept).
        `completions_per_post`, `pairs_per_post`.
    """
    sums = np.zeros(5, dtype=np.int64)
    for batch in _batches(table):  # G groups with C completions and P pairs in all
        # (G,)
        prompts, counts, pair_counts = (_sizes(batch[name]) for name in ("prompt", "completions", "pairs"))
        sizes = _sizes(batch["completions"].flatten())  # (C,)
        owner = np.repeat(np.arange(len(counts)), pair_counts)  # (P,) the group of each pair
        # (P,)
        better, worse = batch["pairs"].flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 2).T
        first = np.cumsum(counts) - counts  # (G,) the group's first completion in `sizes`
        ungrouped = 2 * prompts[owner] + sizes[first[owner] + better] + sizes[first[owner] + worse]  # (P,)
        pairs = set(zip(owner.tolist(), better.tolist(), worse.tolist(), strict=True))
        both = sum((group, b, a) in pairs for group, a, b in pairs) // 2
        sums += [counts.sum(), len(owner), both, prompts.sum() + sizes.sum(), ungrouped.sum()]
    completions, pairs, both, grouped, ungrouped = sums.tolist()
    return {
        "posts": posts, "groups": len(table),
        "completions_per_post": completions / posts, "pairs_per_post": pairs / posts, "contradictions": both,
        "tokens_grouped": grouped, "tokens_ungrouped": ungrouped, "factor": ungrouped / grouped,
    }


def _batches(table: Dataset) -> Iterator[dict[str, pa.Array]]:
    """The columns of the table, a thousand rows at a time."""
    for batch in table.with_format("arrow").iter(1000):
        yield {name: batch[name].combine_chunks() for name in batch.column_names}


def _sizes(lists: pa.Array) -> np.ndarray:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False)


def _spread(sizes: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(sizes, (5, 50, 95)).tolist()
    return {"mean": float(sizes.mean()), "p5": low, "p50": middle, "p95": high, "max": int(sizes.max())}
