"""Rows with a prompt and perhaps its completion, in each of their layouts (`utils/data/columns.py`).

Every function raises UserError for a row that its layout does not allow. `where` (`file:line`) is the row's
place, for these messages; `reading` says how the row is read.
"""

from utils.config import UserError
from utils.data.columns import Layout, Reading
from utils.data.comparisons import info_prompt, shared_dialogue, with_end
from utils.data.dialogues import dialogue
from utils.data.layouts import Example, column_of, plain_prompt, post_prompt, spaced

# layout -> the column of the completion
_ANSWERS = {"prompt, completion": "completion", "prompt, completion, label": "completion",
            "prompt, label": "label", "subreddit, title, post, summary": "summary"}
_MARKS = {"true": True, "1": True, "false": False, "0": False}  # what marks an answer as wanted or not


def example_of(row: dict, reading: Reading, where: str) -> Example:
    """Read an example from a row."""
    layout = reading.layout
    if "messages" in layout.needs:
        prompt, answer = dialogue(row["messages"], where, need_answer=True)
        return Example(prompt, spaced(answer), None)
    prompt = plain_prompt(row, where) if "prompt" in layout.needs else post_prompt(row, "column '{}'", where)
    answer = column_of(row, _ANSWERS[layout.name], where)
    if _is_mark(layout, answer):
        raise UserError(f"{where}: column 'label' is '{answer}', which marks an answer and is none; the "
                        "answer itself stands in 'completion'")
    return Example(prompt, spaced(answer), row.get("facts"))


def _is_mark(layout: Layout, answer: str) -> bool:
    """Whether the answer in a column `label` is none, but says whether another one is wanted."""
    return layout.name == "prompt, label" and answer.strip().lower() in _MARKS


def prompt_of(row: dict, reading: Reading, where: str) -> Example | None:
    """The prompt of a row of any layout, and its completion where the row is an example and has one.

    What is wrong with answers does not matter. None: the two dialogues of the row share no prompt.
    """
    holder, answer = reading.prompt[0], row.get(_ANSWERS.get(reading.layout.name))
    if holder == "messages":
        prompt, answer = dialogue(row["messages"], where, need_answer=False)
    elif holder == "prompt":
        prompt = plain_prompt(with_end(row), where)
    elif holder == "subreddit":
        prompt = post_prompt(row, "column '{}'", where)
    elif holder == "info":
        prompt = info_prompt(row["info"], where)
    elif holder == "history":
        prompt = column_of(row, "history", where).rstrip()
    else:
        prompt = shared_dialogue(row, where)[0]
    if prompt is None:
        return None
    known = (reading.layout.kind == "examples" and isinstance(answer, str) and answer.strip()
             and not _is_mark(reading.layout, answer))
    return Example(prompt, spaced(answer) if known else None, row.get("facts"))


def unpaired_of(row: dict, reading: Reading, where: str) -> tuple[str, str, bool]:
    """Prompt, answer, and whether the answer is wanted."""
    wanted = _MARKS.get(str(row["label"]).strip().lower())
    if wanted is None:
        raise UserError(f"{where}: column 'label' is {str(row['label'])[:40]!r}; it must be true (the answer "
                        "is wanted) or false")
    example = example_of(row, reading, where)
    return example.prompt, example.completion, wanted
