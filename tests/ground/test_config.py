"""Configuration: dataclass <- YAML files <- command line, and one line that names the place of a mistake."""

import ast
import dataclasses
import importlib
import os
import re
import subprocess
import sys
import typing
from dataclasses import dataclass
from typing import ClassVar

import pytest

from utils.config import (
    PROJECT,
    SECTIONS,
    UserError,
    find_input,
    key,
    parse_config,
    save_config,
)
from utils.stage_keys import StageConfig

STAGES = {"sft": "SFTStageConfig", "base": "SFTStageConfig", "reward": "RewardStageConfig",
          "ppo": "PPOStageConfig"}


@dataclass
class Toy(StageConfig):
    """All kinds of keys beside those of every stage."""

    section: ClassVar[str] = "sft"

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
    assert (found.bias, found.share) == (-2.0, 1.0)
    assert isinstance(found.bias, float) and isinstance(found.share, float)
    assert parse(tmp_path, "", "--bias", "-1.5").bias == -1.5
    assert parse(tmp_path, "", "--bias=-1e-3").bias == -1e-3


def test_no_is_a_word_where_a_word_is_asked_for_and_false_where_a_truth_is(tmp_path):
    """YAML 1.1 reads `no` as false, so our own default could not be written down."""
    for word, truth in (("no", False), ("yes", True), ("true", True), ("False", False)):
        assert parse(tmp_path, f"resume: {word}\nmixed_precision: no\n") == Toy(resume=truth)
    assert parse(tmp_path, "note: 1:30\n").note == "1:30" and parse(tmp_path, "note: off\n").note == "off"


def test_null_is_nothing_and_comments_alone_are_an_empty_file(tmp_path):
    assert parse(tmp_path, "# nothing\n") == parse(tmp_path, "note: null\n") == Toy()


def test_lists_are_not_shared_between_configurations():
    Toy().report_to.append("x")
    assert Toy().report_to == ["tensorboard"]


def write(folder, name, text):
    (folder / name).write_text(text)
    return str(folder / name)


def test_of_several_files_the_later_wins_and_the_command_line_over_all(tmp_path):
    recipe = write(tmp_path, "recipe.yaml", "seed: 1\nshare: 0.25\nnote: recipe\nreport_to: [a, b]\n")
    size = write(tmp_path, "size.yaml", "seed: 2\nnote: null\nreport_to: [c]\n")
    found = parse(tmp_path, "bias: 3\n", "--share", "1", "--config", recipe, size, "--warmup_steps", "7")
    assert (found.seed, found.share, found.note, found.report_to) == (2, 1.0, None, ["c"])
    assert (found.warmup_steps, found.bias) == (7, 0.0)  # the default file is not read
    found = parse(tmp_path, "", "--config", size, recipe)
    assert (found.seed, found.note, found.report_to) == (1, "recipe", ["a", "b"])


def test_a_section_is_for_its_stage_and_wins_over_the_common_keys_of_its_file(tmp_path):
    text = "sft:\n  seed: 1\n  share: 0.25\nseed: 2\nnote: common\nppo:\n  seed: 3\n  gamma: 0.5\n"
    found = parse(tmp_path, text)
    assert (found.seed, found.share, found.note) == (1, 0.25, "common")
    later = write(tmp_path, "later.yaml", "seed: 4\nreward: {share: 0.75}\n")
    first = write(tmp_path, "first.yaml", text)
    found = parse(tmp_path, "", "--config", first, later)  # a later file wins over a section too
    assert (found.seed, found.share, found.note) == (4, 0.25, "common")


@dataclass
class Tool:
    """A script that is no stage, with a key that is called like what stages have."""

    seed: int = key(0, "Anything.")
    stage: str = key("sft", "A stage.")


def test_a_script_that_is_no_stage_has_no_sections(tmp_path):
    path = write(tmp_path, "tool.yaml", "seed: 1\nsft:\n  seed: 2\n")
    said = one_line(lambda: parse_config(Tool, None, ["--config", path]))
    assert said.startswith(f"{path}:2: unknown key 'sft'")


# ------------------------------------------------------------------------------------------------ mistakes

IN_FILE = {  # text of the file, line, part of the message
    "unknown key": ("seed: 1\n\nlearnin_rate: 1\n", 3,
                    "unknown key 'learnin_rate'; did you mean 'learning_rate'?"),
    "unlike any key": ("zzz: 1\n", 1, "unknown key 'zzz'; --help shows all keys"),
    "help is no key": ("help: 1\n", 1, "unknown key 'help'"),
    "config is no key": ("config: other.yaml\n", 1, "unknown key 'config'"),
    "text for a number": ("seed: 1\nlearning_rate: fast\n", 2, "invalid float value: 'fast'"),
    "text for a whole number": ("seed: '1e3'\n", 1, "--seed: invalid int value: '1e3'"),
    "a power of ten for a whole number": ("seed: 1e3\n", 1, "'seed' must be a whole number, found 1000.0"),
    "fraction for a whole number": ("\nseed: 1.5\n", 2, "'seed' must be a whole number, found 1.5"),
    "bool for a number": ("seed: true\n", 1, "'seed' must be a whole number, found True"),
    "bool for a float": ("share: true\n", 1, "'share' must be a number, found True"),
    "a word for a float": ("share: yes\n", 1, "--share: invalid float value: 'yes'"),
    "an hour for a whole number": ("seed: 1:30\n", 1, "--seed: invalid int value: '1:30'"),
    "base 16 for a whole number": ("seed: 0x10\n", 1, "--seed: invalid int value: '0x10'"),
    "base 8 for a whole number": ("seed: 010\n", 1, "'010' is 8-based to some programs"),
    "no day of a calendar": ("seed: 2024-02-30\n", 1, "--seed: invalid int value: '2024-02-30'"),
    "digits without an end": (f"seed: {'1' * 5000}\n", 1, "has a number of 5000 characters"),
    "a duplicate in a section": ("sft:\n  seed: 1\n  seed: 2\n", 3, "key 'seed' stands twice (line 2)"),
    "number for a bool": ("resume: 1\n", 1, "'resume' must be true or false, found 1"),
    "text for a bool": ("resume: maybe\n", 1, "--resume:"),
    "number for text": ("note: 3\n", 1, "'note' must be text, found 3"),
    "list for a number": ("seed: [1, 2]\n", 1, "'seed' must be a whole number, found [1, 2]"),
    "mapping for a number": ("share: {a: 1}\n", 1, "'share' must be a number"),
    "list of numbers": ("report_to: [1]\n", 1, "'report_to' must be a list of texts, found [1]"),
    "number for a list": ("report_to: 1\n", 1, "'report_to' must be a list of texts, found 1"),
    "null for a number": ("seed: null\n", 1, "'seed' must be a whole number, found None"),
    "too small": ("seed: 1\nper_device_batch_size: 0\n", 2,
                  "'per_device_batch_size' must be at least 1, found 0"),
    "too large": ("share: 1.5\n", 1, "'share' must be at most 1.0, found 1.5"),
    "nan": ("share: .nan\n", 1, "'share' must be a finite number, found nan"),
    "nan without a range": ("bias: nan\n", 1, "'bias' must be a finite number, found nan"),
    "infinite": ("learning_rate: .inf\n", 1, "'learning_rate' must be a finite number, found inf"),
    "not a choice": ("mixed_precision: bf8\n", 1,
                     "'mixed_precision' must be one of no, bf16, fp16, found 'bf8'"),
    "a bool for a choice": ("mixed_precision: false\n", 1, "must be text, found False"),
    "duplicate": ("seed: 1\nshare: 0.1\nseed: 2\n", 3, "key 'seed' stands twice (line 1)"),
    "list": ("- seed\n- 1\n", 1, "must be a YAML mapping of 'key: value' lines, found a list"),
    "empty list": ("[]\n", 1, "must be a YAML mapping of 'key: value' lines, found a list"),
    "text": ("seed\n", 1, "must be a YAML mapping of 'key: value' lines, found text"),
    "zero": ("0\n", 1, "must be a YAML mapping of 'key: value' lines, found a whole number"),
    "number as key": ("seed: 1\n2: 3\n", 2, "key '2' is not text"),
    "not YAML": ("seed: 1\nshare: [1\n", 3, "is not valid YAML"),
    "tab": ("seed: 1\n\tshare: 1\n", 2, "is not valid YAML"),
    "control character": ("seed: \x00\n", 1, "is not valid YAML"),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, "is not valid YAML"),
    "unknown key in the section": ("sft:\n  seed: 1\n  sed: 2\n", 3,
                                   "unknown key 'sed'; did you mean 'seed'?"),
    "unknown section": ("rewad:\n  seed: 1\n", 1, "unknown key 'rewad'; did you mean 'reward'?"),
    "section in a section": ("sft:\n  ppo:\n    seed: 1\n", 2, "unknown key 'ppo'"),
    "wrong type in the section": ("sft:\n  seed: 1.5\n", 2, "'seed' must be a whole number, found 1.5"),
    "text in the section": ("seed: 1\nsft:\n  seed: one\n", 3, "--seed: invalid int value: 'one'"),
    "empty section": ("seed: 1\nppo:\n", 2, "'ppo' must hold 'key: value' lines, found nothing"),
    "section of text": ("reward: 3.5\n", 1, "'reward' must hold 'key: value' lines, found a number"),
    "duplicate in a section": ("ppo:\n  seed: 1\n  seed: 2\n", 3, "key 'seed' stands twice (line 2)"),
    "section twice": ("sft: {seed: 1}\nsft: {share: 1}\n", 2, "key 'sft' stands twice (line 1)"),
    "number as key of a section": ("reward:\n  2: 3\n", 2, "key '2' is not text"),
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
    "a seed numpy does not take": (["--seed", "5000000000"],
                                   "'seed' must be at most 4294967295, found 5000000000"),
    "a decay of nothing": (["--adam_beta2", "1.0"],
                           "'adam_beta2' must be at most 0.999999, found 1.0"),
    "too large": (["--share", "2"], "'share' must be at most 1.0, found 2.0"),
    "nan": (["--learning_rate", "nan"], "'learning_rate' must be a finite number, found nan"),
    "infinite": (["--bias=-inf"], "'bias' must be a finite number, found -inf"),
    "not a choice": (["--mixed_precision", "fp8"],
                     "'mixed_precision' must be one of no, bf16, fp16, found 'fp8'"),
    "--config without value": (["--seed", "1", "--config"], "--config: expected at least one argument"),
    "--config twice": (["--config", "toy.yaml", "--config=other.yaml"],
                       "--config stands twice; give it once, with all files: --config A B"),
    "a second file behind =": (["--config=toy.yaml", "toy.yaml"],
                               "'toy.yaml' is behind no option; all YAML files stand behind one --config"),
    "a word alone": (["mine.jsonl"], "'mine.jsonl' is behind no option; write --key value"),
    "a second value": (["--note", "a.jsonl", "b.jsonl"], "'b.jsonl' is behind no option; write --key value"),
    "arabic digits": (["--seed", "\u0663"], "--seed: '\u0663' is no number in the digits 0 to 9"),
    "wide digits": (["--share=\uff10.\uff15"],
                    "--share: '\uff10.\uff15' is no number in the digits 0 to 9"),
    "beyond every float": (["--bias", "1e999"], "'bias' must be a finite number, found inf"),
}


# what people type -> what they meant
MEANT = {
    "sft": {"batch_size": "per_device_batch_size", "lr": "learning_rate", "epochs": "num_train_epochs",
            "per_device_train_batch_size": "per_device_batch_size", "steps": "max_steps",
            "data": "actor_training_data",
            "dataset_name": "actor_training_data", "model_name_or_path": "model", "out": "output_dir",
            "bf16": "mixed_precision", "lora_r": "lora_rank", "max_length": "max_prompt_tokens",
            "learning": "learning_rate", "sede": "seed", "batch": ""},
    "reward": {"data": "reward_training_data", "lr": "learning_rate", "batch_size": "per_device_batch_size"},
    "ppo": {"data": "rlhf_training_data", "max_steps": "total_episodes",
            "num_generations": "responses_per_prompt", "num_train_epochs": "total_episodes",
            "beta": "kl_coef", "epochs": "ppo_epochs", "lambda": "lam",
            "batch_size": "per_device_batch_size", "reward_model_path": "reward_model"},
}


@pytest.mark.parametrize(("stage", "typed", "meant"),
                         [(stage, *pair) for stage, pairs in MEANT.items() for pair in pairs.items()])
def test_what_other_programs_call_it_leads_to_our_key(stage, typed, meant):
    said = one_line(lambda: parse_config(stage_class(stage), None, [f"--{typed}", "1"]))
    assert f"unknown key '--{typed}'" in said and len(said) < 200
    assert f"did you mean '{meant}'?" in said if meant else not re.search("mean '[^']*'[?]", said)


@pytest.mark.parametrize(("stage", "other", "key"), [
    ("sft", "reward", "reward_training_data"), ("sft", "ppo", "reward_model"),
    ("ppo", "sft", "actor_validation_data"),
    ("ppo", "reward", "max_completions"), ("reward", "ppo", "kl_coef"),
    ("reward", "sft", "actor_training_data"),
])
def test_a_key_of_another_stage_is_called_so(stage, other, key, tmp_path):
    path = write(tmp_path, "other.yaml", f"seed: 1\n{key}: 3\n")
    for argv, place in (([f"--{key}", "x"], "command line"), (["--config", path], f"{path}:2")):
        said = one_line(lambda: parse_config(stage_class(stage), None, argv))  # noqa: B023
        assert said.startswith(f"{place}: unknown key ")
        assert f"train_{other}.py, and this is train_{stage}.py" in said
    shipped = str(PROJECT / "configs" / "tldr_mini" / f"{other}.yaml")
    said = one_line(lambda: parse_config(stage_class(stage), None, ["--config", shipped]))
    assert f"train_{other}.py" in said and f"this is train_{stage}.py" in said


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
    said = one_line(lambda: parse(tmp_path, "learning_rate: fast\n", "--learning_rate", "1"))
    assert "toy.yaml:1: " in said
    assert "toy.yaml:1: " in one_line(lambda: parse(tmp_path, "seed: -1\n", "--share", "1"))


def test_the_file_that_holds_the_mistake_is_named(tmp_path):
    good = write(tmp_path, "good.yaml", "seed: 1\nshare: 0.5\n")
    bad = write(tmp_path, "bad.yaml", "note: x\nshare: 2\n")
    unknown = write(tmp_path, "unknown.yaml", "\nshre: 1\n")
    missing = str(tmp_path / "none.yaml")

    def said(*files):
        return one_line(lambda: parse(tmp_path, "", "--config", *files))

    assert said(good, bad) == f"{bad}:2: 'share' must be at most 1.0, found 2.0"
    assert said(bad, good) == said(good, bad)  # although the value is overridden
    assert said(good, unknown) == f"{unknown}:2: unknown key 'shre'; did you mean 'share'?"
    assert said(unknown, good) == said(good, unknown)
    assert f"--config: '{missing}' does not exist" in said(good, missing)


# ------------------------------------------------------------------------------------- keys without effect


@dataclass
class Idle(StageConfig):
    """Keys of which some act on nothing beside others."""

    method: str = key("value", "How.", choices=["value", "group"])
    discount: float = key(1.0, "For value.")
    trackers: list[str] = key(["a"], "For value.")
    target: float | None = key(None, "None: fixed.")
    horizon: int = key(10, "For a target.")

    def without_effect(self):
        reasons = super().without_effect()
        if self.method == "group":
            reasons |= dict.fromkeys(["discount", "trackers"], "method group has no values")
        if self.target is None:
            reasons["horizon"] = "target is none"
        return reasons


def idle(folder, text, *argv):
    return parse_config(Idle, write(folder, "idle.yaml", text), list(argv))


def test_a_key_without_effect_is_refused_with_its_place_and_the_reason(tmp_path):
    said = one_line(lambda: idle(tmp_path, "", "--method", "group", "--discount", "0.9"))
    assert said == "command line: 'discount' has no effect (method group has no values); leave it out"
    path = write(tmp_path, "mine.yaml", "method: group\ntrackers: [b]\nlora_alpha: 4\n")
    said = one_line(lambda: idle(tmp_path, "", "--config", path, "--horizon", "3"))
    parts = [f"{path}:3: 'lora_alpha' has no effect (lora_rank is 0, so there are no adapters)",
             f"{path}:2: 'trackers' has no effect (method group has no values)",
             "command line: 'horizon' has no effect (target is none)"]
    assert said == "; ".join(parts) + "; leave them out"


@pytest.mark.parametrize("words", [
    "--discount 0.9", "--target 2 --horizon 3", "--lora_rank 4 --lora_alpha 8",  # they act
    "--method group --discount 1 --trackers a --horizon 10", "--lora_alpha 16",  # at their defaults
])
def test_a_key_that_acts_or_stands_at_its_default_is_taken(words, tmp_path):
    idle(tmp_path, "", *words.split())


def test_what_only_the_default_file_sets_is_not_refused_and_does_not_stay(tmp_path):
    """`--method group` on a default file that sets `discount`; what is saved must be readable again."""
    text = "discount: 0.9\nhorizon: 3\ntarget: 2\n"
    found = idle(tmp_path, text, "--method", "group")
    assert (found.discount, found.horizon, found.target) == (1.0, 3, 2.0)
    save_config(found, tmp_path / "saved.yaml")
    assert idle(tmp_path, "", "--config", str(tmp_path / "saved.yaml")) == found
    # named by the user, the same file is the user's
    assert "idle.yaml:1: 'discount'" in one_line(
        lambda: idle(tmp_path, text, "--config", str(tmp_path / "idle.yaml"), "--method", "group"))


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_every_stage_refuses_an_adapters_scale_without_adapters(stage):
    with pytest.raises(UserError, match=r"^command line: 'lora_alpha' has no effect \(lora_rank is 0"):
        parse_config(stage_class(stage), None, ["--lora_alpha", "8"])
    assert parse_config(stage_class(stage), None, ["--lora_alpha", "8", "--lora_rank", "4"]).lora_alpha == 8


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "missing.yaml"
    said = one_line(lambda: parse_config(Toy, missing, []))
    assert said == f"{missing}: cannot be read (No such file or directory)"
    said = one_line(lambda: parse(tmp_path, "", "--config", "no.yaml"))
    assert "--config: 'no.yaml' does not exist" in said
    said = one_line(lambda: parse(tmp_path, "", "--config", str(tmp_path)))
    assert said == f"{tmp_path}: is a folder; a regular file is needed"
    assert "toy.yaml: is not UTF-8" in one_line(lambda: parse(tmp_path, b"note: caf\xe9\n"))


def test_inputs_are_found_from_here_and_from_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_input("configs/tldr_mini/sft.yaml", "x") == PROJECT / "configs/tldr_mini/sft.yaml"
    (tmp_path / "configs").mkdir()
    assert find_input("configs", "x").resolve() == tmp_path / "configs"


# ------------------------------------------------------------------------------------------- the real ones


def test_a_stages_section_is_no_key():
    assert [stage_class(stage).section for stage in SECTIONS] == list(SECTIONS)
    for stage in SECTIONS:
        assert not {field.name for field in dataclasses.fields(stage_class(stage))} & {*SECTIONS, "section"}


def test_a_saved_configuration_reads_back(tmp_path):
    config = parse(tmp_path, "", "--learning_rate", "3e-6", "--note", "a: 'b' # c", "--report_to", "x", "y")
    save_config(config, tmp_path / "saved.yaml")
    assert parse(tmp_path, "", "--config", str(tmp_path / "saved.yaml")) == config
    assert config.note == "a: 'b' # c"


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_a_stages_defaults_survive_saving(stage, tmp_path):
    save_config(stage_class(stage)(), tmp_path / "saved.yaml")
    assert parse_config(stage_class(stage), tmp_path / "saved.yaml", []) == stage_class(stage)()


SOURCES = sorted((PROJECT / "scripts").rglob("*.py"))
FILES = sorted(p for p in (PROJECT / "configs").rglob("*.yaml") if p.stem in STAGES)


PUBLISHED = {  # what N+, ST, IG and LMHP print; the reference configuration is theirs
    "sft": {"max_prompt_tokens": 512, "max_new_tokens": 53, "learning_rate": None, "adam_eps": 1e-5,
            "num_train_epochs": 1.0, "loss_on": "completion", "eval_temperature": 0.01},
    "reward": {"max_prompt_tokens": 512, "max_completion_tokens": 169, "learning_rate": None,
               "adam_eps": 1e-5, "num_train_epochs": 1.0, "max_completions": 9, "margin": 0.0},
    "ppo": {"max_prompt_tokens": 512, "max_new_tokens": 53, "learning_rate": None, "adam_eps": 1e-5,
            "kl_coef": 0.05, "kl_estimator": "k1", "kl_target": None, "kl_horizon": 10_000,
            "temperature": 0.7, "missing_eos_score": -1.0, "gamma": 1.0, "lam": 0.95, "whiten_rewards": False,
            "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1,
            "ppo_epochs": 4, "num_minibatches": 1, "prompts_per_update": 128, "responses_per_prompt": 4,
            "value_model": "separate", "advantage": "gae", "eval_temperature": 0.01, "ptx_coef": 0.0,
            "ema_decay": 0.0},
}


@pytest.mark.parametrize("stage", PUBLISHED)
def test_the_defaults_are_the_published_ones(stage):
    config = stage_class(stage)()
    assert {name: getattr(config, name) for name in PUBLISHED[stage]} == PUBLISHED[stage]


def config_classes():
    """Every class that a script gives to `read_config`, with its numeric keys."""
    for path in [*SOURCES, PROJECT / "tests" / "helpers" / "kill_test.py"]:
        for name in re.findall(r"read_config\((\w+),", path.read_text()):
            if path.name == "launch.py":
                continue
            folder = "studies." if path.parent.name == "studies" else ""
            kind = getattr(importlib.import_module(f"{folder}{path.stem}"), name)
            hints = typing.get_type_hints(kind)
            for field in dataclasses.fields(kind):
                hint = hints[field.name]
                if typing.get_origin(hint) is not list and {int, float} & {hint, *typing.get_args(hint)}:
                    yield kind, field


def test_a_number_has_a_lower_and_an_upper_limit_everywhere():
    """So that 10^30 steps, or 2^63 rows, do not end in a traceback or never."""
    seen = set()
    for kind, field in config_classes():
        described, where = field.metadata["help"], f"{kind.__name__}.{field.name}"
        seen.add(kind.__name__)
        assert described.low is not None and described.high is not None, where
        default = field.default
        assert default is None or described.low <= default <= described.high, where
        hint = typing.get_type_hints(kind)[field.name]
        above, below = described.high * 2 + 1, described.low - 1
        for text in (above, below, 10**30, -(10**30), 10**400, 2**63, "1e400", "nan", "inf", "-inf", "\u0661",
                     "one", *((1.5,) if int in (hint, *typing.get_args(hint)) else ())):
            said = one_line(lambda: parse_config(kind, None, [f"--{field.name}={text}"]))  # noqa: B023
            assert field.name in said and re.search("must be (at |a finite)|: invalid|digits", said), said
    assert len(seen) >= 9


def test_the_limits_themselves_are_taken():
    for kind, field in config_classes():
        for value in (field.metadata["help"].low, field.metadata["help"].high):
            try:
                found = parse_config(kind, None, [f"--{field.name}={value}"])
                assert getattr(found, field.name) == value
            except UserError as error:  # beside the defaults of other keys
                assert "must be" not in str(error), error


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PROJECT)))
def test_every_shipped_file_loads(path):
    """Named by the user, so that a key without effect would be refused."""
    config = parse_config(stage_class(path.stem), None, ["--config", str(path)])
    assert config.output_dir.startswith("outputs/")


def test_there_are_shipped_files():
    assert {"sft", "reward", "ppo"} <= {path.stem for path in FILES}


DESCRIPTION = "What it does.\n\n    a command\n    another one\n"


def help_of(stage, capsys, *argv):
    file = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    with pytest.raises(SystemExit) as left:
        parse_config(stage_class(stage), file, [*argv, "--help"], DESCRIPTION)
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_help_holds_every_key_with_its_meaning_and_what_the_bare_command_would_use(stage, capsys):
    printed = help_of(stage, capsys)
    assert DESCRIPTION in printed
    shown = " ".join(printed.split())
    bare = parse_config(stage_class(stage), PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml", [])
    for field in dataclasses.fields(stage_class(stage)):
        meaning = " ".join(str(field.metadata["help"]).replace("%%", "%").split())
        value = getattr(bare, field.name)
        value = str(value).lower() if value is None or isinstance(value, bool) else value
        default = getattr(stage_class(stage)(), field.name)
        default = str(default).lower() if default is None or isinstance(default, bool) else default
        here = "" if value == default else f"; here: {value}"
        assert f"--{field.name} {meaning} (default: {default}{here})" in shown
        assert "(source: " in meaning


def test_help_for_another_file_shows_that_files_values(capsys):
    files = [str(PROJECT / "configs" / "opt" / name) for name in ("ppo.yaml", "125m.yaml")]
    shown = " ".join(help_of("ppo", capsys, "--config", *files).split())
    assert "(default: 0.7)" in shown and "(default: outputs/run/stage; here: outputs/opt-125m/ppo)" in shown
    assert "(default: 100000; here: 1000000)" in shown
    assert "".join(f"(default: {' '.join(files)})".split()) in "".join(shown.split())  # wrapped anywhere


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_what_help_shows_is_what_a_run_gets(stage, capsys, tmp_path):
    """Both columns: the default for who names a file without the key, and the value of this very command."""
    own = write(tmp_path, "own.yaml", "seed: 5\n")
    default = PROJECT / "configs" / "tldr_mini" / f"{stage}.yaml"
    for argv in ([], ["--config", own]):
        shown = " ".join(help_of(stage, capsys, *argv).split())
        config = parse_config(stage_class(stage), default, argv)
        without = parse_config(stage_class(stage), default, ["--config", own, "--seed", "0"])
        for field in dataclasses.fields(config):
            values = (rf" --{field.name} (?:(?! --).)*?\(default: (.*?)(?:; here: (.*?))?\)"
                      "(?= --|$| sources of)")
            [(said_default, here)] = re.findall(values, shown)
            for text, found in ((said_default, without), (here or said_default, config)):
                value = getattr(found, field.name)
                plain = value is None or isinstance(value, bool)
                assert text == (str(value).lower() if plain else str(value))


def test_help_does_not_look_at_the_rest_of_the_command_line(capsys):
    assert help_of("sft", capsys, "--seed", "one", "--nonsense") == help_of("sft", capsys)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_help_says_where_the_details_are_and_what_abbreviations_mean(stage, capsys):
    epilogue = help_of(stage, capsys).partition("sources of the defaults:\n")[2]
    assert "docs/details.md" in epilogue and (PROJECT / "docs" / "details.md").is_file()
    explained = {line.split()[0] for line in epilogue.splitlines()}
    assert explained == {"detail", "own", "N+", "ST", "IG", "LMHP", "DSC"}


def sources():
    """Script, key and source of every key of every stage."""
    for stage in ("sft", "reward", "ppo"):
        for field in dataclasses.fields(stage_class(stage)):
            yield stage, field.name, field.metadata["help"].rpartition("(source: ")[2].removesuffix(")")


def details() -> dict[str, list[str]]:
    """Number of a detail -> the cells of its row: detail, source, code, key, test."""
    lines = (PROJECT / "docs" / "details.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    return {number: cells for number, *cells in rows if number.isdecimal()}


def test_a_row_of_the_list_names_functions_and_keys_that_exist():
    keys = {field.name for stage in SECTIONS for field in dataclasses.fields(stage_class(stage))}
    for number, (detail, source, code, named, _) in details().items():
        assert detail and source, number
        assert set(re.findall(r"`(\w+)`", named)) <= keys, number
        files = re.findall(r"`([\w/]+\.py)`((?:,? `\w+`)*)", code)
        assert files or number == "21", number
        for path, names in files:
            tree = ast.parse((PROJECT / "scripts" / path).read_text())
            there = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert names and set(re.findall(r"`(\w+)`", names)) <= there, (number, path)


def test_a_cited_detail_is_a_row_of_the_list_and_no_papers():
    """N+ numbers its own details otherwise: `N+ detail 26` would name something else, or nothing."""
    rows = list(details())
    assert rows == [str(number) for number in range(1, 38)]
    for path in SOURCES:
        assert not re.search(r"(N\+|ST|IG|LMHP|DSC) detail", path.read_text()), path
    cited = [(stage, name, source) for stage, name, source in sources() if "detail" in source]
    assert cited
    assert [entry for entry in cited if not re.fullmatch(r"detail [1-9]\d*(; .*)?", entry[2])] == []
    assert {re.search(r"detail (\d+)", source)[1] for _, _, source in cited} <= set(rows)


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


# ------------------------------------------------------------- a key's name is found where the key acts

NO_KEYS = {"f'{name}_tokens'", "f'eval_{name}'"}  # figures of a data set; metrics


def names_put_together(text: str, keys: set[str]) -> list[str]:
    """Expressions that put the name of a key together, and attributes whose names are put together."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            spelled = "".join(r"\w+" if part is None else re.escape(part) for part in parts)
            has_letters = re.search("[a-z]", "".join(filter(None, parts)))
            if has_letters and any(re.fullmatch(spelled, name) for name in keys):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr"):
            if isinstance(node.args[1], ast.JoinedStr | ast.BinOp | ast.Call):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PROJECT / "scripts")))
def test_no_keys_name_is_put_together(path):
    """So that searching for `rlhf_validation_data` finds every place where it acts."""
    keys = {field.name for stage in SECTIONS for field in dataclasses.fields(stage_class(stage))}
    assert [name for name in names_put_together(path.read_text(), keys) if name not in NO_KEYS] == []


@pytest.mark.parametrize("text", [
    "f'{role}_{split}_data'", "f'rlhf_{split}_data'", "getattr(config, f'{a}')",
    "setattr(config, 'rlhf_' + part, 1)", "getattr(config, '{}_data'.format(a))",
])
def test_a_name_that_is_put_together_is_noticed(text):
    assert names_put_together(text, {"rlhf_validation_data"}) == [text]


@pytest.mark.parametrize("text", [
    "getattr(config, name)", "getattr(config, 'seed', 0)", "f'{a} of {b}_data'", "f'{a}{b}'",
])
def test_other_names_and_texts_are_left_alone(text):
    assert names_put_together(text, {"rlhf_validation_data"}) == []


def test_a_name_that_is_not_utf8_is_one_line():
    """Python hands it on with surrogates, which no file that a run writes can hold."""
    name = os.fsdecode(b"caf\xe9.jsonl")
    assert one_line(lambda: parse_config(Toy, None, ["--note", name])) == (
        r"command line: 'caf\udce9.jsonl' is not UTF-8; rename the file, or correct the text")
    assert parse_config(Toy, None, ["--note", "café 🙂\t"]).note == "café 🙂\t"
