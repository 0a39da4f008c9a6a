"""Every public layout in every kind of file: it is read as its publisher means it, and the scripts train from
it.
"""

import gzip
import itertools
import json
import shutil

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import train_ppo
import train_reward
import train_sft
from hub_layouts import (
    COMPARED,
    ENDINGS,
    PROMPTS,
    SUPERVISED,
    rows_of,
    stories,
    trl_preference,
    trl_tldr,
    write,
)
from real_posts import data_folder
from utils.config import PROJECT, parse_config
from utils.data.rows import load_examples, load_rankings

COUNT = 12
PROMPT_SOURCES = SUPERVISED | COMPARED | PROMPTS  # PPO needs no more than a prompt


def rankings(path, said=None, **options):
    return load_rankings(path, "reward_training_data", 9, [].append if said is None else said.append,
                         **options)


def pairs_of(group):
    return sorted((group.completions[better], group.completions[worse]) for better, worse in group.pairs)


# ------------------------------------------------------------------------------------------- what a row means


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", SUPERVISED)
def test_examples_are_read_as_they_are_meant(name, ending, tmp_path):
    path = write(tmp_path, rows_of(SUPERVISED[name], 3), ending)
    found = [(example.prompt, example.completion) for example in load_examples(path, "actor_training_data")]
    assert found == [(copy.prompt, copy.completion) for copy in map(SUPERVISED[name], stories(3))]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_are_read_as_they_are_meant(name, ending, tmp_path):
    """All rows of a story are one group, whose completions stand in it once."""
    path = write(tmp_path, rows_of(COMPARED[name], 3), ending)
    found = [(group.prompt, len(group.completions), pairs_of(group)) for group in rankings(path)]
    assert found == [(copy.prompt, 3, sorted(copy.pairs)) for copy in map(COMPARED[name], stories(3))]


@pytest.mark.parametrize("name", PROMPT_SOURCES)
def test_prompts_of_any_layout_will_do_for_ppo(name, tmp_path):
    """Each once, also where several rows compare answers to it."""
    path = write(tmp_path, rows_of(PROMPT_SOURCES[name], 3))
    found = [example.prompt for example in load_examples(path, "rlhf_training_data", need_completion=False)]
    assert found == [copy.prompt for copy in map(PROMPT_SOURCES[name], stories(3))]


def test_what_openai_says_of_a_pair_goes_along_with_it(tmp_path):
    groups = rankings(write(tmp_path, rows_of(COMPARED["openai/summarize_from_feedback, comparisons"], 2),
                            ".parquet"))
    for group in groups:
        assert group.notes == [
            {"policies": "ref and sup4_ppo_rm3_kl10", "batch": "batch7", "worker": "w1"},
            {"policies": "ref and sup4_ppo_rm3_kl10", "batch": "batch7", "worker": "w1", "confidence": "7"}]


# ------------------------------------------------------------------------------------------- training from it


MINI = PROJECT / "assets" / "opt-mini"


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """The mini base model with a head that nobody has trained."""
    folder = tmp_path_factory.mktemp("models") / "reward"
    AutoModelForSequenceClassification.from_pretrained(MINI, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINI).save_pretrained(folder)
    return folder


STAGES = {
    "actor": (train_sft, "SFTStageConfig", "--max_steps 1 --eval_steps 1 --max_new_tokens 2"),
    "reward": (train_reward, "RewardStageConfig", "--max_steps 1 --eval_steps 1 --max_completion_tokens 160"),
    "rlhf": (train_ppo, "PPOStageConfig", "--total_episodes 4 --prompts_per_update 2 --responses_per_prompt "
                                          "2 --ppo_epochs 1 --eval_steps 9 --max_new_tokens 2 "
                                          "--reward_model {reward_model}"),
}


def train(role, data, out, reward_model=None, extra=""):
    """The real script on one data set, from which it holds posts out itself; where its run lies."""
    script, kind, words = STAGES[role]
    words = (f"--model assets/opt-mini --{role}_training_data {data} --output_dir {out} --max_prompt_tokens "
             f"224 --eval_rows 2 --test_rows 2 --per_device_batch_size 2 --report_to none "
             f"{words.format(reward_model=reward_model)} {extra}")
    script.main(parse_config(getattr(script, kind), None, words.split()))
    return out


ROLES = {"actor": SUPERVISED, "reward": COMPARED, "rlhf": PROMPT_SOURCES}
# each layout in each role that takes it, from one kind of file after the other
TRAININGS = [(role, name, ending) for (role, name), ending in zip(
    [(role, name) for role, layouts in ROLES.items() for name in layouts], itertools.cycle(ENDINGS),
    strict=False)]


# the first layout of each role in `make test`, the others in `make test-slow`
FIRST = {role: next(iter(layouts)) for role, layouts in ROLES.items()}


@pytest.mark.parametrize(("role", "name", "ending"), [
    pytest.param(*training, marks=[] if FIRST[training[0]] == training[1] else pytest.mark.slow)
    for training in TRAININGS])
def test_the_script_trains_from_every_layout(role, name, ending, reward_model, tmp_path):
    data = write(tmp_path, rows_of(ROLES[role][name], COUNT), ending)
    run = train(role, data, tmp_path / "run", reward_model)
    assert (run / "final" / "model.safetensors").exists()
    shown = {row["prompt"] for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines())}
    assert shown and shown <= {ROLES[role][name](story).prompt for story in stories(COUNT)}
    shutil.rmtree(run)  # a model each, in so many tests


def test_the_script_trains_from_a_mixture_of_layouts(tmp_path):
    """Dialogues, and a random half of the posts that stay when some are held out."""
    names = "Anthropic/hh-rlhf", "CarperAI/openai_summarize_comparisons"
    dialogues, posts = (write(tmp_path, rows_of(COMPARED[name], COUNT), name=name.replace("/", "-"))
                        for name in names)
    data = json.dumps([dialogues, {"name": posts, "weight": 0.5}], separators=(",", ":"))
    run = train("reward", data, tmp_path / "run")
    figures = json.loads((run / "data.json").read_text())["reward_training_data"]
    assert [source["read"] for source in figures["sources"]] == [2 * COUNT, 2 * COUNT]
    kept = 2 * COUNT - 4  # two posts each for validation and test
    assert kept - COUNT // 2 <= figures["rows"] <= kept - (COUNT - 4) // 2


def test_every_kind_of_file_is_trained_from():
    assert {ending for _, _, ending in TRAININGS} == set(ENDINGS)


# --------------------------------------------------------------------------------------- real data, unchanged


def real(name):
    folder = data_folder()
    if folder is None or not (folder / name).exists():
        pytest.skip(f"no {name}; set TLDR_DATA_DIR to the folder that holds it")
    return folder / name


@pytest.mark.slow
@pytest.mark.parametrize("role", ["actor", "rlhf"])
def test_the_script_trains_from_real_posts(role, reward_model, tmp_path):
    run = train(role, real("reddit_tldr.jsonl.gz"), tmp_path / "run", reward_model)
    assert (run / "final" / "model.safetensors").exists()


@pytest.mark.parametrize("role", ["reward", "rlhf"])
def test_the_script_trains_from_real_dialogues(role, reward_model, tmp_path):
    run = train(role, real("hh_rlhf/harmless-base_test.jsonl.gz"), tmp_path / "run", reward_model)
    assert (run / "final" / "model.safetensors").exists()


def test_dialogues_that_part_too_early_are_reported_and_the_others_are_whole():
    """HH's odd rows, counted here by what comes before each dialogue's last answer."""
    path, turn = real("hh_rlhf/harmless-base_test.jsonl.gz"), "\n\nAssistant:"
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    heads = [[row[column][: row[column].rindex(turn)] for column in ("chosen", "rejected")] for row in rows]
    odd = [number for number, (one, other) in enumerate(heads, start=1) if one != other]
    assert len(rows) == 2312 and len(odd) == 5
    said = []
    found = rankings(str(path), said)
    assert len(said) == 1 and "5 share no prompt" in said[0]
    assert found.sets[0].meta["dropped"]["share no prompt"] == {"rows": 5, "first": odd}
    even = [row for number, row in enumerate(rows, start=1) if number not in odd]
    whole = {(row["chosen"].strip(), row["rejected"].strip()) for row in even}
    made = [(group.prompt + better, group.prompt + worse) for group in found
            for better, worse in pairs_of(group)]
    assert all(pair in whole for pair in made)
    assert len(made) == sum(all(row[c].rpartition(turn)[2].strip() for c in ("chosen", "rejected"))
                            for row in even)


# ------------------------------------------------------------------------------------------ bad rows left out


@pytest.mark.parametrize("role", ROLES)
def test_bad_rows_are_left_out_and_written_down_when_that_is_asked_for(role, reward_model, tmp_path):
    layout = {"actor": trl_tldr, "reward": trl_preference, "rlhf": trl_tldr}[role]
    rows = rows_of(layout, COUNT)
    bad = [{**rows[0], "prompt": 7}, {"text": "no prompt"}]
    data = write(tmp_path, [rows[0], bad[0], *rows[1:], bad[1]])
    run = train(role, data, tmp_path / "run", reward_model, "--on_bad_rows skip")
    rejected = [json.loads(line) for line in (run / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(found["place"], found["row"]) for found in rejected] == [(f"{data}:2", bad[0]),
                                                                      (f"{data}:{len(rows) + 2}", bad[1])]
    assert rejected[0]["reason"] == "column 'prompt' is a number; text is needed"
    assert rejected[1]["reason"].startswith("has columns text; the nearest layout is ")
    assert "left out 2 bad rows" in (run / "train.log").read_text()
