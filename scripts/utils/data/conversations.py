"""Conversations as one text: in which form a set stores them, and how they read without a chat template.

A stored conversation is a mark and its messages as JSON. So a set is read once for all tokenizers, and
equal conversations are equal texts. The tools that the assistant may call stand in a first message of the
role `tools`, as JSON text. An answer that is not to be learnt has the weight 0.
"""

import json

_MARK = "\x1e"  # the record separator, which no text begins with
_SPEAKERS = {"tools": "Tools", "system": "System", "user": "Human", "assistant": "Assistant", "tool": "Tool"}
_TURN = "\n\n"


def stored_conversation(messages: list[dict]) -> str:
    """The text that stands for a conversation whose next turn is the assistant's."""
    return _MARK + json.dumps(messages, ensure_ascii=False)


def messages_of(text: str) -> list[dict] | None:
    """The messages of a stored conversation; None: the text is a plain prompt."""
    return json.loads(text[1:]) if text.startswith(_MARK) else None


def readable(text: str) -> str:
    """A stored prompt as people read it, and as models without a chat template do (the layout of hh-rlhf)."""
    messages = messages_of(text)
    return text if messages is None else _TURN.join([*map(_turn, messages), "Assistant:"])


def _turn(message: dict) -> str:
    return f"{_SPEAKERS[message['role']]}: {text_of_turn(message)}"


def text_of_turn(message: dict) -> str:
    """The text of a message; calls of tools as a line of JSON each."""
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join([part for part in [message["content"], *calls] if part])


def learnt_turns(messages: list[dict]) -> list[int]:
    """Numbers of the assistant's turns, without those of weight 0."""
    return [number for number, message in enumerate(messages)
            if message["role"] == "assistant" and message.get("weight") != 0]


def conversation_in(prompt: str) -> list[dict] | None:
    """The messages of a prompt in the layout of hh-rlhf; None when it has another, or reads otherwise."""
    if not prompt.endswith(f"{_TURN}Assistant:"):
        return None
    turns = prompt.removesuffix(f"{_TURN}Assistant:").split(_TURN)
    roles = {f"{_SPEAKERS[role]}: ": role for role in ("system", "user", "assistant")}
    messages = []
    for turn in turns:
        start = next((start for start in roles if turn.startswith(start)), None)
        if start is not None:
            messages.append({"role": roles[start], "content": turn[len(start):]})
        elif messages:  # an empty line inside a turn
            messages[-1]["content"] += _TURN + turn
        else:
            return None
    asked = messages[-1]["role"] == "user" if messages else False
    return messages if asked and readable(stored_conversation(messages)) == prompt else None


def as_conversation(prompt: str) -> str:
    """A prompt in the layout of hh-rlhf as a stored conversation; other prompts stay as they are."""
    messages = conversation_in(prompt)
    return prompt if messages is None else stored_conversation(messages)
