"""The READMEs are true: their commands run, their files exist, both say the same."""

import dataclasses
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from utils.config import UserError, parse_config
from utils.data.rows import load_examples, load_rankings

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks without the comments behind two spaces, which are translated."""
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    return ["\n".join(line.split("  #")[0].rstrip() for line in block.splitlines()) for block in found]


def commands() -> list[str]:
    lines = [line.strip() for block in blocks(READMES[0].read_text(), "sh") for line in block.splitlines()]
    return sorted({line for line in lines if line})


DEFAULTS = ROOT / "configs" / "tldr_mini"
# module, configuration, default file
SCRIPTS = {"scripts/train_sft.py": ("train_sft", "SFTStageConfig", DEFAULTS / "sft.yaml"),
           "scripts/train_reward.py": ("train_reward", "RewardStageConfig", DEFAULTS / "reward.yaml"),
           "scripts/train_ppo.py": ("train_ppo", "PPOStageConfig", DEFAULTS / "ppo.yaml"),
           "scripts/studies/compare_seeds.py": ("studies.compare_seeds", "CompareConfig", None),
           "tests/helpers/kill_test.py": ("kill_test", "KillConfig", None),
           "scripts/studies/over_optimisation.py": ("studies.over_optimisation", "OverOptimisationConfig", None),
           "scripts/prepare_data.py": ("prepare_data", "PrepareConfig", None),
           "scripts/studies/benchmark.py": ("studies.benchmark", "BenchmarkConfig", None),
           "scripts/studies/measure_memory.py": ("studies.measure_memory", "MeasureConfig", None),
           "scripts/plan_memory.py": ("plan_memory", "PlanConfig", None)}
PYTHON = [c for c in commands() if c.startswith("python scripts/")]


def parsed(command: str):
    """The configuration that a command of the README runs with."""
    script, *words = shlex.split(command)[1:]
    module, kind, default_file = SCRIPTS[script]
    config_class = getattr(importlib.import_module(module), kind)
    return parse_config(config_class, default_file, [w for w in words if w != "--help"])


@pytest.mark.parametrize("command", PYTHON)
def test_python_commands_are_understood(command, monkeypatch):
    """Each parses as a user types it, from the project's folder; the stages themselves are run by test_stages."""
    monkeypatch.chdir(ROOT)
    config = parsed(command)
    paths = [getattr(config, name, None) for name in ("output_dir", "output", "figure")] + getattr(config, "runs", [])
    assert all(path.startswith("outputs/") for path in paths if path)


@pytest.mark.parametrize("words", ["--nonsense 1", "nonsense", "--config configs/none.yaml", "--help --nonsense"])
def test_a_command_that_would_not_run_is_noticed(words):
    with pytest.raises(UserError):
        parsed(f"{PYTHON[0]} {words}")


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_links_lead_somewhere_and_no_number_is_missing(readme):
    text = readme.read_text()
    assert "{{" not in text
    for target in re.findall(r'\]\(([^)#]+)\)|src="([^"]+)"', text):
        link = "".join(target)
        assert link.startswith("http") or (ROOT / link).exists(), link


def test_both_languages_hold_the_same_commands_numbers_and_keys():
    ours, theirs = (path.read_text() for path in READMES)
    for language in ("sh", "json", "yaml"):
        assert blocks(ours, language) == blocks(theirs, language)
    for pattern in (r"`[a-z]+/[a-zA-Z0-9_]+`", r"\d+\.\d\d+"):
        assert sorted(set(re.findall(pattern, ours))) == sorted(set(re.findall(pattern, theirs)))


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.name)
def test_the_options_are_keys_and_their_defaults_are_those_of_the_code(readme):
    lines = readme.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| `kl_estimator`"))
    table = lines[first : lines.index("", first)]
    defaults = {}
    for module, kind in (("train_reward", "RewardStageConfig"), ("train_ppo", "PPOStageConfig")):
        config_class = getattr(importlib.import_module(module), kind)
        defaults |= {field.name: field.default for field in dataclasses.fields(config_class)}
    seen = set()
    for row in table:
        names, values = (cell.replace("`", "") for cell in row.split("|")[1:3])
        values = re.split("[;；]", values)
        for name, value in zip(re.split("[,、]", names), values * 2, strict=False):
            assert str(defaults[name.strip()]).lower().removesuffix(".0") == value.split()[0], name
            seen.add(name.strip())
    assert len(seen) == 16


def test_the_rows_that_the_readme_shows_are_read(tmp_path):
    """Each by itself, by the loader of its role."""
    supervised, compared, prompts = blocks(READMES[0].read_text(), "json")
    roles = {"actor_training_data": supervised, "reward_training_data": compared, "rlhf_training_data": prompts}
    for role, block in roles.items():
        rows = [row for row in block.splitlines() if row]
        assert rows
        for row in rows:
            path = tmp_path / "row.jsonl"
            path.write_text(row + "\n")
            if role == "reward_training_data":
                [group] = load_rankings(str(path), role, 9, print)
                assert group.pairs
            else:
                [example] = load_examples(str(path), role, need_completion=role == "actor_training_data")
                assert example.completion or role == "rlhf_training_data"
