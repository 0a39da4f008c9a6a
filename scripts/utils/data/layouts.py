"""The layouts of rows: what the columns of a data set mean. The names of the columns tell the layout.

There are examples (a prompt, perhaps with its completion), rankings (a prompt with K completions),
comparisons (a prompt with a better and a worse completion) and ratings (a summary with a number). Every
function raises UserError for a row that its layout does not allow. `where` (`file:line`) is the row's place,
for these messages.
"""

import math
from typing import NamedTuple

from utils.config import UserError

# The prompts of ST and N+. A completion starts with one space and ends with EOS (details 1 and 2).
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
_POST = ("subreddit", "title", "post")


class Example(NamedTuple):
    """A prompt and its reference completion."""

    prompt: str
    completion: str | None  # None: unknown
    facts: dict[str, str] | None  # facts that a synthetic post was made from, for its gold score


class Ranking(NamedTuple):
    """A prompt and its distinct completions."""

    prompt: str
    completions: list[str]
    pairs: list[tuple[int, int]]  # (better, worse), indices into completions
    # Bradley-Terry strengths of the completions; None: the labeller is unknown
    label_scores: list[float] | None
    notes: list[dict[str, str]] | None = None  # values of NOTES for each pair, for evaluation (detail 20)


# columns that say who compared what, and how sure they were
NOTES = ("confidence", "policies", "batch", "worker")

_TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
               bytes: "bytes", type(None): "empty"}


def _type_name(value) -> str:
    """The type of a value, for error messages."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def _text(value, name: str, where: str) -> str:
    """The value, which must be text with more than white space. `name` says where in the row it is."""
    if isinstance(value, str) and value.strip():
        return value
    problem = "empty" if isinstance(value, str) else _type_name(value)
    raise UserError(f"{where}: {name} is {problem}; text is needed")


def _column(row: dict, column: str, where: str) -> str:
    return _text(row[column], f"column '{column}'", where)


def example_layout(row: dict) -> str | None:
    """The name of an example's layout; None: the row is not an example."""
    if "messages" in row:
        return "messages"
    if set(_POST) <= row.keys():
        return "subreddit, title, post, summary"
    if "prompt" in row:
        return "prompt, label" if "label" in row and "completion" not in row else "prompt, completion"
    return None


def comparison_layout(row: dict) -> str | None:
    """The name of the layout of a comparison or a ranking; None: the row is neither."""
    columns = row.keys()
    if "completions" in columns:
        return "prompt, completions"
    if {"info", "summaries", "choice"} <= columns:
        return "info, summaries, choice"
    if {"history", "human_ref_A", "human_ref_B", "labels"} <= columns:
        return "history, human_ref_A, human_ref_B, labels"
    if {"chosen", "rejected"} <= columns:
        return "prompt, chosen, rejected" if "prompt" in columns else "chosen, rejected (dialogues)"
    return None


RATINGS = "info, summary (ratings)"


def rating_layout(row: dict) -> str | None:
    """The name of a rating's layout; None: the row is not a rating."""
    return RATINGS if {"info", "summary"} <= row.keys() else None


def _refuse_ratings(row: dict, where: str) -> None:
    if rating_layout(row):
        raise UserError(f"{where}: rates one summary ('axes') and compares nothing; name such a set as "
                        "rating_data, or take its comparisons")


def example_of(row: dict, where: str, need_completion: bool) -> Example:
    """Read an example from a row.

    Raises:
        UserError: with the column and what is expected there.
    """
    layout, facts = example_layout(row), row.get("facts")
    if layout == "messages":
        return _dialogue_example(row["messages"], where, need_completion)
    if layout is None:
        _refuse_ratings(row, where)
        raise UserError(f"{where}: has columns {sorted(row)}; needed are prompt and completion, prompt and "
                        "label, subreddit, title, post and summary, or messages")
    if layout.startswith("subreddit"):
        parts = {column: _column(row, column, where).strip() for column in _POST}
        prompt = TLDR_TEMPLATE.format(**parts)
    else:
        prompt = tldr_layout(_column(row, "prompt", where)).rstrip()
    column = layout.rpartition(", ")[2]
    if column not in row and need_completion:
        raise UserError(f"{where}: column '{column}' is missing (found: {', '.join(sorted(row))})")
    if row.get(column) is None and not need_completion:
        return Example(prompt, None, facts)
    return Example(prompt, spaced(_column(row, column, where)), facts)


def prompt_of(row: dict, where: str) -> str | None:
    """The prompt of a comparison, ranking or rating. None: the two dialogues of the row share no prompt."""
    if comparison_layout(row) is None:
        return _openai_prompt(row["info"], where)
    return ranking_of(row, where).prompt if "completions" in row else comparison_of(row, where)[0]


_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


def _dialogue_example(messages, where: str, need_completion: bool) -> Example:
    """Messages as a dialogue of Anthropic/hh-rlhf. A last message of the assistant is the completion."""
    roles = tuple(_SPEAKERS)  # not the dict: `in` would raise TypeError for a role that is a list
    valid = isinstance(messages, list) and all(
        isinstance(message, dict) and message.get("role") in roles for message in messages)
    if not valid or not messages:
        raise UserError(f"{where}: column 'messages' must be a list of {{role, content}} objects; roles are "
                        f"{', '.join(roles)}")
    texts = [_text(message.get("content"), f"column 'messages': content of message {number}", where).strip()
             for number, message in enumerate(messages, start=1)]
    answered = messages[-1]["role"] == "assistant"
    prompt_turns = len(messages) - answered
    if not prompt_turns or (need_completion and not answered):
        raise UserError(f"{where}: column 'messages' must hold a question, and end with the assistant's "
                        "answer")
    turns = [f"{_SPEAKERS[message['role']]}: {text}"
             for message, text in zip(messages[:prompt_turns], texts, strict=False)]
    return Example("\n\n".join([*turns, "Assistant:"]), spaced(texts[-1]) if answered else None, None)


def ranking_of(row: dict, where: str) -> Ranking:
    """Read a ranking from a row with `completions`.

    Raises:
        UserError: with the column and what is expected there.
    """
    if "prompt" not in row:
        raise UserError(f"{where}: column 'prompt' is missing beside 'completions'")
    completions, ranks = row["completions"], row.get("ranks")
    if not isinstance(completions, list) or len(completions) < 2:
        raise UserError(f"{where}: column 'completions' must be a list of two or more texts, best first")
    texts = [spaced(_text(text, "a text in column 'completions'", where)) for text in completions]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: column 'completions' holds the same text twice")
    if ranks is None:
        ranks = list(range(len(texts)))
    strengths = row.get("label_scores")
    for column, numbers in (("ranks", ranks), ("label_scores", strengths)):
        valid = isinstance(numbers, list) and len(numbers) == len(texts) and all(map(_is_number, numbers))
        if numbers is not None and not valid:
            raise UserError(f"{where}: column '{column}' must hold one number for each of the {len(texts)} "
                            "completions")
    pairs = [(i, j) for i, a in enumerate(ranks) for j, b in enumerate(ranks) if a < b]
    return Ranking(tldr_layout(_column(row, "prompt", where)).rstrip(), texts, pairs, strengths)


def _is_number(value) -> bool:
    """Whether a value is a number that float64 holds exactly, so neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**53


def comparison_of(row: dict, where: str):
    """Read a comparison from a row.

    Returns:
        Prompt, better completion, worse completion, and the values of NOTES. The prompt is None when the two
        dialogues of the row share none.

    Raises:
        UserError: with the column and what is expected there.
    """
    layout = comparison_layout(row)
    if layout == "info, summaries, choice":
        return _openai_comparison(row, where)
    if layout == "history, human_ref_A, human_ref_B, labels":
        return _shp_comparison(row, where)
    note = {column: str(row[column]) for column in NOTES if row.get(column) is not None}
    if layout is None:
        _refuse_ratings(row, where)
        raise UserError(f"{where}: has columns {sorted(row)}; needed are prompt, chosen and rejected; chosen "
                        "and rejected (dialogues); or prompt and completions, best first")
    for column in ("chosen", "rejected"):
        if not isinstance(row[column], str):
            raise UserError(f"{where}: column '{column}' is {_type_name(row[column])}; text is needed")
    chosen, rejected = row["chosen"], row["rejected"]
    if "prompt" not in row:
        if "\n\nAssistant:" not in chosen:
            raise UserError(f"{where}: column 'prompt' is missing, and 'chosen' is not a dialogue with "
                            "'Assistant:' turns")
        return *_shared_dialogue(chosen, rejected), note
    prompt = _column(row, "prompt", where)
    if chosen.startswith("TL;DR:") and rejected.startswith("TL;DR:"):
        prompt = f"{prompt.rstrip()}\n\nTL;DR:"
        chosen, rejected = chosen.removeprefix("TL;DR:"), rejected.removeprefix("TL;DR:")
    return tldr_layout(prompt).rstrip(), spaced(chosen), spaced(rejected), note


def _openai_comparison(row: dict, where: str):
    """A row of openai/summarize_from_feedback: `choice` is the index of the better of two summaries."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    two = isinstance(summaries, list) and len(summaries) == 2
    if not isinstance(info, dict) or not two or not all(isinstance(summary, dict) for summary in summaries):
        raise UserError(f"{where}: columns 'info' and 'summaries' must be an object and a list of two "
                        "objects with 'text'")
    if type(choice) is not int or choice not in (0, 1):
        raise UserError(f"{where}: column 'choice' is {choice!r}; it must be 0 or 1, the better of the two "
                        "summaries")
    prompt = _openai_prompt(info, where)
    texts = [summary.get("text") for summary in summaries]
    for number, text in enumerate(texts, start=1):
        if not isinstance(text, str):
            raise UserError(f"{where}: column 'summaries': text of summary {number} is {_type_name(text)}; "
                            "text is needed")
    extra = row.get("extra") if isinstance(row.get("extra"), dict) else {}
    policies = [summary.get("policy") for summary in summaries]
    named = all(isinstance(policy, str) for policy in policies)
    note = {"confidence": extra.get("confidence"), "batch": row.get("batch"), "worker": row.get("worker"),
            "policies": " and ".join(sorted(policies)) if named else None}
    known = {column: str(note[column]) for column in NOTES if note[column] is not None}
    return prompt, spaced(texts[choice]), spaced(texts[1 - choice]), known


def _openai_prompt(info, where: str) -> str:
    """The prompt of a post. A news article (CNN/DM) has neither subreddit nor title."""
    if not isinstance(info, dict):
        raise UserError(f"{where}: column 'info' is {_type_name(info)}; an object with subreddit, title and "
                        "post is needed")
    if info.get("article"):
        return _text(info["article"], "column 'info': article", where).strip() + "\n\nTL;DR:"
    parts = {name: _text(info.get(name), f"column 'info': {name}", where).strip() for name in _POST}
    return TLDR_TEMPLATE.format(**parts)


def rating_of(row: dict, where: str) -> tuple[str, str, float | None]:
    """Read a rating from a row of the `axis` part of openai/summarize_from_feedback.

    Returns:
        Prompt, summary, and overall rating (1 to 7) or None when it was not rated.

    Raises:
        UserError: with the column and what is expected there.
    """
    if not rating_layout(row):
        raise UserError(f"{where}: has columns {sorted(row)}; needed are info, and summary with text and "
                        "axes")
    summary = row["summary"]
    axes = summary.get("axes") if isinstance(summary, dict) else None
    if not isinstance(axes, dict):
        raise UserError(f"{where}: column 'summary' must be an object with 'text' and 'axes'")
    overall = axes.get("overall")
    if overall is not None and not _is_number(overall):
        raise UserError(f"{where}: column 'summary': the overall rating is {overall!r}; a number is needed")
    text = _text(summary.get("text"), "column 'summary': text", where)
    return _openai_prompt(row["info"], where), spaced(text), overall


def _shp_comparison(row: dict, where: str):
    """A row of stanfordnlp/SHP: `labels` is 1 when answer A is preferred, and 0 when B is."""
    if row["labels"] not in (0, 1) or isinstance(row["labels"], bool):
        raise UserError(f"{where}: column 'labels' is {row['labels']!r}; it must be 1 (A is better) or 0 (B "
                        "is)")
    answers = [row["human_ref_A"], row["human_ref_B"]]
    for column, answer in zip("AB", answers, strict=True):
        if not isinstance(answer, str):
            raise UserError(f"{where}: column 'human_ref_{column}' is {_type_name(answer)}; text is needed")
    chosen, rejected = answers if row["labels"] == 1 else reversed(answers)
    return _column(row, "history", where).rstrip(), spaced(chosen), spaced(rejected), {}


def score_ratio(row: dict, where: str) -> float:
    """Column `score_ratio` of SHP: votes of the better answer / votes of the worse.

    Infinite where it is missing.
    """
    ratio = row.get("score_ratio")
    if ratio is not None and not _is_number(ratio):
        raise UserError(f"{where}: column 'score_ratio' is {ratio!r}; a number is needed")
    return math.inf if ratio is None else ratio


def _shared_dialogue(chosen: str, rejected: str):
    """Split a row of Anthropic/hh-rlhf: two dialogues that are equal up to the last assistant turn.

    Returns:
        Prompt, better and worse completion; or None and both dialogues when they differ before the last turn.
    """
    turn = "\n\nAssistant:"
    head, _, answer = chosen.rpartition(turn)
    other_head, _, other = rejected.rpartition(turn)
    if head != other_head:
        return None, chosen, rejected
    return (head + turn).strip(), spaced(answer), spaced(other)


def tldr_parts(prompt: str) -> tuple[str, str, str] | None:
    """Subreddit, title and post of a prompt in any spelling of the TL;DR layout; None: it is another prompt.

    The spellings are `SUBREDDIT: r/...`, newlines, `TITLE: ...`, newlines, `POST: ...`, and perhaps newlines
    and `TL;DR:`.
    """
    if not prompt.startswith("SUBREDDIT: r/"):
        return None
    # no regular expression: looking for the end at each character of the post took longer than all other
    # checks of a row
    subreddit, _, rest = prompt[len("SUBREDDIT: r/"):].partition("\nTITLE: ")
    title, separator, post = rest.partition("\nPOST: ")
    if not separator:
        return None
    post = post.rstrip()
    if post.endswith("\nTL;DR:"):
        post = post.removesuffix("TL;DR:").rstrip()
    return subreddit.rstrip("\n"), title.rstrip("\n"), post


def tldr_layout(prompt: str) -> str:
    """The prompt with the spelling of TLDR_TEMPLATE if it has the TL;DR layout, else unchanged."""
    parts = tldr_parts(prompt)
    return TLDR_TEMPLATE.format(subreddit=parts[0], title=parts[1], post=parts[2]) if parts else prompt


def spaced(completion: str) -> str:
    """The completion, white space before it and none after, so that it continues its prompt (detail 2)."""
    completion = completion.rstrip()
    return completion if completion[:1].isspace() else f" {completion}"
