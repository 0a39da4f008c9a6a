"""Talk to a model: one that the stages wrote, or any other.

    python scripts/chat.py                                       # the demo's last model
    python scripts/chat.py --model outputs/mine/ppo/final --reward_model outputs/mine/reward/final
    echo "My balcony faces north. What grows there?" | python scripts/chat.py --prompt -
    python scripts/chat.py --prompts posts.jsonl --output answers.jsonl
    python scripts/chat.py --compare outputs/tldr_mini/sft/final outputs/tldr_mini/ppo/final

A model with a chat template holds a conversation. A model that was trained on posts summarises what you type:
write it as it is, the layout is added. In a conversation these words are commands:

    /new              forget the conversation
    /system TEXT      instructions for the model; without a text: none
    /k 4              four answers to each prompt
    /temperature 0.7  0: the likeliest token each time
    /help             this list
    /quit             or Ctrl-D

A text of several lines can be pasted. Else a line of three double quotes begins
it, and another one ends it.
"""

import sys
from dataclasses import dataclass

from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start

_ALL_EQUAL = "at temperature 0 all answers to a prompt are the same; ask for one, or raise the temperature"


@dataclass
class ChatConfig:
    """What answers, and how."""

    model: str | None = key(None, "Model that answers: a folder or a hub name; none: the demo's last one.")
    compare: list[str] = key([], "Models that answer the same prompts side by side, in place of `model`.")
    reward_model: str | None = key(None, "Reward model that scores each answer; none: no scores.")
    prompt: str | None = key(None, "One prompt, or - for standard input: its answer is printed, and nothing "
                             "else.")
    prompts: str | None = key(None, "File of prompts (any layout of PPO's data), for `output`.")
    output: str | None = key(None, "JSONL file for the answers to `prompts`.")
    k: int = key(1, "Answers to each prompt.", unit="answers", low=1, high=1000)
    temperature: float | None = key(None, "Sampling temperature; 0: the likeliest token each time; none: "
                                    "that of the model's generation_config.json.", low=0.0, high=100.0)
    max_new_tokens: int | None = key(None, "Longest answer; none: what the model was trained with, or 256.",
                                     unit="tokens", low=1, high=1_000_000)
    chat_template: str | None = key(None, "Jinja file in place of the tokenizer's chat template.")
    seed: int = key(0, "Seed of the sampling.", low=0, high=2**32 - 1)

    def __post_init__(self):
        for one, other in (("model", "compare"), ("prompt", "prompts")):
            if getattr(self, one) and getattr(self, other):
                raise UserError(f"{one}: stands beside {other}; give one of them")
        if bool(self.prompts) != bool(self.output):
            raise UserError("output: --prompts and --output go together; give both")
        if self.k > 1 and self.temperature == 0:
            raise UserError(f"k: {_ALL_EQUAL}")


if __name__ == "__main__":
    CONFIG = read_config(ChatConfig, None, __doc__, notes=sys.stderr)

import json
from contextlib import suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from utils.console import progress_bar
from utils.data.rows import load_examples
from utils.models.parents import Parent
from utils.models.talk import Answer, Pieces, Scorer, Talker, last_model, share_layout, short_names

DEMO = PROJECT / "outputs" / "tldr_mini"
_QUOTES = '"""'
_NOT_TEXT = "this is not text in UTF-8"
_WHAT = {"tldr": "Write or paste a post: it is summarised.",
         "plain": "What you write is continued. Each text stands alone."}


class Chat:
    """A conversation in a terminal, and the settings that its commands change."""

    def __init__(self, config: ChatConfig):
        names = config.compare or [config.model or last_model(DEMO)]
        key = "compare" if config.compare else "model"
        self.config = config
        self.talkers = [Talker(Parent(key, name, config.chat_template)) for name in names]
        self.names = short_names(names)  # of the talkers, as they are shown
        share_layout(self.talkers)
        self.scorer = Scorer(Parent("reward_model", config.reward_model)) if config.reward_model else None
        for talker in self.talkers if self.scorer else ():
            if talker.tokenizer.get_vocab() != self.scorer.parent.tokenizer.get_vocab():
                raise UserError(f"reward_model: '{config.reward_model}' has another tokenizer than "
                                f"'{talker.parent.name}'; use models of one family")
        self.k, self.temperature = config.k, config.temperature
        self.system, self.turns = None, []  # turns: messages of the conversation

    def ask(self, text: str, streams: bool = False) -> list[list[Answer]]:
        """Each model's answers to the conversation with one more message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return self.answers([*system, *self.turns, {"role": "user", "content": text}], streams)

    def answers(self, messages: list[dict], streams: bool = False) -> list[list[Answer]]:
        """Each model's answers to a conversation.

        Raises:
            UserError: when it does not fit into a model, or holds bytes that are no text.
        """
        try:
            json.dumps(messages, ensure_ascii=False).encode()
        except UnicodeError:  # what the terminal sent was no UTF-8
            raise UserError(f"prompt: {_NOT_TEXT}") from None
        found = []
        for talker in self.talkers:
            longest = self.config.max_new_tokens or talker.max_new_tokens
            text = talker.text(messages)
            prompt = talker.tokens(text, longest)
            if talker.shortens(text, longest):
                print(f"note: '{talker.parent.name}' cannot read all of this prompt; it got a part",
                      file=sys.stderr)
            streamer = Pieces(talker.tokenizer, _write) if streams else None
            answers = talker.answers(prompt, self.k, longest, self.temperature, streamer)
            found.append(self.scorer.scored(prompt, answers) if self.scorer else answers)
        return found

    def talk(self) -> None:
        """Read messages until the end of the input."""
        with suppress(ImportError):  # not in every Python: lines can be edited, and a pasted post is one text
            import readline
            readline.parse_and_bind("set enable-bracketed-paste on")
        what = {_WHAT.get(talker.layout, "A conversation: each answer knows what came before it.")
                for talker in self.talkers}
        print(", ".join(self.names), *sorted(what), "/help lists the commands; Ctrl-D ends", sep="\n")
        while True:
            try:
                text = _message()
                if text is None or text.startswith("/") and self.command(text):
                    return
                if text and not text.startswith("/"):
                    self.answer(text)
            except UserError as error:  # a prompt that is too long, say
                print(f"error: {error}")
            except KeyboardInterrupt:
                print("\n(stopped)")

    def answer(self, text: str) -> None:
        """Show the answers; the first one goes on the conversation."""
        alone = len(self.talkers) == 1 and self.k == 1
        found = self.ask(text, streams=alone)
        if not alone:
            show(self.names, found, self.scorer)
        else:
            print()
            if self.scorer:
                print(score_text(found[0][0]))
        if len(self.talkers) == 1:
            self.turns += [{"role": "user", "content": text},
                           {"role": "assistant", "content": found[0][0].text}]

    def command(self, text: str) -> bool:
        """Do what a command says, and say what holds now; True: end."""
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "/quit":
            return True
        if name == "/help":
            print(__doc__[__doc__.index("    /new"):].rstrip())
        elif name == "/new":
            self.turns = []
            print("a new conversation")
        elif name == "/system":
            self.instruct(value)
        elif name == "/k":
            self.set_k(value)
        elif name == "/temperature":
            self.set_temperature(value)
        else:
            raise UserError(f"no command '{text[:60]}'; /help lists them")
        return False

    def instruct(self, value: str) -> None:
        if all(talker.layout in _WHAT for talker in self.talkers):
            raise UserError("/system: this model reads one text alone, and no instructions")
        self.system = value or None
        print(f"instructions: {value or 'none'}")

    def set_k(self, value: str) -> None:
        if not (value.isdecimal() and 1 <= int(value) <= 1000):
            raise UserError("/k: a whole number from 1 to 1000 is needed, as in /k 4")
        if int(value) > 1 and self.temperature == 0:
            raise UserError(f"/k: {_ALL_EQUAL}")
        self.k = int(value)
        print(f"answers to each prompt: {self.k}")

    def set_temperature(self, value: str) -> None:
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not 0 <= number <= 100:
            raise UserError("/temperature: a number from 0 to 100 is needed, as in /temperature 0.7")
        if number == 0 and self.k > 1:
            raise UserError(f"/temperature: {_ALL_EQUAL} (/k 1 asks for one)")
        self.temperature = number
        print(f"temperature: {number:g}")


def score_text(answer: Answer) -> str:
    return "(did not end, so it has no score)" if answer.score is None else f"(score {answer.score:.3f})"


def show(names: list[str], found: list[list[Answer]], scored: bool) -> None:
    """The answers of several models side by side, or several of one."""
    table = Table(show_lines=True, show_header=len(names) > 1)
    for name in names:
        table.add_column(name, overflow="fold")
    for row in zip(*found, strict=True):
        table.add_row(*(f"{answer.text}\n{score_text(answer)}" if scored else answer.text for answer in row))
    Console(markup=False, highlight=False).print(table)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _message() -> str | None:
    """The next message, of several lines between triple quotes; None: the input has ended."""
    try:
        line = input("> ")
        if line.strip() != _QUOTES:
            return line.strip()
        lines = []
        while (line := input(". ")).strip() != _QUOTES:
            lines.append(line)
        return "\n".join(lines).strip()
    except UnicodeError:
        raise UserError(f"prompt: {_NOT_TEXT}") from None
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def answer_file(chat: Chat, config: ChatConfig) -> None:
    """The answers to all prompts of a file, a line each; those of several models stand under their names."""
    output = Path(config.output)
    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise UserError(f"output: '{output}' must be a .jsonl file in a folder that exists")
    if output.exists():
        raise UserError(f"output: '{output}' is there already; name a new file")
    rows = load_examples(config.prompts, "prompts", need_completion=False)
    with output.open("w", encoding="utf-8") as file:
        for index in progress_bar(range(len(rows)), desc="prompts"):
            prompt = rows[index].prompt
            found = chat.answers(rows.messages(index) or [{"role": "user", "content": prompt}])
            answers = {talker.parent.name: [answer._asdict() for answer in each]
                       for talker, each in zip(chat.talkers, found, strict=True)}
            for each in answers.values():
                for answer in each:
                    del answer["tokens"]
            file.write(json.dumps({"prompt": prompt, "answers": answers}, ensure_ascii=False) + "\n")
            file.flush()  # what is answered stays, whatever comes
    print(f"prompts: {len(rows)}; their answers are in '{output}'")


def _prompt_of(config: ChatConfig) -> str:
    """The one prompt that was asked for.

    Raises:
        UserError: when there is none, or it is no text.
    """
    try:
        text = (sys.stdin.read() if config.prompt == "-" else config.prompt).strip()
    except UnicodeError:
        raise UserError(f"prompt: {_NOT_TEXT}") from None
    if not text:
        raise UserError("prompt: is empty; text is needed")
    return text


def main(config: ChatConfig) -> None:
    torch.manual_seed(config.seed)
    text = None if config.prompt is None else _prompt_of(config)
    chat = Chat(config)
    if config.prompts:
        return answer_file(chat, config)
    if text is None:
        return chat.talk()
    found = chat.ask(text)
    if len(chat.talkers) > 1:
        return show(chat.names, found, chat.scorer)
    for answer in found[0]:
        print(answer.text)
        if chat.scorer:  # beside the answer, which may go into a pipe
            print(score_text(answer), file=sys.stderr)


if __name__ == "__main__":
    start(main, CONFIG)
