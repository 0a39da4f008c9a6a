"""Runs of a stage that does nothing, for tests of their folder."""

from dataclasses import dataclass

from utils.config import key
from utils.data.report import DataReport
from utils.runs.run import Run, refuse_used_folder
from utils.stage_keys import StageConfig


@dataclass
class Toy(StageConfig):
    """A stage's configuration."""

    max_new_tokens: int = key(8, "What final/ is to generate.", unit="tokens")


def report_of(*notes):
    report = DataReport()
    report.notes += notes
    return report


def start(folder, resume=False, stage="sft", notes=()):
    config = Toy(output_dir=str(folder), resume=resume, seed=7)
    refuse_used_folder(config)
    return Run(config, stage, report_of(*notes))


def contents(folder):
    return sorted(path.name for path in folder.iterdir())
