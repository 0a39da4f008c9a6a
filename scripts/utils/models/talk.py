"""A model that answers: prompts in the layout it was trained on, answers as text, and their scores."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from utils.config import UserError
from utils.data.chat import Chat
from utils.data.conversations import messages_of, stored_conversation
from utils.data.layouts import TLDR_TEMPLATE, spaced, tldr_layout, tldr_parts
from utils.data.tokens import WHOLE, completion_tokens, cut_prompts, prompt_tokens
from utils.distributed import world
from utils.models.loading import load_policy, load_scalar_model
from utils.models.outputs import scores
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

_LONGEST = 256  # tokens of an answer, where the model does not say how many it was trained with
_TITLE = 60  # characters of a post's first line that can be a title


class Answer(NamedTuple):
    """One answer of a model."""

    text: str
    tokens: list[int]  # the end token included
    score: float | None = None  # by the reward model; None: there is none


class Talker:
    """A language model and the layout of its prompts.

    Args:
        parent: the model's folder or hub name.

    Raises:
        UserError: when it cannot be loaded, or is a reward model.
    """

    def __init__(self, parent: Parent):
        if parent.stage is not None and parent.stage.get("stage") == "reward":
            raise UserError(f"{parent.key}: '{parent.name}' is a reward model, which writes nothing; give it "
                            "as --reward_model, and the model of another stage here")
        self.parent, self.tokenizer = parent, parent.tokenizer
        self.model = load_policy(parent).to(world().device).eval()
        stage = parent.stage or {}
        self.max_new_tokens = stage.get("max_new_tokens", _LONGEST)
        self.layout = "chat" if self.tokenizer.chat_template else stage.get("prompt_layout", "plain")

    @property
    def positions(self) -> int:
        """The longest row that the model can read."""
        return getattr(self.model.config, "max_position_embeddings", None) or 2**20

    def text(self, messages: list[dict]) -> str:
        """A conversation as a data set stores such a prompt (`utils/data/conversations.py`).

        A model that was trained on posts sees the last message as a post.
        """
        if self.layout in ("chat", "dialogue"):
            return stored_conversation(messages)
        text = messages[-1]["content"].rstrip()
        return as_post(text) if self.layout == "tldr" else text

    def prompt(self, messages: list[dict], max_new_tokens: int) -> list[int]:
        """Token ids of a conversation; see `tokens`."""
        return self.tokens(self.text(messages), max_new_tokens)

    def tokens(self, text: str, max_new_tokens: int) -> list[int]:
        """Token ids of a stored prompt, as long as there is room for an answer; earlier turns are cut off.

        Raises:
            UserError: when the last message does not fit.
        """
        room = self.positions - max_new_tokens
        if room < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens} tokens leave no room for a prompt in the "
                            f"{self.positions} positions of '{self.parent.name}'")
        [ids] = prompt_tokens(self.tokenizer, [text], room)
        return ids

    def shortens(self, text: str, max_new_tokens: int) -> bool:
        """Whether `tokens` leaves out some of a stored prompt, which is longer than the model can read."""
        [(_, cut)] = cut_prompts(self.tokenizer, [text], self.positions - max_new_tokens)
        return cut != WHOLE

    def completions(self, text: str, answers: list[str]) -> list[list[int]]:
        """Token ids of finished answers to a stored prompt, as the reward stage sees them."""
        messages = messages_of(text)
        if messages and self.tokenizer.chat_template:
            return Chat(self.tokenizer).completions(messages, [answer.strip() for answer in answers])
        return [list(map(int, row)) for row in
                completion_tokens(self.tokenizer, [spaced(answer) for answer in answers])]

    @torch.no_grad()
    def answers(self, prompt: list[int], count: int, max_new_tokens: int, temperature: float | None,
                streamer=None, stop: Callable[[], bool] | None = None) -> list[Answer]:
        """Sample answers to a prompt.

        Args:
            temperature: None: that of generation_config.json; 0: the likeliest token each time.
            streamer: gets the tokens of a single answer as they come (transformers' `TextStreamer`).
            stop: asked after each token; True: the answers end here, as they are.
        """
        sampling = {}
        if temperature is not None:
            sampling = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
        elif count > 1:
            sampling = {"do_sample": True}
        ids = torch.tensor([prompt], device=self.model.device)
        settings = GenerationConfig(**{**self.model.generation_config.to_diff_dict(), **sampling,
                                       "max_new_tokens": max_new_tokens, "num_return_sequences": count})
        stopping = StoppingCriteriaList([_Stop(stop)] if stop else [])
        rows = self.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings,
                                   streamer=streamer, stopping_criteria=stopping)
        found = [self._until_end(row[len(prompt):].tolist()) for row in rows]
        return [Answer(self.tokenizer.decode(row, skip_special_tokens=True).strip(), row) for row in found]

    def _until_end(self, tokens: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def share_layout(talkers: list[Talker]) -> None:
    """Let models that no stage has trained (a base model) get the prompts of those beside them that one has.
    """
    trained = next((talker for talker in talkers if talker.parent.stage is not None), None)
    if trained is None or trained.layout == "chat":
        return
    for talker in talkers:
        if talker.parent.stage is None and talker.layout == "plain":
            talker.layout, talker.max_new_tokens = trained.layout, trained.max_new_tokens


class Pieces(TextStreamer):
    """Hands on the text of an answer as it grows, a word at a time, without the space that it begins with."""

    def __init__(self, tokenizer, say: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say, self._begun = say, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self._begun else text.lstrip()
        if text:
            self._begun = True
            self._say(text)


class _Stop(StoppingCriteria):
    """Ends all rows of a batch when somebody asks for it."""

    def __init__(self, asked: Callable[[], bool]):
        self.asked = asked

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked(), device=input_ids.device)


class Scorer:
    """A reward model, for answers of models with its tokenizer."""

    def __init__(self, parent: Parent):
        self.parent = parent
        self.model = load_scalar_model(parent).to(world().device).eval()

    @torch.no_grad()
    def scored(self, prompt: list[int], answers: list[Answer]) -> list[Answer]:
        """The answers with their scores; one that did not end has none, for its score would mean nothing."""
        pad, end = self.parent.tokenizer.pad_token_id, self.parent.tokenizer.eos_token_id
        groups = pack([prompt], [[answer.tokens for answer in answers]], pad).to(self.model.device)
        found = scores(self.model, groups).tolist()
        return [answer._replace(score=score) if answer.tokens[-1:] == [end] else answer
                for answer, score in zip(answers, found, strict=True)]


def as_post(text: str) -> str:
    """A text in the layout of TL;DR. Its first line is the title where it can be one."""
    if tldr_parts(text):
        return tldr_layout(text).rstrip()
    text = text.strip()
    first, _, rest = text.partition("\n")
    has_title = rest.strip() and len(first) <= _TITLE
    return TLDR_TEMPLATE.format(subreddit="AskReddit", title=first[:_TITLE].strip(),
                                post=rest.strip() if has_title else text)


def short_names(names: list[str]) -> list[str]:
    """What models are called where there is little room: outputs/mine/ppo/final is mine/ppo.

    Those that would be called alike keep their whole names.
    """
    ends = [[part for part in Path(name).parts if part not in ("outputs", "final", "/", "..", ".")]
            for name in names]
    short = ["/".join(parts[-2:]) or name for parts, name in zip(ends, names, strict=True)]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, names, strict=True)]


def last_model(demo: Path) -> str:
    """The demo's last model: of PPO, else of SFT.

    Raises:
        UserError: when the demo has not run.
    """
    for stage in ("ppo", "sft"):
        if (demo / stage / "final" / "config.json").is_file():
            return str(demo / stage / "final")
    raise UserError(f"model: no trained model in '{demo}'; run 'make demo', or name one with --model")
