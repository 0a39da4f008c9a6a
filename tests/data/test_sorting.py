"""Names to be put in alphabetical order (data/sorting): the problems, and the functions that check answers.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import train_ppo
from utils.config import PROJECT, parse_config

FOLDER = PROJECT / "data" / "sorting"


def module(name):
    spec = importlib.util.spec_from_file_location(f"sorting_{name}", FOLDER / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def files():
    return module("generate").rows(seed=0)


def names_of(row):
    return row["prompt"].removeprefix("Names: ").removesuffix("\n\nIn order:").split()


def test_no_set_of_names_of_a_held_out_row_is_in_another_row(files):
    sets = {name: [frozenset(names_of(row)) for row in rows] for name, rows in files.items()}
    held_out = [names for file in ("sft_validation", "sft_test", "ppo_validation", "ppo_test")
                for names in sets[file]]
    assert len(held_out) == len(set(held_out)) and {len(names) for names in held_out} == {3, 4, 5}
    assert set(held_out).isdisjoint([*sets["sft_train"], *sets["ppo_train"]])


def test_examples_of_sft_are_right_by_chance_alone(files):
    rows = files["sft_train"]
    for row in rows:
        assert sorted(row["completion"].split()) == sorted(names_of(row))
    right = sum(row["completion"].split() == sorted(names_of(row)) for row in rows) / len(rows)
    assert right == pytest.approx((1 / 6 + 1 / 24 + 1 / 120) / 3, abs=0.02)


def test_a_checker_gets_the_names_and_no_answer(files):
    for name in ("ppo_train", "ppo_validation", "ppo_test"):
        assert all(row.keys() == {"prompt", "names"} and row["names"] == names_of(row) for row in files[name])


def test_every_name_is_one_token_and_any_text_comes_back():
    generate = module("generate")
    words = generate.tokenizer()
    assert all(len(words(f" {name}", add_special_tokens=False)["input_ids"]) == 1 for name in generate.NAMES)
    text = "Names: Zoé ☃\n\nIn order:"
    assert words.decode(words(text)["input_ids"], skip_special_tokens=True) == text
    longest = words(generate.problem(generate.NAMES[:5]))["input_ids"]
    config = parse_config(train_ppo.PPOStageConfig, PROJECT / "configs" / "verifiable" / "ppo.yaml", [])
    assert len(longest) <= config.max_prompt_tokens and config.max_new_tokens > 5


def test_the_files_are_the_same_bytes_each_time(tmp_path, files):
    """The model, too: its weights are those of the seed, whatever torch drew before."""
    generate = module("generate")
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path / "once"], check=True)
    generate.main(tmp_path / "again")
    once, again = ({path.relative_to(folder): path.read_bytes() for path in folder.rglob("*")
                    if path.is_file()} for folder in (tmp_path / "once", tmp_path / "again"))
    assert once == again
    for name, rows in files.items():
        assert once[Path(f"{name}.jsonl")].decode() == "".join(json.dumps(row) + "\n" for row in rows)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "once" / "model")
    assert model.num_parameters() == 450_944


@pytest.mark.parametrize(("answer", "right", "in_place"), [
    ("Adam Ben Carl", 1, 1), ("Adam Carl Ben", 0, 1 / 3), ("Ben Carl Adam", 0, 0), ("", 0, 0),
    ("Adam Ben", 0, 2 / 3), ("Adam Ben Carl Carl", 0, 3 / 4), ("adam ben carl", 0, 0),
    (" Adam\nBen  Carl ", 1, 1),
])
def test_checkers_by_hand(answer, right, in_place):
    reward, given = module("reward"), ["Carl", "Adam", "Ben"]
    assert reward.right([answer, answer], [given, given]) == [right] * 2
    assert reward.in_place([answer], [given]) == [pytest.approx(in_place)]
