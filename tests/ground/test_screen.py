"""What happens to a script when nobody reads what it prints any more."""

import os
import pty
import subprocess
import sys

import pytest

from utils.config import PROJECT

PRINTS = """
import sys
sys.path.insert(0, sys.argv[1])
from rich.console import Console
from tqdm import tqdm
from utils.screen import outlive_readers
outlive_readers()
for number in tqdm(range(5000), mininterval=0):
    print("line", number, flush=number % 2 == 0)
Console().print("table")
open(sys.argv[2], "w").write("the end")
"""


@pytest.mark.parametrize("streams", ["| head -1", "2>&1 | head -1", "2>&1 | true", ">&-", "2>&-", "2>&- >&-"])
def test_a_script_ends_as_if_it_were_read(streams, tmp_path):
    command = f'"$0" -c "$1" "$2" "$3" {streams}; echo "${{PIPESTATUS[0]}}" > "$4"'
    words = [sys.executable, PRINTS, str(PROJECT / "scripts"), tmp_path / "end", tmp_path / "status"]
    done = subprocess.run(["bash", "-c", command, *words], capture_output=True, text=True, check=True)
    assert (tmp_path / "status").read_text() == "0\n", done.stderr[-2000:]
    assert (tmp_path / "end").read_text() == "the end"
    assert "Error" not in done.stderr and "Exception" not in done.stderr


def test_a_terminal_that_is_closed_stops_no_script(tmp_path):
    ours, theirs = pty.openpty()
    script = subprocess.Popen([sys.executable, "-c", PRINTS, str(PROJECT / "scripts"), str(tmp_path / "end")],
                              stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert script.wait() == 0 and (tmp_path / "end").read_text() == "the end"


def test_a_full_disk_behind_the_output_is_no_missing_reader(tmp_path):
    code = PRINTS.replace("tqdm(range(5000), mininterval=0)", "range(5000)")
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", code, str(PROJECT / "scripts"), str(tmp_path / "end")]
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode != 0 and "No space left" in done.stderr


@pytest.mark.parametrize("script", ["train_sft.py", "train_ppo.py", "prepare_data.py"])
def test_help_can_be_cut(script):
    command = f"'{sys.executable}' '{PROJECT}/scripts/{script}' --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 1
