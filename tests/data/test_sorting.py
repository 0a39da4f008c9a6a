"""Names to be put in alphabetical order (data/sorting): the problems, and the functions that check answers.
"""

import importlib.util
import json
import subprocess
import sys

import pytest

from tiny_models import mini_tokenizer
from utils.config import PROJECT

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


def test_no_set_of_names_is_in_two_rows(files):
    sets = [frozenset(names_of(row)) for rows in files.values() for row in rows]
    assert len(sets) == len(set(sets)) and {len(names) for names in sets} == {3, 4, 5}


def test_examples_of_sft_are_right_by_chance_alone(files):
    rows = files["sft_train"]
    for row in rows:
        assert sorted(row["completion"].split()) == sorted(names_of(row))
    right = sum(row["completion"].split() == sorted(names_of(row)) for row in rows) / len(rows)
    assert right == pytest.approx((1 / 6 + 1 / 24 + 1 / 120) / 3, abs=0.02)


def test_a_checker_gets_the_names_and_no_answer(files):
    for name in ("ppo_train", "ppo_validation", "ppo_test"):
        assert all(row.keys() == {"prompt", "names"} and row["names"] == names_of(row) for row in files[name])


def test_every_name_is_one_token():
    tokenizer = mini_tokenizer()
    assert all(len(tokenizer(f" {name}", add_special_tokens=False)["input_ids"]) == 1
               for name in module("generate").NAMES)


def test_the_files_are_the_same_bytes_each_time(tmp_path, files):
    subprocess.run([sys.executable, FOLDER / "generate.py", tmp_path], check=True)
    assert {path.stem for path in tmp_path.iterdir()} == files.keys()
    for name, rows in files.items():
        assert (tmp_path / f"{name}.jsonl").read_text() == "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(("answer", "right", "in_place"), [
    ("Adam Ben Carl", 1, 1), ("Adam Carl Ben", 0, 1 / 3), ("Ben Carl Adam", 0, 0), ("", 0, 0),
    ("Adam Ben", 0, 2 / 3), ("Adam Ben Carl Carl", 0, 3 / 4), ("adam ben carl", 0, 0),
    (" Adam\nBen  Carl ", 1, 1),
])
def test_checkers_by_hand(answer, right, in_place):
    reward, given = module("reward"), ["Carl", "Adam", "Ben"]
    assert reward.right([answer, answer], [given, given]) == [right] * 2
    assert reward.in_place([answer], [given]) == [pytest.approx(in_place)]
