"""How a script starts and ends: light imports, errors in one line, and what happens to freed memory."""

import errno
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError

from utils.config import PROJECT, StageConfig
from utils.launch import start


@dataclass
class Toy(StageConfig):
    """A stage without keys of its own."""


@pytest.mark.parametrize("module", ["utils.config", "utils.launch", "utils.paths"])
def test_importing_the_ground_loads_no_heavy_library(module):
    """`--help` and a mistyped key would wait for them."""
    heavy = ("torch", "transformers", "datasets", "accelerate", "pyarrow", "numpy")
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({heavy})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT / "scripts", capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def started(error, monkeypatch, capsys):
    """Exit status and error output of a script whose `main` raises."""
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    with pytest.raises(SystemExit) as left:
        start(main, Toy, Path("/dev/null"), "")
    return left.value.code, capsys.readouterr().err


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
])
def test_a_full_disk_is_one_line(error, monkeypatch, capsys):
    code, said = started(error, monkeypatch, capsys)
    assert code == 2 and said.count("\n") == 1
    assert said.startswith("error: ") and "o space left on" in said
    assert said.endswith("what was saved so far is intact\n")


def test_ctrl_c_leaves_without_a_traceback(monkeypatch, capsys):
    assert started(KeyboardInterrupt(), monkeypatch, capsys) == (130, "stopped\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        started(RuntimeError("a bug"), monkeypatch, None)


ENGINE = ["--deepspeed", "configs/deepspeed/zero2.json"]


@pytest.mark.parametrize(("words", "expected"), [
    ([], ["keep"]), (["--gradient_checkpointing", "true"], []), (ENGINE, ["give back"]),
    ([*ENGINE, "--gradient_checkpointing", "true"], ["give back"]),
])
def test_freed_memory_is_kept_or_given_back_as_the_run_needs_it(words, expected, monkeypatch):
    done = []
    monkeypatch.setattr("utils.launch.keep_freed_memory", lambda: done.append("keep"))
    monkeypatch.setattr("utils.launch.give_back_freed_memory", lambda: done.append("give back"))
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *words])
    start(lambda config: done.append("main"), Toy, Path("/dev/null"), "")
    assert done == [*expected, "main"]


HOLES = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from utils import launch
getattr(launch, sys.argv[2])()

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

torch.ones(2**10)
before = held()
torch.ones(2**22 + 2**21)  # 24 MiB come and go: glibc then takes smaller tensors from its heap
tensors = [torch.ones(2**21) for _ in range(32)]
full = held()
del tensors[::2]
print(full - before, held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
@pytest.mark.parametrize(("function", "left"), [("give_back_freed_memory", 128), ("keep_freed_memory", 256)])
def test_tensors_leave_holes_or_go_back(function, left):
    """32 tensors of 8 MiB, of which every second is freed."""
    words = [sys.executable, "-c", HOLES, str(PROJECT / "scripts"), function]
    full, then = map(float, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())
    assert full == pytest.approx(256, abs=16) and then == pytest.approx(left, abs=16)
