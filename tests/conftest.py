"""Puts `tests/helpers` and `scripts` on the path; see `helpers/environment.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "helpers"))
import environment  # noqa: E402, F401  where the scripts are, and no network
