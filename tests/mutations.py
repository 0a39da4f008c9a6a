"""Breaks one detail of the training code at a time and looks which tests notice: a detail that no test watches is not tested.

    python tests/mutations.py                   # all of tests/mutation_list.py; also `make mutations`
    python tests/mutations.py --only whiten     # those whose name or file holds this text
    python tests/mutations.py --table           # and write the table of tests/README.md

Each mutation is made in a temporary copy of the tree, never in the tree itself. Only the few tests that should notice it
are run, so that it takes seconds. They must pass without it, and one of them must fail with it. A copy that cannot
be imported proves nothing: it is reported as broken, and not as caught.

It is no part of `make test`. The exit status is 1 when a mutation is not caught.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "tests" / "README.md"
BEGIN, END = "<!-- mutations: written by tests/mutations.py --table -->", "<!-- end of mutations -->"
COPIED = ("scripts", "tests")  # they find each other by their own path, which a link would lead back to the tree
LONGEST = 600  # seconds that the tests of a mutation may take; a mutant may never end
# the libraries are imported once, in a server that each run is forked from: they take longer than most tests
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.trainer", "trl", "peft", "evaluate", "datasets", "pytest"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}
OWN_MISTAKES = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError", "IndentationError")


class Result(NamedTuple):
    """What pytest said of a copy of the tree."""

    failed: list[str]  # names of tests
    broken: str  # why it says nothing about the tests; empty when it does
    output: str


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The text of the mutated file.

    Raises:
        ValueError: when the text to replace does not occur exactly once, or would not change.
    """
    text = (root / mutation.file).read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        raise ValueError(f"mutation '{mutation.name}': its old text must occur once in {mutation.file}, found {count} times; "
                         "bring tests/mutation_list.py up to date")
    if mutation.old == mutation.new:
        raise ValueError(f"mutation '{mutation.name}' changes nothing")
    return text.replace(mutation.old, mutation.new)


def copy_tree(folder: Path) -> None:
    """A working tree in `folder`: what can be mutated is copied, the rest is linked."""
    for path in ROOT.iterdir():
        if path.name in COPIED:
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        elif path.name not in (".git", "outputs"):
            (folder / path.name).symlink_to(path)


def run_tests(tests: Iterable[str], mutation: Mutation | None = None) -> Result:
    """Run tests (pytest's ids below tests/) in a copy of the tree, mutated or not."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder, report, output = Path(name) / "tree", Path(name) / "report.xml", Path(name) / "output"
        folder.mkdir()
        copy_tree(folder)
        if mutation is not None:
            (folder / mutation.file).write_text(mutated(mutation), encoding="utf-8")
        arguments = ["-q", "--maxfail", "3", "-p", "no:cacheprovider", "--tb", "short", f"--basetemp={name}/tmp",
                     f"--junitxml={report}", *(f"tests/{test}" for test in tests)]
        process = FORKS.Process(target=_pytest, args=(folder, arguments, output))
        process.start()
        process.join(LONGEST)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Result([], f"took more than {LONGEST} s", output.read_text())
        return judged(process.exitcode, report, output.read_text())


def _pytest(folder: Path, arguments: list[str], output: Path) -> None:
    """In a process of its own, which has the libraries but nothing of the tree."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if Path(path).resolve() not in (ROOT, ROOT / "tests", ROOT / "scripts")]
    for name in [name for name, module in sys.modules.items() if _is_ours(module)]:
        del sys.modules[name]
    sys.exit(int(pytest.main(arguments)))


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent in (ROOT / "tests", ROOT / "scripts", ROOT / "scripts" / "utils")


def judged(status: int, report: Path, output: str) -> Result:
    """Failed tests from pytest's exit status and its report; an import that fails is no verdict."""
    if status not in (0, 1):
        return Result([], f"pytest ended with status {status}: the tests could not be collected", output)
    failed, broken = [], ""
    for case in ElementTree.parse(report).iter("testcase"):
        for found in (*case.findall("failure"), *case.findall("error")):
            message = found.get("message", "")
            kind = message.split(":")[0].removeprefix("failed on setup with \"").strip()
            if kind in OWN_MISTAKES:
                broken = f"the mutant has a mistake of its own: {message.splitlines()[0]}"
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
    return Result(sorted(set(failed)), broken, output)


def check_unmutated(mutations: list[Mutation], jobs: int) -> None:
    """Stop unless every test that is named passes without a mutation."""
    by_file: dict[str, list[str]] = {}
    for test in sorted({test for mutation in mutations for test in mutation.tests}):
        by_file.setdefault(test.split("::")[0], []).append(test)
    # a whole file stands before its single tests
    chosen = [[tests[0]] if "::" not in tests[0] else tests for tests in by_file.values()]
    with ThreadPoolExecutor(jobs) as pool:
        for tests, result in zip(chosen, pool.map(run_tests, chosen), strict=True):
            if result.failed or result.broken:
                sys.exit(f"{result.output}\nwithout any mutation: {result.broken or ', '.join(result.failed)} ({tests[0]})")
            print(f"unmutated, passed: {' '.join(tests)}", flush=True)


def run_all(mutations: list[Mutation], jobs: int) -> list[Result]:
    """Every mutation's result, printed as it comes."""
    def run(mutation):
        result = run_tests(mutation.tests, mutation)
        verdict = f"BROKEN ({result.broken})" if result.broken else "caught" if result.failed else "SURVIVED"
        print(f"{verdict}: {mutation.name} [{mutation.file}] {', '.join(result.failed)}", flush=True)
        if result.broken:
            print(result.output[-2000:], flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, mutations))


def table(mutations: list[Mutation], results: list[Result]) -> str:
    """The results as a Markdown table. Tests of one function with other parameters are one entry."""
    lines = ["| | detail | what is broken | file | tests that failed |", "|---|---|---|---|---|"]
    for number, (mutation, result) in enumerate(zip(mutations, results, strict=True), start=1):
        names = dict.fromkeys(name.split("[")[0] for name in result.failed)
        caught = "<br>".join(f"`{name}`" for name in names) or "none"
        lines.append(f"| {number} | {mutation.detail or ''} | {mutation.name} | `{mutation.file.removeprefix('scripts/')}` "
                     f"| {caught} |")
    return "\n".join(lines)


def write_table(text: str) -> None:
    """Put the table between the two marks of tests/README.md."""
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutations at a time (default: one for each core)")
    parser.add_argument("--only", default="", help="only mutations whose name or file holds this text")
    parser.add_argument("--table", action="store_true", help="write the table of tests/README.md")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before the first fork
    if arguments.table and arguments.only:
        parser.error("--table writes all mutations: leave --only out")
    chosen = [m for m in MUTATIONS if arguments.only in m.name or arguments.only in m.file]
    if not chosen:
        parser.error(f"--only: no mutation's name or file holds '{arguments.only}'")
    for mutation in chosen:
        try:
            mutated(mutation)
        except ValueError as error:
            parser.error(str(error))
    check_unmutated(chosen, arguments.jobs)
    results = run_all(chosen, arguments.jobs)
    if arguments.table:
        write_table(table(chosen, results))
    caught = sum(bool(result.failed) and not result.broken for result in results)
    print(f"mutations: {len(chosen)}, caught: {caught}")
    return 0 if caught == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
