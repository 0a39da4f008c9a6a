"""What runs leave behind, for tests that compare them."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without times."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints that a resume could take, oldest first."""
    paths = [path for path in run.glob("checkpoints/*-*") if re.fullmatch("(step|update)-[0-9]+", path.name)]
    return sorted(paths, key=lambda path: int(path.name.split("-")[1]))


def weights(folder: Path, name: str = "model") -> Tensors:
    """Weights in a folder's safetensors files: a model's, or what a checkpoint has as `trained` or `best`."""
    files = sorted(folder.glob(f"{name}*.safetensors"))
    assert files, f"no {name}*.safetensors in {folder}"
    return {key: weight for path in files for key, weight in load_file(path).items()}


def last_trained(run: Path) -> Tensors:
    """All that a run without an engine trained, as its newest checkpoint has it."""
    return weights(checkpoints(run)[-1], "trained")


def furthest(ours: Tensors, theirs: Tensors) -> float:
    """The largest difference of two weights of the same name."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)
