"""Folders saved by `datasets`: what stands beside the text stays closed, and damage is one line."""

import os
import shutil
import signal

import datasets
import pytest

from utils.data.sources import Source, open_source
from utils.errors import UserError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A set with a column of images that are none."""
    folder = tmp_path_factory.mktemp("saved") / "set"
    features = datasets.Features({"prompt": datasets.Value("string"), "completion": datasets.Value("string"),
                                  "image": datasets.Image()})
    datasets.Dataset.from_dict({"prompt": ["P1", "P2"], "completion": ["c", "d"],
                                "image": [{"bytes": b"no image", "path": None}, None]},
                               features=features).save_to_disk(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "set")


def rows(folder):
    return [row for _, row in open_source(Source(str(folder)), "actor_training_data").rows]


def test_an_image_beside_the_text_is_not_opened(folder):
    assert rows(folder) == [
        {"prompt": "P1", "completion": "c", "image": {"bytes": b"no image", "path": None}},
        {"prompt": "P2", "completion": "d", "image": None}]


def test_a_set_that_was_saved_for_torch_is_read_as_texts(folder):
    expected = rows(folder)
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"_format_type": null', '"_format_type": "torch"'))
    assert rows(folder) == expected


TEXTS = {"cut off": "{", "a list": "[]", "a number": "5", "nothing": "null", "an empty object": "{}",
         "files that are a number": '{"_data_files": 5}', "not UTF-8": b"\xff", "bottomless": "[" * 100_000,
         "a file that is gone": '{"_data_files": [{"filename": "gone.arrow"}]}', "empty": ""}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_a_damaged_description_is_one_line_or_changes_nothing(name, case, folder):
    expected = rows(folder)
    (folder / name).write_bytes(TEXTS[case] if isinstance(TEXTS[case], bytes) else TEXTS[case].encode())
    try:
        assert rows(folder) == expected
        assert name == "dataset_info.json"  # the features are in the Arrow file, too
    except UserError as error:
        said = f"actor_training_data: '{folder}' was saved by `datasets` and is damaged"
        assert str(error).startswith(said)
        assert "\n" not in str(error) and len(str(error)) < 900


def test_a_damaged_table_is_one_line_and_never_ends_the_process(folder):
    """One byte of it changed at a time, each read in a process of its own."""
    [table] = folder.glob("*.arrow")
    whole = table.read_bytes()
    ends = {}
    for place in range(0, len(whole), 61):
        table.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1:])
        child = os.fork()
        if not child:
            status = 3
            try:
                rows(folder)
                status = 0
            except UserError:
                status = 0
            finally:
                os._exit(status)
        ends[place] = os.waitpid(child, 0)[1]
    assert {place: end for place, end in ends.items() if end} == {}
    assert signal.SIGSEGV not in ends.values()
