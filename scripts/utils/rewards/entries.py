"""What the key `rewards` says: a list of mappings, one for each reward. Imports no heavy library.

The kind of an entry is the one key of KINDS that it has. All of its keys are fields of that kind's dataclass,
made by `key` like those of a stage, so that the same law holds for them.
"""

import dataclasses
import re
import typing
from urllib.parse import urlsplit

import regex

from utils.config import Setting, UserError, checked_all, find_input, key, refuse_missing
from utils.errors import quoted
from utils.models.folders import model_folder
from utils.yaml_files import YamlError, kind_of, parse_yaml

_NAME = re.compile(r"[\w.-]{1,40}")  # part of the names of metrics
RESERVED = "tokens"  # in metrics: the length of the answer


def _scale(value):
    if value == "std":
        return value
    number = _number(value)
    if number is None or number <= 0:
        raise ValueError(f"must be a number above 0 or std, found {quoted(value)}")
    return number


def _failure(value):
    number = _number(value)
    if value != "stop" and number is None:
        raise ValueError(f"must be stop or the score to take, found {quoted(value)}")
    return value if number is None else number


def _number(value) -> float | None:
    """A finite number, also one that the command line has as text; None for anything else."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and abs(number) < float("inf") else None


def _function(value):
    path, _, name = str(value).rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"must be FILE.py:FUNCTION, found {quoted(value)}")
    return value


def _pattern(value):
    try:
        regex.compile(value)
    except (regex.error, TypeError) as error:
        raise ValueError(f"is no regular expression ({error}): {quoted(value)}") from None
    return value


def _address(value):
    try:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
            raise ValueError
    except (ValueError, AttributeError):
        raise ValueError(f"must be an address such as http://localhost:8000/score, found {quoted(value)}"
                         ) from None
    if "@" in parts.netloc:
        raise ValueError("holds a password, which logs would show; name an environment variable with "
                         "'api_key_env'")
    return value


@dataclasses.dataclass
class Entry:
    """One reward of a run: the keys that every kind has."""

    name: str | None = key(None, "Its name in the logs; none: its kind, or the name of its function.")
    weight: float = key(1.0, "Factor of its score in the sum of all rewards.", low=-1e6, high=1e6)
    scale: str | None = key(None, "Its score is divided by this number; std: by the standard deviation of "
                                  "its scores of what the SFT model writes in the first evaluation (1 where "
                                  "these are all equal).", parse=_scale)
    length_control: bool = key(False, "What it pays for length is taken off its score, before `scale`: a "
                                      "line, fitted to answers of the SFT model to the validation prompts.",
                               source="Huang 2024, 2409.17407")
    clip: float | None = key(None, "Its score, once divided, is clipped to plus or minus this; none: it "
                                    "is not.",
                             unit="score", low=1e-6, high=1e6)
    warmup_updates: int = key(0, "In training its weight rises on a line from 0 to `weight` over so many "
                                 "updates. Evaluations take the whole weight.", unit="updates",
                              low=0, high=10**9)

    def default_name(self) -> str:
        return next(kind for kind, made in KINDS.items() if made is type(self))


@dataclasses.dataclass
class ModelEntry(Entry):
    """A reward model."""

    model: str | None = key(None, "Reward model: a folder or a hub name.", there=model_folder)
    chat_template: str | None = key(None, "Jinja file with the chat template that it was trained with; none: "
                                          "that of its tokenizer.",
                                    there=lambda name, value: find_input(value, name))
    max_prompt_tokens: int | None = key(None, "With a tokenizer of its own: longer prompts are cut, counted "
                                              "in its tokens; none: as the stage's `max_prompt_tokens`.",
                                        unit="tokens", low=8, high=10_000_000)
    ensemble: str = key("mean", "The score of a model with several heads: their mean; the lowest; or the "
                                "mean less ensemble_coef times their variance.",
                        source="Coste 2023, 2310.02743", choices=["mean", "worst", "uncertainty"])
    ensemble_coef: float = key(1.0, "Weight of the variance with `ensemble: uncertainty`.", unit="1 / score",
                               source="Coste 2023, 2310.02743", low=0.0, high=1e6)


@dataclasses.dataclass
class PythonEntry(Entry):
    """A function of the user's."""

    python: str | None = key(None, "Function that scores answers: FILE.py:FUNCTION (docs/rewards.md).",
                             parse=_function,
                             there=lambda name, value: find_input(value.rpartition(":")[0], name))
    time_limit: float = key(60.0, "The run stops when a call takes longer.", unit="seconds",
                            low=1e-3, high=1e6)
    processes: str = key("each", "Which processes call it: each one for its own answers, or the first of "
                                 "each node for all of the node.", choices=["each", "main"])

    def default_name(self) -> str:
        return self.python.rpartition(":")[2]


@dataclasses.dataclass
class ServiceEntry(Entry):
    """A service that answers over HTTP: what `url` and `judge` have in common."""

    timeout: float = key(30.0, "A request that takes longer has failed.", unit="seconds", low=1e-3, high=1e5)
    retries: int = key(3, "A failed request is sent again so often, after 1, 2, 4, ... seconds.",
                       unit="requests", low=0, high=20)
    concurrency: int = key(8, "Requests of a process that are under way at once.", unit="requests",
                           low=1, high=1000)
    on_failure: str = key("stop", "What a request does that has failed for good: stop the run, or give its "
                                  "answers this score.", parse=_failure)
    api_key_env: str | None = key(None, "Environment variable with a key, sent as `Authorization: Bearer "
                                        "KEY`; none: no key is sent.")


@dataclasses.dataclass
class UrlEntry(ServiceEntry):
    """An HTTP service."""

    url: str | None = key(None, "Address that answers are posted to as JSON (docs/rewards.md).",
                          parse=_address)
    batch_size: int = key(16, "Answers in one request.", unit="answers", low=1, high=10_000)


@dataclasses.dataclass
class JudgeEntry(ServiceEntry):
    """A language model behind an OpenAI-compatible endpoint, which gives a mark."""

    judge: str | None = key(None, "Address of the endpoint, up to /v1.", parse=_address)
    judge_model: str | None = key(None, "The model that the endpoint is asked for.")
    rubric: str | None = key(None, "What makes an answer good, for the judge to read.")
    lowest: float = key(0.0, "The lowest mark.", low=-1e6, high=1e6)
    highest: float = key(10.0, "The highest mark.", low=-1e6, high=1e6)

    def __post_init__(self):
        for name in ("judge_model", "rubric"):
            if not getattr(self, name):
                raise UserError(f"'judge' needs '{name}' too")
        if self.lowest >= self.highest:
            raise UserError("'lowest' must be below 'highest'")


@dataclasses.dataclass
class LengthEntry(Entry):
    """A reward of length itself."""

    def __post_init__(self):
        if self.length_control:
            raise UserError("'length_control' would take back what it pays; leave it out")


@dataclasses.dataclass
class LengthTargetEntry(LengthEntry):
    """Closeness to a length."""

    length_target: int | None = key(None, "A length: minus the distance from it, as a share of it.",
                                    unit="tokens", low=1, high=10_000_000)


@dataclasses.dataclass
class LengthLimitEntry(LengthEntry):
    """A limit of the length."""

    length_limit: int | None = key(None, "A length: 0 up to it, beyond it minus the tokens too many, as a "
                                         "share of it.", unit="tokens", low=1, high=10_000_000)


@dataclasses.dataclass
class LengthPriceEntry(LengthEntry):
    """A price of each token."""

    length_price: float | None = key(None, "Minus this for each token, EOS included.", unit="score a token",
                                     low=-1e6, high=1e6)


@dataclasses.dataclass
class RepetitionEntry(Entry):
    """A price of repeating oneself."""

    repetition: int | None = key(None, "A number of words n: minus the share of the n-grams that stood in "
                                       "the answer before.", unit="words", low=1, high=1000)


@dataclasses.dataclass
class FormatEntry(Entry):
    """A form that answers must have."""

    format: str | None = key(None, "Regular expression: 1 for an answer that matches it as a whole, else 0.",
                             parse=_pattern)


@dataclasses.dataclass
class RougeEntry(Entry):
    """Likeness to the reference."""

    rouge: str | None = key(None, "ROUGE F1 with stemming of the answer to its row's reference, or the mean "
                                  "of the three; a row without a reference is not scored.",
                            choices=["rouge1", "rouge2", "rougeL", "mean"])


@dataclasses.dataclass
class MissingEosEntry(Entry):
    """A price of not ending."""

    missing_eos: float | None = key(None, "The score of an answer without EOS; 0 for one with it.",
                                    unit="score", low=-1e6, high=1e6)


KINDS: dict[str, type[Entry]] = {
    "model": ModelEntry, "python": PythonEntry, "url": UrlEntry, "judge": JudgeEntry,
    "length_target": LengthTargetEntry, "length_limit": LengthLimitEntry, "length_price": LengthPriceEntry,
    "repetition": RepetitionEntry, "format": FormatEntry, "rouge": RougeEntry, "missing_eos": MissingEosEntry,
}


def parse_rewards(value):
    """Check the value of the key `rewards`, a list of mappings or its YAML text, and return the list.

    Raises:
        ValueError: its text says what is wrong with the value.
    """
    if isinstance(value, str):  # from the command line
        try:
            value = parse_yaml(value)
        except YamlError as error:
            raise ValueError(f"is not YAML: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError("must be a list of mappings, such as [{model: FOLDER}], found "
                         f"{'an empty list' if value == [] else kind_of(value)}")
    names = [_entry_of(entry, f"entry {number}").name for number, entry in enumerate(value, start=1)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"has {names.count(name)} entries of the name '{name}'; give each a 'name' of "
                             "its own")
    return value


def entries_of(config) -> list[Entry]:
    """The rewards that a configuration names. `parse_rewards` has checked them."""
    given = config.rewards if config.rewards is not None else [{"model": config.reward_model}]
    return [_entry_of(entry, f"entry {number}") for number, entry in enumerate(given, start=1)]


def _entry_of(entry, place: str) -> Entry:
    """An entry with its defaults. Raises ValueError, which begins with `place`, for what is wrong."""
    if not isinstance(entry, dict):
        raise ValueError(f"{place} is {kind_of(entry)}; a mapping is needed, such as model: FOLDER")
    kinds = [kind for kind in KINDS if kind in entry]
    if len(kinds) != 1:
        has = f"has {' and '.join(kinds)}" if kinds else f"has none of {', '.join(KINDS)}"
        raise ValueError(f"{place} {has}; exactly one says what kind of reward it is")
    [kind] = kinds
    place = f"{place} ('{kind}')"
    known = [field.name for field in dataclasses.fields(KINDS[kind])]
    for name in entry:
        if name not in known:
            raise ValueError(f"{place} has an unknown key '{name}'; valid keys: {', '.join(known)}")
    if entry[kind] is None:
        raise ValueError(f"{place}: '{kind}' says nothing")
    checked = _lawful(KINDS[kind], entry, place)
    try:
        made = KINDS[kind](**checked)
    except UserError as error:  # of __post_init__
        raise ValueError(f"{place}: {error}") from None
    if made.name is None:
        made.name = made.default_name()
    if not _NAME.fullmatch(made.name) or made.name == RESERVED:
        raise ValueError(f"{place} has the name {quoted(made.name)}; letters, digits, _, - and . are taken, "
                         f"at most 40, and not '{RESERVED}'")
    return made


def _lawful(kind: type[Entry], entry: dict, place: str) -> dict:
    """The values of an entry in the types of their fields. Raises ValueError as `_entry_of`."""
    try:
        checked = checked_all(kind, {name: Setting(value, place) for name, value in entry.items()})
    except UserError as error:
        raise ValueError(str(error)) from None
    return {name: setting.value for name, setting in checked.items()}


def refuse_missing_rewards(field: str, value: list) -> None:
    """Raise UserError when a file or folder that an entry names does not exist; the hub is not asked."""
    for number, entry in enumerate(value, start=1):
        try:
            refuse_missing(_entry_of(entry, f"entry {number}"))
        except UserError as error:
            raise UserError(f"{field}: entry {number}: {error}") from None


def rewards_key(help: str) -> typing.Any:
    """The configuration field `rewards`; see `parse_rewards`."""
    return key(None, help, parse=parse_rewards, there=refuse_missing_rewards)
