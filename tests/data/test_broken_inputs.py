"""Broken inputs: each gets its one clear message and exit status 2, before a weight is loaded, and leaves
nothing behind.

Every case runs a real script's `start(main, ...)` as the command line does. It names what the message must
say besides where: file and line, or the key.
"""

import gzip
import io
import json
import os
import subprocess
import sys
from functools import partial

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import train_ppo
import train_reward
import train_sft
from utils.config import PROJECT
from utils.launch import read_config, start

STAGES = {"actor": (train_sft, "SFTStageConfig"), "reward": (train_reward, "RewardStageConfig"),
          "rlhf": (train_ppo, "PPOStageConfig")}
MINI = PROJECT / "assets" / "opt-mini"


def lines(*rows) -> bytes:
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def good(number, role="actor") -> dict:
    """A row for a role."""
    answers = {"actor": {"completion": "c"}, "reward": {"chosen": "a", "rejected": "b"}, "rlhf": {}}
    return {"prompt": f"P{number}", **answers[role]}


def goods(count, role="actor") -> list[dict]:
    return [good(number, role) for number in range(count)]


def parquet(*rows) -> bytes:
    written = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), written)
    return written.getvalue()


def not_utf8(prompts, completions) -> bytes:
    """Parquet whose columns of text hold Latin-1, as a careless program writes it."""
    columns = [pyarrow.array([text.encode("latin-1") for text in texts]) for texts in (prompts, completions)]
    written, names = io.BytesIO(), ["prompt", "completion"]
    texts = [pyarrow.Array.from_buffers(pyarrow.string(), len(column), column.buffers())
             for column in columns]
    pyarrow.parquet.write_table(pyarrow.table(texts, names=names), written)
    return written.getvalue()


def column_twice() -> bytes:
    written, columns = io.BytesIO(), [pyarrow.array([text]) for text in ("p", "c", "d")]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "completion"])
    pyarrow.parquet.write_table(table, written)
    return written.getvalue()


def far_date(row) -> bytes:
    table = pyarrow.Table.from_pylist(goods(9))
    dates = pyarrow.array([2**40 if number == row else 0 for number in range(1, 10)], pyarrow.timestamp("s"))
    written = io.BytesIO()
    pyarrow.parquet.write_table(table.append_column("date", dates), written)
    return written.getvalue()


def tree(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Runs a script that must refuse its input; what it says."""
    def no_weights(*args, **more):
        raise AssertionError("a weight was loaded")

    for module, name in ((train_sft, "load_policy"), (train_reward, "load_scalar_model"),
                         (train_ppo, "load_models")):
        monkeypatch.setattr(module, name, no_weights)
    monkeypatch.chdir(tmp_path)

    def run(role, *words) -> str:
        script, kind = STAGES[role]
        before = tree(tmp_path)
        capsys.readouterr()  # what `datasets` said when it saved
        models = ["--model", str(MINI), *(["--reward_model", str(MINI)] if role == "rlhf" else [])]
        monkeypatch.setattr(sys, "argv", ["train.py", *models, "--output_dir", "run", *words])
        with pytest.raises(SystemExit) as left:
            start(script.main, read_config(getattr(script, kind), None, ""))
        assert left.value.code == 2, capsys.readouterr().err
        assert tree(tmp_path) == before, "nothing is left behind"
        message = capsys.readouterr().err
        assert "Traceback" not in message and message.startswith("error: ") and message.endswith("\n")
        return message.removeprefix("error: ")

    return run


# ------------------------------------------------------------------------------------------------------- rows

POST = {"subreddit": "tea", "title": "Which pot", "post": "I have two pots."}
TWO = [{"text": "a"}, {"text": "b"}]
NEEDS_OBJECT = "one object a line is needed"
NEEDS_LIST = "column 'messages' must be a list of {role, content} objects"
NEEDS_ANSWER = "column 'messages' must hold a question of the user, and end with the assistant's answer"


def message(number, problem):
    return f"column 'messages': message {number} {problem}"


def unknown(number, role):
    return message(number, f"has the role {role!r}; the roles that are read are system, developer, user, "
                           "assistant, tool")


def nearest(layout, lacks):
    return f"the nearest layout is '{layout}', which lacks {lacks}"


EXAMPLE = "prompt, completion"


def said(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def shp(**changes):
    return {"history": "Why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_ratio": 3.0,
            **changes}


def chosen(info=POST, summaries=TWO, choice=0):
    return {"info": info, "summaries": summaries, "choice": choice}


def ranked(**changes):
    return {"prompt": "P", "completions": ["a", "b"], **changes}


def pair(better, worse):
    return {"prompt": "P", "chosen": better, "rejected": worse}


EXAMPLES = {  # a row, what is said of it
    "not JSON": (b"prompt: P", f"is not JSON (Expecting value at column 1); {NEEDS_OBJECT}"),
    "cut off": (b'{"prompt": "P", "comple', f"is not JSON (Unterminated string starting at column "
                                            f"17); {NEEDS_OBJECT}"),
    "two objects": (lines(good(1)).strip() * 2, f"is not JSON (Extra data at column 36); {NEEDS_OBJECT}"),
    "single quotes": (b"{'prompt': 'P'}",
                      f"is not JSON (Expecting property name enclosed in double quotes at column "
                      f"2); {NEEDS_OBJECT}"),
    "a column twice": (b'{"prompt": "P", "completion": "c", "completion": "d"}',
                       "names 'completion' twice; leave one of the two out"),
    "the same column twice": (b'{"prompt": "P", "prompt": "P", "completion": "d"}',
                              "names 'prompt' twice; leave one of the two out"),
    "a role twice": (b'{"messages": [{"role": "user", "role": "system", "content": "Q"}]}',
                     "names 'role' twice; leave one of the two out"),
    "a tab in a text": (b'{"prompt": "a\tb"}', f"is not JSON (Invalid control character at column "
                                               f"14); {NEEDS_OBJECT}"),
    "a bottomless list": (b"[" * 100_000, "is not JSON (nested too deeply); one object a line is needed"),
    "a number of 5,000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}",
                                 "is not JSON (a number of too many digits); one object a line is needed"),
    "a list": (["P", "c"], 'must be a JSON object such as {"prompt": ..., "completion": ...}'),
    "a number": (b"7", 'must be a JSON object such as {"prompt": ..., "completion": ...}'),
    "Latin-1": (b'{"prompt": "caf\xe9", "completion": "c"}', "is not UTF-8; save the file as UTF-8 text"),
    "half an emoji": (b'{"prompt": "P", "completion": "cut \\ud83d"}',
                      "holds half of an emoji (a lone surrogate such as \\ud83d); remove it"),
    "other columns": ({"text": "P"},
                      f"has columns text; {nearest(EXAMPLE, EXAMPLE)} (is 'text' the prompt?)"),
    "no column": ({}, f"has no columns; {nearest(EXAMPLE, EXAMPLE)}"),
    "completion missing": ({"prompt": "P"}, f"has columns prompt; {nearest(EXAMPLE, 'completion')}"),
    "summary missing": (POST, "has columns post, subreddit, title; "
                              + nearest("subreddit, title, post, summary", "summary")),
    "prompt empty": ({"prompt": " \n", "completion": "c"}, "column 'prompt' is empty; text is needed"),
    "prompt null": ({"prompt": None, "completion": "c"}, "column 'prompt' is empty; text is needed"),
    "prompt a number": ({"prompt": 3, "completion": "c"}, "column 'prompt' is a number; text is needed"),
    "prompt not a number": (b'{"prompt": NaN, "completion": "c"}',
                            "column 'prompt' is a number; text is needed"),
    "completion empty": ({"prompt": "P", "completion": ""}, "column 'completion' is empty; text is needed"),
    "completion a list": ({"prompt": "P", "completion": ["c"]},
                          "column 'completion' is a list; text is needed"),
    "label a number": ({"prompt": "P", "label": 1}, "column 'label' is a number; text is needed"),
    "title empty": ({**POST, "title": "", "summary": "s"}, "column 'title' is empty; text is needed"),
    "post a list": ({**POST, "post": ["p"], "summary": "s"}, "column 'post' is a list; text is needed"),
    "messages a text": ({"messages": "Hi"}, NEEDS_LIST),
    "no messages": ({"messages": []}, NEEDS_LIST),
    "messages of text": ({"messages": ["Hi"]}, message(1, "is not an object with role and content")),
    "an unknown role": (said(("robot", "Hi"), ("assistant", "Hello")), unknown(1, "robot")),
    "an unknown role later on": (said(("user", "Hi"), ("function", "Hi"), ("assistant", "Hello")),
                                 unknown(2, "function")),
    "a message without content": ({"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]},
                                  message(1, "(user) is empty; text is needed")),
    "an answer without content": (said(("user", "Hi"), ("assistant", " ")),
                                  message(2, "(assistant) is empty; text is needed")),
    "content that is a number": (said(("user", 5), ("assistant", "Hello")),
                                 message(1, "(user) has a content that is not text; text is needed")),
    "a picture": (said(("system", ""), ("user", [{"type": "image_url", "image_url": {"url": "x"}}]),
                       ("assistant", "Hello")),
                  message(2, "(user) has a content part of type 'image_url'; parts of type 'text' are read")),
    "a part that is none": (said(("user", ["Hi"]), ("assistant", "Hello")),
                            message(1, "(user) has a content part of type 'None'; parts of type 'text' are "
                                       "read")),
    "an answer that calls a tool": (
        {"messages": [{"role": "user", "content": "Hi"},
                      {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        message(2, "(assistant) calls a tool, and is no answer in text")),
    "an answer of weight 0": (
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a", "weight": 0}]},
        message(2, "(assistant) has the weight 0, so it is not to be learnt; leave the row out")),
    "instructions without a question": (said(("system", "Be kind."), ("assistant", "Hello")), NEEDS_ANSWER),
    "no answer": (said(("user", "Hi")), NEEDS_ANSWER),
    "an answer to nothing": (said(("assistant", "Hello")), NEEDS_ANSWER),
    "a role that is a list": (said((["user"], "Hi"), ("assistant", "Hello")), unknown(1, "['user']")),
    "a role that is an object": (said(("user", "Hi"), ({"name": "assistant"}, "Hello")),
                                 unknown(2, "{'name': 'assistant'}")),
}
RANKINGS = {
    "no comparison": ({"prompt": "P", "completion": "c"},
                      "has columns completion, prompt (the layout 'prompt, completion', for "
                      "actor_training_data); "
                      + nearest("prompt, completions", "completions (is 'completion' the completions?)")),
    "rejected missing": ({"prompt": "P", "chosen": "a"},
                         f"has columns chosen, prompt; {nearest('prompt, chosen, rejected', 'rejected')}"),
    "no prompt and no dialogue": ({"chosen": "a", "rejected": "b"},
                                  "column 'prompt' is missing, and 'chosen' is not a dialogue with "
                                  "'Assistant:' turns"),
    "chosen a number": (pair(1, "b"), "column 'chosen' is a number; text is needed"),
    "rejected a list": (pair("a", ["b"]), "column 'rejected' is a list; text is needed"),
    "prompt before TL;DR: empty": ({"prompt": "", "chosen": "TL;DR: a", "rejected": "TL;DR: b"},
                                   "column 'prompt' is empty; text is needed"),
    "prompt of a pair empty": ({**pair("a", "b"), "prompt": ""}, "column 'prompt' is empty; text is needed"),
    "labels 2": (shp(labels=2), "column 'labels' is 2; it must be 1 (A is better) or 0 (B is)"),
    "labels true": (shp(labels=True), "column 'labels' is True; it must be 1 (A is better) or 0 (B is)"),
    "labels a text": (shp(labels="A"), "column 'labels' is 'A'; it must be 1 (A is better) or 0 (B is)"),
    "an answer a number": (shp(human_ref_B=5), "column 'human_ref_B' is a number; text is needed"),
    "history empty": (shp(history=" "), "column 'history' is empty; text is needed"),
    "score_ratio a text": (shp(score_ratio="3"), "column 'score_ratio' is '3'; a number is needed"),
    "score_ratio not a number": (shp(score_ratio=float("nan")),
                                 "column 'score_ratio' is nan; a number is needed"),
    "choice 2": (chosen(choice=2), "column 'choice' is 2; it must be 0 or 1, the better of "
                                   "the two summaries"),
    "choice null": (chosen(choice=None), "column 'choice' is None; it must be 0 or 1, the better of "
                                         "the two summaries"),
    "three summaries": (chosen(summaries=[*TWO, TWO[0]]),
                        "columns 'info' and 'summaries' must be an object and a list of two "
                        "objects with 'text'"),
    "summaries of text": (chosen(summaries=["a", "b"]),
                          "columns 'info' and 'summaries' must be an object and a list of two "
                          "objects with 'text'"),
    "a summary without text": (chosen(summaries=[TWO[0], {"note": "b"}]),
                               "column 'summaries': text of summary 2 is empty; text is needed"),
    "info a text": (chosen(info="t3"), "columns 'info' and 'summaries' must be an object and a list of two "
                                       "objects with 'text'"),
    "info without a post": (chosen(info={"title": "t", "subreddit": "s"}),
                            "column 'info': post is empty; text is needed"),
    "completions without prompt": ({"completions": ["a", "b"]},
                                   f"has columns completions; {nearest('prompt, completions', 'prompt')}"),
    "completions a text": (ranked(completions="a b"), "column 'completions' must be a list of two or more "
                                                      "texts, best first"),
    "one completion": (ranked(completions=["a"]), "column 'completions' must be a list of two or more "
                                                  "texts, best first"),
    "a completion empty": (ranked(completions=["a", ""]),
                           "a text in column 'completions' is empty; text is needed"),
    "a completion twice": (ranked(completions=["a", "b", " a"]),
                           "column 'completions' holds the same text twice"),
    "too few ranks": (ranked(ranks=[1]), "column 'ranks' must hold one number for each of the 2 completions"),
    "ranks of text": (ranked(ranks=["1", "2"]), "column 'ranks' must hold one number for each of "
                                                "the 2 completions"),
    "ranks of nothing": (ranked(ranks=[1, None]), "column 'ranks' must hold one number for each of "
                                                  "the 2 completions"),
    "label_scores a number": (ranked(label_scores=2), "column 'label_scores' must hold one number for each "
                                                      "of the 2 completions"),
    "choice 1.0": (chosen(choice=1.0), "column 'choice' is 1.0; it must be 0 or 1, the better of "
                                       "the two summaries"),
    "choice true": (chosen(choice=True), "column 'choice' is True; it must be 0 or 1, the better of "
                                         "the two summaries"),
    "ranks of 400 digits": (ranked(ranks=[1, 10**400]), "column 'ranks' must hold one number for each of "
                                                        "the 2 completions"),
    "ranks to infinity": (ranked(ranks=[1, float("inf")]), "column 'ranks' must hold one number for each of "
                                                           "the 2 completions"),
    "label_scores of 400 digits": (ranked(label_scores=[10**400, 1]),
                                   "column 'label_scores' must hold one number for each of "
                                   "the 2 completions"),
    "label_scores that float64 has not": (ranked(label_scores=[2**60 + 1, 1]),
                                          "column 'label_scores' must hold one number for each of "
                                          "the 2 completions"),
    "score_ratio of 400 digits": (shp(score_ratio=10**400),
                                  f"column 'score_ratio' is {10**400}; a number is needed"),
}
PROMPTS = {
    "no prompt": ({"completion": "c"}, f"has columns completion; {nearest('prompt', 'prompt')}"),
    "prompt false": ({"prompt": False}, "column 'prompt' is true or false; text is needed"),
}
ROWS = [(role, case) for role, table in (("actor", EXAMPLES), ("reward", RANKINGS), ("rlhf", PROMPTS))
        for case in table]


OR_SKIP = " (or leave bad rows out: on_bad_rows: skip)"


@pytest.mark.parametrize(("role", "case"), ROWS)
def test_a_broken_row_is_named_by_its_line(role, case, refused, tmp_path):
    row, expected = {"actor": EXAMPLES, "reward": RANKINGS, "rlhf": PROMPTS}[role][case]
    (tmp_path / "rows.jsonl").write_bytes(lines(good(0, role), b"", row, *goods(9, role)))
    assert refused(role, f"--{role}_training_data", "rows.jsonl") == f"rows.jsonl:3: {expected}{OR_SKIP}\n"


def heading(count):
    return f"{count} rows cannot be used; mend them, or leave them out with on_bad_rows: skip"


def test_all_that_is_wrong_with_a_file_is_listed(refused, tmp_path):
    rows = [good(0), {"prompt": "P"}, b"no JSON", good(1), {"completion": "c"}, b'{"prompt": "\xff"}']
    (tmp_path / "rows.jsonl").write_bytes(lines(*rows))
    expected = [f"rows.jsonl:2: has columns prompt; {nearest(EXAMPLE, 'completion')}",
                f"rows.jsonl:3: is not JSON (Expecting value at column 1); {NEEDS_OBJECT}",
                f"rows.jsonl:5: has columns completion; {nearest(EXAMPLE, 'prompt')}",
                "rows.jsonl:6: is not UTF-8; save the file as UTF-8 text"]
    assert refused("actor", "--actor_training_data", "rows.jsonl").splitlines() == [heading(4), *expected]


def test_all_that_is_wrong_with_all_files_is_listed(refused, tmp_path):
    for name in ("train", "held", "test"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(good(1, "reward"), pair("a", 3)))
    words = ("--reward_training_data train.jsonl --reward_validation_data held.jsonl "
             "--reward_test_data test.jsonl")
    assert refused("reward", *words.split()) == ("train.jsonl:2 and 2 more such rows: column 'rejected' is a "
                                                 f"number; text is needed{OR_SKIP}\n")


@pytest.mark.parametrize("bad", [2, 300, 5000])
def test_equal_findings_are_one_line(bad, refused, tmp_path):
    """With what the rows have and what they should have."""
    (tmp_path / "rows.jsonl").write_bytes(lines(good(1), {"question": "Q", "answer": "A"}) * bad)
    assert refused("actor", "--actor_training_data", "rows.jsonl") == (
        f"rows.jsonl:2 and {bad - 1} more such rows: has columns answer, question; "
        f"{nearest(EXAMPLE, EXAMPLE)} (is 'question' the prompt? is 'answer' the completion?){OR_SKIP}\n")


@pytest.mark.parametrize("kinds", [20, 21, 50])
def test_twenty_kinds_of_findings_are_listed_and_the_others_counted(kinds, refused, tmp_path):
    rows = [{"prompt": "P", f"c{n}": 1} for n in range(10, 10 + kinds)]
    (tmp_path / "rows.jsonl").write_bytes(lines(good(1), *rows, *rows))
    found = refused("actor", "--actor_training_data", "rows.jsonl").splitlines()
    lacks = nearest(EXAMPLE, "completion")
    listed = [f"rows.jsonl:{n - 8} and 1 more such rows: has columns c{n}, prompt; {lacks}"
              for n in range(10, 30)]
    rest = [f"and {2 * (kinds - 20)} more rows"] if kinds > 20 else []
    assert found == [heading(2 * kinds), *listed, *rest]


def test_when_bad_rows_are_all_there_is_skipping_them_leaves_nothing(refused, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(lines({"prompt": "P"}))
    found = refused("actor", "--actor_training_data", "rows.jsonl", "--on_bad_rows", "skip")
    assert found == ("actor_training_data: 'rows.jsonl' holds no usable row; the first is rows.jsonl:1: "
                     f"has columns prompt; {nearest(EXAMPLE, 'completion')}\n")


# ------------------------------------------------------------------------------------------------------ files

LONG = lines(*({"prompt": f"P{i * 7919}", "completion": "c"} for i in range(5000)))
PARQUET = parquet(*goods(9))
ZST = pyarrow.compress(LONG, codec="zstd", asbytes=True)
NEEDS_ENDING = "is not a file of rows; its name must end with one of .jsonl, .jsonl.gz, .jsonl.zst, .json,"
FILES = {  # name, bytes, the message's beginning, what it says besides
    "empty": ("a.jsonl", b"", "actor_training_data: ", "'a.jsonl' is empty; it needs rows"),
    "blank lines": ("a.jsonl", b"\n \n", "actor_training_data: ", "'a.jsonl' is empty; it needs rows"),
    "an empty list": ("a.json", b"[]", "actor_training_data: ", "'a.json' is empty; it needs rows"),
    "a CSV header alone": ("a.csv", b"prompt,completion\n", "actor_training_data: ",
                           "'a.csv' is empty; it needs rows"),
    "Parquet without rows": ("a.parquet", parquet(), "actor_training_data: ", "is empty; it needs rows"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04", "actor_training_data: ", NEEDS_ENDING),
    "text": ("a.txt", LONG, "actor_training_data: ", NEEDS_ENDING),
    "a zip archive": ("a.jsonl.zip", b"PK\x03\x04", "actor_training_data: ", NEEDS_ENDING),
    "UTF-16": ("a.jsonl", LONG.decode().encode("utf-16"), "a.jsonl:1: ",
               "is UTF-16; save the file as UTF-8 text"),
    "CSV in UTF-16": ("a.csv", "prompt,completion\np,c\n".encode("utf-16"), "a.csv:1: ",
                      "is UTF-16; save the file as UTF-8 text"),
    "gzip under a plain name": ("a.jsonl", gzip.compress(LONG), "a.jsonl:1: ",
                                "is not text but a .gz file; give its name the ending .gz"),
    "zst under a plain name": ("a.csv", ZST, "a.csv:1: ",
                               "is not text but a .zst file; give its name the ending .zst"),
    "plain under gzip's name": ("a.jsonl.gz", LONG, "a.jsonl.gz:1: ",
                                "is not a complete .gz file; copy it again, or decompress it"),
    "gzip cut off": ("a.jsonl.gz", gzip.compress(LONG)[:5000], "a.jsonl.gz:",
                     "is not a complete .gz file; copy it again"),
    "gzip damaged": ("a.jsonl.gz", gzip.compress(LONG)[:5000] + bytes(99) + gzip.compress(LONG)[5099:],
                     "a.jsonl.gz:", "is not a complete"),
    "zst cut off": ("a.jsonl.zst", ZST[:5000], "a.jsonl.zst:", "is not a complete .zst file; copy it again"),
    "plain under zst's name": ("a.jsonl.zst", LONG, "a.jsonl.zst:1: ",
                               "is not a complete .zst file; copy it again"),
    "Parquet cut off": ("a.parquet", PARQUET[:-9], "a.parquet:1: ", "is not a complete Parquet file ("),
    "JSON lines under Parquet's name": ("a.parquet", LONG, "a.parquet:1: ",
                                        "is not a complete Parquet file ("),
    "Parquet of bytes": ("a.parquet", parquet({"prompt": b"\xff", "completion": "c"}), "a.parquet:1: ",
                         "column 'prompt' is bytes; text is needed"),
    "Parquet that is not UTF-8": ("a.parquet", not_utf8("ab", "c\xff"), "a.parquet:2: ",
                                  "column 'completion' is not UTF-8; write it again"),
    "Parquet with a date behind all calendars": ("a.parquet", far_date(2), "a.parquet:2: ",
                                                 "column 'date' holds a value that cannot be"),
    "Parquet with a column twice": ("a.parquet", column_twice(), "a.parquet:1: ",
                                    "names the column 'completion' twice; give each column its own name"),
    "a JSON list with a column twice": ("a.json", b'[{"prompt": "p", "completion": "c"},\n {"prompt": "p", '
                                                  b'"prompt": "q", "completion": "c"}]', "a.json:2: ",
                                        "names 'prompt' twice; leave one of the two out"),
    "CSV whose list has a name twice": ("a.csv", b'messages\n"[{""role"": ""user"", ""role"": ""user""}]"\n',
                                        "a.csv:2: ", "names 'role' twice; leave one of the two out"),
    "JSON list cut off": ("a.json", b'[{"prompt": "p"},\n {"pro', "a.json:2: ",
                          "a list of objects is needed"),
    "JSON list of texts": ("a.json", b'["p", "q"]', "a.json:1: ", "must be a JSON object such as"),
    "text behind a JSON list": ("a.json", b'[{"prompt": "p"}]\nend', "a.json:2: ",
                                "is not JSON (Extra data at column 1)"),
    "a bottomless JSON list": ("a.json", b"[" * 100_000, "a.json:1: ", "is not JSON (nested too deeply)"),
    "rows inside a JSON object": ("a.json", b'{"data": [\n {"prompt": "p"}]}', "a.json:1: ", "is not JSON ("),
    "CSV with a cell too few": ("a.csv", b"prompt,completion\np,c\np\n", "a.csv:3: ",
                                "has 1 cells, but the first line names 2 columns"),
    "CSV with a cell too many": ("a.csv", b"prompt,completion\np,c, and more\n", "a.csv:2: ",
                                 "has 3 cells, but the first line names 2 columns"),
    "CSV with semicolons": ("a.csv", b"prompt;completion\np;c\n", "a.csv:2: ",
                            f"has columns prompt;completion; {nearest(EXAMPLE, EXAMPLE)}"),
    "CSV without a header": ("a.csv", b"Why?,Because.\nWho?,Me.\n", "a.csv:2: ",
                             f"has columns Because., Why?; {nearest(EXAMPLE, EXAMPLE)}"),
    "CSV with a column twice": ("a.csv", b"prompt,completion,prompt\np,c,q\n", "a.csv:1: ",
                                "names the column 'prompt' twice"),
    "CSV with an open quotation mark": ("a.csv", b'prompt,completion\np,c\n"p,c\n', "a.csv:3: ",
                                        "is not CSV ("),
    "CSV in Latin-1": ("a.csv", b"prompt,completion\np,c\nq,caf\xe9\n", "a.csv:3: ",
                       "is not UTF-8; save the file as UTF-8 text"),
    "CSV with an empty cell": ("a.csv", b"prompt,completion\np,c\nq,\n", "a.csv:3: ",
                               "column 'completion' is empty"),
    "CSV messages that are no JSON": ("a.csv", b'messages\n"[{role: user}]"\n', "a.csv:2: ",
                                      "is not JSON (Expecting property name enclosed in double quotes at "
                                      "column 3); column 'messages' needs JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_broken_file_is_named(case, refused, tmp_path):
    name, content, place, expected = FILES[case]
    (tmp_path / name).write_bytes(content)
    message = refused("actor", "--actor_training_data", name)
    first = place.removesuffix(": ")
    assert message.startswith((place, f"{first} and 1 more such rows: ", heading(2)))
    assert first in message and name in message and expected in message


# ------------------------------------------------------------------------------------------- sets and folders


def saved(folder, **splits):
    datasets.DatasetDict({name: datasets.Dataset.from_list(rows)
                          for name, rows in splits.items()}).save_to_disk(folder)


def few(folder):
    (folder / "few.jsonl").write_bytes(lines(*goods(3)))


def two_sets(folder, role="actor"):
    (folder / "rows.jsonl").write_bytes(lines(*goods(9, role)))
    (folder / "held.jsonl").write_bytes(lines(good(20, role), good(5, role)))


two_sets_of_pairs = partial(two_sets, role="reward")


def wordy(folder):
    words = ["one two three four"] * 9 + ["a word " * 200]
    (folder / "wordy.jsonl").write_bytes(lines(*({"prompt": f"P{n}", "completion": text}
                                                 for n, text in enumerate(words))))


def equal_pairs(folder):
    (folder / "equal.jsonl").write_bytes(lines(*(pair("a", " a") for _ in range(9))))


def long_title(folder):
    row = {"subreddit": "tea", "title": "word " * 900, "post": "p", "summary": "s"}
    (folder / "long.jsonl").write_bytes(lines(*({**row, "post": f"p{n}"} for n in range(9))))


SETS = {  # what is made, role, words, parts of the message
    "a file that is not there": (None, "actor", "--actor_training_data no.csv",
                                 ["actor_training_data: 'no.csv' does not exist"]),
    "a folder of files": (lambda folder: (folder / "mine").mkdir(), "actor", "--actor_training_data mine",
                          ["actor_training_data: ", "mine' is a folder that `datasets` did not save; "
                                                    "name a file in it"]),
    "a folder with a file's name": (lambda folder: (folder / "a.jsonl").mkdir(), "rlhf",
                                    "--rlhf_training_data a.jsonl",
                                    ["rlhf_training_data: ",
                                     "a.jsonl' is a folder that `datasets` did not save"]),
    "a named pipe": (lambda folder: os.mkfifo(folder / "a.jsonl"), "actor", "--actor_training_data a.jsonl",
                     ["a.jsonl: is a named pipe; a regular file is needed"]),
    "a row that is too long": (wordy, "actor", "--actor_training_data wordy.jsonl --max_row_bytes 1000", [
        "wordy.jsonl:10: has more than 1000 bytes; shorten it, or raise max_row_bytes" + OR_SKIP]),
    "a link to nothing": (lambda folder: (folder / "a.jsonl").symlink_to(folder / "gone"), "actor",
                          "--actor_training_data a.jsonl", ["actor_training_data: 'a.jsonl' does not exist"]),
    "a folder without the split": (lambda folder: saved(folder / "mine", test=[good(1, "reward")]), "reward",
                                   "--reward_training_data mine",
                                   ["reward_training_data: ", "mine' has no split train (it has test)"]),
    "a name of the hub without a network": (None, "actor", "--actor_training_data someone/some-set", [
        "actor_training_data: 'someone/some-set' is neither a file nor a data set of the hub "
        "that can be reached",
        "without a network, name a local copy: a file, or a folder saved by `datasets`"]),
    "a name that is neither": (None, "rlhf", "--rlhf_training_data tldr",
                               ["rlhf_training_data: 'tldr' does not exist"]),
    "somebody else's home": (None, "actor", "--actor_training_data ~no-such-user/a.jsonl",
                             ["actor_training_data: '~no-such-user/a.jsonl' does not exist"]),
    "a name that is too long": (None, "actor", f"--actor_training_data {'n' * 300}.jsonl",
                                ["actor_training_data: 'nnn", "does not exist"]),
    "too few prompts to hold some out": (few, "actor", "--actor_training_data few.jsonl",
                                         ["few.jsonl: 3 different prompts are too few to hold some out; "
                                          "name validation and test data too"]),
    "a prompt in training and validation": (two_sets, "actor",
                                            "--actor_training_data rows.jsonl --actor_validation_data "
                                            "held.jsonl --actor_test_data none", [
        "the same prompt stands in actor_training_data and in actor_validation_data: 'P5' (rows.jsonl:6 "
        "and held.jsonl:2)",
        "; remove it from one, or accept it with allow_overlap: true"]),
    "a prompt in training and test": (two_sets_of_pairs, "reward",
                                      "--reward_training_data rows.jsonl --reward_test_data held.jsonl",
                                      ["the same prompt stands in reward_training_data and in "
                                       "reward_test_data: 'P5' (rows.jsonl:6 and held.jsonl:2)"]),
    "equal pairs alone": (equal_pairs, "reward", "--reward_training_data equal.jsonl",
                          ["reward_training_data: 'equal.jsonl' holds no usable comparison; they are "
                           "dropped: equal answers"]),
    "a prompt that cannot fit": (long_title, "rlhf", "--rlhf_training_data long.jsonl --max_prompt_tokens 64",
                                 ["long.jsonl:1 and 8 more such rows: the prompt cannot fit into "
                                  "max_prompt_tokens=64 even without its"]),
    "a split of a file": (two_sets, "actor",
                          """--actor_training_data {"name":"rows.jsonl","split":"train"}""", [
        "actor_training_data: 'rows.jsonl' is on this disk and has no split; leave that out"]),
    "a revision of a file": (two_sets, "actor",
                             """--actor_training_data {"name":"rows.jsonl","revision":"main"}""", [
        "actor_training_data: 'rows.jsonl' is on this disk and has no revision; leave that out"]),
    "a split that a folder has not": (lambda folder: saved(folder / "mine", train=[good(1, "reward")]),
                                      "reward",
                                      """--reward_training_data {"name":"mine","split":"dev"}""",
                                      ["reward_training_data: ",
                                       "mine' has no split dev (it has train); take one of these"]),
    "a weight that leaves nothing": (two_sets, "actor",
                                     """--actor_training_data {"name":"rows.jsonl","weight":0.001}""", [
        "actor_training_data: its weights leave no row to train on; raise them"]),
    "half a list": (None, "actor", "--actor_training_data [a.jsonl",
                    ["command line: 'actor_training_data' is not JSON"]),
    "one of several that is not there": (two_sets, "rlhf",
                                         """--rlhf_training_data ["rows.jsonl","no.jsonl"]""",
                                         ["rlhf_training_data: 'no.jsonl' does not exist"]),
    "no completion that is short enough": (wordy, "actor",
                                           "--actor_training_data wordy.jsonl --max_completion_tokens 2", [
        "actor_training_data: 10 of the 10 rows of 'wordy.jsonl' (100.0%) have a completion of more than "
        "max_completion_tokens (2); the longest has ",
        "raise max_completion_tokens, or accept it with max_dropped_share: 1.0"]),
    "no completion that is short enough, and that accepted": (
        wordy, "actor", "--actor_training_data wordy.jsonl --max_completion_tokens 2 --max_dropped_share 1", [
            "actor_training_data: nothing is left, since the shortest completion has ",
            "; raise max_completion_tokens (2)"]),
    "a broken validation set": (two_sets, "rlhf", "--rlhf_training_data rows.jsonl "
                                                  "--rlhf_validation_data held.jsonl.gz",
                                ["rlhf_validation_data: 'held.jsonl.gz' does not exist"]),
    "references that are none": (two_sets_of_pairs, "reward", "--reward_training_data rows.jsonl "
                                                     "--centring_data no.csv",
                                 ["centring_data: 'no.csv' does not exist"]),
}


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_cannot_be_used_is_named_by_its_key(case, refused, tmp_path):
    make, role, words, parts = SETS[case]
    if make:
        make(tmp_path)
    message = refused(role, *words.split())
    assert message.startswith(parts[0]) and all(part in message for part in parts), message


# --------------------------------------------------------------------------------------------- configurations

CONFIGS = {  # text of the YAML file, line, what is said
    "remote code": ("trust_remote_code: true\n", 1, "unknown key 'trust_remote_code'"),
    "a mistyped role": ("seed: 1\nactor_traning_data: rows.jsonl\n", 2,
                        "unknown key 'actor_traning_data'; did you mean 'actor_training_data'?"),
    "the role of another stage": ("reward_training_data: rows.jsonl\n", 1,
                                  "unknown key 'reward_training_data'"),
    "a data set that is a number": ("\nactor_training_data: 7\n", 2, "'actor_training_data' must be"),
    "no data set": ("actor_training_data: null\n", 1, "'actor_training_data' must be"),
    "an empty list": ("actor_training_data: []\n", 1, "'actor_training_data' is an empty "
                                                      "list; name a data set"),
    "a list in a list": ("actor_training_data: [[a.jsonl]]\n", 1,
                         "must be a name, a mapping with 'name', or a list of these"),
    "a mapping without a name": ("actor_training_data: {weight: 2}\n", 1,
                                 "'actor_training_data' has no 'name' in {'weight': 2}"),
    "remote code in a mapping": ("seed: 1\nactor_training_data:\n  - name: a/b\n    "
                                 "trust_remote_code: true\n", 2,
                                 "'actor_training_data' has an unknown key 'trust_remote_code'; code of a "
                                 "data set is never run"),
    "a mistyped key in a mapping": ("actor_training_data: {name: a, wieght: 2}\n", 1,
                                    "has an unknown key 'wieght'; valid keys: name, config, split, "
                                    "revision, data_dir, weight"),
    "a weight of 0": ("actor_training_data: {name: a, weight: 0}\n", 1,
                      "has a weight of 0; a number above 0, at most 1000, is needed"),
    "a weight below 0": ("actor_training_data: {name: a, weight: -1}\n", 1,
                         "has a weight of -1; a number above 0, at most 1000, is needed"),
    "a weight of text": ("actor_training_data: {name: a, weight: half}\n", 1,
                         "has a weight of 'half'; a number above 0"),
    "a weight without an end": ("actor_training_data: {name: a, weight: .inf}\n", 1,
                                "has a weight of inf; a number above 0"),
    "a split that is a list": ("actor_training_data: {name: a, split: [a]}\n", 1,
                               "has ['a'] for 'split'; text is needed"),
    "bad rows otherwise": ("on_bad_rows: ignore\n", 1, "'on_bad_rows' must be one of error, "
                                                       "skip, found 'ignore'"),
    "a prompt of no tokens": ("max_prompt_tokens: 0\n", 1, "'max_prompt_tokens' must be at least 8, found 0"),
    "a name twice": ("actor_training_data: a\nactor_training_data: b\n", 2,
                     "key 'actor_training_data' stands twice (line 1)"),
    "not YAML": ("actor_training_data: [a\n", 2, "is not valid YAML"),
    "not UTF-8": (b"actor_training_data: caf\xe9\n", None,
                  "is not UTF-8; save the file as UTF-8 text"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_broken_configuration_is_named_by_its_line(case, refused, tmp_path):
    text, line, expected = CONFIGS[case]
    (tmp_path / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused("actor", "--config", "mine.yaml")
    assert message.startswith(f"mine.yaml:{line}: " if line else "mine.yaml: ") and expected in message


OPTIONS = {
    "a group of one": ("reward", "--max_completions 1", "command line: 'max_completions' must be "
                                                        "at least 2, found 1"),
    "a negative ratio": ("reward", "--min_score_ratio=-1", "command line: 'min_score_ratio' must be at "
                                                           "least 0.0, found -1.0"),
    "no pairs": ("reward", "--max_pairs_per_prompt 0", "command line: 'max_pairs_per_prompt' must be "
                                                       "at least 1, found 0"),
    "EOS alone": ("actor", "--max_completion_tokens 1", "command line: 'max_completion_tokens' must be "
                                                        "at least 2, found 1"),
    "remote code": ("rlhf", "--trust_remote_code true", "command line: unknown key '--trust_remote_code'"),
    "a used folder": ("actor", "--output_dir used", "output_dir: 'used' is in use; it holds no run to go on "
                                                    "with; name"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_an_option_that_makes_no_sense_is_named(case, refused, tmp_path):
    role, words, expected = OPTIONS[case]
    two_sets(tmp_path, role)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    assert refused(role, f"--{role}_training_data", "rows.jsonl", *words.split()).startswith(expected)


# ----------------------------------------------------------------------------------------------- from outside


@pytest.mark.parametrize(("script", "words", "content", "expected"), [
    ("train_sft.py", "--actor_training_data a.jsonl", b'{"prompt": "P"}\n',
     f"a.jsonl:1: has columns prompt; {nearest(EXAMPLE, 'completion')}{OR_SKIP}"),
    ("train_reward.py", "--model assets/opt-mini --reward_training_data a.jsonl", b"\x1f\x8b\n",
     "a.jsonl:1: is not text but a .gz file; give its name the ending .gz"),
    ("prepare_data.py", "--data no.jsonl", b"", "data: 'no.jsonl' does not exist (looked in "
                                                "{folder} and {project})"),
])
def test_a_real_command_says_one_line_and_exits_with_2(script, words, content, expected, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(content)
    command = [sys.executable, str(PROJECT / "scripts" / script), "--output_dir", "run", *words.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert ((done.returncode, done.stderr) == (2,
                                               f"error: {expected}\n".format(folder=tmp_path,
                                                                             project=PROJECT)))
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
