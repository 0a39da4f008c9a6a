"""Small local copies of the public data sets in their layouts, with invented text; and what they mean,
written out by hand.

A layout is a function from a `Story` to a `Copy`: the story's rows in that layout, and the prompt, completion
and pairs that a loader must make of them.
"""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
import pyarrow.parquet


class Story(NamedTuple):
    """A post and summaries of it, best first."""

    subreddit: str
    title: str
    post: str
    summaries: tuple[str, str, str]


class Copy(NamedTuple):
    """Rows of one story. `pairs`: (better, worse) completions, in the order of the rows."""

    rows: list[dict]
    prompt: str
    completion: str | None = None
    pairs: tuple[tuple[str, str], ...] = ()


def stories(count: int) -> list[Story]:
    """Different stories; their post has a newline, a comma and a quotation mark, which CSV must not stumble
    over.
    """
    things = ("kettle", "bicycle", "lamp", "fence", "piano", "tent")
    people = ("neighbour", "sister", "landlord", "teacher")
    found = []
    for number in range(count):
        thing, person, day = things[number % 6], people[number // 6 % 4], number + 2
        found.append(Story(
            "advice", f"The {thing} and my {person}",
            f'My {person} borrowed my {thing} {day} days ago.\nNow it is broken, and all I heard was '
            f'"sorry". What would you do?',
            (f"My {person} broke my {thing} and only said sorry.", f"My {thing} is broken.",
             f"I have a {person}.")))
    return found


# ---------------------------------------------------------------------------------------- what a post becomes


def tldr(story: Story) -> str:
    return f"SUBREDDIT: r/{story.subreddit}\n\nTITLE: {story.title}\n\nPOST: {story.post}\n\nTL;DR:"


def single(story: Story) -> str:
    """The prompt as the CarperAI sets write it, without its end."""
    return f"SUBREDDIT: r/{story.subreddit}\nTITLE: {story.title}\nPOST: {story.post}"


def question(story: Story) -> str:
    return f"Human: Hi there\n\nAssistant: Hello. How can I help?\n\nHuman: {story.post}\n\nAssistant:"


# ----------------------------------------------------------------------------------------- supervised layouts


def carper_tldr(story):
    row = {"prompt": f"{single(story)}\nTL;DR: ", "label": story.summaries[0]}
    return Copy([row], tldr(story), f" {story.summaries[0]}")


def trl_tldr(story):
    return Copy([{"prompt": tldr(story), "completion": f" {story.summaries[0]}"}], tldr(story),
                f" {story.summaries[0]}")


def openai_tldr(story):
    row = {"id": "t3_1x", "subreddit": story.subreddit, "title": story.title, "post": story.post,
           "summary": story.summaries[0]}
    return Copy([row], tldr(story), f" {story.summaries[0]}")


def prompt_completion(story):
    return Copy([{"prompt": story.post, "completion": story.summaries[0]}], story.post,
                f" {story.summaries[0]}")


def messages(story):
    texts = ["Hi there", "Hello. How can I help?", story.post, story.summaries[0]]
    turns = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, texts,
                                                                   strict=True)]
    return Copy([{"messages": turns}], question(story), f" {story.summaries[0]}")


# --------------------------------------------------------------------------- comparisons: two rows of a story


def _two(story):
    """(better, worse) of its two rows."""
    best, middle, worst = story.summaries
    return (best, middle), (best, worst)


def _pairs(story):
    return tuple((f" {better}", f" {worse}") for better, worse in _two(story))


def carper_comparisons(story):
    rows = [{"prompt": single(story), "chosen": f"TL;DR: {better}", "rejected": f"TL;DR: {worse}"}
            for better, worse in _two(story)]
    return Copy(rows, tldr(story), pairs=_pairs(story))


def trl_preference(story):
    rows = [{"prompt": tldr(story), "chosen": f" {better}", "rejected": f" {worse}"}
            for better, worse in _two(story)]
    return Copy(rows, tldr(story), pairs=_pairs(story))


def prompt_chosen_rejected(story):
    rows = [{"prompt": story.post, "chosen": better, "rejected": worse} for better, worse in _two(story)]
    return Copy(rows, story.post, pairs=_pairs(story))


def _openai_rows(story, info):
    """The better summary stands first in the first row (choice 0) and second in the second (choice 1)."""
    rows = []
    for choice, (better, worse) in enumerate(_two(story)):
        texts = [(better, "sup4_ppo_rm3_kl10"), (worse, "ref")]
        rows.append({
            "info": info, "summaries": [{"text": f" {text}", "policy": policy, "note": None}
                                        for text, policy in
                                        (reversed(texts) if choice else texts)],
            "choice": choice, "worker": "w1", "batch": "batch7", "split": "train",
            "extra": {"confidence": 8 - choice if choice else None}})
    return rows


def openai_comparisons(story):
    info = {"id": "t3_1x", "post": story.post, "title": story.title, "subreddit": story.subreddit,
            "site": None, "article": None}
    return Copy(_openai_rows(story, info), tldr(story), pairs=_pairs(story))


def openai_cnndm(story):
    info = {"id": "1f", "post": "", "title": story.title, "subreddit": None, "site": "cnndm",
            "article": story.post}
    return Copy(_openai_rows(story, info), f"{story.post}\n\nTL;DR:", pairs=_pairs(story))


def hh_rlhf(story):
    rows = [{"chosen": f"\n\n{question(story)} {better}", "rejected": f"\n\n{question(story)} {worse}"}
            for better, worse in _two(story)]
    return Copy(rows, question(story), pairs=_pairs(story))


def shp(story):
    """A is the better answer in the first row (labels 1), B in the second (labels 0)."""
    rows = []
    for label, (better, worse) in zip((1, 0), _two(story), strict=True):
        answers = (better, worse) if label else (worse, better)
        rows.append({
            "post_id": "q1", "domain": "askbaking_train", "upvote_ratio": 0.97, "history": story.post,
            "c_root_id_A": "a1", "c_root_id_B": "b1", "created_at_utc_A": 1600000000,
            "created_at_utc_B": 1600000500,
            "score_A": 20 if label else 4, "score_B": 4 if label else 20, "human_ref_A": answers[0],
            "human_ref_B": answers[1],
            "labels": label, "seconds_difference": 500.0, "score_ratio": 5.0})
    return Copy(rows, story.post, pairs=_pairs(story))


def ranking(story):
    best, middle, worst = (f" {text}" for text in story.summaries)
    row = {"prompt": tldr(story), "completions": list(story.summaries)}
    return Copy([row], tldr(story), pairs=((best, middle), (best, worst), (middle, worst)))


def ranking_with_ranks(story):
    """The best stands last, and the others are equally good, which makes no pair."""
    best, middle, worst = (f" {text}" for text in story.summaries)
    row = {"prompt": tldr(story), "completions": [middle, worst, best], "ranks": [2, 2, 1]}
    return Copy([row], tldr(story), pairs=((best, middle), (best, worst)))


# ---------------------------------------------------------------------------------------------- prompts alone


def openai_axis(story):
    """Two labellers' ratings of the first summary, one of the second, and none of the third. Not for
    training.
    """
    info = {"id": "t3_1x", "post": story.post, "title": story.title, "subreddit": story.subreddit,
            "site": None, "article": None}
    rated = [(story.summaries[0], 7), (story.summaries[1], 3), (story.summaries[0], 4),
             (story.summaries[2], None)]
    axes = {"accuracy": 6, "coverage": 5, "coherence": 7, "compatible": None}
    rows = [{"info": info, "worker": "w1", "batch": "axis1", "split": "test", "summary": {
        "text": f" {text}", "policy": "ref", "note": None, "axes": {"overall": overall, **axes}}}
            for text, overall in rated]
    return Copy(rows, tldr(story))


def prompt_alone(story):
    return Copy([{"prompt": tldr(story)}], tldr(story))


def asked(story):
    """`messages` that end with the question."""
    copy = messages(story)
    return Copy([{"messages": copy.rows[0]["messages"][:-1]}], question(story))


SUPERVISED = {
    "CarperAI/openai_summarize_tldr": carper_tldr,
    "trl-lib/tldr": trl_tldr,
    "openai/summarize_from_feedback, posts": openai_tldr,
    "prompt and completion": prompt_completion,
    "messages": messages,
}
COMPARED = {
    "CarperAI/openai_summarize_comparisons": carper_comparisons,
    "trl-lib/tldr-preference": trl_preference,
    "prompt, chosen and rejected": prompt_chosen_rejected,
    "openai/summarize_from_feedback, comparisons": openai_comparisons,
    "openai/summarize_from_feedback, CNN/DM": openai_cnndm,
    "Anthropic/hh-rlhf": hh_rlhf,
    "stanfordnlp/SHP": shp,
    "ranking": ranking,
    "ranking with ranks": ranking_with_ranks,
}
PROMPTS = {"prompt alone": prompt_alone, "messages without an answer": asked,
           "openai/summarize_from_feedback, axis": openai_axis}


def rows_of(layout, count: int) -> list[dict]:
    return [row for story in stories(count) for row in layout(story).rows]


# -------------------------------------------------------------------------------------------------- the files


def _csv(rows) -> bytes:
    """As the README asks for: what is not text is JSON in its cell."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({name: cell if isinstance(cell, str) else json.dumps(cell) for name, cell in row.items()}
                     for row in rows)
    return text.getvalue().encode()


def _parquet(rows) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), written)
    return written.getvalue()


KINDS = {".jsonl": lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
         ".json": lambda rows: json.dumps(rows, indent=1).encode(), ".csv": _csv, ".parquet": _parquet}
PACKS = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, codec="zstd",
                                                                                   asbytes=True)}
SAVED = "a folder saved by datasets"
ENDINGS = [*(kind + pack for kind in KINDS for pack in PACKS), SAVED]


def write(folder: Path, rows: list[dict], ending: str = ".jsonl", name: str = "rows") -> str:
    """The rows as a file of this kind, or as a folder (`SAVED`) with the split train; its path."""
    path = folder / (name if ending == SAVED else name + ending)
    if ending == SAVED:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    else:
        pack = next(pack for pack in (".gz", ".zst", "") if ending.endswith(pack))
        path.write_bytes(PACKS[pack](KINDS[ending.removesuffix(pack)](rows)))
    return str(path)
