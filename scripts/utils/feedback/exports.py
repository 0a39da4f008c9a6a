"""Ratings as files: JSON lines that this project reads, and the layouts of Argilla and Label Studio.

The functions of FORMATS take the rows of `utils.data.ratings.rated_rows` and yield the file's text in pieces.
"""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from utils.data.conversations import messages_of, readable
from utils.data.ratings import all_rated, day_of, edit_rows
from utils.durable import delete, move
from utils.errors import UserError

# Label Studio's buckets and Argilla's fields are called by place, since both want one set of names for all
# tasks.
_PLACE = "answer_{}"
_BUCKET = "rank_{}"


def jsonl(rows: list[dict]) -> Iterator[str]:
    """Rankings, a line each, in the layout `prompt, completions` (data/README.md) for `reward_training_data`.

    `worker` is the rater and `batch` the day. What the reader does not need stands beside: `id`, `time`,
    `task`, `repeat_of`.
    """
    for row in rows:
        if row["ranks"] is None:
            continue
        extra = {} if row["confidence"] is None else {"confidence": row["confidence"]}
        if row["repeat_of"] is not None:
            extra["repeat_of"] = row["repeat_of"]
        yield _line(_question(row["prompt"]) | {
            "completions": row["completions"], "ranks": row["ranks"], "policies": row["policies"],
            "worker": row["rater"], "batch": day_of(row["time"]), "time": _time(row), "id": row["id"],
            "task": row["task"], **extra})


def edits(rows: list[dict]) -> Iterator[str]:
    """Answers that raters wrote, a line each, for `actor_training_data`; `worker` is the rater."""
    for row in rows:
        for example in edit_rows(row):
            yield _line(example | {"worker": row["rater"], "time": _time(row), "id": row["id"]})


def argilla(rows: list[dict]) -> Iterator[str]:
    """A list of records for `dataset.records.from_json` of Argilla 2; docs/feedback.md has the dataset's
    settings.

    The ranking is a suggestion, since a response must belong to a user of that server. Argilla's rankings
    have no ties: the answers of one rank follow each other, and `ranks` in the metadata has the ties.
    """
    return _list(_argilla_record(row) for row in rows if row["ranks"] is not None)


def _argilla_record(row: dict) -> dict:
    names = [_PLACE.format(place) for place in range(1, len(row["completions"]) + 1)]
    order = [name for _, name in sorted(zip(row["ranks"], names, strict=True))]
    suggestions = {"ranking": {"value": order, "type": "human", "agent": row["rater"]}}
    if row["better"] is not None:
        suggestions["better"] = {"value": row["better"], "type": "human", "agent": row["rater"]}
    metadata = {"rater": row["rater"], "time": _time(row), "ranks": json.dumps(row["ranks"]),
                "policies": json.dumps(row["policies"], ensure_ascii=False)}
    if row["confidence"] is not None:
        metadata["confidence"] = row["confidence"]
    fields = {"prompt": readable(row["prompt"])} | dict(zip(names, row["completions"], strict=True))
    return {"id": f"rating-{row['id']}", "fields": fields, "metadata": metadata, "suggestions": suggestions,
            "responses": {}, "vectors": {}}


def label_studio(rows: list[dict]) -> Iterator[str]:
    """A list of tasks with one annotation each, for Label Studio's import; `label_studio_view` is the
    labelling interface that they fit.

    The answers stand in buckets, one for each rank, so ties are kept.
    """
    return _list(_label_studio_task(row) for row in rows if row["ranks"] is not None)


def _label_studio_task(row: dict) -> dict:
    names = [_PLACE.format(place) for place in range(1, len(row["completions"]) + 1)]
    buckets: dict[str, list[str]] = {}
    for rank, name in sorted(zip(row["ranks"], names, strict=True)):
        buckets.setdefault(_BUCKET.format(rank), []).append(name)
    result = [{"id": "ranking", "from_name": "ranking", "to_name": "answers", "type": "ranker",
               "value": {"ranker": buckets}}]
    if row["better"] is not None:
        result.append({"id": "better", "from_name": "better", "to_name": "prompt", "type": "textarea",
                       "value": {"text": [row["better"]]}})
    answers = [{"id": name, "title": f"Answer {place}", "body": text}
               for place, (name, text) in enumerate(zip(names, row["completions"], strict=True), start=1)]
    data = {"prompt": readable(row["prompt"]), "answers": answers, "rater": row["rater"],
            "time": _time(row), "policies": dict(zip(names, row["policies"], strict=True)),
            "confidence": row["confidence"]}
    return {"data": data, "annotations": [{"result": result}]}


def label_studio_view(k: int) -> str:
    """The labelling interface of Label Studio for rankings of up to k answers."""
    buckets = "\n".join(f'    <Bucket name="{_BUCKET.format(rank)}" title="Rank {rank}"/>'
                        for rank in range(1, k + 1))
    return (f'<View>\n  <Text name="prompt" value="$prompt"/>\n  <List name="answers" value="$answers"/>\n'
            f'  <Ranker name="ranking" toName="answers">\n{buckets}\n  </Ranker>\n'
            f'  <TextArea name="better" toName="prompt"/>\n</View>\n')


# name in the address and for `--export` -> the function, the ending of the file, its media type
FORMATS: dict[str, tuple[Callable[[list[dict]], Iterator[str]], str, str]] = {
    "jsonl": (jsonl, "jsonl", "application/x-ndjson"),
    "edits": (edits, "jsonl", "application/x-ndjson"),
    "argilla": (argilla, "json", "application/json"),
    "label_studio": (label_studio, "json", "application/json"),
}


def export_file(database: Path, target: Path, layout: str) -> int:
    """Write the ratings of a database into a file, whole or not at all, and return how many lines it has.

    Args:
        layout: a key of FORMATS.

    Raises:
        UserError: when the database cannot be read, or the file not be written; or when there is nothing to
            write.
    """
    text = "".join(FORMATS[layout][0](all_rated(database)))
    if text in ("", "[]\n"):
        what = "edited answer" if layout == "edits" else "ranking"
        raise UserError(f"{database}: holds no {what} to export; rate more with scripts/feedback.py")
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="")
        move(temporary, target)
    except OSError as error:
        raise UserError(f"export: '{target}' cannot be written ({error.strerror or error})") from None
    finally:
        delete(temporary)
    return text.count("\n")


def _question(prompt: str) -> dict:
    """A stored prompt as the columns `prompt` and, of a conversation that has them, `tools`."""
    messages = messages_of(prompt)
    if messages is None:
        return {"prompt": prompt}
    if messages[0]["role"] == "tools":
        return {"prompt": messages[1:], "tools": messages[0]["content"]}
    return {"prompt": messages}


def _time(row: dict) -> str:
    return datetime.fromtimestamp(row["time"], UTC).isoformat(timespec="seconds")


def _line(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _list(rows) -> Iterator[str]:
    """A JSON list, a line for each row."""
    start = "[\n"
    for row in rows:
        yield start + json.dumps(row, ensure_ascii=False)
        start = ",\n"
    yield "[]\n" if start == "[\n" else "\n]\n"
