"""Texts become tokens, once: prompts cut to a length, completions with their EOS, stored as Arrow."""

import bisect
import hashlib
import itertools
import re
import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from utils.config import UserError
from utils.console import progress_bar
from utils.data.cache import cached
from utils.data.chat import Chat
from utils.data.conversations import (
    learnt_turns,
    messages_of,
    readable,
    stored_conversation,
    text_of_turn,
)
from utils.data.layouts import TLDR_TEMPLATE, tldr_parts
from utils.data.store import ROW_COLUMNS, StoredSet
from utils.data.turns import TurnGroup, turn_group

# What was done to a prompt: nothing; cut at the end of a sentence or turn; cut inside one; nothing, because
# even its fixed parts do not fit.
WHOLE, CUT, CUT_INSIDE, TOO_LONG = range(4)
_IDS = pa.list_(pa.int32())
_TURN_COLUMNS = {
    "turns": pa.struct([("prompt", _IDS), ("completions", pa.list_(_IDS)), ("labels", pa.list_(_IDS))]),
    "answers": pa.int32(), "positions": pa.int32(),
}
_TURN = "\n\nHuman: "
_PIECE = 1 << 16  # characters that are tokenised at once
_BREAK = re.compile(r"(?<=\w)(?= \w)")
_LONGEST_TOKEN = 256  # characters; the longest of usual vocabularies are rows of 128 spaces or dashes
_PART_BYTES = 1 << 20  # of text that is tokenised for one batch of rows


def token_rows(stored: StoredSet, tokenizer, max_prompt_tokens: int, turns: bool = False) -> Dataset:
    """The rows of a stored set as token ids, on the disk, in the set's order.

    Columns: `prompt`; `completion` (examples, prompts) or `completions`, `pairs`, `label_scores`, `notes`
    (rankings, ratings); `length`, the number of all tokens of the row; `longest`, that of its longest
    completion; `cut`, what was done to the prompt. A prompt that is TOO_LONG and a missing completion have no
    tokens.

    With `turns`, for examples only: `turns`, the group of all answers in the conversation (see `turn_group`),
    whose tokens `length` counts; `answers`, how many these are; `positions`, tokens of its longest sequence.
    """
    key = [stored.folder.name, tokenizer_key(tokenizer), max_prompt_tokens, turns]
    folder = cached("tokens", key, partial(_build, stored, tokenizer, max_prompt_tokens, turns))
    return Dataset.from_file(str(folder / "tokens.arrow"))


def tokenizer_key(tokenizer) -> str:
    """A hash of everything that decides which tokens a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else _saved(tokenizer)
    decides = f"{tokenizer.eos_token_id} {tokenizer.chat_template} {content}"
    return hashlib.sha256(decides.encode()).hexdigest()


def _saved(tokenizer) -> dict[str, bytes]:
    """The files of a tokenizer without a Rust backend: vocabulary, class, options and all else it saves."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _build(stored: StoredSet, tokenizer, max_prompt_tokens: int, turns: bool, folder: Path) -> None:
    """Tokenise a stored set into `folder`."""
    ranked = stored.meta["kind"] in ("rankings", "ratings")
    extra = list(ROW_COLUMNS) if ranked else []
    schema = pa.schema([
        ("prompt", _IDS), ("completions", pa.list_(_IDS)) if ranked else ("completion", _IDS),
        *((name, ROW_COLUMNS[name]) for name in extra),
        ("length", pa.int32()), ("longest", pa.int32()), ("cut", pa.int8()),
        *(_TURN_COLUMNS.items() if turns else ()),
    ])
    cut = partial(cut_prompts, tokenizer, max_tokens=max_prompt_tokens)
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    bar = progress_bar(desc=f"tokenising {stored.label}", total=stored.table.num_rows, unit=" rows",
                       leave=False)
    with pa.ipc.new_stream(str(folder / "tokens.arrow"), schema) as file, bar:
        for batch in _parts(stored, stored.table.select(["prompt", "completions", *extra])):
            prompts_and_cuts = _of_texts(stored, batch["prompt"].to_pylist(), cut)
            prompts, cuts = [ids for ids, _ in prompts_and_cuts], [cut for _, cut in prompts_and_cuts]
            numbers = batch["completions"].to_pylist()  # a list for each row
            all_numbers = [number for group in numbers for number in group]
            tokenised = iter(_of_texts(stored, all_numbers, partial(completion_tokens, tokenizer)))
            completions = [[next(tokenised) for _ in group] for group in numbers]
            if chat is not None:
                completions = [
                    _answers(chat, stored, prompt, group, max_prompt_tokens) or plain
                    for prompt, group, plain in zip(batch["prompt"].to_pylist(), numbers, completions,
                                                    strict=True)
                ]
            lengths = [len(prompt) + sum(map(len, group))
                       for prompt, group in zip(prompts, completions, strict=True)]
            longest = [max(map(len, group), default=0) for group in completions]
            if not ranked:
                completions = [group[0] if group else [] for group in completions]
            more = []
            if turns:
                answers = [_turns(tokenizer, chat, stored, *row, max_prompt_tokens) if row[2] else []
                           for row in zip(batch["prompt"].to_pylist(), numbers, prompts, completions,
                                          strict=True)]
                groups = [turn_group(row) if row else TurnGroup([], [], []) for row in answers]
                lengths = [len(one.prompt) + sum(map(len, one.completions)) for one in groups]
                positions = [len(one.prompt) + max(map(len, one.completions), default=0) for one in groups]
                more = [[one._asdict() for one in groups], list(map(len, answers)), positions]
            columns = [prompts, completions, *(batch[name] for name in extra), lengths, longest, cuts, *more]
            arrays = [column if isinstance(column, pa.Array) else pa.array(column, field.type)
                      for column, field in zip(columns, schema, strict=True)]
            file.write_batch(pa.record_batch(arrays, schema=schema))
            bar.update(len(batch))


def _answers(chat: Chat, stored: StoredSet, prompt: int, answers: list[int], max_tokens: int):
    """Token ids of the answers to a conversation that fits; None: the prompt is another one."""
    messages = messages_of(stored.text(prompt))
    kept = messages and chat.cut(messages, max_tokens)
    return kept and chat.completions(kept, [stored.text(answer).strip() for answer in answers])


def _turns(tokenizer, chat: Chat | None, stored: StoredSet, text: int, answers: list[int], prompt, completion,
           max_tokens: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) as token ids, of each answer of an example that is learnt.

    Args:
        chat: None: the model reads conversations in the plain layout.
        text, answers: numbers of the example's texts.
        prompt, completion: the last turn's token ids.
    """
    messages, [answer] = messages_of(stored.text(text)), map(stored.text, answers)
    last = list(prompt), list(completion)  # of a very long text they are arrays
    if not messages or not learnt_turns(messages):
        return [last]
    if chat is None:
        return [*_earlier_turns(tokenizer, messages, last[0]), last]
    kept, said = chat.cut(messages, max_tokens), {"role": "assistant", "content": answer.strip()}
    return chat.turns([*kept, said])


def _earlier_turns(tokenizer, messages, prompt: list[int]) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) as token ids, of each answer that a prompt in the plain layout holds.

    Args:
        prompt: the conversation's token ids, perhaps without its first turns. Cut inside a turn it holds no
            answer.
    """
    def ids(part) -> list[int]:
        return list(_ids(tokenizer, readable(stored_conversation(part))))

    starts = [0, *(n for n, message in enumerate(messages) if n and message["role"] == "user")]
    # the later the first turn, the shorter the prompt
    first = bisect.bisect_left(starts, True, key=lambda start: len(ids(messages[start:])) <= len(prompt))
    kept = messages[starts[first]:] if first < len(starts) else []
    if not kept or ids(kept) != prompt:
        return []
    answers = completion_tokens(tokenizer, [f" {text_of_turn(kept[n])}" for n in learnt_turns(kept)])
    return [(ids(kept[:n]), list(answer)) for n, answer in zip(learnt_turns(kept), answers, strict=True)]


def _parts(stored: StoredSet, rows: pa.Table) -> Iterator[pa.RecordBatch]:
    """The rows in parts of at most 1,000 rows, and of about _PART_BYTES of text unless one row has more."""
    sizes = stored.text_sizes()
    for batch in rows.to_batches(max_chunksize=1000):
        texts = [sizes[batch["prompt"].to_numpy()]]  # bytes of each row's prompt and completions
        owners = pc.list_parent_indices(batch["completions"]).to_numpy()
        texts.append(np.bincount(owners, sizes[batch["completions"].flatten().to_numpy()], len(batch)))
        part = np.cumsum(sum(texts)) // _PART_BYTES
        starts = [0, *(np.flatnonzero(np.diff(part)) + 1), len(batch)]
        yield from (batch.slice(first, end - first) for first, end in itertools.pairwise(starts))


def _of_texts(stored: StoredSet, numbers: list[int], tokenise) -> list:
    """The result of `tokenise`, a function of a list of texts, for each number.

    Each distinct text is tokenised once.
    """
    distinct = list(dict.fromkeys(numbers))
    results = dict(zip(distinct, tokenise([stored.text(number) for number in distinct]), strict=True))
    return [results[number] for number in numbers]


def _ids(tokenizer, text, add_special_tokens=True):
    """Token ids of a text or of a list of texts.

    A text of more than _PIECE characters is tokenised in pieces that end between two words, because a
    tokenizer takes some 250 bytes for each character.
    """
    if isinstance(text, str):
        pieces = _pieces(text)
        ids = _ids_at_once(tokenizer, pieces[0], add_special_tokens)
        if len(pieces) == 1:
            return ids
        rest = (_continued(tokenizer, piece) for piece in pieces[1:])
        return np.concatenate([np.array(part, dtype=np.int32) for part in (ids, *rest)])
    short = [one for one in text if len(one) <= _PIECE]
    done = iter(_ids_at_once(tokenizer, short, add_special_tokens) if short else [])
    return [next(done) if len(one) <= _PIECE else _ids(tokenizer, one, add_special_tokens) for one in text]


def _pieces(text: str) -> list[str]:
    """The text in pieces of at most _PIECE characters, cut before a space between two words.

    No token of a usual tokenizer goes on there, so that the pieces have the tokens of the whole. A text
    without such a place is cut anywhere.
    """
    pieces, begin = [], 0
    while len(text) - begin > _PIECE:
        places = [match.start() for match in _BREAK.finditer(text, begin + _PIECE // 2, begin + _PIECE)]
        end = places[-1] if places else begin + _PIECE
        pieces.append(text[begin:end])
        begin = end
    return [*pieces, text[begin:]]


def _continued(tokenizer, piece: str) -> list[int]:
    """Token ids of a text as it continues another."""
    head = _head(tokenizer)
    start = _ids_at_once(tokenizer, head, False) if head else []
    ids = _ids_at_once(tokenizer, head + piece, False)
    return ids[len(start):] if ids[: len(start)] == start else _ids_at_once(tokenizer, piece, False)


def _ids_at_once(tokenizer, text, add_special_tokens):
    """Token ids of a text or of a list of texts.

    A special token that somebody has written into a text stays text: `</s>` in a post does not end it (detail
    4).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or isinstance(text, str):
        return tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
    # calling the tokenizer does the same, but also builds offsets and masks, which takes a fifth more time
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    encodings = backend.encode_batch_fast(text, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def prompt_tokens(tokenizer, prompts: list[str], max_tokens: int) -> list[list[int]]:
    """Token ids of each prompt, with the tokenizer's special tokens at the start, cut to `max_tokens`.

    Raises:
        UserError: for a prompt that is TOO_LONG.
    """
    ids_and_cuts = cut_prompts(tokenizer, prompts, max_tokens)
    for prompt, (_, cut) in zip(prompts, ids_and_cuts, strict=True):
        if cut == TOO_LONG:
            raise UserError(f"{cannot_fit(max_tokens)}: {prompt[:60]!r}...")
    return [ids for ids, _ in ids_and_cuts]


def cannot_fit(max_tokens: int) -> str:
    """The error message for a prompt that is TOO_LONG."""
    return (f"the prompt cannot fit into max_prompt_tokens={max_tokens} even without its post or its earlier "
            "turns")


def cut_prompts(tokenizer, prompts: list[str], max_tokens: int) -> list[tuple[list[int], int]]:
    """Token ids of each prompt, at most `max_tokens`, and what was done to it.

    That is WHOLE, CUT, CUT_INSIDE or TOO_LONG.
    """
    chat = Chat(tokenizer) if tokenizer.chat_template else None
    conversations = [messages_of(prompt) if chat else None for prompt in prompts]
    plain = [readable(prompt) for prompt, messages in zip(prompts, conversations, strict=True)
             if not messages]
    fitting = iter(_ids(tokenizer, [prompt for prompt in plain if _may_fit(prompt, max_tokens)]))
    tried = [next(fitting) if _may_fit(prompt, max_tokens) else None for prompt in plain]
    found = iter([
        (ids, WHOLE) if ids is not None and len(ids) <= max_tokens
        else _cut_prompt(tokenizer, prompt, max_tokens)
        for prompt, ids in zip(plain, tried, strict=True)
    ])
    return [_cut_chat(chat, messages, max_tokens) if messages else next(found) for messages in conversations]


def _cut_chat(chat: Chat, messages, max_tokens: int) -> tuple[list[int], int]:
    """The first turns of a conversation are cut off, the system's stays."""
    kept = chat.cut(messages, max_tokens)
    return ([], TOO_LONG) if kept is None else (chat.prompt(kept), WHOLE if kept == messages else CUT)


def _may_fit(text: str, max_tokens: int) -> bool:
    """Whether a text is worth tokenising to see if it fits: one of 10 MB takes 10 s."""
    return len(text) <= _LONGEST_TOKEN * max_tokens


def _cut_prompt(tokenizer, prompt: str, max_tokens: int) -> tuple[list[int], int]:
    """Cut off the end of a post (detail 1), the first turns of a dialogue, or the start of another prompt."""
    if parts := tldr_parts(prompt):
        return _cut_post(tokenizer, *parts, max_tokens)
    turns = []  # where the user's turns begin
    if prompt.endswith("\n\nAssistant:"):
        turns = [match.start() + 2 for match in re.finditer(f"(?={_TURN})", prompt)]
    # the later the first turn, the shorter the dialogue: bisect for the earliest turn from which the rest
    # fits
    first = bisect.bisect_left(turns, True, key=lambda start: _may_fit(prompt[start:], max_tokens) and len(
        _ids(tokenizer, prompt[start:])) <= max_tokens)
    if first < len(turns):
        return _ids(tokenizer, prompt[turns[first]:]), CUT
    with_special, text = (_ids(tokenizer, ":", add_special_tokens=special) for special in (True, False))
    special = with_special[: len(with_special) - len(text)]  # special tokens at the start
    end = _ids(tokenizer, prompt[-_LONGEST_TOKEN * max_tokens :], add_special_tokens=False)
    return special + list(end[len(end) - max_tokens + len(special) :]), CUT_INSIDE


def _cut_post(tokenizer, subreddit, title, post, max_tokens: int) -> tuple[list[int], int]:
    """Cut the post at a newline, else at the end of a sentence, else at a word. `TL;DR:` is never cut off."""
    def cut_prompt(end: int) -> str:
        return TLDR_TEMPLATE.format(subreddit=subreddit, title=title, post=post[:end].rstrip())

    @cache
    def cut_at(end: int) -> list[int]:
        return _ids(tokenizer, cut_prompt(end))

    def fits(end: int) -> bool:
        return _may_fit(cut_prompt(end), max_tokens) and len(cut_at(end)) <= max_tokens

    sample = post[: 4 * max_tokens]
    token_size = len(sample) / max(len(_ids(tokenizer, sample)), 1)  # in characters
    guess = max_tokens * token_size - len(cut_prompt(0))
    for breaks, cut in zip(_breaks(post[: _LONGEST_TOKEN * max_tokens]), (CUT, CUT, CUT_INSIDE), strict=True):
        last = _last_that_fits(breaks, fits, guess)
        if last is not None:
            return cut_at(last), cut
    return [], TOO_LONG


def _last_that_fits(ends: list[int], fits, guess: float) -> int | None:
    """The last of the ascending `ends` that fits; None: none does.

    After an end that does not fit none may fit. The search goes from the guess in steps of 1, 2, 4, ...,
    because each test is a tokenisation and the guess is mostly right.
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
    """Where a post may be cut, best first.

    These are its newlines, the ends of sentences in its first paragraph, and the words of that paragraph, or
    0.
    """
    paragraph = post.split("\n", 1)[0]
    return [
        [match.start() for match in re.finditer(r"(?<=\S)\n", post)],
        [match.start() for match in re.finditer(r"(?<=[.?!]) ", paragraph)],
        [0] + [match.start() for match in re.finditer(r"(?<=\S) ", paragraph)],
    ]


def completion_tokens(tokenizer, completions: list[str]) -> list[list[int]]:
    """Token ids of each completion as it continues a prompt (detail 2), followed by EOS."""
    if not completions:
        return []
    head = _head(tokenizer)
    skip = len(_ids(tokenizer, head, add_special_tokens=False)) if head else 0
    ids = _ids(tokenizer, [head + text for text in completions]
               if head else completions, add_special_tokens=False)
    return [np.append(tokens[skip:], np.int32(tokenizer.eos_token_id)) if isinstance(tokens, np.ndarray)
            else tokens[skip:] + [tokenizer.eos_token_id] for tokens in ids]


def _head(tokenizer) -> str:
    """Text to put before a completion when it is tokenised.

    It is empty, except for tokenizers that put a space before every text (Llama's). For these it is the colon
    that prompts end with.
    """
    apart, joined, head = (_ids(tokenizer, text, add_special_tokens=False) for text in (" a", ": a", ":"))
    return "" if head + apart == joined else ":"
