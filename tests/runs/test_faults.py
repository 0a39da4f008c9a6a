"""A disk that takes no more, a folder that is gone: one line, and nothing that looks finished."""

import json
import os
import re
import subprocess
import sys

import pytest

import faults


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_fault_of_the_disk_ends_a_run_in_one_line(stage, tmp_path):
    """A process of its own: forks want no threads."""
    subprocess.run([sys.executable, faults.__file__, stage, str(tmp_path)], check=True, capture_output=True,
                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    undisturbed, *report = json.loads((tmp_path / "report.json").read_text())
    assert undisturbed["status"] == 0 and undisturbed["final"] and len(report) == 21
    for row in report:
        lines = [line for line in row["said"].splitlines() if line.startswith("error: ")]
        case = f"{row['fault']} at {row['number']}: {row['said'][-2000:]}"
        assert "Traceback" not in row["said"] and row["status"] == 2 and not row["final"], case
        assert len(lines) == 1, case
        if row["fault"] in ("removed", "made again"):
            reasons = "was removed or replaced during the run|cannot be written"
        elif row["fault"] == "limit":
            reasons = "File too large"
        else:
            reasons = os.strerror(faults.REFUSALS[row["fault"]])
        assert re.search(reasons, lines[0]), case
