"""Rows with a prompt and perhaps its completion, in each of their layouts (`utils/data/columns.py`).

Every function raises UserError for a row that its layout does not allow. `where` (`file:line`) is the row's
place, for these messages; `reading` says how the row is read.
"""

from utils.config import UserError
from utils.data.columns import Layout, Reading
from utils.data.comparisons import (
    compared_conversations,
    info_prompt,
    question_of,
    refuse_tools_beside_text,
    shared_dialogue,
    with_end,
)
from utils.data.dialogues import conversation, conversation_row, turn_in
from utils.data.layouts import Example, column_of, plain_prompt, post_prompt, spaced
from utils.data.sources import is_wanted

# layout -> the column of the completion
_ANSWERS = {"prompt, completion": "completion", "prompt, completion, label": "completion",
            "prompt, label": "label", "subreddit, title, post, summary": "summary"}
_CONVERSATIONS = ("messages", "conversations", "instruction")  # columns that hold the question in turns
_MARKS = ("true", "1", "1.0", "false", "0", "0.0")  # what marks an answer as wanted or not


def example_of(row: dict, reading: Reading, where: str) -> Example:
    """Read an example from a row."""
    layout = reading.layout
    if layout.needs[0] in _CONVERSATIONS:
        prompt, answer = _asked(row, layout.needs[0], where)
        return Example(prompt, spaced(answer), None)
    if "prompt" in layout.needs and isinstance(row["prompt"], list):
        prompt, _ = conversation(row["prompt"], f"{where}: column 'prompt'", need_answer=False)
        return Example(prompt, spaced(turn_in(row, "completion", where)), None)
    prompt = plain_prompt(row, where) if "prompt" in layout.needs else post_prompt(row, "column '{}'", where)
    answer = column_of(row, _ANSWERS[layout.name], where)
    if _is_mark(layout, answer):
        raise UserError(f"{where}: column 'label' is '{answer}', which marks an answer and is none; the "
                        "answer itself stands in 'completion'")
    return Example(prompt, spaced(answer), row.get("facts"))


def _asked(row: dict, column: str, where: str, need_answer: bool = True) -> tuple[str, str | None]:
    """The stored conversation of a row, and its last answer."""
    if column != "instruction":
        return conversation_row(row, column, where, need_answer)
    asked = column_of(row, "instruction", where).strip()
    more = row.get("input")
    if isinstance(more, str) and more.strip():
        asked = f"{asked}\n{more.strip()}"
    messages = [*_history(row.get("history"), where), {"role": "user", "content": asked}]
    if isinstance(row.get("output"), str) and row["output"].strip():
        messages.append({"role": "assistant", "content": row["output"]})
    elif need_answer:
        column_of(row, "output", where)
    row = {"messages": messages, "system": row.get("system")}
    return conversation_row(row, "messages", where, need_answer)


def _history(history, where: str) -> list[dict]:
    """The turns in a column `history`, a list of pairs of question and answer."""
    pairs = history or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError(f"{where}: column 'history' must be a list of pairs of question and answer")
    return [{"role": role, "content": text} for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)]


def _is_mark(layout: Layout, answer: str) -> bool:
    """Whether the answer in a column `label` is none, but says whether another one is wanted."""
    return layout.name == "prompt, label" and answer.strip().lower() in _MARKS


def prompt_of(row: dict, reading: Reading, where: str) -> Example | None:
    """The prompt of a row of any layout, and its completion where the row is an example and has one.

    What is wrong with answers does not matter. None: the two dialogues of the row share no prompt.
    """
    holder, answer = reading.prompt[0], row.get(_ANSWERS.get(reading.layout.name))
    if holder in _CONVERSATIONS:
        prompt, answer = _asked(row, holder, where, need_answer=False)
    elif holder == "prompt" and isinstance(row["prompt"], list):
        prompt, answer = conversation_row(row, "prompt", where, need_answer=False)[0], None
    elif isinstance(row.get("chosen"), list) and holder in ("prompt", "chosen"):
        prompt = _asked_in_chosen(row, where)
    elif holder == "prompt" and {"responses", "response"} & set(reading.layout.needs):
        prompt = question_of(row, "prompt", where)
    elif holder == "prompt":
        refuse_tools_beside_text(row, where)
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


def _asked_in_chosen(row: dict, where: str) -> str | None:
    """The conversation that `chosen` and `rejected` answer; where they do not, the text of `prompt`."""
    try:
        return compared_conversations(row, where)[0]
    except UserError:
        if not isinstance(row.get("prompt"), str):
            raise
    return plain_prompt(row, where)


def unpaired_of(row: dict, reading: Reading, where: str) -> tuple[str, str, bool]:
    """Prompt, answer, and whether the answer is wanted."""
    wanted = is_wanted(row["label"])
    example = example_of(row, reading, where)
    return example.prompt, example.completion, wanted
