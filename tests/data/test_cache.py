"""The cache: a result that is not what was written is made again, and killed runs leave nothing for good."""

import fcntl
import json
import os
import shutil
import signal
import time

import datasets
import pytest

from utils.data import cache, store, tokens, validation
from utils.data.sources import Source
from utils.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Words:
    """A tokenizer whose tokens are known: a word's token is its length."""

    eos_token_id, backend_tokenizer, chat_template = 0, None, None

    def __call__(self, text, add_special_tokens=True, split_special_tokens=True):
        texts = [text] if isinstance(text, str) else text
        ids = [[len(word) for word in text.split()] for text in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def save_pretrained(self, folder):
        pass


ROWS = [*({"prompt": f"the prompt {'x' * n}", "completion": f"an answer {'y' * n}"} for n in range(30)), {}]


def content(path):
    """All that a run takes from the data: rows, rejected rows, counts, tokens."""
    stored = validation.read_set(Source(str(path)), "actor_training_data", "examples")
    table = tokens.token_rows(stored, Words(), 64)
    rows = [stored.row(index) for index in range(stored.table.num_rows)]
    return rows, list(stored.rejected()), stored.meta, table.to_dict()


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def folders():
    return sorted(cache.cache_folder().iterdir())


def flip(path):
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def fifo(path):
    path.unlink()
    os.mkfifo(path)


def folder(path):
    path.unlink()
    path.mkdir()


def link(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = {"removed": lambda path: path.unlink(), "emptied": lambda path: path.write_bytes(b""),
          "halved": lambda path: os.truncate(path, path.stat().st_size // 2), "flipped": flip, "a pipe": fifo,
          "a folder": folder, "endless": link,
          "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
          "other JSON": lambda path: path.write_text('{"a": [1]}'),
          "a number": lambda path: path.write_text("1"),
          "a list": lambda path: path.write_text("[1]"), "nothing": lambda path: path.write_text("{}")}
FILES = [("rows", "texts.arrow"), ("rows", "rows.arrow"), ("rows", "rejected.jsonl"), ("rows", "meta.json"),
         ("rows", "checksums.json"), ("tokens", "tokens.arrow"), ("tokens", "checksums.json")]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_a_damaged_result_is_made_again(kind, name, damage, data):
    expected = content(data)
    before = folders()
    [victim] = cache.cache_folder().glob(f"{kind}-*/{name}")
    DAMAGE[damage](victim)
    assert content(data) == expected and folders() == before
    assert all(cache._is_whole(path) for path in folders())


@pytest.mark.parametrize("kind", ["rows", "tokens"])
@pytest.mark.parametrize("damage", ["a file", "a link to nothing", "a link to another folder", "empty"])
def test_what_stands_in_the_place_of_a_result_is_made_way(kind, damage, data, tmp_path):
    expected = content(data)
    [victim] = cache.cache_folder().glob(f"{kind}-*")
    shutil.rmtree(victim)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("mine")
    {"a file": lambda: victim.write_text("x"), "empty": lambda: victim.mkdir(),
     "a link to nothing": lambda: victim.symlink_to(tmp_path / "gone"),
     "a link to another folder": lambda: victim.symlink_to(tmp_path / "mine")}[damage]()
    assert content(data) == expected
    assert (tmp_path / "mine" / "thesis").read_text() == "mine"


def test_a_whole_result_is_not_made_again_for_a_stray_file(data, monkeypatch):
    expected = content(data)
    for path in folders():
        (path / ".DS_Store").write_text("x")
    monkeypatch.setattr(cache, "_make", None)
    assert content(data) == expected


def test_what_another_run_has_made_meanwhile_stays(monkeypatch):
    """The check of a damaged result takes long; another run replaces it before it ends."""
    def build(path):
        (path / "a").write_text("x")

    made = cache.cached("rows", [1], build)
    (made / "a").write_text("y")

    def replaced(path):
        path.rename(path.with_name("gone"))
        path.mkdir()
        (path / "b").write_text("of another run")
        return False

    monkeypatch.setattr(cache, "_is_whole", replaced)
    assert (cache.cached("rows", [1], build) / "b").is_file()


# -------------------------------------------------------------------------------------------------- leftovers


def leftover(name="rows-0.1", age=3600):
    path = cache.cache_folder() / name
    path.mkdir(parents=True)
    (path / "a").write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def make(number=1):
    return cache.cached("rows", [number], lambda path: (path / "a").write_text("x"))


def test_what_a_killed_run_has_left_is_removed_by_the_next_that_builds():
    left = [leftover(), leftover("tokens-1.f")]
    young = leftover("rows-2.3", age=1)
    made = make()
    assert set(folders()) == {made, young} and not any(path.exists() for path in left)


def test_what_a_living_run_is_building_stays():
    path = leftover()
    descriptor = os.open(path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    assert set(folders()) == {path} and make() in folders() and path.exists()
    os.close(descriptor)
    assert make(2) in folders() and not path.exists()


def test_the_folder_that_is_being_built_is_locked(monkeypatch):
    monkeypatch.setattr(cache, "_YOUNG", -1)

    def build(path):
        make(2)  # another run
        (path / "a").write_text("x")

    assert (cache.cached("rows", [1], build) / "a").read_text() == "x" and len(folders()) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_killed_while_it_reads_leaves_nothing_for_good(number, monkeypatch):
    ready, said = os.pipe()
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        cache.cached("rows", [1], lambda path: ((path / "a").write_text("half"), os.write(said, b"x"),
                                                time.sleep(60)))
    os.read(ready, 1)
    monkeypatch.setattr(cache, "_YOUNG", -1)
    make(2)
    assert len(folders()) == 2  # the child lives
    os.kill(child, number)
    os.waitpid(child, 0)
    make(3)
    assert [path.name for path in folders() if "." in path.name] == [] and len(folders()) == 2


def test_a_result_is_on_the_disk_before_it_has_its_name(data, monkeypatch):
    synced, renamed = set(), []
    fsync, replace = os.fsync, os.replace

    def spy(descriptor):
        synced.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def rename(source, target):
        assert {path.name for path in source.iterdir()} | {source.name} <= synced
        renamed.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr(os, "replace", rename)
    content(data)
    assert sorted(renamed) == folders() and "opt-rlhf" in synced


def test_a_full_disk_is_one_line_that_names_the_cache(data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.SetWriter, "_flush_rows", full)
    with pytest.raises(UserError, match=r"^HF_DATASETS_CACHE: '.*opt-rlhf' cannot be written to \(No space"):
        content(data)
    assert folders() == []
