"""The study of the guard: its rules on hand-made evaluations, and the cells that are run."""

import json

import pytest

import train_ppo
import train_reward
from studies.guard import (
    RULES,
    GuardStudyConfig,
    cells_of,
    kept_by_guard,
    main,
    points_of,
    ppo_words,
    reward_words,
    share_kept,
)
from utils.config import PROJECT, UserError, parse_config

# update, KL, score, gold, the guard's score, gain over the kept policy
CURVE = [(0, 0.0, 0.2, 0.6, -0.3, None), (2, 2.5, 0.7, 0.8, 0.1, 4.0), (4, 3.1, 0.9, 0.9, 0.4, 2.0),
         (6, 5.0, 1.1, 0.72, 0.4, 0.5), (8, 9.0, 1.3, 0.45, 0.3, -1.0)]
POINTS = [dict(zip(("update", "kl", "score", "gold", "guard_score", "gain"), row, strict=True))
          for row in CURVE]


def test_what_each_rule_keeps_of_hand_made_evaluations():
    kept = {name: rule(POINTS)["update"] for name, rule in RULES.items()}
    assert kept == {"the highest score": 8, "the last policy": 8, "guard: 1": 4, "kl_budget: 3": 2,
                    "the highest score of the guard's model": 6}  # of equal ones the later, as `Best`
    assert share_kept(POINTS, kept_by_guard) == 1.0
    assert share_kept(POINTS, RULES["the highest score"]) == pytest.approx(0.45 / 0.9)
    assert kept_by_guard(POINTS[:1]) == POINTS[0] and kept_by_guard(POINTS, 3.0) == POINTS[1]


def test_evaluations_are_read_from_the_metrics(tmp_path):
    rows = [{"step": 0, "eval/score": 0.2, "eval/gold": 0.6, "eval/kl": 0.0},
            {"step": 1, "objective/entropy": 0.5}, {"step": 2, "objective/entropy": 0.4},
            {"step": 2, "eval/score": 0.7, "eval/gold": 0.8, "eval/kl": 1.0, "eval/guard_gain": None}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert points_of(tmp_path) == [
        {"update": 0, "entropy": None, "score": 0.2, "gold": 0.6, "kl": 0.0},
        {"update": 2, "entropy": 0.4, "score": 0.7, "gold": 0.8, "kl": 1.0, "gain": None}]


def test_finished_cells_are_in_the_table_and_are_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("studies.guard.run_stage", lambda *words: pytest.fail("a finished cell is run"))
    results = tmp_path / "guard.jsonl"
    points = [point | {"gold_sampled": point["gold"]} for point in POINTS]
    rows = [json.dumps({"arm": "single", "kl_coef": 0.0, "seed": seed, "points": points}) for seed in (1, 2)]
    results.write_text("\n".join(rows) + '\n{"arm": "sin')  # a kill cut the last one off
    main(GuardStudyConfig(arms=["single"], kl_coefs=[0.0], seeds=[1, 2], results=str(results)))
    said = capsys.readouterr().out
    assert "2 of 2 cells are finished" in said and said.count("1.000 (1.000)") >= 2 and "0.900" in said


def test_the_stages_take_the_words_of_every_cell():
    config = GuardStudyConfig(arms=["single", "uncertainty"], kl_coefs=[0.0, 0.12], seeds=[7, 8])
    cells = cells_of(config)
    assert cells[:3] == [("single", 0.0, 7), ("uncertainty", 0.0, 7), ("single", 0.0, 8)] and len(cells) == 8
    configs = PROJECT / "configs" / "tldr_mini"
    for cell in cells:
        made = parse_config(train_ppo.PPOStageConfig, configs / "ppo.yaml", ppo_words(config, cell))
        assert (made.kl_coef, made.seed, made.guard, made.kl_budget) == (cell[1], cell[2], 1.0, 1e6)
        assert made.rewards[0].get("ensemble", "single") == cell[0]
    words = reward_words(config, 5, 3)
    assert parse_config(train_reward.RewardStageConfig, configs / "reward.yaml", words).reward_heads == 5
    with pytest.raises(UserError, match="^arms: 'best'"):
        GuardStudyConfig(arms=["best"])
