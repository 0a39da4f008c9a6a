"""Conversations as token ids, through the chat template of a tokenizer.

A prompt ends where the assistant's turn begins (the generation prompt). A completion is the assistant's turn
with the token that ends it. Special tokens are those that the template writes: the same characters in
somebody's message stay text (detail 4).
"""

import bisect
import json
import re
from collections.abc import Sequence

from jinja2 import TemplateError

from utils.config import UserError
from utils.data.conversations import learnt_turns, text_of_turn

Messages = list[dict]
_STAND_IN = "\ue000{}\ue001"  # for a special token in a message: characters that no text has
_STANDS_IN = re.compile("\ue000(\\d+)\ue001")


class Chat:
    """The chat template of a tokenizer.

    Args:
        tokenizer: one with a `chat_template`.

    Attributes:
        end: the token that ends an answer: the first special token behind it.

    Raises:
        UserError: when the template cannot be used at all, or ends answers with no token of its own.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._ids = {token.content: number for number, token in added}
        # one special token may begin with another
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        rest = self._render([question, answer], False).rpartition("answer")[2]
        found = self._special.search(rest)
        if not found:
            raise UserError("chat_template: no special token stands behind an answer, so no answer could end")
        self.end = found[0]

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids of a conversation whose next turn is the assistant's."""
        return self._tokens(self._render(messages, True))

    def completions(self, messages: Messages, answers: Sequence[str]) -> list[list[int]]:
        """Token ids of each answer to a conversation, as they follow `prompt(messages)`.

        Raises:
            UserError: when the template writes the prompt otherwise once it is answered.
        """
        prompt = self._render(messages, True)
        return [self._completion(prompt, messages, {"role": "assistant", "content": answer})
                for answer in answers]

    def turns(self, messages: Messages) -> list[tuple[list[int], list[int]]]:
        """(prompt, answer) as token ids, of each answer in a conversation that is to be learnt.

        Raises:
            UserError: as `completions` does.
        """
        texts = [(self._render(messages[:n], True), n) for n in learnt_turns(messages)]
        return [(self._tokens(prompt), self._completion(prompt, messages[:n], messages[n]))
                for prompt, n in texts]

    def _completion(self, prompt: str, messages, turn: dict) -> list[int]:
        both = self._render([*messages, turn], False)
        if not both.startswith(prompt):
            raise UserError("chat_template: the prompt is written otherwise when its answer follows, so the "
                            "model would learn on another text than it is asked with; give another "
                            "chat_template")
        asked, tokens = self._tokens(prompt), self._tokens(both)
        # where the last characters of the prompt and the first of the answer make one token, the prompt's
        # tokens are those that the model is asked with
        tokens = (tokens[len(asked):] if tokens[: len(asked)] == asked else self._tokens(both[len(prompt):]))
        end = self._ids[self.end]
        if end not in tokens:  # a call of a tool may end otherwise than an answer
            raise UserError(f"chat_template: a turn of the assistant does not end with {self.end!r}, which "
                            "ends answers; give another chat_template, or take loss_on: completion")
        return tokens[: len(tokens) - tokens[::-1].index(end)]  # what templates write between turns goes

    def cut(self, messages: Messages, max_tokens: int) -> Messages | None:
        """The conversation without its first turns, so that it fits; None when its last question does not.

        Tools and a system turn at the beginning stay. What is left begins with the user.
        """
        stays = [message for message in messages[:2] if message["role"] in ("tools", "system")]
        starts = [n for n, message in enumerate(messages) if message["role"] == "user"]
        # the later the first turn, the shorter the prompt
        first = bisect.bisect_left(starts, True, key=lambda start: len(
            self.prompt([*stays, *messages[start:]])) <= max_tokens)
        return [*stays, *messages[starts[first]:]] if first < len(starts) else None

    def _render(self, messages: Messages, ask: bool) -> str:
        """The template's text; special tokens in messages are replaced by stand-ins."""
        try:
            messages, tools = self._spelled(self._protected(messages))
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False,
                                                      add_generation_prompt=ask)
        except (TemplateError, TypeError, KeyError) as error:  # what templates raise, and run into
            raise UserError(f"chat_template: the template refuses the conversation: {error}") from None

    def _spelled(self, messages: Messages) -> tuple[Messages, list | None]:
        """The messages as the template knows them, and the tools; what it does not know becomes text."""
        template, tools = str(self.tokenizer.chat_template), None
        messages = [{name: value for name, value in message.items() if name != "weight"}
                    for message in messages]
        if messages[0]["role"] == "tools":
            text, messages = messages[0]["content"], messages[1:]
            if "tools" in template:
                tools = json.loads(text)
            elif messages[0]["role"] == "system":
                said = f"{messages[0]['content']}\n\n{text}"
                messages = [{"role": "system", "content": said}, *messages[1:]]
            else:
                messages = [{"role": "system", "content": text}, *messages]
        if "tool_calls" not in template:
            messages = [{"role": message["role"], "content": text_of_turn(message)} for message in messages]
        return messages, tools

    def _protected(self, value):
        """The same lists, objects and texts, with stand-ins for special tokens in the texts."""
        if isinstance(value, str):
            return self._special.sub(lambda match: _STAND_IN.format(self._ids[match[0]]), value)
        if isinstance(value, dict):
            return {key: self._protected(item) for key, item in value.items()}
        return [self._protected(item) for item in value] if isinstance(value, list) else value

    def _tokens(self, text: str) -> list[int]:
        """Ids of rendered text. What stands between special tokens is tokenised as text."""
        if not _STANDS_IN.search(text):
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        decoder, ids, place = self.tokenizer.added_tokens_decoder, [], 0
        for match in [*self._special.finditer(text), None]:
            part = text[place : match.start() if match else None]
            if part:
                part = _STANDS_IN.sub(lambda m: decoder[int(m[1])].content, part)
                ids += self.tokenizer(part, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if match:
                ids.append(self._ids[match[0]])
                place = match.end()
        return ids
