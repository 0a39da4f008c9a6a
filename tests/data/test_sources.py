"""Data keys: names, mappings and lists of them, how they are mixed, and what is refused."""

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass

import datasets
import pytest

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import UserError, parse_config, save_config
from utils.data import sources
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, split_rows
from utils.data.sources import Source, data_key, open_source, parse_sources, sources_of
from utils.stage_keys import StageConfig

TOKENIZER = mini_tokenizer()
NAMES = ("actor_training_data", "actor_validation_data", "actor_test_data")


@dataclass
class Toy(StageConfig):
    """A stage with data."""

    training_data: str = data_key("a.jsonl", "Rows.")
    test_data: str | None = data_key(None, "Rows, none.")


def parse(folder, text="", *argv):
    (folder / "toy.yaml").write_text(text)
    return parse_config(Toy, folder / "toy.yaml", list(argv))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ---------------------------------------------------------------------------------------- what a key may hold

MIXTURE = """
training_data:
  - name: CarperAI/openai_summarize_comparisons
    split: train
    weight: 0.5
  - name: Anthropic/hh-rlhf
    data_dir: helpful-base
    revision: main
  - mine.jsonl
"""
SOURCES = [Source("CarperAI/openai_summarize_comparisons", split="train", weight=0.5),
           Source("Anthropic/hh-rlhf", data_dir="helpful-base", revision="main"), Source("mine.jsonl")]


def test_a_key_holds_a_name_a_mapping_or_a_list_of_them(tmp_path):
    assert sources_of(parse(tmp_path).training_data) == [Source("a.jsonl")]
    assert sources_of(parse(tmp_path, "training_data: b.csv\n").training_data) == [Source("b.csv")]
    assert (sources_of(parse(tmp_path, "training_data: {name: b.csv, weight: 2}\n").training_data)
            == [Source("b.csv", weight=2)])
    assert sources_of(parse(tmp_path, MIXTURE).training_data) == SOURCES
    assert parse(tmp_path, "test_data: null\n").test_data is None


def test_the_command_line_takes_a_name_or_json(tmp_path):
    assert parse(tmp_path, MIXTURE, "--training_data", "b.csv").training_data == "b.csv"
    words = '[{"name": "b.csv", "weight": 0.5}, "c.jsonl"]'
    assert (sources_of(parse(tmp_path, "", "--training_data", words).training_data)
            == [Source("b.csv", weight=0.5),
                Source("c.jsonl")])
    assert parse(tmp_path, "test_data: [b.csv]\n", "--test_data", "none").test_data is None


def test_a_saved_mixture_is_read_again(tmp_path):
    found = parse(tmp_path, MIXTURE, "--test_data", '{"name": "b.csv", "split": "test"}')
    save_config(found, tmp_path / "saved.yaml")
    assert parse_config(Toy, tmp_path / "saved.yaml", []) == found


REFUSED = {
    "{name: a, trust_remote_code: true}": "has an unknown key 'trust_remote_code'; code of a data set is "
                                          "never run; valid keys: ",
    "{name: a, weigth: 2}": "has an unknown key 'weigth'; valid keys: name, config, split, "
                            "revision, data_dir, weight",
    "[{path: a}]": "has an unknown key 'path'",
    "{weight: 2}": "has no 'name' in {'weight': 2}",
    "{name: a, weight: 0}": "has a weight of 0; a number above 0, at most 1000, is needed",
    "{name: a, weight: 1e12}": "has a weight of 1000000000000.0; a number above 0, at most 1000, is needed",
    "{name: a, weight: 1000.5}": "has a weight of 1000.5;",
    "{name: a, weight: -1}": "has a weight of -1;",
    "{name: a, weight: many}": "has a weight of 'many';",
    "{name: a, weight: true}": "has a weight of True;",
    "{name: a, weight: .nan}": "has a weight of nan;",
    "{name: a, weight: .inf}": "has a weight of inf;",
    "{name: 3}": "has 3 for 'name'; text is needed",
    "{name: a, split: [train]}": "has ['train'] for 'split'; text is needed",
    "[]": "is an empty list; name a data set",
    "[[a]]": "must be a name, a mapping with 'name', or a list of these, found ['a']",
    "3": "must be a name, a mapping with 'name', or a list of these, found 3",
    "null": "must be a name, a mapping with 'name', or a list of these, found None",
    "''": "must be a name, a mapping with 'name', or a list of these, found ''",
}


@pytest.mark.parametrize("value", REFUSED)
def test_anything_else_is_refused_with_file_and_line(value, tmp_path):
    with pytest.raises(UserError) as caught:
        parse(tmp_path, f"seed: 1\ntraining_data: {value}\n")
    assert str(caught.value).startswith(f"{tmp_path / 'toy.yaml'}:2: 'training_data' {REFUSED[value]}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("word", "said"), [
    ("[a.jsonl", "is not JSON"), ('{"name": "a", "trust_remote_code": true}',
                                  "has an unknown key 'trust_remote_code'"),
])
def test_the_command_line_is_as_strict(word, said, tmp_path):
    with pytest.raises(UserError, match=f"^command line: 'training_data' {said}") as caught:
        parse(tmp_path, "", "--training_data", word)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------------- mixing


def splits(**settings):
    """Prompts of the three parts of an SFT configuration."""
    config, report = train_sft.SFTStageConfig(**settings), DataReport()
    loaded = load_data(config, {name: NamedSet(getattr(config, name), "examples") for name in NAMES},
                       TOKENIZER, report)
    return [[example.prompt for example in rows] for rows in split_rows(config, loaded, *NAMES, report)]


def mixed(folder, weights, seed=0, rows=20):
    """Prompts of a mixture of sets a, b, ... as training takes them, with their counts."""
    entries = [{"name": write(folder / f"{name}.jsonl", [{"prompt": f"{name}{n}", "completion": "c"}
                                                         for n in range(rows)]),
                "weight": weight} for name, weight in zip("abc", weights, strict=False)]
    held = write(folder / "held.jsonl", [{"prompt": f"held {n}", "completion": "c"} for n in range(4)])
    return splits(actor_training_data=entries, actor_validation_data=held, actor_test_data=held, seed=seed,
                  allow_overlap=True)[0]


def test_a_weight_says_how_often_each_row_is_taken(tmp_path):
    assert mixed(tmp_path, [1, 1]) == [f"{name}{n}" for name in "ab" for n in range(20)]
    counts = Counter(mixed(tmp_path, [2, 0.5, 1.25]))
    assert [counts[f"a{n}"] for n in range(20)] == [2] * 20
    assert sorted(counts[f"b{n}"] for n in range(20)) == [0] * 10 + [1] * 10
    assert sorted(counts[f"c{n}"] for n in range(20)) == [1] * 15 + [2] * 5
    assert len(mixed(tmp_path, [0.3], rows=10)) == 3


def test_weights_that_leave_nothing_are_refused(tmp_path):
    with pytest.raises(UserError, match="^actor_training_data: its weights leave no row to train on"):
        mixed(tmp_path, [0.01])


def test_the_seed_fixes_which_part_is_taken(tmp_path):
    half = mixed(tmp_path, [0.5])
    assert half == mixed(tmp_path, [0.5]) != mixed(tmp_path, [0.5], seed=1)
    assert half == sorted(half, key=lambda prompt: int(prompt[1:])) and half != [f"a{n}" for n in range(10)]


def test_rows_that_are_held_out_are_taken_once_and_from_every_set(tmp_path):
    entries = [{"name": write(tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{n}", "completion": "c"}
                                                           for n in range(100)]),
                "weight": 3} for name in "ab"]
    train, *held = splits(actor_training_data=entries)
    for prompts in held:
        assert len(prompts) == len(set(prompts)) > 10 and {prompt[0] for prompt in prompts} == {"a", "b"}
    assert set(Counter(train).values()) == {3} and len(set(train)) + sum(map(len, held)) == 200


@pytest.mark.parametrize("sizes", [(40,), (60, 40), (10, 80, 10), (30, 0, 30)])
def test_of_a_mixture_the_first_rows_of_each_set_are_judged_in_proportion(sizes, tmp_path):
    """Of one set, exactly its first rows; one of three sets may hold none that is usable."""
    paths = [write(tmp_path / f"{letter}.jsonl", [{"prompt": f"{letter}{n}", "completion": "c"}
                                                  for n in range(size)]
                   or [{"prompt": "long", "completion": ""}])
             for letter, size in zip("abc", sizes, strict=False)]
    train = write(tmp_path / "train.jsonl", [{"prompt": f"t{n}", "completion": "c"} for n in range(50)])
    kept = splits(actor_training_data=train, actor_validation_data=paths, eval_rows=20, on_bad_rows="skip")[1]
    counts = Counter(prompt[0] for prompt in kept)
    assert len(kept) == 20 and kept == [f"{letter}{n}" for letter in "abc" for n in range(counts[letter])]
    assert all(abs(counts[letter] - 20 * size / sum(sizes)) < 1
               for letter, size in zip("abc", sizes, strict=False))


def test_references_of_a_mixture_are_of_every_set(tmp_path):
    paths = [write(tmp_path / f"{letter}.jsonl", [{"prompt": f"{letter}{n}", "completion": "c"}
                                                  for n in range(size)])
             for letter, size in (("a", 30), ("b", 10))]
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"P{n}", "chosen": "a", "rejected": "b"}
                                           for n in range(50)])
    config = train_reward.RewardStageConfig(reward_training_data=rows, centring_data=paths, test_rows=4)
    references = train_reward.load_splits(config, TOKENIZER, DataReport())[3]
    assert [example.prompt for example in references.examples] == ["a0", "a1", "a2", "b0"]


def test_a_mixture_of_comparisons_trains_from_every_set(tmp_path):
    """Of different layouts, each with its own groups; a prompt that two sets share has a group in each."""
    one = write(tmp_path / "a.jsonl", [{"prompt": f"P{n}", "chosen": "a", "rejected": "b"} for n in range(8)])
    turn = "\n\nHuman: {}\n\nAssistant:".format
    two = write(tmp_path / "b.jsonl", [{"chosen": f"{turn(n)} a", "rejected": f"{turn(n)} b"}
                                       for n in range(8)]
                + [{"prompt": "P1", "completions": ["x", "y", "z"]}])
    config = train_reward.RewardStageConfig(reward_training_data=[one, {"name": two, "weight": 2}],
                                            eval_rows=1, test_rows=1)
    report = DataReport()
    train, validation, test, *_ = train_reward.load_splits(config, TOKENIZER, report)
    prompts = Counter(TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in train["prompt"])
    assert len(validation) == len(test) == 1
    assert all(count == (2 if prompt.startswith("Human") else 3 if prompt == "P1" else 1)
               for prompt, count in prompts.items())
    assert [source["name"] for source in report.figures["reward_training_data"]["sources"]] == [one, two]


# ---------------------------------------------------------------------------------------- hub, folders, files


def test_the_hub_is_asked_for_what_the_mapping_says(monkeypatch):
    asked = []

    def load(*words, **more):
        asked.append((words, more))
        return datasets.Dataset.from_list([{"prompt": "P"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names",
                        lambda *words, **more: asked.append((words, more)) or ["train"])
    full = Source("openai/sets", "comparisons", "train", "refs/convert/parquet", "part", 2)
    opened = open_source(full, "reward_training_data")
    assert asked == [(("openai/sets", "comparisons"),
                      {"split": "train", "revision": "refs/convert/parquet", "data_dir": "part"})]
    assert (opened.label == "openai/sets/comparisons/part[train]" and list(opened.rows)
            == [(1, {"prompt": "P"})])
    asked.clear()
    open_source(Source("openai/sets", revision="main"), "reward_training_data")
    assert (asked == [(("openai/sets",), {"revision": "main"}),
                      (("openai/sets",), {"split": "train", "revision": "main"})])


def test_a_set_of_the_hub_is_known_by_its_content(monkeypatch):
    """Not by how it is stored, nor by the name of its revision."""
    def content_of(rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda *words, **more: rows)
        return open_source(Source("openai/sets", split="train"), "reward_training_data").content

    rows = [{"prompt": f"p{i}", "score": i % 7} for i in range(2500)]
    known = content_of(datasets.Dataset.from_list(rows))
    parts = [datasets.Dataset.from_list(part) for part in (rows[:3], rows[3:1700], rows[1700:])]
    assert content_of(datasets.concatenate_datasets(parts)) == known
    for other in (rows[:-1], [*rows[:-1], rows[0]], [{"prompt": row["prompt"]} for row in rows], rows[::-1]):
        assert content_of(datasets.Dataset.from_list(other)) != known


def test_an_unreachable_set_of_a_mixture_says_how_to_use_a_local_copy():
    with pytest.raises(UserError, match="^reward_training_data: 'Anthropic/hh-rlhf' is neither a file nor a "
                                        "data set of the hub that can be reached .*; without a network, name "
                                        "a local copy: a file, or a folder"):
        open_source(Source("Anthropic/hh-rlhf", data_dir="helpful-base"), "reward_training_data")


@pytest.mark.parametrize("option", ["config", "split", "revision", "data_dir"])
def test_what_only_the_hub_has_is_refused_for_a_file(option, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "P"}])
    with pytest.raises(UserError, match=f"^actor_training_data: '{path}' is on this disk and has no "
                                        f"{option}; leave that out"):
        open_source(Source(path, **{option: "x"}), "actor_training_data")


def test_a_split_of_a_folder_can_be_named(tmp_path):
    part, odd = (datasets.Dataset.from_list([{"prompt": prompt, "completion": "c"}]) for prompt in "PQ")
    datasets.DatasetDict(train=part, odd=odd).save_to_disk(tmp_path / "d")
    part.save_to_disk(tmp_path / "one")
    for split, prompt in ((None, "P"), ("odd", "Q")):
        entry = {"name": str(tmp_path / "d")} | ({"split": split} if split else {})
        found = load_examples(entry, "actor_training_data")
        assert ([e.prompt for e in found] == [prompt] and found.place(0)
                == f"{tmp_path / 'd'}[{split or 'train'}]:1")
    with pytest.raises(UserError, match=r"has no split none \(it has train, odd\); take one of these"):
        load_examples({"name": str(tmp_path / "d"), "split": "none"}, "actor_training_data")
    with pytest.raises(UserError, match="one' has no splits; leave split out"):
        load_examples({"name": str(tmp_path / "one"), "split": "train"}, "actor_training_data")


def test_a_file_under_another_option_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(UserError, match="^x: 'no/file.jsonl' does not exist"):
        load_examples("no/file.jsonl", "x", need_completion=False)



def test_every_data_key_has_its_split_of_a_hub_set():
    """By its whole name, so that a new key cannot take the training split unseen."""
    for config_class in (train_sft.SFTStageConfig, train_reward.RewardStageConfig, train_ppo.PPOStageConfig):
        for field in dataclasses.fields(config_class):
            if field.metadata["help"].parse is parse_sources:
                assert field.name.endswith("_training_data") != (field.name in sources._SPLITS), field.name
