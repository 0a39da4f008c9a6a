"""The mutation check's list fits the code, and its verdicts are right. (The check itself is run by hand: tests/mutations.py.)"""

import ast
import re
from pathlib import Path

import pytest
from mutation_list import MUTATIONS, Mutation
from mutations import BEGIN, END, README, Result, judged, mutated, run_tests, table

TESTS = Path(__file__).resolve().parent
BEHAVIOUR = set(range(1, 38)) - {21, 36}  # which are others' results


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_and_is_python(mutation):
    ast.parse(mutated(mutation))  # ValueError: its old text is gone or no longer the only one


def test_the_named_tests_exist():
    for test in sorted({test for mutation in MUTATIONS for test in mutation.tests}):
        file, _, name = test.partition("::")
        functions = {node.name for node in ast.walk(ast.parse((TESTS / file).read_text())) if isinstance(node, ast.FunctionDef)}
        assert not name or name.split("[")[0] in functions, test


def test_every_detail_that_says_how_the_program_behaves_is_broken_once_and_no_name_stands_twice():
    assert {mutation.detail for mutation in MUTATIONS} - {None} == BEHAVIOUR
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_readmes_table_is_that_of_the_list():
    """Which tests failed is not looked at: that takes the run."""
    rows = README.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    expected = table(MUTATIONS, [Result([], "", "")] * len(MUTATIONS)).splitlines()
    assert [row.split(" | ")[:4] for row in rows] == [row.split(" | ")[:4] for row in expected]
    assert not any(row.endswith("| none |") for row in rows), "a mutation that no test catches"


def test_the_readme_holds_every_detail_and_names_tests_that_exist():
    text = README.read_text().partition(BEGIN)[0]
    assert [line.split(" | ")[0] for line in text.splitlines() if re.match(r"\| \d", line)] == [f"| {n}" for n in range(1, 38)]
    names = set(re.findall(r"`(\w+\.py)`", text))
    for file in names:
        assert list(TESTS.parent.rglob(f"scripts/**/{file}")) or (TESTS / file).exists(), file
    for line in text.splitlines():
        if re.match(r"\| \d", line):
            cell = line.rstrip("| ").rpartition(" | ")[2]
            for file, rest in re.findall(r"`(test_\w+\.py)`((?:,? `\w+`)*)", cell):
                for name in re.findall(r"`(\w+)`", rest):
                    assert f"def test_{name}" in (TESTS / file).read_text(), f"{file} {name}"


@pytest.mark.parametrize(("text", "message"), [("a = 2\n", "found 0 times"), ("a = 1\na = 1\n", "found 2 times")])
def test_a_text_that_is_not_there_once_is_said(text, message, tmp_path):
    (tmp_path / "x.py").write_text(text)
    with pytest.raises(ValueError, match=f"mutation 'n': .* in x.py, {message}"):
        mutated(Mutation("n", 1, "x.py", "a = 1", "a = 3", ()), tmp_path)
    (tmp_path / "x.py").write_text("a = 1\n")
    assert mutated(Mutation("n", 1, "x.py", "a = 1", "a = 3", ()), tmp_path) == "a = 3\n"
    with pytest.raises(ValueError, match="changes nothing"):
        mutated(Mutation("n", 1, "x.py", "a = 1", "a = 1", ()), tmp_path)


SUITE = '<testsuites><testsuite><testcase classname="tests.test_x" name="test_{0}[1]">{1}</testcase></testsuite></testsuites>'


@pytest.mark.parametrize(("status", "case", "failed", "broken"), [
    (0, "", [], ""),
    (1, '<failure message="AssertionError: assert 1 == 2"/>', ["test_x::test_a[1]"], ""),
    (1, '<failure message="NameError: name &apos;x&apos; is not defined"/>', ["test_x::test_a[1]"], "the mutant has a mistake"),
    (2, "", [], "status 2"),  # a file that cannot be imported
    (5, "", [], "status 5"),  # no such test
])
def test_a_mutant_that_does_not_run_is_not_caught(status, case, failed, broken, tmp_path):
    (tmp_path / "report.xml").write_text(SUITE.format("a", case))
    found = judged(status, tmp_path / "report.xml", "")
    assert found.failed == failed and broken in found.broken and bool(broken) == bool(found.broken)


@pytest.mark.slow
def test_a_broken_detail_is_caught_in_a_copy_and_the_tree_stays_as_it_is():
    mutation = next(m for m in MUTATIONS if m.name == "k2 is not halved")
    path = TESTS.parent / mutation.file
    before = path.read_bytes(), path.stat().st_mtime_ns
    tests = ("test_ppo.py::test_kl_estimators_by_hand",)
    assert run_tests(tests).failed == []
    assert run_tests(tests, mutation).failed == ["test_ppo::test_kl_estimators_by_hand"]
    unimportable = mutation._replace(new="return undefined(", tests=tests)
    assert run_tests(tests, unimportable).broken.startswith("pytest ended with status")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
