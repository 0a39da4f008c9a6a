"""Where a repetition's time goes: functions that are watched while they run."""

import time
from collections import defaultdict
from functools import wraps

PARTS = ("generation", "scoring", "update", "data", "other")


class Clock:
    """Seconds by part. A watched function that another one calls takes its time out of the other's."""

    def __init__(self):
        self.seconds, self.inside = defaultdict(float), []

    def watch(self, owner, name: str, part) -> None:
        """Charge the time in `owner.name` to a part; `part` may be a function that says which when it is
        called.
        """
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            began, number = time.perf_counter(), len(self.inside)
            self.inside.append(0.0)  # seconds in watched functions that this one calls
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                self.seconds[part() if callable(part) else part] += seconds - self.inside.pop()
                if number:
                    self.inside[-1] += seconds

        setattr(owner, name, timed)

    def take(self, total: float) -> dict[str, float]:
        """Seconds by PARTS since the last time, of `total`; what no watched function took is `other`."""
        parts = {part: self.seconds[part] for part in PARTS}
        parts["other"] = total - sum(parts.values())
        self.seconds.clear()
        return parts
