"""Held-out sets that belong to another training set are not taken over."""

import json

import pytest

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import PROJECT, parse_config
from utils.data.report import DataReport

STAGES = {
    "sft": (train_sft.SFTStageConfig, train_sft.load_splits, "actor",
            ["actor_validation_data", "actor_test_data"]),
    "reward": (train_reward.RewardStageConfig, train_reward.load_splits, "reward",
               ["reward_validation_data", "reward_test_data", "centring_data"]),
    "ppo": (train_ppo.PPOStageConfig, train_ppo.load_posts, "rlhf",
            ["rlhf_validation_data", "rlhf_test_data", "gold_rules"]),
}


def configured(stage, *words):
    """The configuration of a command on the embedded default."""
    words = [str(word) for word in words]
    return parse_config(STAGES[stage][0], PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", words)


def own_file(folder, stage, name="mine"):
    answers = {"chosen": "a", "rejected": "b"} if stage == "reward" else {"completion": "c"}
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{name} {n}", **answers}) + "\n" for n in range(40)))
    return path


def prompts(loaded):
    """Of each split."""
    if isinstance(loaded, train_ppo.Posts):
        return [len(loaded.prompts), len(loaded.validation.prompts), len(loaded.test.prompts)]
    return [len(part.prompts) if hasattr(part, "prompts") else len(part) for part in loaded[:3]]


@pytest.mark.parametrize("stage", STAGES)
def test_an_own_training_set_is_held_out_of_and_a_line_says_so(stage, tmp_path):
    _, load, role, belonging = STAGES[stage]
    mine, report = own_file(tmp_path, stage), DataReport()
    config = configured(stage, f"--{role}_training_data", mine)
    assert [getattr(config, name) for name in belonging] == [None] * len(belonging)
    found = prompts(load(config, mini_tokenizer(), report))
    assert sum(found) == 40 and min(found) == 4
    embedded = f"{PROJECT}/configs/tldr_mini/{stage}.yaml"
    assert [note for note in report.notes if "belong to" in note] == [
        f"not used, since they belong to the {role}_training_data of {embedded}: {', '.join(belonging)}; "
        "name your own if you want some"]
    assert any(f"{role}_test_data: 4 rows held out of {role}_training_data" in note for note in report.notes)


@pytest.mark.parametrize("stage", STAGES)
def test_the_embedded_sets_stay_together(stage):
    """Also when the same training set is named again, and when only held-out sets are named."""
    _, _, role, belonging = STAGES[stage]
    default = configured(stage)
    assert None not in [getattr(default, name) for name in belonging] and not default.notes
    same = configured(stage, f"--{role}_training_data", getattr(default, f"{role}_training_data"))
    assert same == default and not same.notes
    other = configured(stage, f"--{role}_test_data", "mine.jsonl")
    assert getattr(other, f"{role}_test_data") == "mine.jsonl" and not other.notes
    assert getattr(other, f"{role}_validation_data") == getattr(default, f"{role}_validation_data")


@pytest.mark.parametrize("stage", STAGES)
def test_held_out_sets_that_are_named_stay(stage, tmp_path):
    _, _, role, belonging = STAGES[stage]
    given = {name: f"{name}.jsonl" for name in belonging}
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    config = configured(stage, f"--{role}_training_data", "mine.jsonl", *words)
    assert {name: getattr(config, name) for name in belonging} == given and not config.notes
    one = configured(stage, f"--{role}_training_data", "mine.jsonl", f"--{role}_test_data", "test.jsonl")
    assert getattr(one, f"{role}_test_data") == "test.jsonl"
    assert getattr(one, f"{role}_validation_data") is None
    [note] = one.notes
    assert [name for name in belonging if name in note] == [n for n in belonging if n != f"{role}_test_data"]


def test_a_later_file_with_a_training_set_takes_its_own_along(tmp_path):
    files = {"recipe": "actor_training_data: a\nactor_validation_data: b\nactor_test_data: c\n",
             "size": "model: m\nactor_training_data: a\n",
             "mine": "actor_training_data: x\nactor_test_data: z\n",
             "held": "actor_validation_data: held\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)

    def read(*names, words=()):
        paths = [str(tmp_path / f"{name}.yaml") for name in names]
        config = parse_config(train_sft.SFTStageConfig, None, ["--config", *paths, *words])
        return [config.actor_training_data, config.actor_validation_data, config.actor_test_data]

    assert read("recipe", "size") == ["a", "b", "c"]
    assert read("recipe", "size", "mine") == ["x", None, "z"]
    assert read("recipe", "mine", "held") == ["x", "held", "z"]
    assert read("held", "mine") == ["x", "held", "z"], "it stood alone, so it is for any training set"
    assert read("recipe", "held", words=["--actor_training_data", "y"]) == ["y", "held", None]
    assert read("mine", words=["--actor_training_data", "y"]) == ["y", None, None]


def test_what_the_run_saves_is_read_again_to_the_same(tmp_path):
    from utils.config import save_config

    config = configured("sft", "--actor_training_data", "mine.jsonl")
    save_config(config, tmp_path / "config.yaml")
    again = parse_config(train_sft.SFTStageConfig, None, ["--config", str(tmp_path / "config.yaml")])
    assert again == config and not again.notes
