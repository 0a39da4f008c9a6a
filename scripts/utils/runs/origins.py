"""What a run's numbers come from: configuration, data, models, tokenizer, code and libraries, as digests.

Each checkpoint has them. When a run goes on with something else, the result is that of neither.
"""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from utils.config import UserError
from utils.data.report import DataReport
from utils.data.tokens import tokenizer_key
from utils.models.parents import Parent
from utils.paths import PROJECT, find_local

# what may differ between a run and its continuation: it changes what is written down, not what is learnt
FREE = ("output_dir", "resume", "allow_changes", "report_to", "push_to_hub", "logging_steps", "save_steps",
        "eval_steps", "save_total_limit")
# what they name may lie elsewhere when the run goes on: the content must be the same
DATA = ("actor_training_data", "actor_validation_data", "actor_test_data",
        "reward_training_data", "reward_validation_data", "reward_test_data", "centring_data", "rating_data",
        "rlhf_training_data", "rlhf_validation_data", "rlhf_test_data")
MODELS = ("model", "reward_model")
FILES = ("gold_rules", "deepspeed", "chat_template")
BY_CONTENT = (*DATA, *MODELS, *FILES)
_LIBRARIES = ("torch", "transformers", "accelerate")


def origins_of(config, stage: str, report: DataReport, parents: list[Parent]) -> dict:
    """Everything that must not change before the run goes on, for JSON. It reads the models' files."""
    keys = {name: value for name, value in asdict(config).items() if name not in (*FREE, *BY_CONTENT)}
    sources = {field: [[source["content"], source["weight"]] for source in figures["sources"]]
               for field, figures in report.figures.items() if "sources" in figures}
    files = {field: _sha256(find_local(name)) for field in FILES if (name := getattr(config, field, None))}
    return {"configuration": keys, "data": sources, "models": {one.key: _model(one) for one in parents},
            "tokenizer": tokenizer_key(parents[0].tokenizer) if parents else None, "files": files,
            "code": _code(stage), "libraries": {name: version(name) for name in _LIBRARIES}}


def changes_accepted(then: dict, now: dict, checkpoint: Path, allow: bool) -> str | None:
    """Compare what a checkpoint was made from with what is here.

    Args:
        allow: accept everything but another configuration, which the checkpoint's optimizer would not follow.

    Returns:
        A line about what was accepted, if anything.

    Raises:
        UserError: naming what has changed.
    """
    for name, value in now["configuration"].items():
        before = then["configuration"].get(name, value)
        if before != value:
            raise UserError(f"resume: '{name}' is {value!r} here, but '{checkpoint}' was trained with "
                            f"{before!r}; resume with the same configuration, or name a new --output_dir")
    changed = list(_changes(then, now))
    if not changed:
        return None
    what = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
    if allow:
        return f"going on from '{checkpoint}' with changes (allow_changes): {what}"
    raise UserError(f"resume: not everything is as it was for '{checkpoint}': {what}; put it back, name a "
                    "new --output_dir, or accept it with --allow_changes true")


def _changes(then: dict, now: dict):
    """What differs, apart from the configuration: a few words for each."""
    for field in sorted({*then["data"], *now["data"]}):
        if then["data"].get(field) != now["data"].get(field):
            yield f"{field} has other rows"
    for field in sorted({*then["models"], *now["models"]}):
        for file in _differing(then["models"].get(field, {}), now["models"].get(field, {})):
            yield f"{field}: another {file}"
    if then["tokenizer"] != now["tokenizer"]:
        yield "model: another tokenizer"
    for field in _differing(then["files"], now["files"]):
        yield f"{field}: another file"
    for file in _differing(then["code"], now["code"]):
        yield f"scripts/{file} has changed"
    for name in _differing(then["libraries"], now["libraries"]):
        yield f"{name} was {then['libraries'].get(name)}, is {now['libraries'].get(name)}"


def _differing(then: dict, now: dict) -> list[str]:
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def _model(parent: Parent) -> dict[str, str]:
    """A digest of each file that makes the model what it is; of a hub model the commit."""
    if parent.folder is not None:
        base = {} if parent.adapter is None else _model(parent.base)
        return (parent.identity["sha256"] | {"config.json": _sha256(parent.folder / "config.json")}
                | {f"{file} of its base": digest for file, digest in base.items()})
    cached = try_to_load_from_cache(parent.name, "config.json")
    return {"name": parent.name, "commit": Path(cached).parent.name if isinstance(cached, str) else None}


def _code(stage: str) -> dict[str, str]:
    scripts = PROJECT / "scripts"
    files = [scripts / f"train_{stage}.py", *sorted((scripts / "utils").rglob("*.py"))]
    return {path.relative_to(scripts).as_posix(): _sha256(path)[:16] for path in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
