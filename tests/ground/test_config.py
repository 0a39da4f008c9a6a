"""Configuration: dataclass <- YAML <- command line, and one line that names the place of each mistake."""

import dataclasses
import importlib
import subprocess
import sys
from dataclasses import dataclass

import pytest

from utils.config import PROJECT, StageConfig, UserError, find_input, key, parse_config, save_config

STAGES = {"sft": "SFTStageConfig", "base": "SFTStageConfig", "reward": "RewardStageConfig", "ppo": "PPOStageConfig"}


@dataclass
class Toy(StageConfig):
    """All kinds of keys beside those of every stage."""

    note: str | None = key(None, "Anything.")
    bias: float = key(0.0, "Any number, 100 % of them.")
    share: float = key(0.5, "A share.", low=0.0, high=1.0)


def parse(folder, text="", *argv):
    path = folder / "toy.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_config(Toy, path, list(argv))


def stage_class(stage):
    script = "sft" if stage == "base" else stage
    return getattr(importlib.import_module(f"train_{script}"), STAGES[stage])


# ---------------------------------------------------------------------------------------------- precedence


def test_dataclass_then_yaml_then_command_line(tmp_path):
    assert parse(tmp_path) == Toy()
    text = "seed: 3\nshare: 0.25\nnote: file\nreport_to: [wandb, tensorboard]\nresume: true\n"
    found = parse(tmp_path, text)
    assert (found.seed, found.share, found.note, found.resume) == (3, 0.25, "file", True)
    assert found.report_to == ["wandb", "tensorboard"]
    found = parse(tmp_path, text, "--seed", "4", "--note=line", "--report_to", "none", "--resume", "false")
    assert (found.seed, found.share, found.note, found.resume) == (4, 0.25, "line", False)
    assert found.report_to == ["none"]
    # a later word on the command line wins, and dashes are as good as underscores
    assert parse(tmp_path, text, "--seed", "5", "--seed=6", "--learning-rate", "0.5").learning_rate == 0.5


def test_config_option_replaces_the_default_file(tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("note: other\n")
    for argv in (["--config", str(other)], [f"--config={other}"]):
        found = parse(tmp_path, "seed: 3\nnote: default\n", "--share", "1", *argv)
        assert (found.seed, found.note, found.share) == (0, "other", 1.0)


@pytest.mark.parametrize("text", ["3e-6", "3.0e-6", "3E-06", ".000003", "'3e-6'", "0.000_003"])
def test_every_spelling_of_a_float_is_a_float(text, tmp_path):
    """PyYAML reads `3e-6` as text."""
    found = parse(tmp_path, f"learning_rate: {text}\n").learning_rate
    assert isinstance(found, float) and found == pytest.approx(3e-6)


def test_whole_numbers_are_floats_where_a_float_is_asked_for(tmp_path):
    found = parse(tmp_path, "bias: -2\n", "--share", "1")
    assert (found.bias, found.share) == (-2.0, 1.0) and isinstance(found.bias, float) and isinstance(found.share, float)
    assert parse(tmp_path, "", "--bias", "-1.5").bias == -1.5
    assert parse(tmp_path, "", "--bias=-1e-3").bias == -1e-3


def test_null_is_nothing_and_comments_alone_are_an_empty_file(tmp_path):
    assert parse(tmp_path, "# nothing\n") == parse(tmp_path, "note: null\n") == Toy()


def test_lists_are_not_shared_between_configurations():
    Toy().report_to.append("x")
    assert Toy().report_to == ["tensorboard"]


# ------------------------------------------------------------------------------------------------ mistakes

IN_FILE = {  # text of the file, line, part of the message
    "unknown key": ("seed: 1\n\nlearnin_rate: 1\n", 3, "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
    "unlike any key": ("zzz: 1\n", 1, "unknown key 'zzz'; valid keys: adam_beta2,"),
    "help is no key": ("help: 1\n", 1, "unknown key 'help'"),
    "config is no key": ("config: other.yaml\n", 1, "unknown key 'config'"),
    "text for a number": ("seed: 1\nlearning_rate: fast\n", 2, "invalid float value: 'fast'"),
    "text for a whole number": ("seed: 1e3\n", 1, "--seed: invalid int value: '1e3'"),
    "fraction for a whole number": ("\nseed: 1.5\n", 2, "'seed' must be a whole number, found 1.5"),
    "bool for a number": ("seed: true\n", 1, "'seed' must be a whole number, found True"),
    "bool for a float": ("share: yes\n", 1, "'share' must be a number, found True"),
    "number for a bool": ("resume: 1\n", 1, "'resume' must be true or false, found 1"),
    "text for a bool": ("resume: maybe\n", 1, "--resume:"),
    "number for text": ("note: 3\n", 1, "'note' must be text, found 3"),
    "list for a number": ("seed: [1, 2]\n", 1, "'seed' must be a whole number, found [1, 2]"),
    "mapping for a number": ("share: {a: 1}\n", 1, "'share' must be a number"),
    "list of numbers": ("report_to: [1]\n", 1, "'report_to' must be a list of str, found [1]"),
    "number for a list": ("report_to: 1\n", 1, "'report_to' must be a list of str, found 1"),
    "null for a number": ("seed: null\n", 1, "'seed' must be a whole number, found None"),
    "too small": ("seed: 1\nper_device_batch_size: 0\n", 2, "'per_device_batch_size' must be at least 1, found 0"),
    "too large": ("share: 1.5\n", 1, "'share' must be between 0.0 and 1.0, found 1.5"),
    "nan": ("share: .nan\n", 1, "'share' must be a finite number, found nan"),
    "nan without a range": ("bias: nan\n", 1, "'bias' must be a finite number, found nan"),
    "infinite": ("learning_rate: .inf\n", 1, "'learning_rate' must be a finite number, found inf"),
    "not a choice": ("mixed_precision: bf8\n", 1, "'mixed_precision' must be one of no, bf16, fp16, found 'bf8'"),
    "choice read as a bool": ("mixed_precision: no\n", 1, "must be text, found False"),
    "duplicate": ("seed: 1\nshare: 0.1\nseed: 2\n", 3, "key 'seed' stands twice (line 1)"),
    "list": ("- seed\n- 1\n", 1, "must be a YAML mapping of 'key: value' lines, found a list"),
    "empty list": ("[]\n", 1, "must be a YAML mapping of 'key: value' lines, found a list"),
    "text": ("seed\n", 1, "must be a YAML mapping of 'key: value' lines, found a str"),
    "zero": ("0\n", 1, "must be a YAML mapping of 'key: value' lines, found a int"),
    "number as key": ("seed: 1\n2: 3\n", 2, "key '2' is not text"),
    "not YAML": ("seed: 1\nshare: [1\n", 3, "is not valid YAML"),
    "tab": ("seed: 1\n\tshare: 1\n", 2, "is not valid YAML"),
    "control character": ("seed: \x00\n", 1, "is not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, "is not valid YAML"),
}

ON_COMMAND_LINE = {  # words, part of the message
    "unknown key": (["--learnin_rate", "1"], "unknown key '--learnin_rate'; did you mean 'learning_rate'?"),
    "unknown key=": (["--sed=1"], "unknown key '--sed=1'; did you mean 'seed'?"),
    "abbreviation": (["--learning", "1"], "unknown key '--learning'"),
    "no dashes": (["seed=1"], "unknown key 'seed=1'; did you mean 'seed'?"),
    "wrong type": (["--seed", "one"], "--seed: invalid int value: 'one'"),
    "fraction": (["--seed", "1.5"], "--seed: invalid int value: '1.5'"),
    "bool for a number": (["--seed", "true"], "--seed: invalid int value: 'true'"),
    "text for a bool": (["--resume", "maybe"], "--resume:"),
    "no value": (["--seed"], "--seed: expected one argument"),
    "too small": (["--warmup_steps", "-1"], "'warmup_steps' must be at least 0, found -1"),
    "a seed numpy does not take": (["--seed", "5000000000"], "'seed' must be between 0 and 4294967295, found 5000000000"),
    "a decay of nothing": (["--adam_beta2", "1.0"], "'adam_beta2' must be between 0.0 and 0.999999, found 1.0"),
    "too large": (["--share", "2"], "'share' must be between 0.0 and 1.0, found 2.0"),
    "nan": (["--learning_rate", "nan"], "'learning_rate' must be a finite number, found nan"),
    "infinite": (["--bias=-inf"], "'bias' must be a finite number, found -inf"),
    "not a choice": (["--mixed_precision", "fp8"], "'mixed_precision' must be one of no, bf16, fp16, found 'fp8'"),
    "--config without value": (["--seed", "1", "--config"], "--config needs a file"),
    "--config twice": (["--config", "toy.yaml", "--config=other.yaml"], "--config stands twice"),
}


def one_line(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.isprintable(), repr(message)
    return message


@pytest.mark.parametrize("case", IN_FILE)
def test_a_mistake_in_the_file_is_named_by_file_and_line(case, tmp_path):
    text, line, part = IN_FILE[case]
    message = one_line(lambda: parse(tmp_path, text))
    assert message.startswith(f"{tmp_path / 'toy.yaml'}:{line}: ") and part in message


@pytest.mark.parametrize("case", ON_COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_named(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv, part = ON_COMMAND_LINE[case]
    message = one_line(lambda: parse(tmp_path, "share: 0.1\n", *argv))
    assert message.startswith("command line: ") and part in message


def test_the_command_line_does_not_hide_a_mistake_of_the_file(tmp_path):
    assert "toy.yaml:1: " in one_line(lambda: parse(tmp_path, "learning_rate: fast\n", "--learning_rate", "1"))
    assert "toy.yaml:1: " in one_line(lambda: parse(tmp_path, "seed: -1\n", "--share", "1"))


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    assert one_line(lambda: parse_config(Toy, missing, [])) == f"{missing}: cannot be read (No such file or directory)"
    assert "--config: 'no.yaml' does not exist" in one_line(lambda: parse(tmp_path, "", "--config", "no.yaml"))
    assert "cannot be read" in one_line(lambda: parse(tmp_path, "", "--config", str(tmp_path)))
    assert "toy.yaml: is not UTF-8" in one_line(lambda: parse(tmp_path, b"note: caf\xe9\n"))


def test_inputs_are_found_from_here_and_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_input("configs/tldr_mini/sft.yaml", "x") == PROJECT / "configs/tldr_mini/sft.yaml"
    (tmp_path / "configs").mkdir()
    assert find_input("configs", "x").resolve() == tmp_path / "configs"


# ------------------------------------------------------------------------------------------- the real ones


def test_a_saved_configuration_reads_back(tmp_path):
    config = parse(tmp_path, "", "--learning_rate", "3e-6", "--note", "a: 'b' # c", "--report_to", "x", "y")
    save_config(config, tmp_path / "saved.yaml")
    assert parse(tmp_path, "", "--config", str(tmp_path / "saved.yaml")) == config
    assert config.note == "a: 'b' # c"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stages_defaults_survive_saving(stage, tmp_path):
    save_config(stage_class(stage)(), tmp_path / "saved.yaml")
    assert parse_config(stage_class(stage), tmp_path / "saved.yaml", []) == stage_class(stage)()


FILES = sorted(p for p in (PROJECT / "configs").rglob("*.yaml") if p.stem in STAGES)


PUBLISHED = {  # what N+, ST, IG and LMHP print; the reference configuration is theirs
    "sft": {"max_prompt_tokens": 512, "max_new_tokens": 53, "learning_rate": 3e-6, "adam_eps": 1e-5, "num_train_epochs": 1.0,
            "loss_on": "completion", "eval_temperature": 0.01},
    "reward": {"max_prompt_tokens": 512, "max_completion_tokens": 169, "learning_rate": 3e-6, "adam_eps": 1e-5,
               "num_train_epochs": 1.0, "max_completions": 9, "margin": 0.0},
    "ppo": {"max_prompt_tokens": 512, "max_new_tokens": 53, "learning_rate": 3e-6, "adam_eps": 1e-5, "kl_coef": 0.05,
            "kl_estimator": "k1", "kl_target": None, "kl_horizon": 10_000, "temperature": 0.7, "missing_eos_score": -1.0,
            "gamma": 1.0, "lam": 0.95, "whiten_rewards": False, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1,
            "ppo_epochs": 4, "num_minibatches": 1, "prompts_per_update": 128, "responses_per_prompt": 4,
            "value_model": "separate", "advantage": "gae", "eval_temperature": 0.01, "ptx_coef": 0.0, "ema_decay": 0.0},
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_defaults_are_the_published_ones(stage):
    config = stage_class(stage)()
    assert {name: getattr(config, name) for name in PUBLISHED[stage]} == PUBLISHED[stage]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_every_shipped_file_loads(path):
    assert parse_config(stage_class(path.stem), path, []).output_dir.startswith("outputs/")


def test_there_are_shipped_files():
    assert {"sft", "reward", "ppo"} <= {path.stem for path in FILES}


def help_of(stage, capsys, *argv):
    file = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    with pytest.raises(SystemExit) as left:
        parse_config(stage_class(stage), file, [*argv, "--help"], "What it does.\n\n    a command\n    another one\n")
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_help_holds_every_key_with_its_meaning_and_what_the_bare_command_would_use(stage, capsys):
    printed = help_of(stage, capsys)
    assert "What it does.\n\n    a command\n    another one\n" in printed
    shown = " ".join(printed.split())
    bare = parse_config(stage_class(stage), PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", [])
    for field in dataclasses.fields(stage_class(stage)):
        meaning = " ".join(str(field.metadata["help"]).replace("%%", "%").split())
        value = getattr(bare, field.name)
        value = str(value).lower() if value is None or isinstance(value, bool) else value
        assert f"--{field.name} {meaning} (default: {value})" in shown
        assert "(source: " in meaning


def test_help_for_another_file_shows_that_files_values(capsys):
    assert "(default: 0.7)" in help_of("ppo", capsys, "--config", str(PROJECT / "configs" / "opt-125m" / "ppo.yaml"))


def test_a_script_says_one_line_and_exits_with_2(tmp_path):
    command = [sys.executable, str(PROJECT / "scripts" / "train_sft.py"), "--learnin_rate", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: command line: unknown key '--learnin_rate'; did you mean 'learning_rate'?\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_no_steps_at_all_are_refused_with_their_place(stage, tmp_path):
    """`Trainer` takes 0 for -1, and trains by epochs."""
    path = tmp_path / "stage.yaml"
    path.write_text("seed: 1\nmax_steps: 0\n")
    with pytest.raises(UserError, match=rf"^{path}:2: max_steps: 0 steps train nothing"):
        parse_config(stage_class(stage), path, [])
    path.write_text("seed: 1\n")
    with pytest.raises(UserError, match="^command line: max_steps: 0 steps train nothing"):
        parse_config(stage_class(stage), path, ["--max_steps", "0"])
    assert parse_config(stage_class(stage), path, ["--max_steps", "-1"]).max_steps == -1


@pytest.mark.parametrize("name", ["gradient_accumulation_steps", "logging_steps", "max_steps"])
def test_ppo_has_no_key_that_it_would_not_use(name, tmp_path):
    (tmp_path / "ppo.yaml").write_text("seed: 1\n")
    with pytest.raises(UserError, match=f"unknown key '--{name}'"):
        parse_config(stage_class("ppo"), tmp_path / "ppo.yaml", [f"--{name}", "1"])
