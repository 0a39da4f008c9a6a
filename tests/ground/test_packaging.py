"""One list of pins: pyproject.toml, requirements*.txt and uv.lock agree, and the Dockerfile and the Makefile use them."""

import re
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


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt", "requirements-bench.txt"])
def test_the_requirements_are_those_of_the_project(name):
    assert (ROOT / name).read_text() == requirements()[name], "pyproject.toml has changed: run `make lock`"


@pytest.mark.parametrize("name", LISTS)
def test_every_pin_is_exact_and_the_lock_has_it(name):
    """uv.lock keeps what it was asked for, and the packages that it chose."""
    [own] = [package for package in LOCK["package"] if package["name"] == normal(PROJECT["project"]["name"])]
    asked = own["metadata"]["requires-dist"] if name == "requires-dist" else own["metadata"]["requires-dev"][name]
    locked = {(package["name"], package["version"]) for package in LOCK["package"]}
    for pin in LISTS[name]:
        package, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", pin).groups()
        assert {"name": normal(package), "specifier": f"=={version}"} in asked, f"{pin}: run `make lock`"
        assert (normal(package), version) in locked, f"{pin}: run `make lock`"
    assert len(asked) == len(LISTS[name])
    assert LOCK["requires-python"] == PROJECT["project"]["requires-python"]


def test_the_lock_names_no_index_but_the_public_one():
    """Whoever locks on a machine with an index of its own would write that address for everybody."""
    sources = {package["source"].get("registry") for package in LOCK["package"]} - {None}
    assert sources == {"https://pypi.org/simple"}


def test_a_change_of_a_pin_reaches_the_files(tmp_path):
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text.replace("transformers==5.23.0", "transformers==5.23.1"))
    changed = requirements(tmp_path)
    assert "transformers==5.23.1\n" in changed["requirements.txt"] and "5.23.1" in changed["requirements-bench.txt"]
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
