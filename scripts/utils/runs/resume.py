"""Where a run goes on: the newest checkpoint that is whole, together with the best weights that it names."""

import json
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import broadcast_object_list

from utils.config import UserError
from utils.distributed import on_main, world
from utils.runs.checkpoints import CheckpointFolder, damage, next_best, number_of
from utils.runs.origins import changes_accepted
from utils.runs.run import Run

PROGRESS = "progress.json"


class Point(NamedTuple):
    """A checkpoint to go on from."""

    path: Path
    progress: dict  # what the loop wrote into progress.json


def find_point(checkpoints: CheckpointFolder, kind: str) -> Point | None:
    """The checkpoint to go on from; None: from the beginning. Nothing is changed, and damage is logged.

    A checkpoint whose best weights are damaged is passed over for one before them: the run then finds them
    again, and ends as if nothing had been. When there is none, the next best weights are taken.

    Raises:
        UserError: when another number of processes wrote it: their data is shared out otherwise.
    """
    # read by one process: a large checkpoint takes minutes
    found = [_search(checkpoints, kind) if world().is_main_process else None]
    point, notes = broadcast_object_list(found)[0]
    for note in notes:
        checkpoints.run.log(note)
    if point is None:
        checkpoints.run.log("no complete checkpoint: starting from the beginning")
    elif point.progress["processes"] != world().num_processes:
        raise UserError(f"resume: '{point.path}' was written by {point.progress['processes']} processes, "
                        f"here are {world().num_processes}; start as many, or a new run in another "
                        "--output_dir")
    return point


def refuse_changes(point: Point, run: Run) -> None:
    """Raise UserError when the run's data, models, code or configuration are not those of the checkpoint."""
    def compare():
        line = changes_accepted(point.progress["origins"], run.origins, point.path, run.config.allow_changes)
        if line:
            run.log(line)

    on_main(compare)


def _search(checkpoints, kind) -> tuple[Point | None, list[str]]:
    """The point, and lines about what was passed over."""
    notes, without_best = [], None
    for path in reversed(checkpoints.paths(kind)):
        if reason := damage(path):
            notes.append(f"'{path}' is damaged ({reason}); going back to the one before")
            continue
        progress = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
        best = progress["best"]
        reason = best and damage(checkpoints.folder / f"best-{best['step']}")
        if not reason:
            return Point(path, progress), notes
        notes.append(f"'{path}': its best weights, of {kind} {best['step']}, are damaged ({reason})")
        without_best = without_best or Point(path, progress)
    if without_best is None:
        return None, notes
    best = next_best(checkpoints, number_of(without_best.path))
    taken = f"the next best weights, of {kind} {best['step']}" if best else "no best weights so far"
    notes.append(f"no checkpoint has all of its best weights; going on from '{without_best.path}' with "
                 f"{taken}")
    return without_best._replace(progress=without_best.progress | {"best": best}), notes
