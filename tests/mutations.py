"""Breaks one detail of the training code at a time. A detail whose tests all still pass is not tested.

    python tests/mutations.py                  # all of tests/mutation_list.py; also `make mutations`
    python tests/mutations.py --only whiten    # those whose name, file or function contains this text
    python tests/mutations.py --check          # run nothing: does the list fit the code?
    python tests/mutations.py --readme       # and write the line `mutations: N, caught: N` of tests/README.md

Each mutation is made in a temporary copy of the tree, never in the tree itself. Only the few tests that
should notice it are run, so it takes seconds. These tests must pass without the mutation, and at least one
must fail with it. A copy that cannot be imported proves nothing: it is reported as broken, not as caught.

The check is not part of `make test`. A run of all mutations writes its table to outputs/mutations.md. The
exit status is 1 when a mutation is not caught.
"""

import argparse
import ast
import datetime
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from mutation_list import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
README = TESTS / "README.md"
TABLE = ROOT / "outputs" / "mutations.md"
SUMMARY = re.compile(r"^mutations: \d+, caught: \d+.*$", re.MULTILINE)  # the line of tests/README.md
# they find each other by their own path, which a link would lead back to the tree
COPIED = ("scripts", "tests")
LONGEST = 600  # seconds that the tests of a mutation may take; a mutant may never end
# the libraries are imported once, in a server that each run is forked from: they take longer than most tests
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.trainer", "trl", "peft", "evaluate", "datasets",
                              "pytest"])
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1",
               "HF_HUB_OFFLINE": "1",
               "TOKENIZERS_PARALLELISM": "false"}
OWN_MISTAKES = ("NameError", "UnboundLocalError", "ImportError", "ModuleNotFoundError", "SyntaxError",
                "IndentationError")


class Result(NamedTuple):
    """What pytest said of a copy of the tree."""

    failed: list[str]  # names of tests
    broken: str  # why it says nothing about the tests; empty when it does
    output: str


def mutated(mutation: Mutation, root: Path = ROOT) -> str:
    """The text of the mutated file. Whitespace, comments and docstrings do not matter for what `old` matches.

    Raises:
        ValueError: when the file or its function is missing, when `old` does not occur exactly once in the
            function, or when nothing would change.
    """
    here = f"mutation '{mutation.name}': {mutation.file}"
    if mutation.old == mutation.new:
        raise ValueError(f"mutation '{mutation.name}' changes nothing")
    if not (root / mutation.file).exists():
        raise ValueError(f"{here} does not exist")
    text = (root / mutation.file).read_text(encoding="utf-8")
    spans = _spans(text)
    if mutation.function:
        found = spans.get(mutation.function, [])
        if len(found) != 1:
            raise ValueError(f"{here} must define '{mutation.function}' once, found {len(found)} times")
        (begin, end), = found
        excluded = []
    else:  # what stands at the level of the module, outside all functions and classes
        begin, end = 0, len(text)
        excluded = [span for same in spans.values() for span in same]
    places = [match for match in _pattern(mutation.old).finditer(_code_only(text), begin, end)
              if not any(first <= match.start() < last for first, last in excluded)]
    if len(places) != 1:
        raise ValueError(f"{here}, {mutation.function or 'outside of functions'}: `{mutation.old}` must "
                         f"occur once, found {len(places)} times")
    return text[:places[0].start()] + mutation.new + text[places[0].end():]


def _spans(text: str) -> dict[str, list[tuple[int, int]]]:
    """Offsets into the text of each function and class: `name`, `Class.method`, `outer.inner`."""
    offsets = _line_offsets(text)
    spans: dict[str, list[tuple[int, int]]] = {}

    def collect(node, prefix):
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                spans.setdefault(name, []).append((offsets[first - 1], offsets[child.end_lineno]))
            collect(child, name)

    collect(ast.parse(text), "")
    return spans


def _code_only(text: str) -> str:
    """The text with spaces in place of comments and docstrings, at the same offsets."""
    offsets, lines = _line_offsets(text), text.splitlines(keepends=True)

    def offset(line, column):  # ast counts columns in bytes
        return offsets[line - 1] + len(lines[line - 1].encode()[:column].decode())

    spans = [(offsets[token.start[0] - 1] + token.start[1], offsets[token.end[0] - 1] + token.end[1])
             for token in tokenize.generate_tokens(io.StringIO(text).readline)
             if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str):
            spans.append((offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)))
    characters = list(text)
    for first, last in spans:
        characters[first:last] = " " * (last - first)
    return "".join(characters)


def _line_offsets(text: str) -> list[int]:
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    return offsets


def _pattern(old: str) -> re.Pattern:
    """A regular expression for `old`: whole words at both ends, any whitespace between words and signs."""
    words = re.findall(r"\w+|[^\w\s]", old)
    pattern = re.escape(words[0])
    for left, right in zip(words[:-1], words[1:], strict=True):
        both_words = re.match(r"\w", left) and re.match(r"\w", right)
        pattern += (r"\s+" if both_words else r"\s*") + re.escape(right)
    before = r"(?<!\w)" if re.match(r"\w", words[0]) else ""
    after = r"(?!\w)" if re.match(r"\w", words[-1]) else ""
    return re.compile(before + pattern + after)


def named_tests(mutation: Mutation) -> list[str]:
    """pytest's ids, below tests/, of the tests that a mutation names.

    `ppo_update` is the whole of test_ppo_update.py; `ppo_update:the_loss_of` is its one test whose name is
    test_the_loss_of or begins so; `ppo_update:the_loss_of[gae]` is that test with one set of parameters.

    Raises:
        ValueError: when there is not exactly one such file or test.
    """
    ids = []
    for word in mutation.tests.split():
        stem, _, rest = word.partition(":")
        beginning, bracket, parameters = rest.partition("[")
        files = list(TESTS.rglob(f"test_{stem}.py"))
        if len(files) != 1:
            raise ValueError(f"mutation '{mutation.name}': {len(files)} files named "
                             f"test_{stem}.py below tests/")
        identity = files[0].relative_to(TESTS).as_posix()
        if rest:
            functions = [node.name for node in ast.parse(files[0].read_text(encoding="utf-8")).body
                         if isinstance(node, ast.FunctionDef) and node.name.startswith(f"test_{beginning}")]
            matches = [name for name in functions if name == f"test_{beginning}"] or functions
            if len(matches) != 1:
                raise ValueError(f"mutation '{mutation.name}': {len(matches)} tests of {identity} begin with "
                                 f"test_{beginning}")
            identity += f"::{matches[0]}{bracket}{parameters}"
        ids.append(identity)
    return ids


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
        arguments = ["-q", "--maxfail", "3", "-p", "no:cacheprovider", "--tb", "short",
                     f"--basetemp={name}/tmp",
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
    sys.path[:] = [path for path in sys.path if not _in_tree(Path(path).resolve())]
    for name in [name for name, module in sys.modules.items() if _is_ours(module)]:
        del sys.modules[name]
    sys.exit(int(pytest.main(arguments)))


def _in_tree(path: Path) -> bool:
    return path == ROOT or any(path.is_relative_to(ROOT / folder) for folder in COPIED)


def _is_ours(module) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and any(Path(file).is_relative_to(ROOT / folder) for folder in COPIED)


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
    for test in sorted({test for mutation in mutations for test in named_tests(mutation)}):
        by_file.setdefault(test.split("::")[0], []).append(test)
    # a whole file stands before its single tests
    chosen = [[tests[0]] if "::" not in tests[0] else tests for tests in by_file.values()]
    with ThreadPoolExecutor(jobs) as pool:
        for tests, result in zip(chosen, pool.map(run_tests, chosen), strict=True):
            if result.failed or result.broken:
                sys.exit(f"{result.output}\nwithout any mutation: "
                         f"{result.broken or ', '.join(result.failed)} ({tests[0]})")
            print(f"unmutated, passed: {' '.join(tests)}", flush=True)


def run_all(mutations: list[Mutation], jobs: int) -> list[Result]:
    """Every mutation's result, printed as it comes."""
    def run(mutation):
        result = run_tests(named_tests(mutation), mutation)
        verdict = f"BROKEN ({result.broken})" if result.broken else "caught" if result.failed else "SURVIVED"
        print(f"{verdict}: {mutation.name} [{mutation.file} {mutation.function}] {', '.join(result.failed)}",
              flush=True)
        if result.broken:
            print(result.output[-2000:], flush=True)
        return result

    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(run, mutations))


def table(mutations: list[Mutation], results: list[Result]) -> str:
    """The results as a Markdown table. Tests of one function with other parameters are one entry."""
    lines = ["| | detail | what is broken | where | tests that failed |", "|---|---|---|---|---|"]
    for number, (mutation, result) in enumerate(zip(mutations, results, strict=True), start=1):
        names = dict.fromkeys(name.split("[")[0] for name in result.failed)
        failed = "<br>".join(f"`{name}`" for name in names) or "none"
        where = (f"`{mutation.file.removeprefix('scripts/')}` "
                 f"{f'`{mutation.function}`' if mutation.function else ''}".rstrip())
        lines.append(f"| {number} | {mutation.detail or ''} | {mutation.name} | {where} | {failed} |")
    return "\n".join(lines)


def summary(count: int, caught: int) -> str:
    """The line of tests/README.md, with the day and the commit of the tree."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "scripts", "tests"], capture_output=True,
                             text=True).stdout
    tree = f"commit {commit or 'unknown'}{' with changes' if changed else ''}"
    return f"mutations: {count}, caught: {caught} ({datetime.date.today()}, {tree})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(),
                        help="mutations at a time (default: one for each core)")
    parser.add_argument("--only", default="",
                        help="only mutations whose name, file or function contains this text")
    parser.add_argument("--check", action="store_true",
                        help="only look whether every mutation fits the code; run no test")
    parser.add_argument("--readme", action="store_true", help="write the line of tests/README.md")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)  # before the first fork
    if arguments.readme and (arguments.only or arguments.check):
        parser.error("--readme is for a run of all mutations: leave --only and --check out")
    chosen = [m for m in MUTATIONS if any(arguments.only in text for text in (m.name, m.file, m.function))]
    if not chosen:
        parser.error(f"--only: no mutation's name, file or function holds '{arguments.only}'")
    mistakes = list(filter(None, map(mistake, chosen)))
    if mistakes:
        parser.error("\n".join(["tests/mutation_list.py does not fit the code", *mistakes]))
    if arguments.check:
        print(f"mutations: {len(chosen)}, all fit the code")
        return 0
    check_unmutated(chosen, arguments.jobs)
    results = run_all(chosen, arguments.jobs)
    caught = sum(bool(result.failed) and not result.broken for result in results)
    if not arguments.only:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(f"{summary(len(chosen), caught)}\n\n{table(chosen, results)}\n", encoding="utf-8")
        print(f"the table is in {TABLE.relative_to(ROOT)}")
    if arguments.readme:
        text = README.read_text(encoding="utf-8")
        README.write_text(SUMMARY.sub(summary(len(chosen), caught), text, count=1), encoding="utf-8")
    print(f"mutations: {len(chosen)}, caught: {caught}")
    return 0 if caught == len(chosen) else 1


def mistake(mutation: Mutation) -> str:
    """Why a mutation does not fit the code or the tests; empty when it does."""
    try:
        ast.parse(mutated(mutation))
        named_tests(mutation)
    except ValueError as error:
        return str(error)
    except SyntaxError as error:
        return f"mutation '{mutation.name}' is no Python: {error}"
    return ""


if __name__ == "__main__":
    sys.exit(main())
