"""Text becomes tokens, once: prompts cut to a length, completions with their EOS, kept on the disk as Arrow."""

import bisect
import hashlib
import re
import tempfile
from functools import cache, partial
from pathlib import Path

import pyarrow as pa
from datasets import Dataset
from tqdm.auto import tqdm

from utils.config import UserError
from utils.data.cache import cached
from utils.data.layouts import TLDR_TEMPLATE, tldr_parts
from utils.data.store import ROW_COLUMNS, StoredSet

WHOLE, CUT, CUT_INSIDE, TOO_LONG = range(4)  # a prompt; cut at a boundary; inside a sentence or turn; its fixed parts do not fit
_IDS = pa.list_(pa.int32())
_TURN = "\n\nHuman: "


def token_rows(stored: StoredSet, tokenizer, max_prompt_tokens: int) -> Dataset:
    """The rows of a stored set as token ids, on the disk and in the set's order.

    Columns: `prompt`; `completion` (examples, prompts) or `completions`, `pairs`, `label_scores`, `notes` (rankings,
    ratings); `length`, the tokens of all of it; `longest`, those of the longest completion; `cut`, what was done to the
    prompt. A prompt that is TOO_LONG has no tokens, and a completion that is missing none either.
    """
    key = [stored.folder.name, tokenizer_key(tokenizer), max_prompt_tokens]
    folder = cached("tokens", key, partial(_build, stored, tokenizer, max_prompt_tokens))
    return Dataset.from_file(str(folder / "tokens.arrow"))


def tokenizer_key(tokenizer) -> str:
    """A hash of all that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else _saved(tokenizer)
    return hashlib.sha256(f"{tokenizer.eos_token_id} {content}".encode()).hexdigest()


def _saved(tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer without a backend: its class, its options, and all that stands beside a vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _build(stored: StoredSet, tokenizer, max_prompt_tokens: int, folder: Path) -> None:
    ranked = stored.meta["kind"] in ("rankings", "ratings")
    extra = list(ROW_COLUMNS) if ranked else []
    schema = pa.schema([
        ("prompt", _IDS), ("completions", pa.list_(_IDS)) if ranked else ("completion", _IDS),
        *((name, ROW_COLUMNS[name]) for name in extra), ("length", pa.int32()), ("longest", pa.int32()), ("cut", pa.int8()),
    ])
    bar = tqdm(desc=f"tokenising {stored.label}", total=stored.table.num_rows, unit=" rows", disable=None, leave=False)
    with pa.ipc.new_stream(str(folder / "tokens.arrow"), schema) as file, bar:
        for batch in stored.table.select(["prompt", "completions", *extra]).to_batches():
            prompts, cuts = _of_texts(stored, batch["prompt"].to_pylist(), partial(cut_prompts, tokenizer,
                                                                                 max_tokens=max_prompt_tokens))
            numbers = batch["completions"].to_pylist()
            flat, _ = _of_texts(stored, [n for group in numbers for n in group], lambda texts: [
                (ids, None) for ids in completion_tokens(tokenizer, texts)])
            flat = iter(flat)
            completions = [[next(flat) for _ in group] for group in numbers]
            lengths = [len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, completions, strict=True)]
            longest = [max(map(len, group), default=0) for group in completions]
            if not ranked:
                completions = [group[0] if group else [] for group in completions]
            columns = [prompts, completions, *(batch[name] for name in extra), lengths, longest, cuts]
            file.write_batch(pa.record_batch([column if isinstance(column, pa.Array) else pa.array(column, field.type)
                                              for column, field in zip(columns, schema, strict=True)], schema=schema))
            bar.update(len(batch))


def _of_texts(stored: StoredSet, numbers: list[int], measure) -> tuple[list, list]:
    """What `measure` makes of the texts with these numbers, each text once: two columns."""
    distinct = list(dict.fromkeys(numbers))
    found = dict(zip(distinct, measure([stored.text(number) for number in distinct]), strict=True))
    return [found[number][0] for number in numbers], [found[number][1] for number in numbers]


def _ids(tokenizer, text, add_special_tokens=True):
    """Token ids. A special token that somebody has written into a text is text: `</s>` in a post ends nothing (detail 4)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or isinstance(text, str):
        return tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
    # what the call does for a batch, without the offsets and masks that nobody needs here: a fifth of the time
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    return [encoding.ids for encoding in backend.encode_batch_fast(text, add_special_tokens=add_special_tokens)]


def prompt_tokens(tokenizer, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, special tokens in front as the tokenizer has them, cut to `max_tokens`.

    Raises:
        UserError: for a prompt that cannot be cut so far.
    """
    found = cut_prompts(tokenizer, prompts, max_tokens)
    for prompt, (_, cut) in zip(prompts, found, strict=True):
        if cut == TOO_LONG:
            raise UserError(f"{cannot_fit(max_tokens)}: {prompt[:60]!r}...")
    return [ids for ids, _ in found]


def cannot_fit(max_tokens: int) -> str:
    """What is wrong with a prompt that is TOO_LONG."""
    return f"the prompt cannot fit into max_prompt_tokens={max_tokens} even without its post"


def cut_prompts(tokenizer, prompts: list[str], max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids of each prompt, at most `max_tokens`, and what was done to it: WHOLE, CUT, CUT_INSIDE or TOO_LONG."""
    if not prompts:
        return []
    return [
        (ids, WHOLE) if len(ids) <= max_tokens else _cut_prompt(tokenizer, prompt, ids, max_tokens)
        for prompt, ids in zip(prompts, _ids(tokenizer, prompts), strict=True)
    ]


def _cut_prompt(tokenizer, prompt: str, ids: list[int], max_tokens: int) -> tuple[list[int], int]:
    """A post loses its end (detail 1), a dialogue its first turns, any other prompt its beginning."""
    if parts := tldr_parts(prompt):
        return _cut_post(tokenizer, *parts, max_tokens, len(prompt) / len(ids))
    # the later the first turn, the shorter the dialogue: find the earliest that fits by bisection
    turns = [found.start() + 2 for found in re.finditer(f"(?={_TURN})", prompt)] if prompt.endswith("\n\nAssistant:") else []
    first = bisect.bisect_left(turns, True, key=lambda start: len(_ids(tokenizer, prompt[start:])) <= max_tokens)
    if first < len(turns):
        return _ids(tokenizer, prompt[turns[first]:]), CUT
    special = len(ids) - len(_ids(tokenizer, prompt, add_special_tokens=False))
    return ids[:special] + ids[len(ids) - max_tokens + special :], CUT_INSIDE


def _cut_post(tokenizer, subreddit, title, post, max_tokens: int, token_size: float) -> tuple[list[int], int]:
    """Cut the *post* at its last newline, then at its last sentence, then at a word; never `TL;DR:`.

    Args:
        token_size: characters in a token of it, from which the place of the cut is guessed.
    """
    @cache
    def cut_at(end: int) -> list[int]:
        return _ids(tokenizer, TLDR_TEMPLATE.format(subreddit=subreddit, title=title, post=post[:end].rstrip()))

    guess = max_tokens * token_size - len(TLDR_TEMPLATE.format(subreddit=subreddit, title=title, post=""))
    for breaks, cut in zip(_breaks(post), (CUT, CUT, CUT_INSIDE), strict=True):
        last = _last_that_fits(breaks, lambda end: len(cut_at(end)) <= max_tokens, guess)
        if last is not None:
            return cut_at(last), cut
    return [], TOO_LONG


def _last_that_fits(ends: list[int], fits, guess: float) -> int | None:
    """The last of ascending `ends` that fits, where none fits behind one that does not; None when none does.

    Steps of 1, 2, 4, ... lead away from the guess, which is mostly right: each look costs a tokenisation.
    """
    low, high, step = -1, len(ends), 1
    place = min(max(bisect.bisect_right(ends, guess) - 1, 0), high - 1)
    while high - low > 1:
        if fits(ends[place]):
            low, place = place, place + step
        else:
            high, place = place, place - step
        step *= 2
        if not low < place < high:
            place = (low + high) // 2
    return ends[low] if low >= 0 else None


def _breaks(post: str) -> list[list[int]]:
    """Where a post may be cut: at newlines; else behind sentences of its first paragraph; else at words; else wholly."""
    first = post.split("\n", 1)[0]
    return [
        [found.start() for found in re.finditer(r"(?<=\S)\n", post)],
        [found.start() for found in re.finditer(r"(?<=[.?!]) ", first)],
        [0] + [found.start() for found in re.finditer(r"(?<=\S) ", first)],
    ]


def completion_tokens(tokenizer, completions: list[str]) -> list[list[int]]:
    """Token ids of each completion as they are behind a prompt (detail 2), followed by EOS."""
    if not completions:
        return []
    head = _head(tokenizer)
    skip = len(_ids(tokenizer, head, add_special_tokens=False)) if head else 0
    ids = _ids(tokenizer, [head + text for text in completions] if head else completions, add_special_tokens=False)
    return [tokens[skip:] + [tokenizer.eos_token_id] for tokens in ids]


def _head(tokenizer) -> str:
    """Text to put in front of a completion: nothing, or, for tokenizers that begin every text with a space of their own
    (Llama's), the colon that prompts end with."""
    apart, joined, head = (_ids(tokenizer, text, add_special_tokens=False) for text in (" a", ": a", ":"))
    return "" if head + apart == joined else ":"
