"""The scripts use the public names of other libraries. No private name is called, imported or overridden.

A private name begins with one underscore, or is mangled. It may go or change its meaning in any release.
The check reads syntax trees. Where a tree does not say whose an attribute is, it counts as another's: only
`self`, `cls` and `super()` may have private names, and only those that the project's own classes define. Base
classes are found by importing them: what an own class defines must not be a private name of a library class
that it extends.
"""

import ast
import builtins
import importlib
import inspect
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest

from utils.config import PROJECT

SCRIPTS = PROJECT / "scripts"
FILES = sorted(SCRIPTS.rglob("*.py"))
# first parts of the names of own modules
OWN = {path.stem if path.is_file() else path.name for path in SCRIPTS.iterdir()}
BY_NAME = ("getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller")

# (file below scripts/ or any, name): why
ANY = "any"
EXCEPTIONS = {
    (ANY, "_exit"): "documented and public: os._exit",
    (ANY, "_replace"): "public methods of Python's namedtuple: the underscore keeps them apart from fields",
    (ANY, "_asdict"): "as _replace",
    (ANY, "_fields"): "as _replace",
    ("utils/judge/metrics.py", "_info"): "evaluate documents it as what every Metric defines",
    ("utils/judge/metrics.py", "_compute"): "as _info",
    ("utils/command_line.py", "_format_action_invocation"): "argparse has no public way to show one spelling "
                                                            "only",
}


class Finding(NamedTuple):
    """A private name in a file."""

    line: int
    name: str
    what: str


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not (name.startswith("__") and name.endswith("__"))


def findings(path: Path) -> list[Finding]:
    """Every private name of somebody else's that a file uses, by line."""
    return sorted(_File(ast.parse(path.read_text(encoding="utf-8"))).findings())


class _File:
    """The syntax tree of one file."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        self.imported = {}  # name here -> how to get what it stands for
        for node in ast.walk(tree):
            for alias in getattr(node, "names", []) if isinstance(node, ast.Import | ast.ImportFrom) else []:
                if isinstance(node, ast.ImportFrom):
                    self.imported[alias.asname or alias.name] = (node.module, alias.name)
                else:  # `import a.b` gives the name a
                    self.imported[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0], None)

    def findings(self):
        yield from self._within(self.tree, None)

    def _within(self, node, owner: ast.ClassDef | None):
        """Findings below a node of the class `owner`."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and is_private(child.attr):
                if not (owner and _is_self(child.value) and child.attr in self._names(owner)):
                    what = f"{ast.unparse(child)} is not defined by an own class"
                    yield Finding(child.lineno, child.attr, what)
            elif isinstance(child, ast.Import | ast.ImportFrom):
                yield from self._imports(child)
            elif isinstance(child, ast.Call):
                yield from _names_in_text(child)
            elif isinstance(child, ast.ClassDef):
                yield from self._overrides(child)
            yield from self._within(child, child if isinstance(child, ast.ClassDef) else owner)

    @staticmethod
    def _imports(node):
        paths = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
        for name in {part for path in paths for part in path.split(".") if is_private(part)}:
            yield Finding(node.lineno, name, f"{ast.unparse(node)} imports it")

    def _overrides(self, owner):
        for library in self._libraries(owner):
            for name in sorted(_defined(owner) & _names_of_class(library)):
                what = f"{owner.name} overrides {name} of {library.__module__}.{library.__name__}"
                yield Finding(owner.lineno, name, what)

    def _names(self, owner) -> set[str]:
        """Private names that a class or its own bases define."""
        names = _defined(owner)
        for base in self._bases(owner):
            if isinstance(base, ast.ClassDef):
                names |= self._names(base)
            else:
                names |= {name for kind in base.__mro__ if _is_own(kind) for name in _names_of_class(kind)}
        return names

    def _libraries(self, owner) -> set[type]:
        """Classes of other libraries that a class extends, directly or not."""
        libraries = set()
        for base in self._bases(owner):
            if isinstance(base, ast.ClassDef):
                libraries |= self._libraries(base)
            else:
                libraries |= {kind for kind in base.__mro__ if not _is_own(kind) and kind is not object}
        return libraries

    def _bases(self, owner):
        """The bases of a class, each a class of this file or an imported one."""
        for expression in owner.bases:
            if isinstance(expression, ast.Subscript):  # Sequence[int]
                expression = expression.value
            if isinstance(expression, ast.Name) and expression.id in self.classes:
                yield self.classes[expression.id]
                continue
            base = self._object(expression)
            base = getattr(base, "__origin__", base)  # typing.Sequence
            if isinstance(base, type):
                yield base
            else:
                assert base is NamedTuple, f"line {owner.lineno}: {ast.unparse(expression)} is no class"

    def _object(self, expression):
        if isinstance(expression, ast.Attribute):
            return getattr(self._object(expression.value), expression.attr)
        known = isinstance(expression, ast.Name)
        assert known, f"line {expression.lineno}: the base {ast.unparse(expression)} has no name"
        if expression.id not in self.imported:
            return getattr(builtins, expression.id)
        module, name = self.imported[expression.id]
        loaded = importlib.import_module(module)
        if name is None or hasattr(loaded, name):
            return loaded if name is None else getattr(loaded, name)
        return importlib.import_module(f"{module}.{name}")


def _is_self(node) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls") or ast.unparse(node) == "super()"


def _names_in_text(call):
    """Names that are given as text: getattr(model, "_name")."""
    called = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", None)
    if called in BY_NAME:
        for argument in call.args:
            text = argument.value if isinstance(argument, ast.Constant) else None
            if isinstance(text, str) and is_private(text):
                yield Finding(call.lineno, text, ast.unparse(call))


def _defined(owner: ast.ClassDef) -> set[str]:
    """Private names that a class defines itself: methods, class attributes, and what is assigned to self."""
    names = {node.name for node in owner.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for statement in owner.body:
        if isinstance(statement, ast.Assign | ast.AnnAssign):
            names |= {node.id for node in ast.walk(statement) if isinstance(node, ast.Name)
                      and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in ast.walk(owner) if isinstance(node, ast.Attribute)
              and isinstance(node.ctx, ast.Store) and _is_self(node.value)}
    return set(filter(is_private, names))


def _names_of_class(kind: type) -> set[str]:
    """Private names that an imported class defines, without those of its bases."""
    names = set(filter(is_private, vars(kind)))
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # written in C
        return names
    return names | _defined(ast.parse(source).body[0])


def _is_own(kind: type) -> bool:
    return kind.__module__.split(".")[0] in OWN


# ---------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("path", FILES, ids=[path.relative_to(SCRIPTS).as_posix() for path in FILES])
def test_the_scripts_use_no_private_name_of_a_library(path):
    place = path.relative_to(SCRIPTS).as_posix()
    found = [f"{place}:{finding.line}: {finding.what}" for finding in findings(path)
             if not {(ANY, finding.name), (place, finding.name)} & EXCEPTIONS.keys()]
    assert not found, "\n".join(found)


def test_every_exception_is_needed():
    used = {place for path in FILES for finding in findings(path)
            for place in ((ANY, finding.name), (path.relative_to(SCRIPTS).as_posix(), finding.name))}
    assert not EXCEPTIONS.keys() - used and all(EXCEPTIONS.values())


# ------------------------------------------------------------------------------- what the check notices

NOTICED = {  # source: names that are found
    "attribute of a model": ("if model._supports_sdpa:\n    pass", ["_supports_sdpa"]),
    "called on a part": ("accelerator.gradient_state._set_sync_gradients(True)", ["_set_sync_gradients"]),
    "assigned": ("engine._config = 3", ["_config"]),
    "deleted": ("del engine._config", ["_config"]),
    "mangled": ("engine.__config", ["__config"]),
    "of a call": ("tensor.untyped_storage()._cdata", ["_cdata"]),
    "a function": ("from torch.utils.cpp_extension import _get_build_directory", ["_get_build_directory"]),
    "under another name": ("from trl.trainer.utils import _pad as pad", ["_pad"]),
    "from a private module": ("from torch._dynamo import disable", ["_dynamo"]),
    "a private module": ("import torch._dynamo", ["_dynamo"]),
    "within a function": ("def f():\n    from peft.tuners import _buffer_dict", ["_buffer_dict"]),
    "a private module as attribute": ("import torch\ntorch._C.foo()", ["_C"]),
    "in text": ("getattr(model, '_tied')\nsetattr(model, '_no_split', [])\nhasattr(model, '_x')",
                ["_tied", "_no_split", "_x"]),
    "in text, from a module": ("import operator\noperator.attrgetter('_tied')", ["_tied"]),
    "in text, called": ("from operator import methodcaller\nmethodcaller('_save')", ["_save"]),
    "an overridden method": (
        "from transformers import Trainer\nclass X(Trainer):\n    def _save(self): pass", ["_save"]),
    "an overridden method of a base's base": (
        "from trl import RewardTrainer\nclass X(RewardTrainer):\n    def _inner_training_loop(self): pass",
        ["_inner_training_loop"]),
    "an overridden method in a grandchild": (
        "import transformers as t\nclass A(t.Trainer): pass\nclass B(A):\n  def _save(self): pass",
        ["_save"]),
    "an overridden class attribute": (
        "import torch.nn as nn\nclass X(nn.Module):\n    _version = 2", ["_version"]),
    "an overridden annotated attribute": (
        "from torch import nn\nclass X(nn.Module):\n    _version: int = 2", ["_version"]),
    "an overridden attribute of the instance": (
        "from accelerate import Accelerator\nclass X(Accelerator):\n    def f(self): self._models = []",
        ["_models"]),
    "of a local class": (
        "def f():\n  from torch import nn\n  class X(nn.Module):\n    def _call_impl(self): pass",
        ["_call_impl"]),
    "called on self": (
        "from transformers import Trainer\nclass X(Trainer):\n    def f(self): self._save('x')", ["_save"]),
    "called on super": (
        "from transformers import Trainer\nclass X(Trainer):\n    def f(self): super()._save()", ["_save"]),
    "called on a class": ("from transformers import Trainer\nTrainer._save(None)", ["_save"]),
    "of a self that has no class": ("def f(self):\n    return self._save", ["_save"]),
}
ALLOWED = {
    "own names on self": "class X:\n    _a = 1\n    def _b(self): self._c, self._d = self._a, self._b()\n"
                         "    def f(self): return self._c + self._d",
    "own names of a base": "class X:\n    def _a(self): pass\nclass Y(X):\n    def f(self): "
                           "super()._a(); self._a()",
    "own names of an imported base":
        "from utils.runs.run import Run\nclass X(Run):\n    def f(self): return self._trackers",
    "own names beside a library's":
        "from torch import nn\nclass X(nn.Module):\n    def _mine(self): return self._mine",
    "names of Python": "class X(Exception):\n    def f(self): return self.__dict__, type(self).__name__",
    "a variable that is not used": "for _ in range(3): _, x = 1, 2",
    "own functions and constants": "_LIMIT = 3\ndef _f(): return _LIMIT\n_f()",
    "public bases": "from typing import NamedTuple\nfrom collections.abc import Sequence\n"
                    "class A(NamedTuple):\n    x: int\nclass B(Sequence[int]): pass\nclass C(dict): pass",
}


@pytest.mark.parametrize("case", NOTICED)
def test_a_private_name_is_noticed(case, tmp_path):
    source, names = NOTICED[case]
    (tmp_path / "snippet.py").write_text(source)
    assert [finding.name for finding in findings(tmp_path / "snippet.py")] == names


@pytest.mark.parametrize("case", ALLOWED)
def test_what_is_ones_own_is_allowed(case, tmp_path):
    (tmp_path / "snippet.py").write_text(ALLOWED[case])
    assert findings(tmp_path / "snippet.py") == []


def test_a_base_that_is_not_known_is_no_silent_pass(tmp_path):
    (tmp_path / "snippet.py").write_text("class X(make_base()):\n    def _save(self): pass")
    with pytest.raises(AssertionError, match="line 1: the base make_base"):
        findings(tmp_path / "snippet.py")
