"""What the stages of a run cost: seconds, memory, and the card's energy."""

import shutil
import subprocess
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from statistics import fmean

from studies.real_run.records import read_json


@contextmanager
def power_to(path: Path):
    """Append the time and the card's watts to a file every second meanwhile; nothing without a card."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    query = ["nvidia-smi", "--query-gpu=timestamp,power.draw", "--format=csv,noheader,nounits", "-l", "1"]
    with path.open("a") as file:
        process = subprocess.Popen(query, stdout=file, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def cost_of(out: Path) -> dict[str, dict]:
    """Of each stage the seconds with its start and the peak memory; the card's mean power and the energy
    meanwhile, other processes on it included.
    """
    power, samples = out / "power.csv", []
    for line in power.read_text().splitlines() if power.is_file() else ():
        at, _, watts = line.partition(",")
        with suppress(ValueError):  # a line that was cut off, or a card that does not say
            samples.append((datetime.strptime(at.strip(), "%Y/%m/%d %H:%M:%S.%f").timestamp(), float(watts)))
    costs = {}
    for path in sorted((out / "times").glob("*.json"), key=lambda path: path.stat().st_mtime):
        times, summary = read_json(path), read_json(out / path.stem / "summary.json")
        seconds = times["ended"] - times["began"]
        costs[path.stem] = {"seconds": seconds, "peak_memory_mb": summary["peak_memory_mb"]}
        watts = [watt for at, watt in samples if times["began"] <= at <= times["ended"]]
        if watts:
            costs[path.stem] |= {"watts": fmean(watts), "kwh": fmean(watts) * seconds / 3.6e6}
    return costs
