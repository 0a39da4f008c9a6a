"""The run directory is the experiment: configuration, metrics, samples, log, summary, plots, checkpoints,
final.
"""

import itertools
import logging
import math
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate.utils import LoggerType
from safetensors.torch import save_file
from transformers.integrations import get_available_reporting_integrations

from utils import durable
from utils.config import PROJECT, UserError, find_input, save_config
from utils.console import AboveBars
from utils.data.report import DataReport
from utils.distributed import on_main, world
from utils.input_files import read_json
from utils.models.four_bit import merge_dense
from utils.models.lora import merge_adapter, save_adapter
from utils.models.parents import Parent, task_of
from utils.runs.folder import LOCK, claim, refuse_lost, refuse_other_kinds, refuse_running
from utils.runs.hub import refuse_closed_hub
from utils.runs.origins import BY_CONTENT, FREE, origins_of
from utils.runs.records import append_rows, broken_lines, end_line, read_whole_rows, write_json
from utils.runs.signals import catch_signals, time_for_saving
from utils.runs.tracking import Trackers
from utils.yaml_files import read_yaml
from utils.zero import resumable, save_pretrained

# what a stage counts, and calls its checkpoints by
UNITS = {"sft": "step", "reward": "step", "ppo": "update"}
SHOWN = 4  # validation posts whose samples are written at every evaluation: always the first ones


class Run:
    """One stage's run directory. Made when all inputs have been checked, so that a mistake leaves nothing
    behind.
    """

    def __init__(self, config, stage: str, report: DataReport, parents: Sequence[Parent] = ()):
        self.config, self.stage, self.is_main = config, stage, world().is_main_process
        self.unit = UNITS[stage]
        self.folder = Path(config.output_dir).expanduser()
        self.started = time.monotonic()
        notes = []
        on_main(lambda: notes.extend(self._open()))
        self._lines = self._logger()
        for note in [*notes, *report.notes]:
            self.log(note)
        # taken now, since the models' folders may change while the run goes on
        self.origins = origins_of(config, stage, report, parents) if self.is_main else None
        if self.is_main:
            write_json(self.folder / "data.json", report.figures)
            self._write_all("rejected_rows.jsonl", report.rejected())
        self.stop_signal = None
        self._trackers = None

    def _open(self) -> list[str]:
        """Make the folder, for this run alone. Returns lines for the log."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            no_locks = claim(self.folder)
            refuse_used_folder(self.config)  # again: another run may have been faster
            # the first, for without it nothing can be resumed
            save_config(self.config, self.folder / "config.yaml")
            (self.folder / "plots").mkdir(exist_ok=True)
            if not self.config.resume:  # of a run that ended before its first step
                for name in ("metrics.jsonl", "samples.jsonl"):
                    (self.folder / name).unlink(missing_ok=True)
            (self.folder / "train.log").touch()
            end_line(self.folder / "metrics.jsonl")
        except OSError as error:
            raise UserError(f"output_dir: '{self.folder}' cannot be written to "
                            f"({error.strerror}); name another") from None
        return [f"output_dir: its file system has no locks ({no_locks}); start no second run there"
                ] if no_locks else []

    def _logger(self):
        log = logging.getLogger(f"{self.stage}.{self.folder}")
        log.setLevel(logging.INFO)
        log.propagate = False
        log.handlers.clear()
        if self.is_main:
            for handler, layout in (
                (AboveBars(sys.stdout), "%(message)s"),
                (logging.FileHandler(self.folder / "train.log", encoding="utf-8"), "%(asctime)s %(message)s"),
            ):
                handler.setFormatter(logging.Formatter(layout))
                log.addHandler(handler)
        return log

    def log(self, message: str) -> None:
        """One line for people: console and train.log."""
        self._lines.info(message)

    def metrics(self, step: int, values: dict) -> None:
        """One line of metrics.jsonl, and the experiment trackers. NaN and infinity, which JSON has not,
        become null.
        """
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.is_main:
            refuse_lost(self.folder)
            append_rows(self.folder / "metrics.jsonl", [{"step": step, **values}])
            if self._trackers:
                self._trackers.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def use_trackers(self, accelerator) -> None:
        """Send metrics and samples to the accelerator's trackers too."""
        self._trackers = Trackers(accelerator, self.config, self.folder, self.log)

    def end_tracking(self) -> None:
        """Let the trackers write what they hold back."""
        if self._trackers:
            self._trackers.end()

    def samples(self, step: int, posts: str, rows: list[dict]) -> None:
        """Add what the model wrote for some posts to samples.jsonl and, as text, to the trackers.

        Args:
            posts: "validation" or "test".
        """
        if self.is_main:
            written = [{"step": step, "posts": posts, **row} for row in rows]
            append_rows(self.folder / "samples.jsonl", written)
            if self._trackers:
                text = "\n\n---\n\n".join("\n\n".join(f"**{name}**: {value}" for name, value in row.items())
                                         for row in rows)
                self._trackers.log({f"samples/{posts}": text}, step=step)

    def rewind_samples(self, step: int) -> None:
        """Forget the samples after a step, and those of the end: the run is going to write them again."""
        path = self.folder / "samples.jsonl"
        if self.is_main and path.exists():
            self._write_all(path.name, [row for row in read_whole_rows(path)
                                        if row.get("posts") != "test" and row["step"] <= step])

    def _write_all(self, name: str, rows: Iterable[dict]) -> None:
        """A whole file of rows, none when there is no row; one of the run that this one goes on with is
        replaced.
        """
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        first = next(rows := iter(rows), None)
        if first is None:
            path.unlink(missing_ok=True)
        else:
            append_rows(temporary, itertools.chain([first], rows))
            durable.move(temporary, path)

    def metrics_bytes(self) -> int:
        """Size of metrics.jsonl, by which a checkpoint remembers what was logged before it."""
        refuse_lost(self.folder)
        self._sync_rows()
        path = self.folder / "metrics.jsonl"
        return path.stat().st_size if path.exists() else 0

    def _sync_rows(self) -> None:
        """A checkpoint and final/ must not know of more rows than a loss of power leaves."""
        for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
            if path.exists():
                durable.fsync(path)

    def rewind(self, size: int) -> None:
        """Forget the metrics after the first so many bytes: the run is going to log them again. Say what of
        them is lost.
        """
        if not self.is_main:
            return
        path, found = self.folder / "metrics.jsonl", self.metrics_bytes()
        if found > size:
            os.truncate(path, size)
            end_line(path)
        elif found < size:
            self.log(f"'{path}' has {found} of the {size} bytes that were logged before this checkpoint: the "
                     "rest is lost, and the curves have a hole there")
        if broken := broken_lines(path):
            self.log(f"'{path}': {broken} lines are no rows of metrics; the curves leave them out")

    def read_metrics(self) -> list[dict]:
        return read_whole_rows(self.folder / "metrics.jsonl")

    def write_summary(self, summary: dict) -> None:
        """Write summary.json: flat, the stage's final figures."""
        summary = {**summary, "seconds": time.monotonic() - self.started, "peak_memory_mb": peak_memory_mb(),
                   "seed": self.config.seed}
        summary = {k: round(v, 6) if isinstance(v, float) else v for k, v in summary.items()}
        if self.is_main:
            write_json(self.folder / "summary.json", summary)

    def save_final(self, model, tokenizer, parents: list[Parent], extra: dict, card: str,
                   tensors: dict[str, dict] | None = None) -> None:
        """`final/`: the model, its tokenizer, stage.json and the card, written aside and then renamed.

        It comes last, since a run with final/ counts as finished.

        Args:
            extra: what stage.json says besides.
            card: the text of README.md.
            tensors: what other .safetensors files hold, by their names.
        """
        config = self.config
        if not config.load_in_4bit:
            merge_adapter(model)
        elif self.is_main and not config.save_adapters:
            merge_dense(model, parents[0].base.config.dtype or torch.float32)
        temporary = self.folder / "final.tmp"
        if self.is_main:
            shutil.rmtree(temporary, ignore_errors=True)  # half-written leftovers of a killed run, ours alone
        model.config.use_cache = True  # a base model may have it off; whoever generates with final/ wants it
        if model.can_generate():
            model.generation_config.use_cache = True
        if not config.save_adapters:
            save_pretrained(model, temporary)
        elif self.is_main:
            save_adapter(model, parents[0].base, temporary)
        if not self.is_main:
            return
        tokenizer.save_pretrained(temporary)
        for name, state in (tensors or {}).items():
            save_file(state, temporary / name)
        stage = {"stage": self.stage, "parents": {parent.key: parent.identity for parent in parents},
                 **task_of(tokenizer), **extra, "load_in_4bit": config.load_in_4bit,
                 **({"base": parents[0].base.identity} if config.save_adapters else {}),
                 "seed": self.config.seed, "commit": _commit()}
        write_json(temporary / "stage.json", stage)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        refuse_lost(self.folder)
        self._sync_rows()
        durable.move(temporary, self.folder / "final")

    def catch_signals(self) -> None:
        """From here on Ctrl-C, SIGTERM and SIGHUP ask the run to save and stop."""
        what = "a checkpoint is saved" if resumable() else "the run ends, without a checkpoint,"
        self._when_asked = (f"stopping: {what} after this {self.unit} (Ctrl-C again, some seconds later, "
                            f"stops at once){time_for_saving()}")
        catch_signals(self._ask)

    def _ask(self, number: int) -> None:
        self.stop_signal = number
        self.log(self._when_asked)

    def finish(self) -> None:
        """All steps are done and saved: a signal comes too late to stop them."""
        self._when_asked = (f"all {self.unit}s are done and saved; the final figures and final/ follow (a "
                            "run that is stopped before its end goes on there with --resume)")
        if self.stop_signal is not None:  # after the last step had looked
            self.log(self._when_asked)

    def stopped(self) -> None:
        """Say how to go on, and leave with the signal's exit status."""
        processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes] if processes != "1" else []
        command = shlex.join([sys.executable, *launcher, *sys.argv,
                              *([] if self.config.resume else ["--resume"])])
        if not resumable():
            self.log("stopped; a run with its optimizer on NVMe cannot go on "
                     "(docs/scaling.md): start a new one")
        elif os.environ.get("WORLD_SIZE", "1") != processes:  # where the nodes met is not known here
            self.log("stopped; go on with the same command on each node, and --resume")
        else:
            self.log(f"stopped; go on with: {command}")
        sys.exit(128 + self.stop_signal)


def refuse_impossible(config) -> None:
    """Everything that would stop the run later and can be known before a file is read.

    Raises:
        UserError: for an output folder in use, another configuration than that of the run to resume, a
            tracker that is not installed, a hub that takes no upload, or half precision on a machine that has
            none.
    """
    on_main(lambda: refuse_used_folder(config))
    trackers = {name for name in get_available_reporting_integrations() if name in LoggerType}
    for name in config.report_to:
        if name not in {*trackers, "none"}:
            raise UserError(f"report_to: '{name}' is not installed, or no tracker; here are: "
                            f"{', '.join(sorted(trackers))}, none")
    if config.push_to_hub:
        on_main(lambda: refuse_closed_hub(config.push_to_hub))
    if config.mixed_precision == "fp16" and world().device.type == "cpu":
        raise UserError("mixed_precision: fp16 needs a GPU; take bf16 or no")


def refuse_used_folder(config) -> None:
    """Raise UserError for a non-empty `output_dir` without `resume`, and for `resume` without its run to go
    on with.
    """
    try:
        folder = Path(config.output_dir).expanduser()
        refuse_running(folder)
        used = (folder.exists()
                and not (folder.is_dir() and (not any(folder.iterdir()) or _nothing_trained(folder))))
    except (OSError, RuntimeError) as error:  # too long, or ~somebody who is not here
        reason = getattr(error, "strerror", error)
        raise UserError(
            f"output_dir: '{config.output_dir}' cannot be used ({reason}); name another") from None
    has_run = (folder / "config.yaml").exists()
    if used and not config.resume:
        way = "go on with --resume, or name" if has_run else "it holds no run to go on with; name"
        raise UserError(f"output_dir: '{folder}' is in use; {way} a new --output_dir")
    if config.resume and (folder / "final").exists():
        raise UserError(f"output_dir: '{folder}' is finished (it has final/); name a new --output_dir")
    if config.resume and not has_run:
        way = "name a new --output_dir" if used else "leave --resume out to start"
        raise UserError(f"output_dir: nothing to resume in '{folder}': it has no config.yaml; {way}")
    if config.resume:
        refuse_other_kinds(folder)
        _refuse_other_config(config, folder / "config.yaml")


def _nothing_trained(folder: Path) -> bool:
    """Whether a run ended here before its first step, by a mistake say: nothing to lose, and nothing to go on
    with.
    """
    config = {"config.yaml", "config.tmp"}
    ours = {*config, "data.json", "data.tmp", "rejected_rows.jsonl", "rejected_rows.tmp", "metrics.jsonl",
            "samples.jsonl", "samples.tmp", "train.log", "plots", "tensorboard", "checkpoints", "wandb",
            "wandb_id"}
    names = {path.name for path in folder.iterdir()} - {LOCK}
    if not names:
        return True
    if not names & config or not names <= ours:
        return False
    refuse_other_kinds(folder)
    checkpoints = [path for path in folder.glob("checkpoints/*") if not path.name.startswith("best-")]
    metrics = folder / "metrics.jsonl"
    return not checkpoints and not broken_lines(metrics) and not any(
        row["step"] for row in read_whole_rows(metrics))


def _refuse_other_config(config, path: Path) -> None:
    """Compare with the run's config.yaml, before the data is read; the checkpoint knows more."""
    saved, _ = read_yaml(path)
    for name, value in asdict(config).items():
        if name not in (*FREE, *BY_CONTENT) and saved.get(name, value) != value:
            raise UserError(f"resume: '{name}' is {value!r} here, but {saved[name]!r} in '{path}'; resume "
                            "with the configuration that the run began with, or name a new --output_dir")


def peak_memory_mb() -> float:
    """Largest resident memory of this process, or memory allocated on its GPU, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def finished_run(name: str, stage: str, field: str) -> tuple[Path, dict]:
    """The folder of one stage's finished run, looked up as all inputs are, and its summary.json.

    Args:
        name: the run's folder, or with `stage` the folder that it lies in under the stage's name.
        stage: "sft", "reward", "ppo", or "" when `name` is the run's own folder.

    Raises:
        UserError: naming the key `field`, when it is not there or not finished.
    """
    folder = find_input(name, field) / stage
    if not (folder / "summary.json").exists():
        raise UserError(f"{field}: no finished run in '{folder}' (it has no summary.json); train "
                        f"it to its end first")
    try:
        summary = read_json(folder / "summary.json")
    except UserError:
        summary = None
    if not isinstance(summary, dict):
        raise UserError(f"{field}: '{folder / 'summary.json'}' is no JSON object; train that stage again")
    return folder, summary


def output_file(name: str, field: str, suffix: str) -> Path:
    """Where a result goes. Raises UserError when its folder is not there or its name ends otherwise than in
    `suffix`.
    """
    path = Path(name)
    if path.suffix != suffix or not path.parent.is_dir():
        raise UserError(f"{field}: '{name}' must be a {suffix} file in a folder that exists")
    return path


def _commit() -> str:
    try:
        done = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True,
                              check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"
