"""Rows with `messages`: a dialogue becomes a prompt in the layout of hh-rlhf, and its last answer."""

from utils.config import UserError

_SPEAKERS = {"system": "System", "developer": "System", "user": "Human", "assistant": "Assistant"}
_PARTS = ("text", "input_text", "output_text")  # types of content parts that are plain text
# what a message may carry besides its text, and what would be lost without it
_CARRIED = ("tool_calls", "function_call", "images", "image", "audio", "video")


def dialogue(messages, where: str, need_answer: bool) -> tuple[str, str | None]:
    """The prompt of a dialogue, which ends with `Assistant:`, and its answer.

    The answer is the text of a last message of the assistant. It is None where there is none, or where it is
    not needed and cannot be read.

    Raises:
        UserError: naming the message by its number and role.
    """
    where = f"{where}: column 'messages'"
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} must be a list of {{role, content}} objects")
    answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant"
    asked = messages[:-1] if answered else messages
    turns = [turn for number, message in enumerate(asked, start=1) if (turn := _turn(message, number, where))]
    if not any(message["role"] == "user" for message in asked) or (need_answer and not answered):
        raise UserError(f"{where} must hold a question of the user, and end with the assistant's answer")
    answer = _answer(messages, where, need_answer) if answered else None
    return "\n\n".join([*turns, "Assistant:"]), answer


def _answer(messages: list, where: str, needed: bool) -> str | None:
    """The text of the last message."""
    try:
        if messages[-1].get("weight") == 0:
            raise UserError(f"{where}: message {len(messages)} (assistant) has the weight 0, so it is not to "
                            "be learnt; leave the row out")
        return _text(messages[-1], len(messages), where, may_be_empty=False)
    except UserError:
        if needed:
            raise
        return None


def _turn(message, number: int, where: str) -> str | None:
    """A message as a turn of the dialogue; None for empty instructions of the system."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: message {number} is not an object with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in _SPEAKERS:
        raise UserError(f"{where}: message {number} has the role {str(role)[:40]!r}; the roles that are read "
                        f"are {', '.join(_SPEAKERS)}")
    text = _text(message, number, where, may_be_empty=_SPEAKERS[role] == "System")
    return f"{_SPEAKERS[role]}: {text}" if text else None


def _text(message: dict, number: int, where: str, may_be_empty: bool) -> str:
    """The text of a message, without white space around it."""
    place = f"{where}: message {number} ({message['role']})"
    carried = next((name for name in _CARRIED if message.get(name)), None)
    if carried:
        raise UserError(f"{place} has '{carried}', which is not read; this project reads text only")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join([_part(part, place) for part in content])
    content = "" if content is None else content
    if not isinstance(content, str):
        raise UserError(f"{place} has a content that is not text; text is needed")
    if not content.strip() and not may_be_empty:
        raise UserError(f"{place} is empty; text is needed")
    return content.strip()


def _part(part, place: str) -> str:
    """The text of a content part such as {"type": "text", "text": "..."}."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in _PARTS or not isinstance(part.get("text"), str):
        raise UserError(f"{place} has a content part of type {str(kind)[:40]!r}; parts of type 'text' are "
                        "read")
    return part["text"]
