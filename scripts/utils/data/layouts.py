"""What rows become, and the spelling of their texts.

`where` (`file:line`) is a row's place, for messages.
"""

from typing import NamedTuple

from utils.config import UserError
from utils.data.conversations import as_conversation, readable

# The prompts of ST and N+. A completion starts with one space and ends with EOS (details 1 and 2).
TLDR_TEMPLATE = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


class Example(NamedTuple):
    """A prompt and its reference completion."""

    prompt: str
    completion: str | None  # None: unknown
    facts: dict[str, str] | None  # facts that a synthetic post was made from, for its gold score
    columns: dict | None = None  # of a row of prompts: its other columns, for rewards


class Ranking(NamedTuple):
    """A prompt and its distinct completions."""

    prompt: str
    completions: list[str]
    pairs: list[tuple[int, int]]  # (better, worse), indices into completions
    # Bradley-Terry strengths of the completions; None: the labeller is unknown
    label_scores: list[float] | None
    notes: list[dict[str, str]] | None = None  # values of NOTES for each pair, for evaluation (detail 20)
    # how much better the better completion of each pair is, in the data's unit; None: not known
    margins: list[float | None] | None = None


_TYPE_NAMES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object",
               bytes: "bytes", type(None): "empty"}


def type_name(value) -> str:
    """The type of a value, for error messages."""
    return _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")


def text_of(value, name: str, where: str) -> str:
    """The value, which must be text with more than white space. `name` says where in the row it is."""
    if isinstance(value, str) and value.strip():
        return value
    problem = "empty" if isinstance(value, str) else type_name(value)
    raise UserError(f"{where}: {name} is {problem}; text is needed")


def column_of(row: dict, column: str, where: str) -> str:
    return text_of(row[column], f"column '{column}'", where)


def plain_prompt(row: dict, where: str) -> str:
    """The prompt in column `prompt`."""
    return as_conversation(tldr_layout(column_of(row, "prompt", where)).rstrip())


def post_prompt(parts: dict, name: str, where: str) -> str:
    """The prompt of a post in parts. `name` says where in the row they are; `{}` stands for one of them."""
    texts = {part: text_of(parts.get(part), name.format(part), where).strip()
             for part in ("subreddit", "title", "post")}
    return TLDR_TEMPLATE.format(**texts)


def is_number(value) -> bool:
    """Whether a value is a number that float64 holds exactly, so neither infinite nor NaN."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 2**53


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


def layout_of(prompt: str) -> str:
    """What kind of prompt a model was trained on: "tldr", "dialogue" or "plain"."""
    if tldr_parts(prompt):
        return "tldr"
    return "dialogue" if readable(prompt).endswith("\n\nAssistant:") else "plain"
