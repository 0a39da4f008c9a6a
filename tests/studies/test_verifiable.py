"""The study of checked answers: equal time for every arm, what is read of a run, and its words as the stage
takes them.
"""

import json

import pytest

import train_ppo
from studies import verifiable
from studies.verifiable import ARMS, Arm, VerifiableConfig, figures, main, print_table, updates_in_time
from utils.config import PROJECT, UserError, parse_config

CONFIG = PROJECT / "configs" / "verifiable" / "ppo.yaml"


def write_metrics(folder, rows):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_arm_gets_the_updates_that_fit_into_its_time(tmp_path, monkeypatch):
    """2 CPU seconds an update; the first one, which also warms up, does not count. A minute is 30 updates."""
    asked = []

    def run_stage(stage, words):
        made = parse_config(train_ppo.PPOStageConfig, CONFIG, words[2:])
        asked.append((stage, made.updates, made.advantage))
        write_metrics(tmp_path / made.output_dir, [
            {"step": update, "time/rollout": 7.0, "time/cpu": 9.0 if update == 1 else 1.5 + update % 2}
            for update in range(1, made.updates)])

    monkeypatch.setattr(verifiable, "run_stage", run_stage)
    config = VerifiableConfig(minutes=1.0, sft="sft")
    assert updates_in_time(Arm("grpo", 3e-4, 1), config, tmp_path) == 30
    assert asked == [("ppo", 8, "grpo")]


def test_a_curve_has_cpu_seconds_of_training_and_the_share_that_is_right(tmp_path):
    assert figures(tmp_path / "run") is None
    write_metrics(tmp_path / "run", [
        {"step": 0, "eval/rewards/right": 0.1, "eval/kl": 0.0},
        {"step": 1, "time/rollout": 9.0, "time/cpu": 1.0, "objective/episodes": 512},
        {"step": 2, "time/rollout": 9.0, "time/cpu": 2.0, "objective/episodes": 1024},
        {"step": 2, "eval/rewards/right": 0.4, "eval/kl": 3.0}])
    (tmp_path / "run" / "summary.json").write_text(json.dumps({"right_after": 0.5, "rouge_avg": 0.1}))
    assert figures(tmp_path / "run") == {
        "curve": [{"seconds": 0.0, "episodes": 0, "right": 0.1, "kl": 0.0},
                  {"seconds": 3.0, "episodes": 1024, "right": 0.4, "kl": 3.0}],
        "test": {"right_after": 0.5}}


def test_the_table_has_the_time_to_the_goal_and_the_best_evaluation(capsys):
    curve = [{"seconds": seconds, "episodes": 512, "right": right}
             for seconds, right in ((0.0, 0.1), (3.0, 0.89), (5.0, 0.9), (7.0, 0.95), (9.0, 0.94))]
    print_table({"gae-0": {"curve": curve, "test": {"right_before": 0.08, "right_after": 0.93}},
                 "rloo-0": {"curve": curve[:2], "test": {}}})
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows == ["| gae-0 | 9 | 512 | 5 | 0.100 → 0.950 | 0.080 → 0.930 |",
                    "| rloo-0 | 3 | 512 | never | 0.100 → 0.890 |  |"]


def test_an_update_has_as_many_episodes_as_the_study_counts():
    assert parse_config(train_ppo.PPOStageConfig, CONFIG, []).episodes_per_update == verifiable._EPISODES


@pytest.mark.parametrize("method", ARMS)
def test_the_stage_takes_the_words_of_every_arm(method, tmp_path):
    words = Arm(method, 1e-3, 7).words(VerifiableConfig(sft="mine/sft"), tmp_path, 2)
    made = parse_config(train_ppo.PPOStageConfig, PROJECT / words[1], words[2:])
    assert (made.seed, made.learning_rate, made.total_episodes) == (7, 1e-3, 1024)
    assert made.advantage == method.split("_")[0]


def test_unknown_arms_and_used_folders_are_one_line(tmp_path):
    with pytest.raises(UserError, match="arms: 'best' is none of gae"):
        main(VerifiableConfig(arms=["best"], folder=str(tmp_path / "new")))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not empty; name a new one"):
        main(VerifiableConfig(folder=str(tmp_path)))
