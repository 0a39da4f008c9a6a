"""How a script starts and ends: light imports, errors in one line, and what happens to freed memory."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from safetensors import SafetensorError

from utils.config import PROJECT
from utils.launch import read_config, start
from utils.stage_keys import StageConfig


@dataclass
class Toy(StageConfig):
    """A stage without keys of its own."""


@pytest.fixture(autouse=True)
def signals():
    """As in a new process, and afterwards as they were."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL,
             signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("module", ["utils.config", "utils.launch", "utils.paths", "utils.stage_keys",
                                    "utils.data.sources"])
def test_importing_the_ground_loads_no_heavy_library(module):
    """`--help` and a mistyped key would wait for them."""
    heavy = ("torch", "transformers", "datasets", "accelerate", "matplotlib")
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({heavy})))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=PROJECT / "scripts", capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.fixture(autouse=True)
def no_run(monkeypatch):
    """No run has claimed a folder in this process."""
    monkeypatch.setattr("utils.failures.claimed", lambda: None)


def started(error, monkeypatch, capsys):
    """Exit status and error output of a script whose `main` raises."""
    def main(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    config = read_config(Toy, None, "")
    with pytest.raises(SystemExit) as left:
        start(main, config)
    return left.value.code, capsys.readouterr().err


def torch_error():
    """What torch.save raises when the file that it was given cannot take more."""
    try:
        try:
            raise OSError(errno.EFBIG, "File too large")
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(("error", "reason"), [
    (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "metrics.jsonl: No space left"),
    (OSError(errno.EFBIG, "File too large", "metrics.jsonl"), "metrics.jsonl: File too large"),
    (OSError(errno.EIO, "Input/output error"), "Input/output error"),
    (OSError(errno.ENOENT, "No such file or directory", b"x"), "No such file"),
    (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
     ": No space left on device;"),
    (SafetensorError("Error while serializing: I/O error: File too large (os error 27)"),
     ": File too large;"),
    (Exception("Permission denied (os error 13)"), "Permission denied"),
    (torch_error(), "File too large"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
     "a limit on the size of files"),
    (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"),
     "no space left on the disk"),
    (RuntimeError("basic_ios::clear: iostream error"), "no space left on the disk"),
    (RuntimeError("Parent directory /x/checkpoints does not exist."), "x/checkpoints does not exist"),
])
def test_a_file_that_cannot_be_written_is_one_line(error, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("utils.failures.claimed", lambda: tmp_path)
    code, said = started(error, monkeypatch, capsys)
    assert code == 2 and said.count("\n") == 1 and reason in said
    assert said.startswith("error: ") and said.endswith("what was saved so far is intact\n")


def test_before_a_run_has_its_folder_nothing_is_said_of_what_was_saved(monkeypatch, capsys):
    code, said = started(OSError(errno.EIO, "Input/output error", "rows.jsonl"), monkeypatch, capsys)
    assert (code, said) == (2, "error: rows.jsonl: Input/output error\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_before_training_tidies_up_and_leaves(number, monkeypatch, capfd):
    tidied = []

    def main(config):
        try:
            signal.raise_signal(number)
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)  # a launcher's second one does not interrupt this
            tidied.append(True)

    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    config = read_config(Toy, None, "")
    with pytest.raises(SystemExit) as left:
        start(main, config)
    assert left.value.code == 128 + number and tidied == [True] and capfd.readouterr().err == "stopped\n"


def test_nohup_keeps_its_meaning(monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    start(lambda config: signal.raise_signal(signal.SIGHUP), read_config(Toy, None, ""))


def test_ctrl_c_leaves_without_a_traceback(monkeypatch, capsys):
    assert started(KeyboardInterrupt(), monkeypatch, capsys) == (130, "stopped\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="a bug"):
        started(RuntimeError("a bug"), monkeypatch, None)


ENGINE = ["--deepspeed", "configs/deepspeed/zero2.json"]


# ------------------------------------------------------------------------------- before the libraries

SCRIPTS = ["train_sft.py", "train_reward.py", "train_ppo.py", "prepare_data.py", "plan_memory.py"]
# stands in for what is slow to import: whoever imports it before the command line is read would wait here
SLOW = """
import os, sys, time
print("importing", flush=True)
time.sleep(60)
"""


@pytest.fixture
def slow_libraries(tmp_path):
    """An environment in which torch and transformers take a minute to import."""
    for name in ("torch", "transformers", "datasets", "accelerate", "rich", "matplotlib"):
        (tmp_path / f"{name}.py").write_text(SLOW)
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


MISTAKES = {
    "--sed 1": "error: command line: unknown key '--sed'",
    "--config broken.yaml": "error: broken.yaml:2: is not valid YAML",
    "--config no.yaml": "error: --config: 'no.yaml' does not exist",
    "--model nothing": "error: model: no model folder at 'nothing'",
    "--actor_training_data no.jsonl": "error: actor_training_data: 'no.jsonl' does not exist",
    '--actor_test_data ["broken.yaml",{"name":"b.csv"}]': "error: actor_test_data: 'b.csv' does not exist",
    "--deepspeed zero9.json": "error: deepspeed: 'zero9.json' does not exist",
}


@pytest.mark.parametrize(("script", "words"), [
    *((script, words) for script in SCRIPTS for words in ("--help", "--sed 1")),
    *(("train_sft.py", words) for words in list(MISTAKES)[1:]),
])
def test_help_and_mistakes_do_not_wait_for_the_libraries(script, words, slow_libraries, tmp_path):
    (tmp_path / "broken.yaml").write_text("seed: [\n")
    command = [sys.executable, PROJECT / "scripts" / script, *words.split()]
    done = subprocess.run(command, env=slow_libraries, timeout=30, cwd=tmp_path, capture_output=True,
                          text=True, check=False)
    mistake = MISTAKES.get(words)
    assert done.returncode == (2 if mistake else 0), done.stderr
    assert done.stderr.startswith(mistake) if mistake else done.stdout.startswith("usage:")
    assert "importing" not in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_while_libraries_are_imported_is_one_line(script, slow_libraries):
    """Also where an import would catch the exception that Ctrl-C raises."""
    mini = str(PROJECT / "assets" / "opt-mini")
    words = {"train_reward.py": ["--model", mini], "train_ppo.py": ["--model", mini, "--reward_model", mini]}
    command = [sys.executable, PROJECT / "scripts" / script, *words.get(script, [])]
    running = subprocess.Popen(command, env=slow_libraries, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    first = running.stdout.readline()
    assert first == f"{script}: loading PyTorch and other libraries (about 10 s)\n"
    assert running.stdout.readline() == "importing\n"
    running.send_signal(signal.SIGINT)
    assert running.communicate(timeout=30) == ("", "stopped\n")
    assert running.returncode == 130


def test_ctrl_c_is_an_exception_again_once_the_script_runs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    config = read_config(Toy, None, "")
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    start(lambda config: None, config)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_job_in_the_background_goes_on_at_ctrl_c(monkeypatch):
    """A shell starts it with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(sys, "argv", ["train_toy.py"])
        start(lambda config: None, read_config(Toy, None, ""))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("environment", "said"), [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE: it is 'two' in the environment, where a whole number is needed"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE: it is ''"), ({"WORLD_SIZE": "-1"}, "WORLD_SIZE: it is '-1'"),
    ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE: it is '2.0'"), ({"RANK": "\u0661"}, "RANK: it is '\u0661'"),
    ({"LOCAL_RANK": "0x1"}, "LOCAL_RANK: it is '0x1'"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT: it is 'http'"),
    ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: it is '999"),
    ({"WORLD_SIZE": "0"}, "RANK: it is 0 in the environment, but WORLD_SIZE is 0; start with torchrun"),
    ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK: it is 2 in the environment, but WORLD_SIZE is 2;"),
    ({"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "3"}, "LOCAL_RANK: it is 3 in the environment, but"),
])
def test_a_place_among_processes_that_no_launcher_gives_is_one_line(environment, said, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train_toy.py"])
    with pytest.raises(SystemExit) as left:
        read_config(Toy, None, "")
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.startswith(f"error: {said}") and message.count("\n") == 1


def test_windows_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as left:
        read_config(Toy, None, "")
    said = capsys.readouterr().err
    assert left.value.code == 2 and said == ("error: Windows is not supported; use the Windows Subsystem for "
                                             "Linux (WSL 2)\n")


# ------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("words", "expected"), [
    ([], ["keep"]), (["--gradient_checkpointing", "true"], []), (ENGINE, ["give back"]),
    ([*ENGINE, "--gradient_checkpointing", "true"], ["give back"]),
])
def test_freed_memory_is_kept_or_given_back_as_the_run_needs_it(words, expected, monkeypatch):
    done = []
    monkeypatch.setattr("utils.launch.keep_freed_memory", lambda: done.append("keep"))
    monkeypatch.setattr("utils.launch.give_back_freed_memory", lambda: done.append("give back"))
    monkeypatch.setattr(sys, "argv", ["train_toy.py", *words])
    start(lambda config: done.append("main"), read_config(Toy, None, ""))
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
