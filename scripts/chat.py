"""Talk to a model: one that the stages wrote, or any other.

    python scripts/chat.py                                       # the demo's last model
    python scripts/chat.py --model outputs/mine/ppo/final --reward_model outputs/mine/reward/final
    echo "My balcony faces north. What grows there?" | python scripts/chat.py --prompt -
    python scripts/chat.py --prompts posts.jsonl --output answers.jsonl
    python scripts/chat.py --compare outputs/tldr_mini/sft/final outputs/tldr_mini/ppo/final

A model with a chat template holds a conversation. A model that was trained on posts summarises what you type:
write it as it is, the layout is added. In a conversation these words are commands:

    /new            forget the conversation        /k 4              four answers to each prompt
    /system TEXT    instructions for the model     /temperature 0.7  0: the likeliest token each time
    /help           this list                      /quit             or Ctrl-D

A line with three double quotes begins and ends a text of several lines.
"""

import sys
from dataclasses import dataclass

from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start


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


if __name__ == "__main__":
    CONFIG = read_config(ChatConfig, None, __doc__, notes=sys.stderr)

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import TextStreamer

from utils.data.rows import load_examples
from utils.models.parents import Parent
from utils.models.talk import Answer, Scorer, Talker, last_model, share_layout

DEMO = PROJECT / "outputs" / "tldr_mini"
_QUOTES = '"""'


class Chat:
    """A conversation in a terminal, and the settings that its commands change."""

    def __init__(self, config: ChatConfig):
        names = config.compare or [config.model or last_model(DEMO)]
        key = "compare" if config.compare else "model"
        self.config = config
        self.talkers = [Talker(Parent(key, name, config.chat_template)) for name in names]
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
        messages = [*system, *self.turns, {"role": "user", "content": text}]
        found = []
        for talker in self.talkers:
            longest = self.config.max_new_tokens or talker.max_new_tokens
            text = talker.text(messages)
            prompt = talker.tokens(text, longest)
            if talker.shortens(text, longest):
                print(f"note: '{talker.parent.name}' cannot read all of this prompt; it got a part",
                      file=sys.stderr)
            streamer = TextStreamer(talker.tokenizer, skip_prompt=True, skip_special_tokens=True)
            answers = talker.answers(prompt, self.k, longest, self.temperature, streamer if streams else None)
            found.append(self.scorer.scored(prompt, answers) if self.scorer else answers)
        return found

    def talk(self) -> None:
        """Read messages until the end of the input."""
        names = ", ".join(talker.parent.name for talker in self.talkers)
        print(f"{names}\n/help lists the commands; Ctrl-D ends")
        while (text := _message()) is not None:
            try:
                if text.startswith("/"):
                    if self.command(text):
                        return
                elif text:
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
            show(self.talkers, found)
        elif found[0][0].score is not None:
            print(f"(score {found[0][0].score:.3f})")
        elif self.scorer:
            print("(did not end, so it has no score)")
        if len(self.talkers) == 1:
            self.turns += [{"role": "user", "content": text},
                           {"role": "assistant", "content": found[0][0].text}]

    def command(self, text: str) -> bool:
        """Do what a command says; True: end."""
        name, _, value = text.partition(" ")
        if name == "/quit":
            return True
        if name == "/new":
            self.turns = []
        elif name == "/system":
            self.system = value.strip() or None
        elif name == "/k" and value.strip().isdecimal() and 1 <= int(value) <= 1000:
            self.k = int(value)
        elif name == "/temperature" and (number := _number(value)) is not None:
            self.temperature = number
        elif name == "/help":
            print(__doc__[__doc__.index("    /new"):].rstrip())
        else:
            print(f"error: no command '{text[:60]}'; /help lists them")
        return False


def show(talkers: list[Talker], found: list[list[Answer]]) -> None:
    """The answers of several models side by side, or several of one."""
    table = Table(show_lines=True, show_header=len(talkers) > 1)
    for talker in talkers:
        table.add_column(talker.parent.name, overflow="fold")
    for row in zip(*found, strict=True):
        table.add_row(*(answer.text + ("" if answer.score is None else f"\n(score {answer.score:.3f})")
                        for answer in row))
    Console(markup=False, highlight=False).print(table)


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
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _number(text: str) -> float | None:
    try:
        return number if 0 <= (number := float(text)) <= 100 else None
    except ValueError:
        return None


def answer_file(chat: Chat, config: ChatConfig) -> None:
    """The answers to all prompts of a file, a line each; those of several models stand under their names."""
    output = Path(config.output)
    if output.suffix != ".jsonl" or not output.parent.is_dir():
        raise UserError(f"output: '{output}' must be a .jsonl file in a folder that exists")
    if output.exists():
        raise UserError(f"output: '{output}' is there already; name a new file")
    examples = load_examples(config.prompts, "rlhf_training_data", need_completion=False)
    with output.open("w", encoding="utf-8") as file:
        for example in examples:
            found = chat.ask(example.prompt)
            answers = {talker.parent.name: [answer._asdict() for answer in each]
                       for talker, each in zip(chat.talkers, found, strict=True)}
            for each in answers.values():
                for answer in each:
                    del answer["tokens"]
            file.write(json.dumps({"prompt": example.prompt, "answers": answers}, ensure_ascii=False) + "\n")


def main(config: ChatConfig) -> None:
    torch.manual_seed(config.seed)
    chat = Chat(config)
    if config.prompts:
        return answer_file(chat, config)
    if config.prompt is None:
        return chat.talk()
    text = (sys.stdin.read() if config.prompt == "-" else config.prompt).strip()
    if not text:
        raise UserError("prompt: is empty; text is needed")
    found = chat.ask(text)
    if len(chat.talkers) > 1:
        return show(chat.talkers, found)
    for answer in found[0]:
        print(answer.text)


if __name__ == "__main__":
    start(main, CONFIG)
