"""A folder is one run's: the lock of its process, and files and folders of the right kinds."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager

import pytest

import kill_test
from toy_runs import contents, start
from utils.config import PROJECT, UserError
from utils.runs.folder import FILES, FOLDERS, claim, refuse_running

CLAIM = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from utils.config import UserError
from utils.runs.folder import claim
print("ready", flush=True)
sys.stdin.readline()
try:
    claim(Path(sys.argv[2]))
    print("mine", flush=True)
except UserError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def others(folder, count):
    """Processes that are about to claim the folder."""
    words = [sys.executable, "-c", CLAIM, str(PROJECT / "scripts"), str(folder)]
    found = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
             for _ in range(count)]
    assert all(other.stdout.readline() == "ready\n" for other in found)
    return found


def answers(processes):
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return [process.stdout.readline().strip() for process in processes]


@contextmanager
def held(folder):
    """Inside, another process has claimed the folder."""
    folder.mkdir(exist_ok=True)
    [other] = others(folder, 1)
    assert answers([other]) == ["mine"]
    try:
        yield other
    finally:
        other.kill()
        other.communicate()


# ----------------------------------------------------------------------------------------------------- lock


def test_of_many_that_start_at_the_same_moment_one_goes_on(tmp_path):
    processes = others(tmp_path, 6)
    said = answers(processes)
    for process in processes:
        process.kill()
        process.communicate()
    first = processes[said.index("mine")]
    assert said.count("mine") == 1
    who = f"process {first.pid} on '{socket.gethostname()}', since '20"
    assert all(who in line for line in said if line != "mine"), said


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_the_lock_ends_with_its_process(ending, tmp_path):
    with held(tmp_path) as other:
        with pytest.raises(UserError, match="is in use by a run that goes on"):
            refuse_running(tmp_path)
        if ending:
            other.send_signal(ending)
        other.communicate("\n")
        refuse_running(tmp_path)
        claim(tmp_path)
    assert json.loads((tmp_path / "run.lock").read_text())["process"] == os.getpid()


@pytest.mark.parametrize("resume", [False, True])
def test_a_start_beside_a_run_is_refused_and_changes_nothing(resume, tmp_path):
    start(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    with held(tmp_path / "other"):
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size)
                  for path in (tmp_path / "other").rglob("*")}
        with pytest.raises(UserError, match=r"^output_dir: .*/other' is in use by a run that goes on \(proc"):
            start(tmp_path / "other", resume=resume)
        assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size)
                          for path in (tmp_path / "other").rglob("*")}


def test_a_run_that_found_its_folder_free_is_refused_when_another_was_faster(tmp_path, monkeypatch):
    """Both have looked; then the other one opens the folder, and ends before this one comes to it."""
    other = tmp_path / "elsewhere"
    start(other).metrics(1, {"loss": 1.0})
    monkeypatch.setattr("utils.runs.run.claim", lambda folder: shutil.copytree(other, folder,
                                                                                dirs_exist_ok=True) and None)
    with pytest.raises(UserError, match="is in use; go on with --resume"):
        start(tmp_path / "run")


def test_a_fork_has_no_lock_and_takes_none_away(tmp_path):
    claim(tmp_path)
    if (child := os.fork()) == 0:
        try:
            refuse_running(tmp_path)
            os._exit(1)
        except UserError:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    [other] = others(tmp_path, 1)
    [said] = answers([other])
    other.kill()
    other.communicate()
    assert "is in use by a run that goes on" in said


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "[" * 5000, '{"process": 1e999}', "\x1b[31m" * 1000])
def test_what_stands_in_the_lock_file_misleads_nobody(text, tmp_path):
    with held(tmp_path):
        (tmp_path / "run.lock").write_text(text)
        with pytest.raises(UserError, match=r"goes on \(another process\)") as refused:
            refuse_running(tmp_path)
    assert "\x1b" not in str(refused.value)
    refuse_running(tmp_path)


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="^output_dir: .*run.lock' cannot be read"):
        start(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "keep"


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.lockf", lockf)
    start(tmp_path)
    assert "output_dir: its file system has no locks (No locks available)" in capsys.readouterr().out


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_removed_during_the_run_ends_it_in_one_line(again, tmp_path):
    """Also when another run has made it again: no row of this one goes there."""
    run = start(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    if again:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.lock").touch()
    for write in (lambda: run.metrics(1, {"loss": 1.0}), run.metrics_bytes):
        with pytest.raises(UserError, match="was removed or replaced during the run"):
            write()
    assert not again or contents(tmp_path / "run") == ["run.lock"]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 0), (0, 1)])
def test_two_stages_that_start_at_once_in_one_folder(seeds, tmp_path):
    """One ends as if alone, the other one with a line."""
    kill_test.make_models(tmp_path)
    script = str(PROJECT / "scripts" / "train_reward.py")
    words = kill_test.STAGES["reward"].format(models=tmp_path).split()
    runs = [subprocess.Popen([sys.executable, script, *words, "--output_dir", str(tmp_path / "run"), "--seed",
                              str(seed)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"}) for seed in seeds]
    errors = [run.communicate()[1] for run in runs]
    statuses = [run.returncode for run in runs]
    assert sorted(statuses) == [0, 2], errors
    assert "in use" in errors[statuses.index(2)] and "Traceback" not in errors[statuses.index(2)]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seed"] == seeds[statuses.index(0)]


# ---------------------------------------------------------------------------------------------------- kinds


def nothing(path):
    """Remove what is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_folder_in_place_of_a_file_or_the_other_way_round_is_refused(name, tmp_path):
    start(tmp_path, resume=False).metrics(1, {"loss": 1.0})
    nothing(tmp_path / name)
    (tmp_path / name).mkdir() if name in FILES else (tmp_path / name).touch()
    with pytest.raises(UserError, match="^output_dir: .*"):
        start(tmp_path, resume=True)
    assert name in contents(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "train.log", "data.json", "run.lock"])
def test_a_pipe_a_device_or_a_link_in_a_circle_is_refused(name, tmp_path):
    """Opening a pipe would wait for ever."""
    start(tmp_path).metrics(0, {"loss": 1.0})
    for plant in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero"),
                  lambda path: path.symlink_to(path)):
        nothing(tmp_path / name)
        plant(tmp_path / name)
        for resume in (False, True):
            with pytest.raises(UserError, match=f"^output_dir: .*{name}' "):
                start(tmp_path, resume=resume)
