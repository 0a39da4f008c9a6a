"""Where a model lies that a key names, and what to name when it does not lie there. Imports nothing heavy."""

import re
from pathlib import Path

from utils.config import key
from utils.errors import UserError
from utils.input_files import refuse_special
from utils.paths import find_local, is_hub_name, nearest


def model_key(default: str, help: str, **more):
    """A configuration field that names a model: a folder or a hub name."""
    return key(default, help, there=model_folder, **more)


def model_folder(field: str, name: str) -> Path | None:
    """The folder of a model; None: the name is one of the hub.

    Args:
        field: the configuration key that names it, for messages.
        name: a folder (looked up from the current folder, then the project's) or a hub name.

    Raises:
        UserError: when the name is neither. It says which folder was probably meant.
    """
    folder = find_local(name)
    if folder is None and is_hub_name(name):
        return None
    if folder is None:
        raise UserError(f"{field}: no model folder at '{name}'; {_instead_of_nothing(name)}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{field}: '{folder}' is not a model folder ({_instead_of(folder, field)})")
    refuse_special(folder, "*")  # the libraries call weights that cannot be read "No such file"
    return folder


def _instead_of_nothing(name: str) -> str:
    if size := re.fullmatch(r"opt-(125m|350m|1\.3b|2\.7b|6\.7b|13b|30b|66b)", name.lower()):
        return f"on the hub it is 'facebook/opt-{size[1]}'"
    if near := nearest(name):
        return f"did you mean '{near}'?"
    return "train that stage first or give another folder or hub name"


def _instead_of(folder: Path, field: str) -> str:
    """What a folder is that is no model, and what to name instead."""
    def holds(*names) -> bool:
        return any((folder / name).exists() for name in names)

    if folder.is_file():
        beside = folder.parent / "config.json"
        return f"it is a file; did you mean '{folder.parent}'?" if beside.is_file() else "it is a file"
    if holds("adapter_config.json"):
        return ("it holds a LoRA adapter, adapter_config.json, and not the model; merge the two with peft, "
                "merge_and_unload() and save_pretrained(), and name the merged model's folder")
    if holds("progress.json", "manifest.json"):
        return "it is a checkpoint, from which --resume goes on; a finished run has its model in final/"
    stage = "reward" if field in ("reward_model", "guard_model") else "sft"
    inside = [folder / "final", folder / stage / "final", *sorted(folder.glob("snapshots/*"))]
    for model in inside:
        if (model / "config.json").is_file():
            return f"did you mean '{model}'?"
    if holds("config.yaml"):
        return "it is a run that has not finished, without final/; finish it with --resume"
    return "it has no config.json"
