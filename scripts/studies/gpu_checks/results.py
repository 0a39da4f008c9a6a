"""What a check leaves behind, one JSON line each, so that a job that is killed leaves what it had done."""

import json
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from studies.gpu_checks.device import free_memory

LAST_LINES = 6  # of a traceback, in the result


class Outcome(NamedTuple):
    """What a check found; `wrong` says why it failed, None when it did not."""

    figures: dict
    wrong: str | None = None


class Results:
    """Writes the checks of one job.

    Args:
        path: of the JSON lines.
        part: letter of the part, as in gpu_check.py.
        seconds: that the job has.
    """

    def __init__(self, path: Path, part: str, seconds: float):
        self.path, self.part, self.ends = path, part, time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self.ends - time.monotonic()

    def check(self, name: str, needs: float, function) -> Outcome | None:
        """Run `function() -> Outcome` and record it; skip it when fewer than `needs` seconds are left.

        A check that raises anything is recorded as failed, and the job goes on.
        """
        if self.left() < needs:
            self.skip(name, f"needs about {needs:.0f} s, {max(0, self.left()):.0f} s were left")
            return None
        began = time.monotonic()
        try:
            outcome = function()
        except Exception:
            lines = traceback.format_exc().strip().splitlines()
            outcome = Outcome({}, "\n".join(lines[-LAST_LINES:]))
        free_memory()
        status = "failed" if outcome.wrong else "passed"
        self._write(name, status, outcome.figures, outcome.wrong, time.monotonic() - began)
        return outcome

    def skip(self, name: str, why: str) -> None:
        self._write(name, "skipped", {}, why, 0.0)

    def _write(self, name, status, figures, why, seconds):
        row = {
            "part": self.part,
            "name": name,
            "status": status,
            "seconds": round(seconds, 2),
            "figures": figures,
        }
        if why:
            row["why"] = why
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
