"""What the columns of a row say: its layout, columns that change its meaning, and those that nobody reads.

An empty column (null) counts as missing, because in a table all rows have the columns of all.
"""

import difflib
from functools import lru_cache
from typing import NamedTuple

from utils.config import UserError

NOTES = ("confidence", "policies", "batch", "worker")  # who compared what, and how sure they were
MARGINS = ("margin", "score_chosen", "score_rejected")  # how much better the better answer is
# kind of rows -> the data key that sets of this kind are for
ROLES = {"examples": "actor_training_data", "rankings": "reward_training_data",
         "prompts": "rlhf_training_data", "ratings": "rating_data"}


class Layout(NamedTuple):
    """Columns that belong together."""

    name: str
    kind: str  # one of ROLES, or "unpaired": answers that are each wanted or unwanted
    needs: tuple[str, ...]
    reads: tuple[str, ...] = ()  # optional columns

    @property
    def columns(self) -> set[str]:
        return {*self.needs, *self.reads}


_POST = ("subreddit", "title", "post")
LAYOUTS = (
    Layout("prompt, completion", "examples", ("prompt", "completion"), ("facts",)),
    Layout("prompt, label", "examples", ("prompt", "label"), ("facts",)),
    Layout("subreddit, title, post, summary", "examples", (*_POST, "summary"), ("facts",)),
    Layout("messages", "examples", ("messages",), ("system", "tools")),
    Layout("conversations", "examples", ("conversations",), ("system", "tools")),
    Layout("instruction, output", "examples", ("instruction", "output"), ("input", "system", "history")),
    Layout("prompt", "prompts", ("prompt",), ("facts",)),
    Layout("subreddit, title, post", "prompts", _POST, ("facts",)),
    Layout("prompt, chosen, rejected", "rankings", ("prompt", "chosen", "rejected"), (*NOTES, *MARGINS)),
    Layout("prompt, completions", "rankings", ("prompt", "completions"),
           ("ranks", "scores", "label_scores", "tools", *NOTES)),
    Layout("info, summaries, choice", "rankings", ("info", "summaries", "choice"),
           ("extra", "batch", "worker")),
    Layout("history, human_ref_A, human_ref_B, labels", "rankings",
           ("history", "human_ref_A", "human_ref_B", "labels"), ("score_ratio", "score_A", "score_B")),
    Layout("conversations, chosen, rejected", "rankings", ("conversations", "chosen", "rejected"),
           ("system", "tools", *NOTES, *MARGINS)),
    Layout("prompt, responses, scores", "rankings", ("prompt", "responses", "scores")),
    Layout("instruction, completions", "rankings", ("instruction", "completions")),
    Layout("prompt, response, helpfulness", "rankings", ("prompt", "response", "helpfulness")),
    Layout("chosen, rejected (dialogues)", "rankings", ("chosen", "rejected"), (*NOTES, *MARGINS)),
    Layout("info, summary (ratings)", "ratings", ("info", "summary")),
    Layout("prompt, completion, label", "unpaired", ("prompt", "completion", "label")),
    Layout("messages, label", "unpaired", ("messages", "label")),
)
# columns that hold a prompt; the last ones only where there are no others
_PROMPTS = (("messages",), ("conversations",), ("instruction",), ("prompt",), _POST,
            ("info", "summaries"), ("info", "summary"),
            ("history", "human_ref_A", "human_ref_B"), ("chosen", "rejected"))
# HuggingFaceH4/ultrafeedback_binarized has the chosen conversation in `messages` as well
_TWICE = {"messages", "prompt, chosen, rejected"}
# Columns that are a part of the question, and columns that say how good an answer is. A layout that does not
# read them would read something else than its author wrote.
_ASKS = frozenset("""system system_prompt instruction input context history tools functions image images audio
                  audios video videos""".split())
_JUDGES = frozenset("""label labels choice preferred preference winner best better worse swapped flipped rank
                    ranks rating ratings reward rewards scores weight chosen rejected completions accepted
                    correct good wanted is_accepted is_chosen is_correct is_good is_preferred
                    is_wanted""".split())
_ALSO_CALLED = {"prompt": ("question", "instruction", "query", "input", "text", "document", "article"),
                "completion": ("response", "answer", "output", "summary", "reference", "target")}


class Reading(NamedTuple):
    """How a row is read."""

    layout: Layout
    prompt: tuple[str, ...]  # the columns that hold its prompt; rows of kind "prompts" only
    unread: tuple[str, ...]  # the columns that are not looked at
    suspects: tuple[str, ...]  # those of them that change its meaning, unless they are empty


def read_columns(row: dict, kind: str) -> Reading:
    """How a row is read as one of `kind`, a key of ROLES.

    Raises:
        UserError: when the row has no layout of this kind, or fits two; or when it has a column that changes
            what it means, and that its layout does not read.
    """
    empty = None in row.values()
    reading = _reading(tuple([name for name in row if row[name] is not None] if empty else row), kind)
    if isinstance(reading, str):  # with its empty columns it may have a layout: who reads that names them
        whole = _reading(tuple(row), kind)
        if isinstance(whole, str):
            raise UserError(reading)
        reading = whole
    for name in reading.suspects:
        _refuse_meaning(name, row[name], kind)
    return reading


def layouts_of(columns) -> list[Layout]:
    """The layouts that columns fit, without those that are a part of another one."""
    columns = set(columns)
    fits = [layout for layout in LAYOUTS if columns.issuperset(layout.needs)]
    return [one for one in fits
            if not any(one != other and set(one.needs) <= other.columns for other in fits)]


@lru_cache(maxsize=4096)
def _reading(columns: tuple[str, ...], kind: str) -> Reading | str:
    """How rows with these columns are read; or why they are not."""
    return _prompt_reading(columns) if kind == "prompts" else _kind_reading(columns, kind)


def _kind_reading(columns: tuple[str, ...], kind: str) -> Reading | str:
    fits = layouts_of(columns)
    if kind == "rankings" and {layout.name for layout in fits} == _TWICE:
        fits = [layout for layout in fits if layout.kind == kind]
    if len(fits) > 1:
        return (f"fits two layouts, '{fits[0].name}' and '{fits[1].name}'; leave the columns of one of them "
                "out")
    layout = fits[0] if fits else None
    if layout and layout.kind == "unpaired" and kind == "examples":
        return ("column 'label' beside the answer says whether it is wanted, and this stage would learn "
                f"unwanted ones; name the set as {ROLES['rankings']}, or leave out the unwanted rows and the "
                "column")
    if layout is None or layout.kind not in (kind, "unpaired" if kind == "rankings" else kind):
        return _no_layout(columns, kind)
    unread = tuple(name for name in columns if name not in layout.columns)
    return Reading(layout, (), unread, tuple(name for name in unread if name.lower() in _ASKS | _JUDGES))


def _prompt_reading(columns: tuple[str, ...]) -> Reading | str:
    """The same for rows of which only the prompt is needed: what is said of answers changes nothing."""
    holders = [holder for holder in _PROMPTS if set(holder) <= set(columns)]
    if _TWICE <= {layout.name for layout in layouts_of(columns)}:
        holders = [("prompt",)]
    holders = holders[:-1] if len(holders) > 1 and holders[-1] == _PROMPTS[-1] else holders
    if len({holder[0] for holder in holders}) > 1:
        return (f"has a prompt in '{', '.join(holders[0])}' and one in '{', '.join(holders[1])}'; leave the "
                "columns of one of them out")
    if not holders:
        return _no_layout(columns, "prompts")
    fits = layouts_of(columns)
    layout = fits[0] if fits else Layout(", ".join(holders[0]), "rankings", holders[0])
    read = set(holders[0]).union(*(one.columns for one in fits))
    unread = tuple(name for name in columns if name not in read)
    return Reading(layout, holders[0], unread, tuple(name for name in unread if name.lower() in _ASKS))


def _refuse_meaning(name: str, value, kind: str) -> None:
    """Raise UserError for a column that changes what its row means, unless it says nothing."""
    if value in (None, "", [], {}) or (name.lower() == "weight" and str(value) in ("1", "1.0")):
        return
    if name.lower() in _ASKS:
        raise UserError(f"column '{name}' is a part of what is asked, and is not read; write it into the "
                        "prompt, or leave the column out")
    advice = ("give 'ranks' (1 is the best) or 'scores' (higher is better) beside 'completions'"
              if kind == "rankings" else "keep the rows whose answers are good")
    raise UserError(f"column '{name}' says how good an answer is, and is not read; {advice}, and leave the "
                    "column out")


# -------------------------------------------------------------------------------------------------- no layout


def _no_layout(columns: tuple[str, ...], kind: str) -> str:
    """What is said of rows that have no layout of a kind: their columns, and the layout that is nearest."""
    has = f"has columns {listed(columns)}" if columns else "has no columns"
    known = [layout for layout in layouts_of(columns) if layout.kind in ROLES and layout.kind != "prompts"]
    if known:
        has += f" (the layout '{known[0].name}', for {ROLES[known[0].kind]})"
    of_kind = [layout for layout in LAYOUTS if layout.kind == kind]
    nearest = max(of_kind, key=lambda layout: len(set(layout.needs) & set(columns)) / len(layout.needs))
    lacks = [name for name in nearest.needs if name not in columns]
    if not lacks:  # a part of another layout
        return has
    return (f"{has}; the nearest layout is '{nearest.name}', which lacks {', '.join(lacks)}"
            f"{_meant(lacks, columns)}")


def _meant(lacks: list[str], columns: tuple[str, ...]) -> str:
    """A question about columns that may be those that are missing, under other names."""
    meant = []
    for name in lacks:
        alike = [*difflib.get_close_matches(name, columns[:100], n=1, cutoff=0.75),
                 *(other for other in _ALSO_CALLED.get(name, ()) if other in columns)]
        meant += [f"is '{alike[0]}' the {name}?"] if alike else []
    return f" ({' '.join(meant)})" if meant else ""


def listed(names, most: int = 12) -> str:
    """Names of columns for a message: at most so many, each short and without control characters."""
    names = sorted(names)
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names[:most]]
    shown = [name if len(name) <= 40 else f"{name[:40]}..." for name in shown]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
