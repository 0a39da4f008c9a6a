"""The data card is true: each row that it shows is read as the block below it says, and its links lead
somewhere.
"""

import itertools
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import yaml

import prepare_data
import train_reward
from hub_layouts import COMPARED, SUPERVISED
from utils.config import PROJECT, UserError, parse_config
from utils.data.files import FILE_ENDINGS
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, load_rankings
from utils.data.sources import parse_sources, sources_of

CARD = (PROJECT / "data" / "README.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^##+ (.*)$", CARD, re.MULTILINE)
SECTIONS = re.split(r"^##+ .*$", CARD, flags=re.MULTILINE)[1:]
# (heading, row, what is made of it)
SHOWN = [(heading, *pair) for heading, text in zip(HEADINGS, SECTIONS, strict=True)
         for pair in re.findall(r"```json\n(.*?)```\n```json\n(.*?)```", text, re.DOTALL)]


def of_ranking(path):
    [group] = load_rankings(path, "reward_training_data", 9, print)
    made = {"prompt": group.prompt, "pairs": sorted([group.completions[b], group.completions[w]]
                                                    for b, w in group.pairs)}
    return made | ({"notes": group.notes} if group.notes else {})


def of_example(path, field):
    [example] = load_examples(path, field, need_completion=field == "actor_training_data")
    return {"prompt": example.prompt, "completion": example.completion}


@pytest.mark.parametrize(("heading", "row", "made"), SHOWN,
                         ids=[f"{n} {shown[0]}" for n, shown in enumerate(SHOWN)])
def test_a_row_becomes_what_the_card_says(heading, row, made, tmp_path):
    path, made = tmp_path / "row.jsonl", json.loads(made)
    rows = json.loads(row)
    rows = rows if isinstance(rows, list) else [rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if "ratings" in made:
        named = {"rating_data": NamedSet(str(path), "ratings")}
        config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**6, max_dropped_share=1.0)
        [rated] = load_data(config, named, None, DataReport())["rating_data"]
        ratings = [list(pair) for pair in zip(rated.completions, rated.label_scores, strict=True)]
        assert {"prompt": rated.prompt, "ratings": ratings} == made
    elif "pairs" in made:
        assert of_ranking(str(path)) == made | {"pairs": sorted(made["pairs"])}
        assert of_example(str(path), "rlhf_training_data") == {"prompt": made["prompt"], "completion": None}
    else:
        made.setdefault("completion", None)
        field = "actor_training_data" if made["completion"] else "rlhf_training_data"
        assert of_example(str(path), field) == made


TURN = "\n\nHuman: C\n\nAssistant:"
PPO_ROWS = {  # how a line of the table begins: its columns, and the prompt that they give
    "| SFT, PPO | `messages` |": ({"messages": [{"role": "user", "content": "M"}]}, "Human: M\n\nAssistant:"),
    "| reward, PPO | `chosen`": ({"chosen": f"{TURN} a", "rejected": f"{TURN} b"}, TURN.strip()),
    "| SFT, PPO | `subreddit`": ({"subreddit": "tea", "title": "t", "post": "p"},
                                 "SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"),
    "| SFT, PPO | `prompt` (and `label`)": ({"prompt": "P", "label": "l"}, "P"),
    "| `rating_data`, PPO |": ({"info": {"article": "A"}, "summary": {"text": "s", "axes": {}}},
                               "A\n\nTL;DR:"),
}


@pytest.mark.parametrize("line", PPO_ROWS)
def test_each_line_of_the_table_gives_its_prompt(line, tmp_path):
    (row, prompt), path = PPO_ROWS[line], tmp_path / "row.jsonl"
    assert f"\n{line}" in CARD
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert of_example(str(path), "rlhf_training_data")["prompt"] == prompt


# `summary` cannot be the text of the one and the object of the other; beside a prompt, dialogues hold none
BOTH = [pair for pair in itertools.combinations(PPO_ROWS, 2)
        if not ("`subreddit`" in pair[0] and "rating" in pair[1]) and "| reward, PPO | `chosen`" not in pair]


@pytest.mark.parametrize(("one", "other"), BOTH)
def test_a_row_with_two_prompts_is_refused(one, other, tmp_path):
    row, path = PPO_ROWS[one][0] | PPO_ROWS[other][0], tmp_path / "row.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="has a prompt in '.*' and one in '.*'"):
        of_example(str(path), "rlhf_training_data")


def test_mixtures_and_commands_are_understood():
    [mixture] = re.findall(r"```yaml\n(.*?)```", CARD, re.DOTALL)
    assert ([source.name
             for source in sources_of(parse_sources(yaml.safe_load(mixture)["reward_training_data"]))] == [
        "CarperAI/openai_summarize_comparisons", "Anthropic/hh-rlhf", "openai/summarize_from_feedback"])
    commands = re.findall(r"python scripts/prepare_data.py (.*?)[\n`]", CARD)
    for words in commands:
        assert parse_config(prepare_data.PrepareConfig, None, words.split()).data
    [words] = re.findall(r"`--reward_training_data (.*?)`", CARD)
    config = parse_config(train_reward.RewardStageConfig, None,
                          ["--reward_training_data", *shlex.split(words)])
    assert commands and [source.weight for source in sources_of(config.reward_training_data)] == [1, 2]


def anchor(heading):
    """As GitHub makes it."""
    return re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", CARD):
        if target.startswith("#"):
            assert target[1:] in set(map(anchor, HEADINGS)), target
        else:
            assert (PROJECT / "data" / target).exists(), target


def test_nothing_is_left_out():
    """Each block belongs to a pair; each public set has its heading, each kind of file its mention."""
    assert CARD.count("```json") == 2 * len(SHOWN)
    names = [name for name in SUPERVISED | COMPARED if "/" in name and not name.endswith("CNN/DM")]
    assert names and set(names) <= set(HEADINGS)
    for ending in FILE_ENDINGS:
        assert all(f"`{part}`" in CARD for part in re.findall(r"\.\w+", ending)), ending
