"""Does it compute the same on this machine's card, and how fast? One command, without a network.

    python scripts/studies/gpu_check.py --output outputs/gpu_check                    # six minutes
    python scripts/studies/gpu_check.py --output outputs/gpu_check --minutes 9.5      # all that it has
    python scripts/studies/gpu_check.py --output outputs/gpu_check --parts d --shapes 350m 1.3b

a: log-probs, scores, values, gradients, head, attention and sampling equal separate rows of stock models, in
   float32 and bfloat16, for five architectures; FlexAttention and causal kernels; a recorded decoding step
   against ordinary ones; each engine of sampling against the softmax.
b: the three stages on the embedded data through their scripts; a run of each that is stopped and resumed.
c: each stage under DeepSpeed's ZeRO 1, 2, 3 and with offload, its losses against the plain run's.
d: seconds and memory beside trl, beside `generate` and `generate_batch`, and beside our own unshared rows;
   the share of the card's measured matrix-product rate; what plan_memory.py says beside the peak; where the
   time of a step goes, and what the host waits for in it.

The folder gets gpu_check.json, with every check's figures or the reason why it was skipped, and table.md.
Both are written anew as soon as a check ends, so a kill loses only the check that ran. A failed check does
not stop the others; the exit status is then 1. Every job is a process of its own. A job whose time is
measured has the card for itself; the others run at the same time.

Without a card everything runs in a shrunken form, one job after the other. That shows that the checks run.
The times then mean nothing.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # scripts/, as for the stages
from studies.gpu_checks.device import ON_CARD, machine
from studies.gpu_checks.job import PARTS
from studies.gpu_checks.report import markdown
from utils.config import UserError, key
from utils.launch import read_config, start
from utils.paths import PROJECT
from utils.runs.records import read_objects

SHAPES = ["125m", "1.3b", "350m"]  # in the order of their value
LAST_LINES = 6  # of a job's log, in the result
POLL = 2  # seconds between looks at what a job has written
AHEAD = 3  # phases whose jobs import meanwhile, the one that runs included
RESERVE = 8  # seconds for the tables and for killing what is late
COMPILE = "from deepspeed.ops.op_builder import CPUAdamBuilder; CPUAdamBuilder().load()"


@dataclass
class CheckConfig:
    """What to check, and how long it may take."""

    output: str = key("outputs/gpu_check", "Folder of the result; must be new or empty.")
    minutes: float = key(6.0, "What does not fit into this time is skipped.", unit="minutes",
                         low=0.5, high=10_000.0)
    parts: list[str] = key(["a", "b", "c", "d"], "Parts to run; see above.")
    shapes: list[str] = key(SHAPES, f"OPT shapes of part d, of {', '.join(SHAPES)}.")


class Job(NamedTuple):
    """One process: a module of gpu_checks, and the shape it is for."""

    name: str
    shape: str = "-"

    @property
    def label(self) -> str:
        return self.name if self.shape == "-" else f"{self.name}_{self.shape}"


class Phase(NamedTuple):
    """Jobs that run at the same time, the least seconds that they need, and the most that they get."""

    jobs: list[Job]
    least: float
    most: float


def phases_of(config: CheckConfig) -> list[Phase]:
    """In the order of their value; on a machine without a card no two jobs run at the same time.

    First whether it computes the same. Then what nothing has measured yet, the small shape before the large.
    The stages' own times are known, so they come late.
    """
    shapes = config.shapes if ON_CARD else ["mini"]
    small, large = ([one for one in shapes if (one == "1.3b") == is_large] for is_large in (False, True))
    order = [
        Phase([Job("equalities"), Job("kernels"), Job("resume"), Job("engines")], 30, 130),
        *(Phase([Job("speed", shape)], 20, 75) for shape in small[:1]),
        Phase([Job("long_prompts")], 15, 45),
        *(Phase([Job("sampling", shape)], 15, 75) for shape in small[:1]),
        *(Phase([Job("speed", shape)], 25, 110) for shape in large),
        *(Phase([Job("where", shape)], 15, 40) for shape in (large or small)[:1]),
        Phase([Job("stages")], 40, 120),
        *(Phase([Job("sampling", shape)], 15, 60) for shape in large),
        *(Phase([Job("where", shape)], 15, 40) for shape in small[: bool(large)]),
        *(Phase([Job(name, shape)], 20, 100) for shape in small[1:] for name in ("speed", "sampling")),
    ]
    found = []
    for phase in order:
        jobs = [job for job in phase.jobs if PARTS[job.name] in config.parts]
        groups = [jobs] if ON_CARD else [[job] for job in jobs]
        found += [
            phase._replace(jobs=group) if ON_CARD else Phase(group, 1, 600) for group in groups if group
        ]
    return found


class Running:
    """A job's process. It imports what it needs, and waits for `go`."""

    def __init__(self, job: Job, folder: Path):
        self.job, self.began, self.short = job, None, False
        self.results, self.log = folder / f"{job.label}.jsonl", folder / f"{job.label}.log"
        paths = [str(PROJECT / "scripts"), os.environ.get("PYTHONPATH", "")]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.setdefault(
            "CUDA_VISIBLE_DEVICES", "0"
        )  # with several cards transformers' Trainer takes all
        command = [
            sys.executable,
            "-m",
            "studies.gpu_checks.job",
            job.name,
            str(self.results),
            str(folder),
            job.shape,
        ]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                start_new_session=True,
            )

    def go(self, seconds: float, short: bool) -> None:
        """Let it begin; `short`: it gets less than it could use, because the whole check must end."""
        self.began, self.short = time.monotonic(), short
        try:
            self.process.stdin.write(f"{seconds}\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it has ended; `rows` says how
            pass

    def wait(self, ends: float, on_check) -> None:
        """Until it ends; at `ends` it is killed with all processes that it started.

        Args:
            on_check: called with its checks so far, whenever there are more.
        """
        count = 0
        while True:
            try:
                self.process.wait(min(POLL, max(0.1, ends - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                if len(rows := read_objects(self.results)) > count:
                    count = len(rows)
                    on_check(rows)
                if time.monotonic() >= ends:
                    break
        kill_group(self.process)

    def rows(self) -> list[dict]:
        """Its checks; one more, failed, when it did not reach its end."""
        rows, status = read_objects(self.results), self.process.returncode
        if status == 0:
            return rows
        lines = self.log.read_text(errors="replace").strip().splitlines()[-LAST_LINES:]
        late = status == -signal.SIGKILL
        why = "stopped when the time was over" if late else f"ended with status {status}"
        return [
            *rows,
            {
                "part": PARTS[self.job.name],
                "name": f"job {self.job.label}",
                "status": "skipped" if late and self.short else "failed",
                "seconds": round(time.monotonic() - (self.began or time.monotonic()), 2),
                "figures": {},
                "why": "\n".join([*lines, why]),
            },
        ]


def kill_group(process: subprocess.Popen) -> None:
    """End a process that leads a session, and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def skipped(phase: Phase, why: str) -> list[dict]:
    return [
        {
            "part": PARTS[job.name],
            "name": f"job {job.label}",
            "status": "skipped",
            "seconds": 0.0,
            "figures": {},
            "why": why,
        }
        for job in phase.jobs
    ]


def run_phases(phases: list[Phase], folder: Path, ends: float, write) -> list[dict]:
    """All rows; `write(rows)` is called after each check. On a card jobs start early, to import meanwhile."""
    rows, started = [], {}

    def write_more(of_job: list[dict]) -> None:
        write(rows + of_job)

    for number, phase in enumerate(phases):
        left = ends - time.monotonic()
        if left < phase.least:
            rows += skipped(phase, f"needs about {phase.least:.0f} s, {max(0.0, left):.0f} s were left")
            continue
        timed_first = number == 0 and len(phase.jobs) == 1  # nothing else may start beside it
        ahead = phases[number : number + 1] if timed_first or not ON_CARD else phases[number : number + AHEAD]
        for job in (job for one in ahead for job in one.jobs):
            started.setdefault(job, None)
            started[job] = started[job] or Running(job, folder)
        seconds = min(phase.most, left)
        for job in phase.jobs:
            started[job].go(seconds, short=left < phase.most)
        phase_ends = time.monotonic() + seconds
        for job in phase.jobs:
            started[job].wait(phase_ends, write_more)
            rows += started.pop(job).rows()
            write(rows)
    for running in started.values():
        if running is not None:
            kill_group(running.process)
    write(rows)
    return rows


def refuse_unknown(config: CheckConfig) -> None:
    """Raise UserError for a part or a shape that does not exist."""
    for name, known in (("parts", sorted(set(PARTS.values()))), ("shapes", SHAPES)):
        for value in getattr(config, name):
            if value not in known:
                raise UserError(f"{name}: '{value}' is unknown; there are: {' | '.join(known)}")


def main(config: CheckConfig) -> None:
    refuse_unknown(config)
    ends = time.monotonic() + 60 * config.minutes - RESERVE
    folder = Path(config.output).absolute()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"output: '{folder}' is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    about = machine()
    compiling = None
    if ON_CARD and "c" in config.parts:  # offload needs it, and it takes a minute of two cores
        with (folder / "compile.log").open("w") as log:
            compiling = subprocess.Popen(
                [sys.executable, "-c", COMPILE], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def write(rows):
        (folder / "gpu_check.json").write_text(
            json.dumps({"machine": about, "checks": rows}, indent=1) + "\n"
        )
        (folder / "table.md").write_text(markdown(about, rows) + "\n")

    try:
        rows = run_phases(phases_of(config), folder, ends, write)
    finally:
        if compiling:
            kill_group(compiling)
    print(markdown(about, rows))
    if any(row["status"] == "failed" for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    start(main, read_config(CheckConfig, None, __doc__, notes=sys.stderr))
