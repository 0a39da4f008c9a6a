"""Signals: a run saves before it leaves, and says what it does."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import kill_test
from run_folders import checkpoints
from toy_runs import start
from utils.config import PROJECT
from utils.runs.signals import AGAIN_SECONDS, catch_signals

INT, TERM, HUP = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@pytest.fixture(autouse=True)
def signals():
    """As they are for a new process, and afterwards as they were."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (INT, TERM, HUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the test sets."""
    seconds = [100.0]
    monkeypatch.setattr("utils.runs.signals.time.monotonic", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(("sent", "at_once"), [
    ([(0, INT)], False),
    ([(0, INT), (0.1, INT)], False),  # the terminal's and the launcher's
    ([(0, INT), (AGAIN_SECONDS, INT)], True),
    ([(0, TERM), (0.1, TERM), (60, TERM)], False),  # torchrun's, Slurm's, systemd's
    ([(0, HUP), (0.1, TERM), (60, HUP)], False),
    ([(0, TERM), (0.1, INT), (1, INT)], False),
    ([(0, TERM), (60, INT)], True),
    ([(0, HUP)], False),
])
def test_only_a_ctrl_c_after_a_while_stops_at_once(sent, at_once, clock):
    asked, stopped = [], False
    catch_signals(asked.append)
    for after, number in sent:
        clock[0] = 100.0 + after
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            stopped = True
    assert (asked, stopped) == ([sent[0][1]], at_once)


@pytest.mark.parametrize("number", [INT, HUP])
def test_what_the_process_was_started_to_ignore_stays_ignored(number):
    """SIGHUP under nohup, SIGINT of a job in the background."""
    signal.signal(number, signal.SIG_IGN)
    asked = []
    catch_signals(asked.append)
    signal.raise_signal(number)
    assert not asked


def test_a_signal_in_the_steps_promises_a_checkpoint_and_one_after_them_none(tmp_path, capsys):
    run = start(tmp_path / "in")
    run.catch_signals()
    signal.raise_signal(TERM)
    assert "stopping: a checkpoint is saved after this step" in capsys.readouterr().out
    assert run.stop_signal == TERM
    run.finish()  # the last step had looked for signals before this one came
    assert "all steps are done and saved; the final figures and final/ follow" in capsys.readouterr().out
    run = start(tmp_path / "after")
    run.catch_signals()
    run.finish()
    assert capsys.readouterr().out == ""
    signal.raise_signal(TERM)
    said = capsys.readouterr().out
    assert "all steps are done and saved" in said and "stopping" not in said


def test_under_torchrun_the_line_says_what_may_be_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    start(tmp_path).catch_signals()
    signal.raise_signal(TERM)
    assert "30 seconds: what is not saved by then is lost" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ real runs


WORDS = ("--model {0}/base --max_steps {1} --eval_steps 1000 --save_steps 1000 --logging_steps 1 "
         "--per_device_batch_size 4 --eval_rows 2 --test_rows 2 --report_to none")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    kill_test.make_models(folder)
    return folder


def command(models, out, steps, *more):
    words = WORDS.format(models, steps).split()
    return [str(PROJECT / "scripts" / "train_reward.py"), *words, "--output_dir", str(out), *more]


def wait_for_steps(out: Path, process) -> None:
    """Until a few steps are logged."""
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_bytes().count(b"\n") < 3:
        assert process.poll() is None, "the run has ended already"
        time.sleep(0.05)


def workers_of(launcher: int) -> list[int]:
    return list(map(int, Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "whom"), [(TERM, "launcher"), (TERM, "all"), (HUP, "all twice"),
                                              (INT, "all twice")])
def test_a_signal_to_torchrun_and_its_workers_saves_a_checkpoint(number, whom, models, tmp_path):
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         *command(models, tmp_path, 5000)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=ENVIRONMENT)
    wait_for_steps(tmp_path, launcher)
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    for _ in range(2 if whom == "all twice" else 1):
        for process in [launcher.pid, *(workers if whom != "launcher" else [])]:
            os.kill(process, number)
    output = launcher.communicate()[0]
    assert len(checkpoints(tmp_path)) == 1, output[-3000:]
    assert "stopping: a checkpoint is saved after this step" in output and "stopped; go on with" in output


@pytest.mark.slow
@pytest.mark.parametrize("trains", [True, False])
def test_a_terminal_that_is_closed_saves_a_checkpoint(trains, models, tmp_path):
    """The kernel sends SIGHUP to the process of a terminal that is gone, and refuses what it prints."""
    out = tmp_path / "run"
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, *command(models, out, 50_000)])
    seen = "/loss" if trains else "eval/"  # before its first step there is nothing to save
    while not ((out / "metrics.jsonl").exists() and seen in (out / "metrics.jsonl").read_text()):
        os.read(terminal, 10_000)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + HUP
    assert len(checkpoints(out)) == trains
    assert ("stopped; go on with" in (out / "train.log").read_text()) == trains


@pytest.mark.slow
def test_a_run_whose_output_is_cut_ends_like_any_other(models, tmp_path):
    words = " ".join([sys.executable, *command(models, tmp_path / "run", 5)])
    shell = f"{words} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert done.returncode == 0 and (tmp_path / "run" / "final" / "model.safetensors").exists(), done.stderr
    assert "test" in (tmp_path / "run" / "train.log").read_text()
