"""The mutation check's list fits the code, and its verdicts are right. `make mutations` is the check itself.

Also the table of docs/details.md: it has all 37 details, its tests exist, and `make test` runs them.
"""

import ast
import re
from pathlib import Path

import pytest
from mutation_list import MUTATIONS, Mutation
from mutations import (
    README,
    SUMMARY,
    Result,
    judged,
    mistake,
    mutated,
    named_tests,
    run_tests,
    summary,
    table,
)

ROOT = Path(__file__).resolve().parents[2]
TESTS, DETAILS = ROOT / "tests", ROOT / "docs" / "details.md"
BEHAVIOUR = set(range(1, 38)) - {21, 36}  # these two are results of others


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_changes_one_place_is_python_and_names_tests_that_exist(mutation):
    assert mistake(mutation) == ""


def test_every_detail_that_says_how_the_program_behaves_is_broken_once_and_no_name_stands_twice():
    assert {mutation.detail for mutation in MUTATIONS} - {None} == BEHAVIOUR
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_readme_says_that_every_mutation_is_caught():
    lines = SUMMARY.findall(README.read_text())
    assert len(lines) == 1, "tests/mutations.py --readme writes the line `mutations: N, caught: N` there"
    count, caught = re.match(r"mutations: (\d+), caught: (\d+) \(\d{4}-\d\d-\d\d, commit ", lines[0]).groups()
    assert int(count) == int(caught) == len(MUTATIONS)


def test_the_line_of_the_readme_and_the_table_by_hand():
    assert SUMMARY.fullmatch(summary(3, 2))
    mutations = [Mutation("a", 1, "scripts/utils/x.py", "f", "1", "2", ""),
                 Mutation("b", None, "scripts/y.py", "", "1", "2", "")]
    results = [Result(["test_x::test_a[1]", "test_x::test_a[2]", "test_x::test_b"], "", ""),
               Result([], "", "")]
    assert table(mutations, results).splitlines()[2:] == [
        "| 1 | 1 | a | `utils/x.py` `f` | `test_x::test_a`<br>`test_x::test_b` |",
        "| 2 |  | b | `y.py` | none |"]


DETAIL_ROWS = [[cell.strip() for cell in line.split("|")[1:-1]]  # number, detail, source, code, key, test
               for line in DETAILS.read_text().splitlines() if re.match(r"\| \d", line)]


def test_the_details_are_37_with_their_source_code_key_and_test():
    assert [int(cells[0]) for cells in DETAIL_ROWS] == list(range(1, 38))
    for number, _, source, code, _, test in DETAIL_ROWS:
        assert source, f"detail {number} names no source"
        assert (code and test) or int(number) not in BEHAVIOUR, f"detail {number} names no code or no test"


def test_the_code_of_every_detail_is_where_its_row_says():
    mistakes = []
    for number, _, _, code, *_ in DETAIL_ROWS:
        text = ""
        for name in re.findall(r"`([^`]+)`", code):
            if name.endswith(".py"):
                path = ROOT / "scripts" / name
                text = path.read_text() if path.exists() else ""
            if (not text or not (name.endswith(".py") or re.search(rf"^\s*(def|class) {name}\b", text,
                                                                   re.MULTILINE))):
                mistakes.append(f"{number}: {name}")
    assert mistakes == []


def test_the_tests_of_every_detail_exist_and_make_test_runs_them():
    mistakes = []
    for number, *_, cell in DETAIL_ROWS:
        for name, beginnings in re.findall(r"`(test_\w+\.py)`((?:,? `\w+`)*)", cell):
            paths = list(TESTS.rglob(name))
            tests, is_slow = slow_tests(paths[0].read_text()) if paths else ([], None)
            for beginning in re.findall(r"`(\w+)`", beginnings) or [""]:
                matches = [test for test in tests if test.startswith(f"test_{beginning}")]
                if not matches:
                    mistakes.append(f"{number}: no {name} {beginning}")
                elif all(map(is_slow, matches)):
                    mistakes.append(f"{number}: {name} {beginning} is slow")
    assert mistakes == []


def slow_tests(text):
    """Names of a file's tests, and a function that says whether one carries the marker `slow`."""
    tree = ast.parse(text)
    functions = {node.name: node for node in tree.body
                 if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
    marks = [ast.unparse(node.value) for node in tree.body
             if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"]
    whole_file = any("mark.slow" in mark for mark in marks)

    def is_slow(name):
        return whole_file or "pytest.mark.slow" in map(ast.unparse, functions[name].decorator_list)

    return list(functions), is_slow


def test_what_a_slow_test_is():
    text = "import pytest\n@pytest.mark.slow\ndef test_a(): pass\ndef test_b(): pass\ndef other(): pass\n"
    tests, is_slow = slow_tests(text)
    assert tests == ["test_a", "test_b"] and is_slow("test_a") and not is_slow("test_b")
    assert slow_tests("pytestmark = pytest.mark.slow\ndef test_b(): pass\n")[1]("test_b")


CODE = '''"""Doc: a = 1."""
LIMIT = 1


class Box:
    def size(self):
        """a = 1"""
        return self.a(
            1, 2)  # a = 1

def size():
    a = 1
    b = ä = 1
    return a + 1
'''


@pytest.mark.parametrize(("function", "old", "new", "line"), [
    ("size", "a = 1", "a = 3", "    a = 3"),
    ("size", "ä=1", "ä = 3", "    b = ä = 3"),
    ("Box.size", "self.a(1, 2)", "self.a(2)", "        return self.a(2)  # a = 1"),  # over two lines
    ("Box", "return self", "return 3; self", "        return 3; self.a("),
    ("", "1", "3", "LIMIT = 3"),
])
def test_a_mutation_changes_the_one_place_in_its_function(function, old, new, line, tmp_path):
    (tmp_path / "x.py").write_text(CODE)
    after = mutated(Mutation("n", 1, "x.py", function, old, new, ""), tmp_path).splitlines()
    before = CODE.splitlines()
    assert [text for text in after if text not in before] == [line]
    assert len(before) - len(after) == (function == "Box.size")  # two lines have become one


@pytest.mark.parametrize(("function", "old", "message"), [
    ("size", "b = 1", "size: `b = 1` must occur once, found 0 times"),
    ("size", "1", "size: `1` must occur once, found 3 times"),
    ("size", "a +", None),
    ("size", "retur", "found 0 times"),  # whole words
    ("Box.size", "a = 1", "found 0 times"),  # in a docstring and a comment
    ("", "return", "outside of functions: `return` must occur once, found 0 times"),
    ("Box.width", "1", "must define 'Box.width' once, found 0 times"),
])
def test_a_text_that_is_not_there_once_is_said(function, old, message, tmp_path):
    mutation = Mutation("n", 1, "x.py", function, old, "3", "")
    with pytest.raises(ValueError, match="^mutation 'n': x.py does not exist"):
        mutated(mutation, tmp_path)
    (tmp_path / "x.py").write_text(CODE)
    if message is None:
        assert mutated(mutation, tmp_path) != CODE
        with pytest.raises(ValueError, match="changes nothing"):
            mutated(mutation._replace(new=old), tmp_path)
    else:
        with pytest.raises(ValueError, match=f"^mutation 'n': x.py.*{re.escape(message)}"):
            mutated(mutation, tmp_path)


def test_tests_are_found_by_the_beginning_of_their_names():
    here = "stages/test_mutations.py"
    mutation = Mutation("n", 1, "x.py", "f", "1", "2", "mutations mutations:what_a_slow[1]")
    assert named_tests(mutation) == [here, f"{here}::test_what_a_slow_test_is[1]"]
    for tests, message in (("mutations:a_mu", "3 tests of stages/test_mutations.py begin with test_a_mu"),
                           ("mutations:none", "0 tests"),
                           ("no_such_file", "0 files named test_no_such_file.py")):
        with pytest.raises(ValueError, match=f"^mutation 'n': {message}"):
            named_tests(mutation._replace(tests=tests))


SUITE = ('<testsuites><testsuite><testcase classname="tests.test_x" '
         'name="test_{0}[1]">{1}</testcase></testsuite></testsuites>')


@pytest.mark.parametrize(("status", "case", "failed", "broken"), [
    (0, "", [], ""),
    (1, '<failure message="AssertionError: assert 1 == 2"/>', ["test_x::test_a[1]"], ""),
    (1, '<failure message="NameError: name &apos;x&apos; is not defined"/>', ["test_x::test_a[1]"],
     "the mutant has a mistake"),
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
    path = ROOT / mutation.file
    before = path.read_bytes(), path.stat().st_mtime_ns
    tests = named_tests(mutation._replace(tests="ppo:kl_estimators_by_hand"))
    assert run_tests(tests).failed == []
    assert run_tests(tests, mutation).failed == ["test_ppo::test_kl_estimators_by_hand"]
    unimportable = mutation._replace(new="undefined(")
    assert run_tests(tests, unimportable).broken.startswith("pytest ended with status")
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
