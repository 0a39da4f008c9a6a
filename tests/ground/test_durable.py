"""What is renamed is on the disk before."""

import os

from utils.durable import delete, move


def recorded(monkeypatch):
    """The names that are synced and renamed, in order."""
    said, names, real = [], {}, {name: getattr(os, name) for name in ("open", "fsync", "replace")}

    def opened(path, *more, **options):
        handle = real["open"](path, *more, **options)
        names[handle] = os.path.basename(path)
        return handle

    def synced(handle):
        said.append(names[handle])
        real["fsync"](handle)

    def replaced(source, target):
        said.append(f"{os.path.basename(source)} -> {os.path.basename(target)}")
        real["replace"](source, target)

    for name, function in (("open", opened), ("fsync", synced), ("replace", replaced)):
        monkeypatch.setattr(os, name, function)
    return said


def test_a_folder_and_all_in_it_is_synced_before_its_name_and_its_name_afterwards(tmp_path, monkeypatch):
    folder = tmp_path / "new.tmp"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "inner" / "b").write_text("b")
    said = recorded(monkeypatch)
    move(folder, tmp_path / "new")
    rename = said.index("new.tmp -> new")
    assert sorted(said[:rename]) == ["a", "b", "inner", "new.tmp"] and said[rename - 1] == "new.tmp"
    assert said[rename + 1:] == [tmp_path.name] and (tmp_path / "new" / "inner" / "b").read_text() == "b"


def test_a_file_takes_the_place_of_an_older_one(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")
    (tmp_path / "a.tmp").write_text("new")
    said = recorded(monkeypatch)
    move(tmp_path / "a.tmp", tmp_path / "a")
    assert said == ["a.tmp", "a.tmp -> a", tmp_path.name] and (tmp_path / "a").read_text() == "new"


def test_what_cannot_be_deleted_raises_nothing(tmp_path):
    """It runs while another error is on its way to the user, which must not be replaced."""
    (tmp_path / "file").write_text("a file")
    delete(tmp_path / "file" / "below")
    delete(tmp_path / "never made")
    assert (tmp_path / "file").read_text() == "a file"
