"""Puts `tests/helpers` and `scripts` on the path; see `helpers/environment.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
import environment  # noqa: E402, F401  where the scripts are, and no network; libraries read it when imported

# isort: split
import pytest  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def fresh_accelerate():
    """accelerate remembers precision and engine of a process; each file of tests begins as a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
