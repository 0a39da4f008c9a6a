"""A short form of the runs on real posts and human labels; skipped where that data is not."""

import pytest

import real_posts


@pytest.mark.slow
@pytest.mark.skipif(real_posts.data_folder() is None, reason="TLDR_DATA_DIR is not set: no real posts here")
def test_the_scripts_take_real_posts_unchanged(tmp_path):
    figures = real_posts.run_all(real_posts.data_folder(), tmp_path, quick=True)
    assert 0 < figures["first sentence"]["rouge_avg"] < 1 and 0 < figures["title"]["rouge_avg"] < 1
    for name in ("reward", "hh-rlhf"):
        assert "label_ceiling" not in figures[name] and figures[name]["pairs"] > 0
    assert figures["ppo"]["episodes"] == 8 and not any(name.startswith("gold") for name in figures["ppo"])
    assert set(figures) == {"title", "first sentence", "sft", "reward", "ppo", "hh-rlhf",
                            "small random OPT, sft"}
