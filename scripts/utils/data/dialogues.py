"""Lists of messages: a conversation and its last answer, in OpenAI's spelling ({role, content}) and in
ShareGPT's ({from, value}).
"""

import json

from utils.config import UserError
from utils.data.conversations import messages_of, stored_conversation

# what the roles are called here; a call is the assistant's
_ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
          "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
          "tool": "tool", "observation": "tool"}
_SHOWN_ROLES = "system, developer, user, assistant, tool"
_PARTS = ("text", "input_text", "output_text")  # types of content parts that are plain text
# what a message may carry besides its text, and what would be lost without it
_CARRIED = ("function_call", "images", "image", "audio", "video")


def conversation(messages, where: str, need_answer: bool) -> tuple[str, str | None]:
    """The stored prompt of a list of messages, and its answer.

    The answer is the text of a last message of the assistant. It is None where there is none, or where it is
    not needed and cannot be read.

    Args:
        where: the row's place and the column.

    Raises:
        UserError: naming the message by its number and role.
    """
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{where} must be a list of {{role, content}} objects")
    answered = isinstance(messages[-1], dict) and _ROLES.get(_role(messages[-1])) == "assistant"
    asked = messages[:-1] if answered else messages
    numbered = [(number, turn) for number, message in enumerate(asked, start=1)
                if (turn := _turn(message, number, where))]
    if not any(turn["role"] == "user" for _, turn in numbered) or (need_answer and not answered):
        raise UserError(f"{where} must hold a question of the user, and end with the assistant's answer")
    _refuse_order(numbered, where)
    answer = answer_of(messages[-1], len(messages), where, need_answer) if answered else None
    return stored_conversation([turn for _, turn in numbered]), answer


def answer_of(message, number: int, where: str, needed: bool = True) -> str | None:
    """The text of an answer; None where it cannot be read and is not needed."""
    try:
        if not isinstance(message, dict) or _ROLES.get(_role(message)) != "assistant":
            raise UserError(f"{where}: message {number} is no answer of the assistant")
        if _has_no_weight(message, f"{where}: message {number} (assistant)"):
            raise UserError(f"{where}: message {number} (assistant) has the weight 0, so it is not to be "
                            "learnt; leave the row out")
        if message.get("tool_calls") or _role(message) == "function_call":
            raise UserError(f"{where}: message {number} (assistant) calls a tool, and is no answer in text")
        return _text(message, number, where, may_be_empty=False)
    except UserError:
        if needed:
            raise
        return None


def turn_in(row: dict, column: str, where: str) -> str:
    """The answer in a column: text, or one message of the assistant, alone or in a list."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        return value
    turns = value if isinstance(value, list) else [value]
    if len(turns) != 1:
        raise UserError(f"{where}: column '{column}' holds {len(turns)} messages; one answer of the "
                        "assistant is needed")
    return answer_of(turns[0], 1, f"{where}: column '{column}'")


def conversation_row(row: dict, column: str, where: str, need_answer: bool = True) -> tuple[str, str | None]:
    """`conversation` of a column with messages, and of the columns `system` and `tools` beside it."""
    messages, place = row[column], f"{where}: column '{column}'"
    system, tools = row.get("system"), _tools(row.get("tools"), where)
    if isinstance(system, str) and system.strip() and isinstance(messages, list):
        messages = [{"role": "system", "content": system}, *messages]
    prompt, answer = conversation(messages, place, need_answer)
    if tools:
        prompt = stored_conversation([{"role": "tools", "content": tools}, *messages_of(prompt)])
    return prompt, answer


def _tools(value, where: str) -> str | None:
    """The tools of a conversation as JSON text, a list of objects; None without any."""
    if value in (None, "", [], "[]"):
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{where}: column 'tools' must be a list of objects, or the JSON of one")
    return json.dumps(tools, ensure_ascii=False)


def _role(message: dict):
    role = message.get("role", message.get("from"))
    return role if isinstance(role, str) else str(role)[:40]


def _turn(message, number: int, where: str) -> dict | None:
    """A message in our spelling; None for empty instructions of the system."""
    if not isinstance(message, dict):
        raise UserError(f"{where}: message {number} is not an object with role and content")
    given = _role(message)
    role = _ROLES.get(given)
    if role is None:
        raise UserError(f"{where}: message {number} has the role {given[:40]!r}; the roles that are read are "
                        f"{_SHOWN_ROLES}")
    calls = _calls(message, number, where)
    text = "" if given == "function_call" else _text(message, number, where,
                                                     may_be_empty=role == "system" or bool(calls))
    if not text and not calls:
        return None
    turn = {"role": role, "content": text} | ({"tool_calls": calls} if calls else {})
    left_out = role == "assistant" and _has_no_weight(message, f"{where}: message {number} ({given})")
    return turn | ({"weight": 0} if left_out else {})


def _has_no_weight(message: dict, place: str) -> bool:
    """Whether an answer is not to be learnt (OpenAI's `weight`)."""
    weight = message.get("weight")
    if weight not in (None, 0, 1):
        raise UserError(f"{place} has the weight {str(weight)[:40]!r}; 1 (to be learnt) and 0 are read")
    return weight == 0


def _calls(message: dict, number: int, where: str) -> list[dict]:
    """The calls of tools in a message, in OpenAI's spelling."""
    place = f"{where}: message {number} ({_role(message)})"
    found = message.get("tool_calls") or []
    if _role(message) == "function_call":
        try:
            call = json.loads(message.get("value", message.get("content")))
            found = [{"type": "function", "function": call}]
        except (TypeError, ValueError):
            raise UserError(f"{place} must be the JSON of a call, with name and arguments") from None
    if found and _ROLES[_role(message)] != "assistant":
        raise UserError(f"{place} has 'tool_calls', which only the assistant makes")
    for call in found if isinstance(found, list) else [None]:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{place} has 'tool_calls' without the name of a function; needed is a list of "
                            "{function: {name, arguments}}")
    return found


def _refuse_order(numbered: list[tuple[int, dict]], where: str) -> None:
    """Raise UserError unless questions and answers take turns.

    Args:
        numbered: (number of the message, turn).
    """
    before, called = None, False  # role of the turn before, and whether it calls a tool
    for number, turn in numbered:
        if problem := _out_of_order(turn["role"], before, called):
            raise UserError(f"{where}: message {number} ({turn['role']}) {problem}")
        before, called = turn["role"], bool(turn.get("tool_calls"))
    if before not in ("user", "tool"):
        raise UserError(f"{where} must hold a question of the user, and end with the assistant's answer")


def _out_of_order(role: str, before: str | None, called: bool) -> str | None:
    """What is wrong with a turn after another one; None: nothing."""
    if role == "system" and before is not None:
        return "stands behind others; instructions of the system stand first, and once"
    if role == "assistant" and before in (None, "system"):
        return "answers before anything is asked"
    if role in ("user", "assistant") and role == before:
        return f"follows another one of the {role}; join the two"
    if role == "user" and called:
        return "follows the call of a tool, which has no result"
    if role == "tool" and before != "tool" and not called:
        return "is the result of a tool that nobody has called"
    return None


def _text(message: dict, number: int, where: str, may_be_empty: bool) -> str:
    """The text of a message, without white space around it."""
    place = f"{where}: message {number} ({_role(message)})"
    carried = next((name for name in _CARRIED if message.get(name)), None)
    if carried:
        raise UserError(f"{place} has '{carried}', which is not read; this project reads text only")
    content = message.get("content", message.get("value"))
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
