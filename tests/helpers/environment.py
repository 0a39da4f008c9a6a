"""Tests and helpers import as the scripts do: `scripts/` is the import root. Nothing may use a network."""

import os
import sys
import tempfile
from pathlib import Path

CACHE = tempfile.TemporaryDirectory(prefix="opt-rlhf-tests-")  # removed at exit
os.environ["HF_DATASETS_CACHE"] = CACHE.name
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.pop("COLUMNS", None)  # several workers of pytest have one, and tables would fit it
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
