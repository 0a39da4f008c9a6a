"""The READMEs and docs/ are true: their commands run, their files and links exist, both languages say the
same.
"""

import dataclasses
import gzip
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sft
from utils.config import UserError, parse_config
from utils.data.rows import load_examples, load_rankings
from utils.data.tokens import prompt_tokens

ROOT = Path(__file__).resolve().parents[2]
READMES = [ROOT / "README.md", ROOT / "README_zh.md"]
DOCS = [*READMES, *sorted((ROOT / "docs").glob("*.md"))]
# whose links are followed as well
CARDS = [path for path in (ROOT / "data/README.md", ROOT / "data/tldr_mini/README.md",
                           ROOT / "tests/README.md",
                           ROOT / "assets/opt-mini/README.md", ROOT / "CONTRIBUTING.md") if path.exists()]


def name(path: Path) -> str:
    """Of a test's parameter."""
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks without the comments behind two spaces, which are translated."""
    fenced = re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return ["\n".join(line.split("  #")[0].rstrip() for line in block.splitlines()) for block in fenced]


def shown_lines(text: str) -> list[str]:
    """What a document shows to be typed: the lines of its sh and text blocks, continued lines joined, and its
    inline code.
    """
    fenced = "\n".join(blocks(text, "sh") + blocks(text, "text"))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r" *\\\n *", " ", fenced).splitlines() + re.findall(r"`([^`\n]+)`", prose)


def commands(path: Path) -> list[str]:
    """The commands of a document that run a Python program of this project, from the program's name on.

    In front may stand `python`, `torchrun` with its options and the like; a command in quotes ends with its
    quote.
    """
    pattern = (r"(?:python|torchrun|deepspeed|accelerate) (?:.* "
               r")?((?:scripts|tests|data|assets)/[\w/]+\.py)( [^']*)?")
    matches = (re.search(pattern, line) for line in shown_lines(path.read_text(encoding="utf-8")))
    return sorted({match[1] + (match[2] or "").rstrip() for match in matches if match})


DEFAULTS = ROOT / "configs" / "tldr_mini"
# module, configuration, default file
SCRIPTS = {"scripts/train_sft.py": ("train_sft", "SFTStageConfig", DEFAULTS / "sft.yaml"),
           "scripts/train_reward.py": ("train_reward", "RewardStageConfig", DEFAULTS / "reward.yaml"),
           "scripts/train_ppo.py": ("train_ppo", "PPOStageConfig", DEFAULTS / "ppo.yaml"),
           "scripts/studies/compare_seeds.py": ("studies.compare_seeds", "CompareConfig", None),
           "tests/helpers/kill_test.py": ("kill_test", "KillConfig", None),
           "scripts/studies/over_optimisation.py": ("studies.over_optimisation", "OverOptimisationConfig",
                                                    None),
           "scripts/studies/real.py": ("studies.real", "RealConfig", None),
           "scripts/prepare_data.py": ("prepare_data", "PrepareConfig", None),
           "scripts/studies/benchmark.py": ("studies.benchmark", "BenchmarkConfig", None),
           "scripts/studies/gpu_check.py": ("studies.gpu_check", "CheckConfig", None),
           "scripts/studies/sampling.py": ("studies.sampling", "SamplingConfig", None),
           "scripts/studies/measure_memory.py": ("studies.measure_memory", "MeasureConfig", None),
           "scripts/plan_memory.py": ("plan_memory", "PlanConfig", None),
           "scripts/chat.py": ("chat", "ChatConfig", None),
           "scripts/studies/feedback_load.py": ("studies.feedback_load", "LoadConfig", None),
           "scripts/studies/personalise.py": ("studies.personalise", "PersonaliseConfig", None),
           "scripts/studies/guard.py": ("studies.guard", "GuardStudyConfig", None),
           "scripts/studies/verifiable.py": ("studies.verifiable", "VerifiableConfig", None),
           "scripts/feedback.py": ("feedback", "FeedbackConfig", None)}
# takes no configuration: the words that the documents may give it
PLAIN = {"tests/helpers/real_posts.py": [], "data/sorting/generate.py": [],
         "data/tldr_mini/generate.py": ["--output_dir", "outputs/uneven", "--answers", "2", "9"]}
COMMANDS = sorted({command for path in DOCS for command in commands(path)})


def parsed(command: str):
    """The configuration that a command of the documents runs with."""
    script, *words = shlex.split(command)
    module, kind, default_file = SCRIPTS[script]
    config_class = getattr(importlib.import_module(module), kind)
    return parse_config(config_class, default_file, [w for w in words if w != "--help"])


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command, monkeypatch, tmp_path):
    """Each parses as a user types it, from the project's folder; with files of the reader's own, from where
    these are.
    """
    script, *words = shlex.split(command)
    assert (ROOT / script).is_file()
    if script in PLAIN:
        assert words == PLAIN[script]
        return
    monkeypatch.chdir(write_own_files(tmp_path) if "mine/own.yaml" in words else ROOT)
    config = parsed(command)
    paths = ([getattr(config, key, None) for key in ("output_dir", "output", "figure")]
             + getattr(config, "runs", []))
    assert all(path.startswith("outputs/") for path in paths if path)
    if deepspeed := getattr(config, "deepspeed", None):
        assert (ROOT / deepspeed).is_file()


def test_no_command_is_overlooked():
    """Whatever looks like a program of ours in a document is among the commands."""
    scripts = {shlex.split(command)[0] for command in COMMANDS}
    assert set(SCRIPTS) == scripts - set(PLAIN)
    for path in DOCS:
        for line in "\n".join(blocks(path.read_text(encoding="utf-8"), "sh")).splitlines():
            if re.match(r"(python|torchrun) .*\.py", line):
                assert any(script in line for script in scripts), line


@pytest.mark.parametrize("words", ["--nonsense 1", "nonsense", "--config configs/none.yaml",
                                   "--help --nonsense"])
def test_a_command_that_would_not_run_is_noticed(words):
    with pytest.raises(UserError):
        parsed(f"scripts/train_sft.py {words}")


MAKE = sorted({line for path in DOCS for line in shown_lines(path.read_text(encoding="utf-8"))
               if re.fullmatch(r"make [a-z_-]+.*", line)})


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist(command):
    done = subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr


def anchor(heading: str) -> str:
    """Of a heading, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCS + CARDS, ids=name)
def test_links_and_anchors_lead_somewhere_and_no_number_is_missing(path):
    text = path.read_text(encoding="utf-8")
    assert "{{" not in text
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for target in map("".join, re.findall(r'\]\(([^)]+)\)|src="([^"]+)"', prose)):
        if target.startswith("http"):
            continue
        file, _, part = target.partition("#")
        linked = (path.parent / file).resolve() if file else path
        assert linked.exists(), target
        if part:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert part in set(map(anchor, headings)), target


@pytest.mark.parametrize("path", DOCS, ids=name)
def test_files_that_are_named_exist(path):
    """Inline code that begins like a path of this project; `*`, `{` and `<` stand for several."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    tops = "scripts|configs|tests|docs|data|assets"
    for file in re.findall(rf"`((?:{tops})/[\w./-]+)`", prose):
        assert (ROOT / file).exists(), file


def test_every_document_is_in_the_index_and_in_the_readme():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for path in DOCS[2:]:
        if path.name != "README.md":
            assert f"]({path.name})" in index, path.name
            assert all(f"](docs/{path.name}" in readme.read_text(encoding="utf-8")
                       for readme in READMES), (path.name)


def test_every_picture_is_shown():
    texts = "".join(path.read_text(encoding="utf-8") for path in DOCS + CARDS)
    pictures = [path for kind in ("png", "svg") for path in (ROOT / "assets").rglob(f"*.{kind}")]
    assert pictures and all(f"{path.name})" in texts or f'{path.name}"' in texts for path in pictures)


def map_folders(text: str) -> set[str]:
    """The folders that the map names: its lines' first words, each below the last less indented one."""
    [tree] = [block for block in blocks(text, "text") if block.startswith("scripts/")]
    above, folders = [], set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        above[depth:] = [line.split()[0].rstrip("/")]
        folders.add("/".join(above))
    return folders


@pytest.mark.parametrize("readme", READMES, ids=name)
def test_the_map_has_every_folder(readme):
    folders = map_folders(readme.read_text(encoding="utf-8"))
    assert all((ROOT / folder).is_dir() for folder in folders)
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=False).stdout.split("\n")
    if not any(files):
        pytest.skip("not a git checkout: which folders belong to the project is not known")
    kept = {file.split("/")[0] for file in files if "/" in file and not file.startswith(".")}
    assert kept <= folders
    rooms = {str(Path(file).parent) for file in files if re.fullmatch(r"scripts/(utils/)?[a-z]+/[a-z_]+\.py",
                                                                      file)}
    assert rooms <= folders


def test_the_readme_is_short():
    assert len(READMES[0].read_text(encoding="utf-8").split()) <= 2500


def test_both_languages_hold_the_same_commands_numbers_and_keys():
    ours, theirs = (path.read_text(encoding="utf-8") for path in READMES)
    for language in ("sh", "json", "python"):
        assert blocks(ours, language) == blocks(theirs, language)
    for pattern in (r"`[a-z]+/[a-zA-Z0-9_]+`", r"\d+\.\d\d+", r"`--[a-z_]+", r"\]\(([^)h#][^)#]*)"):
        assert sorted(set(re.findall(pattern, ours)) - {"README.md", "README_zh.md"}) == sorted(
            set(re.findall(pattern, theirs)) - {"README.md", "README_zh.md"})
    headings = [re.findall(r"^(#+) ", text, re.MULTILINE) for text in (ours, theirs)]
    assert headings[0] == headings[1]


def test_the_options_are_keys_and_their_defaults_are_those_of_the_code():
    lines = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| `kl_estimator`"))
    table = lines[first : lines.index("", first)]
    defaults = {}
    for module, kind in (("train_reward", "RewardStageConfig"), ("train_ppo", "PPOStageConfig")):
        config_class = getattr(importlib.import_module(module), kind)
        defaults |= {field.name: field.default for field in dataclasses.fields(config_class)}
    seen = set()
    for row in table:
        names, values = (cell.replace("`", "") for cell in row.split("|")[1:3])
        for key, value in zip(names.split(","), values.split(";") * 2, strict=False):
            assert str(defaults[key.strip()]).lower().removesuffix(".0") == value.split()[0], key
            seen.add(key.strip())
    assert len(seen) == len(table) + 2  # two rows have two keys


# ------------------------------------------------------------------------------------------------- own data


def own_rows() -> dict[str, str]:
    """The rows of "Your own data", by the key that takes them."""
    [block] = blocks(READMES[0].read_text(encoding="utf-8"), "json")
    return dict(zip(("actor_training_data", "reward_training_data", "rlhf_training_data"), block.splitlines(),
                    strict=True))


def test_the_rows_that_the_readme_shows_are_read(tmp_path):
    """Each by itself, by the loader of its role."""
    for role, row in own_rows().items():
        path = tmp_path / f"{role}.jsonl"
        path.write_text(row + "\n", encoding="utf-8")
        if role == "reward_training_data":
            [group] = load_rankings(str(path), role, 9, print)
            assert group.pairs == [(0, 1)]
        else:
            [example] = load_examples(str(path), role, need_completion=role == "actor_training_data")
            assert bool(example.completion) == (role == "actor_training_data")


def write_own_files(folder: Path) -> Path:
    """mine/own.yaml as docs/options.md shows it, and mine/*.jsonl: the README's rows, many of them, about
    other plants.
    """
    mine = folder / "mine"
    mine.mkdir()
    for block in re.findall(r"^```yaml\n(.*?)^```",
                            (ROOT / "docs" / "options.md").read_text(encoding="utf-8"), re.DOTALL | re.M):
        path = block.split("\n")[0].removeprefix("# ")
        assert isinstance(yaml.safe_load(block), dict) and path.startswith("mine/")
        (folder / path).write_text(block, encoding="utf-8")
    for file, row in zip(("summaries", "comparisons", "prompts"), own_rows().values(), strict=True):
        rows = [row.replace("north", f"place {number}") for number in range(24)]
        (mine / f"{file}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


QUICK = {"train_sft": "--max_steps 1 --max_new_tokens 4", "train_reward": "--max_steps 1",
         "train_ppo": "--total_episodes 8 --prompts_per_update 4 --responses_per_prompt 2 --max_new_tokens 4"}


def run_own_data(commands: list[str], folder: Path) -> None:
    """Run the three stages on the README's rows, with the mini model in place of OPT-125M and a few steps
    only.
    """
    for command in commands:
        script, *words = shlex.split(command)
        stage = Path(script).stem
        model = ["--model", str(ROOT / "assets/opt-mini")] if stage == "train_sft" else []
        quick = f"{QUICK[stage]} --mixed_precision no --max_prompt_tokens 128 --eval_rows 2 --test_rows 2"
        done = subprocess.run([sys.executable, str(ROOT / script), *words, *model, *quick.split()],
                              cwd=folder,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """The folder in which the three commands of "Your own data" have run."""
    folder = write_own_files(tmp_path_factory.mktemp("own"))
    own = [command for command in commands(READMES[0]) if "mine/" in command]
    run_own_data(sorted(own, key=lambda command: list(SCRIPTS).index(command.split()[0])), folder)
    return folder


@pytest.mark.slow
def test_the_three_commands_for_own_data_train_on_the_rows_beside_them(own_run):
    """What they train is the data of the reader, not the demo's or the hub's."""
    for stage in ("sft", "reward", "ppo"):
        report = (own_run / "outputs/mine" / stage / "data.json").read_text(encoding="utf-8")
        assert "mine/" in report and "tldr" not in report
        assert (own_run / "outputs/mine" / stage / "final" / "stage.json").exists()


# ------------------------------------------------------------------------------------------ the snippet


def snippet() -> str:
    [code] = blocks(READMES[0].read_text(encoding="utf-8"), "python")
    return code


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with the demo's data and a trained policy where the snippet looks for it, and what the snippet
    prints there.
    """
    folder = tmp_path_factory.mktemp("snippet")
    shutil.copytree(ROOT / "data" / "tldr_mini", folder / "data" / "tldr_mini",
                    ignore=shutil.ignore_patterns("*.py"))
    words = f"--output_dir {folder}/sft --max_steps 1 --eval_rows 2 --test_rows 2 --max_new_tokens 4"
    train_sft.main(parse_config(train_sft.SFTStageConfig, DEFAULTS / "sft.yaml", words.split()))
    (folder / "outputs/tldr_mini/ppo").mkdir(parents=True)
    shutil.copytree(folder / "sft" / "final", folder / "outputs/tldr_mini/ppo/final")
    done = subprocess.run([sys.executable, "-c", snippet()], cwd=folder, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@torch.no_grad()
def test_the_snippet_writes_the_summary_that_the_model_finds_most_likely(shown):
    """Held against the training code's tokens of the prompt, and the most likely next token, one at a time.
    """
    folder, printed = shown
    final = folder / "outputs/tldr_mini/ppo/final"
    tokenizer, model = (AutoTokenizer.from_pretrained(final),
                        AutoModelForCausalLM.from_pretrained(final).eval())
    with gzip.open(folder / "data/tldr_mini/rlhf_test.jsonl.gz", "rt", encoding="utf-8") as file:
        prompt = json.loads(next(file))["prompt"]
    [ids] = prompt_tokens(tokenizer, [prompt], 256)
    summary = []
    while len(summary) < 48 and tokenizer.eos_token_id not in summary:
        summary.append(int(model(input_ids=torch.tensor([ids + summary])).logits[0, -1].argmax()))
    assert len(summary) > 4
    assert printed == f"{prompt}\n{tokenizer.decode(summary, skip_special_tokens=True)}\n"
