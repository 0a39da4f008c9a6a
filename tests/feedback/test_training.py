"""The stages' real `main()` on a database of ratings."""

import re

import datasets
import pytest

import train_reward
import train_sft
from rated import database, next_task, rank_all, rate
from tiny_models import save_opt
from utils.config import parse_config
from utils.data.ratings import all_rated

POST = "SUBREDDIT: r/tea\n\nTITLE: Cups {0}\n\nPOST: Which of the {0} is it?\n\nTL;DR:"
WORDS = ("--max_steps 2 --per_device_batch_size 4 --logging_steps 1 --eval_steps 2 --save_steps 1000 "
         "--max_prompt_tokens 64 --report_to none").split()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    ratings = database(tmp_path / "r.db", [POST.format(n) for n in range(24)], ("old", "new"))
    rate(ratings, "Ann", next_task(ratings, "Ann"), kind="all_bad", better="So many cups.")
    for rater in ("Ann", "Bob"):
        rank_all(ratings, rater, key=lambda text: text[-1], repeat_share=0.3, overlap_share=1.0)
    for name in ("Cem", "Dan", "Eva", "Fay"):  # edits of other prompts, so that some can be held out
        ratings.add_prompts([POST.format(name)], "chat")
        for prompt, _, missing in ratings.to_sample([1, 2], 4, 1):
            for policy, count in missing.items():
                answers = [(f" {name} {policy} {n}", True) for n in range(count)]
                ratings.add_answers(prompt, policy, answers, 1.0)
        rate(ratings, name, next_task(ratings, name), kind="skip", better=f"{name} has cups.")
    return tmp_path


@pytest.mark.slow
def test_the_reward_stage_reports_by_rater_policies_and_day(folder):
    """Two raters tie the answers of each number, so 4 of the 6 pairs of a prompt are trained on."""
    model = save_opt(folder / "model")
    train_reward.main(parse_config(train_reward.RewardStageConfig, None, [
        "--model", str(model), "--reward_training_data", str(folder / "r.db"), "--output_dir",
        str(folder / "run"), "--max_completion_tokens", "32", *WORDS]))
    log = (folder / "run" / "train.log").read_text(encoding="utf-8")
    by = {name: line for line in log.splitlines() for name in ("worker", "policies", "batch")
          if f"accuracy by {name}:" in line}
    assert "Ann: " in by["worker"] and "Bob: " in by["worker"] and "Cem" not in by["worker"]
    assert "new and old: " in by["policies"] and "202" in by["batch"]
    assert (folder / "run" / "final" / "model.safetensors").is_file()


@pytest.mark.slow
def test_best_and_edited_answers_are_supervised_examples(folder):
    model = save_opt(folder / "model")
    train_sft.main(parse_config(train_sft.SFTStageConfig, None, [
        "--model", str(model), "--actor_training_data", str(folder / "r.db"), "--output_dir",
        str(folder / "run"), "--max_completion_tokens", "32", *WORDS]))
    log = (folder / "run" / "train.log").read_text(encoding="utf-8")
    counts = re.findall(r"actor_(?:training|validation|test)_data: (\d+) rows?", log)
    rated = all_rated(folder / "r.db")
    assert {row["kind"] for row in rated} == {"ranking", "all_bad", "skip"}
    assert len(counts) == 3 and sum(map(int, counts)) == len(rated)  # those that rank nothing have an edit
