"""Where a relative path is looked up, and which names may be on the hub."""

from utils.paths import PROJECT, find_local, is_hub_name, nearest


def test_an_owner_that_is_a_folder_here_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_hub_name("facebook/opt-125m")
    assert find_local("~no-such-user/opt") is None and find_local("n" * 300) is None
    for name in ("mine/final", "outputs/final", "assets/none", "./opt", "/opt", "opt", "a/b/c"):
        assert not is_hub_name(name), name


def test_a_missing_file_is_like_one_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("comparisons.jsonl", "mine.yaml", "prompts.jsonl"):
        (tmp_path / name).touch()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "125m.yaml").touch()
    for typed, meant in {"comparison.jsonl": "comparisons.jsonl", "mine.yml": "mine.yaml",
                         "./prompt.jsonl": "./prompts.jsonl", "sub/125.yaml": "sub/125m.yaml",
                         f"{tmp_path}/mien.yaml": f"{tmp_path}/mine.yaml"}.items():
        assert nearest(typed) == meant
    for typed in ("other.jsonl", "a/b/mine.yaml", "x" * 5000, "sub/125m.yaml/x", ""):
        assert nearest(typed) is None
    monkeypatch.chdir(PROJECT)
    assert nearest("configs/opt/1.3B.yaml") == "configs/opt/1.3b.yaml"
