"""The run directory is the experiment: configuration, metrics, samples, log, summary, plots, checkpoints, final."""

import hashlib
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from utils.config import PROJECT, UserError, find_input, save_config
from utils.data import TLDR_TEMPLATE
from utils.distributed import world


class Run:
    """One stage's run directory. Made when all inputs have been checked, so that a mistake leaves nothing behind."""

    def __init__(self, config, stage: str, notes: list[str]):
        self.config, self.stage, self.is_main = config, stage, world().is_main_process
        self.folder = Path(config.output_dir).expanduser()
        self.started = time.time()
        if self.is_main:
            self._open()
        self.log = self._logger()
        for note in notes:
            self.say(note)
        self.stop_signal = None
        self._tracker = None

    def _open(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "plots").mkdir(exist_ok=True)
        save_config(self.config, self.folder / "config.yaml")

    def _logger(self):
        log = logging.getLogger(f"{self.stage}.{self.folder}")
        log.setLevel(logging.INFO)
        log.propagate = False
        log.handlers.clear()
        if self.is_main:
            for handler, layout in (
                (logging.StreamHandler(sys.stdout), "%(message)s"),
                (logging.FileHandler(self.folder / "train.log", encoding="utf-8"), "%(asctime)s %(message)s"),
            ):
                handler.setFormatter(logging.Formatter(layout))
                log.addHandler(handler)
        return log

    def say(self, message: str) -> None:
        """One line for people: console and train.log."""
        self.log.info(message)

    def metrics(self, step: int, values: dict) -> None:
        """One line of metrics.jsonl, and the experiment trackers."""
        if self.is_main:
            _append(self.folder / "metrics.jsonl", [{"step": step, **values}])
            if self._tracker:
                self._tracker.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def use_tracker(self, accelerator) -> None:
        """Send metrics to the accelerator's trackers too."""
        self._tracker = accelerator

    def samples(self, rows: list[dict]) -> None:
        """Lines of samples.jsonl."""
        if self.is_main:
            _append(self.folder / "samples.jsonl", rows)

    def read_metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def finish(self, summary: dict) -> None:
        """Write summary.json: flat, the stage's final figures."""
        summary = {**summary, "peak_memory_mb": peak_memory_mb(), "seed": self.config.seed}
        self.summary = {k: round(v, 6) if isinstance(v, float) else v for k, v in summary.items()}
        if self.is_main:
            _write_json(self.folder / "summary.json", self.summary)

    def save_final(self, model, tokenizer, parents: dict[str, str], extra: dict) -> None:
        """`final/`: the model, its tokenizer and stage.json, written under another name and then renamed."""
        if not self.is_main:
            return
        temporary = self.folder / "final.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # half-written leftovers of a killed run, ours alone
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        stage = {"stage": self.stage, "parents": {k: _identity(v) for k, v in parents.items()},
                 **task_of(tokenizer), **extra, "seed": self.config.seed, "commit": _commit()}
        _write_json(temporary / "stage.json", stage)
        temporary.rename(self.folder / "final")

    def catch_signals(self) -> None:
        """Ctrl-C and SIGTERM ask the run to save and stop; a second Ctrl-C stops at once."""
        def ask(number, frame):
            if self.stop_signal is not None:
                raise KeyboardInterrupt
            self.stop_signal = number
            self.say("stopping: saving a checkpoint first (press Ctrl-C again to stop at once)")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)

    def stopped(self) -> None:
        """Say how to go on, and leave with the signal's exit status."""
        command = " ".join(["python", *sys.argv, *([] if self.config.resume else ["--resume"])])
        self.say(f"stopped; go on with: {command}")
        sys.exit(128 + self.stop_signal)


def refuse_used_folder(config) -> None:
    """Raise UserError for a non-empty `output_dir` without `resume`, and for `resume` without anything to resume."""
    folder = Path(config.output_dir).expanduser()
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if used and not config.resume:
        raise UserError(f"output_dir: '{folder}' is in use; go on with --resume, or name a new --output_dir")
    if config.resume and (folder / "final").exists():
        raise UserError(f"output_dir: '{folder}' is finished (it has final/); name a new --output_dir")
    if config.resume and not (folder / "config.yaml").exists():
        raise UserError(f"output_dir: nothing to resume in '{folder}'; leave --resume out to start")


def check_task(tokenizer, parents: dict[str, str]) -> None:
    """Refuse parents that were trained on another task, before a weight of theirs is loaded.

    Args:
        tokenizer: the one this stage uses.
        parents: configuration key -> model folder; a hub model carries no stage.json and is not checked.

    Raises:
        UserError: naming the key, what differs, and both values.
    """
    ours = task_of(tokenizer)
    for field, name in parents.items():
        folder = next((f for f in (Path(name).expanduser(), PROJECT / name) if f.is_dir()), None)
        if folder is None or not (folder / "stage.json").exists():
            continue
        theirs = json.loads((folder / "stage.json").read_text())
        for item, value in ours.items():
            if item in theirs and theirs[item] != value:
                raise UserError(f"{field}: '{name}' was trained with another {item.replace('_', ' ')} "
                                f"({theirs[item]!r:.60} there, {value!r:.60} here); use models of one family")


def task_of(tokenizer) -> dict:
    """What two stages must agree on."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return {
        "prompt_template": TLDR_TEMPLATE,
        "tokenizer_sha256": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def peak_memory_mb() -> float:
    """Largest resident memory of this process, or memory allocated on its GPU, in MiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def stage_summaries(folder: Path) -> dict[str, dict]:
    """summary.json of each finished stage beside this one, by stage name."""
    return {stage: json.loads((folder / stage / "summary.json").read_text())
            for stage in ("sft", "reward", "ppo") if (folder / stage / "summary.json").exists()}


def _identity(name: str) -> dict:
    """Which weights a parent had: its path and the checksum of its safetensors; a hub model its name."""
    try:
        folder = find_input(name, "parent")
    except UserError:
        return {"name": name}
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}
    return {"name": name, "sha256": digests}


def _commit() -> str:
    try:
        done = subprocess.run(["git", "-C", PROJECT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return "unknown"
    return done.stdout.strip() or "unknown"


def _append(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _write_json(path: Path, value: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
