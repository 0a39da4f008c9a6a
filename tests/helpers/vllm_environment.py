"""The environment of requirements-vllm.txt, for tests that start a process in it."""

import os
import subprocess
from pathlib import Path

import pytest

from utils.config import PROJECT

PYTHON = Path(os.environ.get("VLLM_PYTHON", PROJECT / ".venv-vllm" / "bin" / "python"))
NEEDS_VLLM = [pytest.mark.slow, pytest.mark.skipif(
    not PYTHON.is_file(), reason="vLLM is not installed: requirements-vllm.txt says how")]


def run(script: str, *words: str) -> None:
    """Run a script of the project there; what this environment has set is not for it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([PYTHON, PROJECT / script, *words], env=environment, cwd=PROJECT,
                          capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-3000:]
