"""The files of `shared/data/formats`, as people have them, through prepare_data.py and the stage of each.

Nothing of them may stand here; what is expected is counted in the file.
"""

import gzip
import json
from types import SimpleNamespace

import pytest
from test_chat import tokenizer_of
from test_hub_layouts import train

import prepare_data
from real_posts import data_folder
from utils.config import UserError, parse_config
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, load_rankings

SUPERVISED = ["alpaca_en_demo", "alpaca_zh_demo", "glaive_toolcall_en_demo"]
COMPARED = ["dpo_en_demo", "dpo_zh_demo"]
KTO = "kto_en_demo"


def real(name):
    """(path, rows) of one of the files."""
    folder = data_folder()
    path = folder and folder / "formats" / f"{name}.json.gz"
    if path is None or not path.exists():
        pytest.skip(f"no formats/{name}.json.gz; set TLDR_DATA_DIR to the folder that holds it")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return path, json.load(file)


def prepare(path, out):
    """The figures of prepare_data.py on a set."""
    config = parse_config(prepare_data.PrepareConfig, None, ["--data", str(path), "--output_dir", str(out)])
    prepare_data.main(config)
    return json.loads((out / "data.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", SUPERVISED)
def test_examples_are_whole(name, tmp_path):
    path, rows = real(name)
    figures = prepare(path, tmp_path / "out")
    assert (figures["key"], figures["rows"], figures["rejected"]) == ("actor_training_data", len(rows), 0)
    examples = load_examples(str(path), "actor_training_data")
    assert list(load_examples(str(tmp_path / "out" / "rows.jsonl"), "actor_training_data")) == list(examples)
    for row, example in zip(rows, examples, strict=True):
        turns = row.get("conversations") or [{"value": row["instruction"]}, {"value": row["output"]}]
        asked, answer = [turn["value"].strip() for turn in turns[:-1]], turns[-1]["value"].strip()
        assert example.completion.strip() == answer and example.prompt.endswith("\n\nAssistant:")
        assert row.get("input", "") in example.prompt
        # calls of tools are written out again as JSON
        assert all(text in example.prompt for text, turn in zip(asked, turns, strict=False)
                   if turn.get("from") != "function_call")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_are_whole(name, tmp_path):
    path, rows = real(name)
    figures = prepare(path, tmp_path / "out")
    dropped = sum(reason["rows"] for reason in figures["sources"][0]["dropped"].values())
    assert (figures["key"], figures["rejected"]) == ("reward_training_data", 0)
    groups = list(load_rankings(str(path), "reward_training_data", 9, print))
    found = sorted((group.completions[b].strip(), group.completions[w].strip()) for group in groups
                   for b, w in group.pairs)
    meant = sorted((row["chosen"]["value"].strip(), row["rejected"]["value"].strip()) for row in rows)
    assert dropped == len(meant) - len(found) and set(found) <= set(meant)
    assert all(better == worse or not better or not worse for better, worse in set(meant) - set(found))
    again = load_rankings(str(tmp_path / "out" / "rows.jsonl"), "reward_training_data", 9, print)
    assert list(again) == groups


def test_marked_answers_are_examples_only_when_the_wanted_ones_are_asked_for(tmp_path):
    """No question of the file has a wanted and an unwanted answer, so there is nothing to compare either."""
    path, rows = real(KTO)
    assert {row["label"] for row in rows} == {True, False}
    with pytest.raises(UserError, match="label"):
        load_examples(str(path), "actor_training_data")
    with pytest.raises(UserError, match=r"no usable comparison; they are dropped: no unwanted answer"):
        prepare(path, tmp_path / "out")
    wanted = load_examples({"name": str(path), "only_wanted": True}, "actor_training_data")
    assert [one.completion.strip() for one in wanted] == [
        row["messages"][-1]["content"].strip() for row in rows if row["label"]]


@pytest.mark.parametrize("template", ["qwen2_5", None])
def test_every_answer_beside_calls_of_tools_is_learnt(template, tmp_path):
    """`loss_on: turns`, each conversation in one row: the answers and calls of the file, and nothing else."""
    rows = real("glaive_toolcall_en_demo")[1][:12]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = template and tokenizer.chat_template
    config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**7, max_dropped_share=1.0,
                             max_prompt_tokens=10**6)
    named = {"actor_training_data": NamedSet(str(path), "examples", turns=True)}
    table = load_data(config, named, tokenizer, DataReport())["actor_training_data"].dataset()
    for row, tokens in zip(rows, table, strict=True):
        said = [turn for turn in row["conversations"] if turn["from"] in ("gpt", "function_call")]
        assert tokens["answers"] == len(said)
        [labels] = tokens["turns"]["labels"]
        text = tokenizer.decode([label for label in labels if label >= 0])
        answers = text.split(tokenizer.eos_token)
        assert len(answers) == len(said) + 1 and answers[-1] == ""
        for turn, answer in zip(said, answers, strict=False):
            calls = turn["from"] == "function_call"
            assert (json.loads(turn["value"])["name"] in answer) if calls else (
                answer.strip() == turn["value"].strip())


TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.mark.slow
@pytest.mark.parametrize(("role", "name", "extra"), [
    ("actor", "alpaca_en_demo", ""), ("actor", "alpaca_zh_demo", "--chat_template {template}"),
    ("actor", "glaive_toolcall_en_demo", "--chat_template {template} --loss_on turns"),
    ("actor", KTO, ""), ("reward", "dpo_en_demo", "--chat_template {template}"),
    ("reward", "dpo_zh_demo", "")])
def test_the_stage_trains_from_it(role, name, extra, tmp_path):
    path, _ = real(name)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    wanted = json.dumps({"name": str(path), "only_wanted": True}, separators=(",", ":"))
    extra = (f"{extra.format(template=tmp_path / 'chat.jinja')} --max_completion_tokens 160 "
             "--max_dropped_share 1 --on_bad_rows skip")
    run = train(role, wanted if name == KTO else path, tmp_path / "run", extra=extra)
    assert (run / "final" / "model.safetensors").exists()
    figures = json.loads((run / "data.json").read_text())[f"{role}_training_data"]
    assert figures["rows"] > 2
    assert "turns" not in extra or figures["turns"]["answers"] > figures["rows"]
