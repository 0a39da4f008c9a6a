"""Where a relative path is looked up, and which names may be on the hub."""

from utils.paths import find_local, is_hub_name


def test_an_owner_that_is_a_folder_here_is_no_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert is_hub_name("facebook/opt-125m")
    assert find_local("~no-such-user/opt") is None and find_local("n" * 300) is None
    for name in ("mine/final", "outputs/final", "assets/none", "./opt", "/opt", "opt", "a/b/c"):
        assert not is_hub_name(name), name
