"""A DeepSpeed file as this project reads it: every "auto" filled in, and what contradicts the run refused.

DeepSpeed itself takes a number in quotes for one here and there, `true` for stage 1, and ignores what it does
not know.
"""

import difflib
from pathlib import Path

from utils.errors import UserError, quoted
from utils.input_files import read_json

_STAGES = (1, 2, 3)
# of a DeepSpeed file: what is handed on; other sections would change the training without a key
_TAKEN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "bf16", "fp16", "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "communication_data_type", "prescale_gradients", "gradient_predivide_factor", "activation_checkpointing",
    "aio", "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger",
    "flops_profiler", "log_level",
)
# what the keys of the run decide, and which keys these are
_DECIDED = {
    "train_batch_size": "per_device_batch_size x gradient_accumulation_steps x processes",
    "train_micro_batch_size_per_gpu": "per_device_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps (PPO: 1)",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "mixed_precision",
    "fp16.enabled": "mixed_precision",
}


def read_zero_file(path: Path, config, hidden: int, processes: int) -> dict:
    """The settings in a DeepSpeed file, filled in for a run.

    Args:
        config: of the stage.
        hidden: width of the trained model's hidden states.
        processes: of the run.

    Raises:
        UserError: naming file and place, when it is no such file or contradicts the run.
    """
    try:
        settings = read_json(path)
    except UserError as error:
        raise UserError(f"deepspeed: {error}") from None
    zero = settings.get("zero_optimization") if isinstance(settings, dict) else None
    if not isinstance(zero, dict) or "stage" not in zero:
        raise UserError(f"deepspeed: '{path}' is no DeepSpeed configuration with zero_optimization.stage; "
                        "take one of configs/deepspeed/")
    if isinstance(zero["stage"], bool) or zero["stage"] not in _STAGES:
        raise UserError(f"deepspeed: '{path}': zero_optimization.stage must be one of 1, 2, 3, found "
                        f"{quoted(zero['stage'])}; for no sharding leave the key deepspeed out")
    _refuse_others(settings, path)
    numbers = _numbers(config, hidden, processes)
    settings = _filled(settings, numbers, "")
    _refuse_invalid(settings["zero_optimization"], path)
    for place, keys in _DECIDED.items():
        _decide(settings, place, numbers[place], keys, path)
    return settings


def _refuse_others(settings: dict, path) -> None:
    """Raise UserError for a section that is not handed on."""
    for name in settings:
        if name in ("optimizer", "scheduler"):
            raise UserError(f"deepspeed: '{path}': leave optimizer and scheduler out; their keys are "
                            "learning_rate, adam_eps, ... of the stage")
        if name not in _TAKEN:
            near = difflib.get_close_matches(name, _TAKEN, n=1)
            meant = f"did you mean '{near[0]}'?" if near else "leave it out"
            raise UserError(f"deepspeed: '{path}': {quoted(name)} is not read here; {meant}")


def _decide(settings: dict, place: str, number, keys: str, path) -> None:
    """Set what the run decides; a file may leave it out, or say the same.

    Raises:
        UserError: when the file says something else.
    """
    *sections, name = place.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise UserError(f"deepspeed: '{path}': {section} must be a mapping such as "
                            f"{{\"enabled\": \"auto\"}}, found {quoted(settings)}")
    found = settings.setdefault(name, number)
    if found != number or isinstance(found, bool) != isinstance(number, bool):
        raise UserError(f"deepspeed: '{path}': {place} is {quoted(found)}, but {keys} of the run makes it "
                        f"{number!r}; write \"auto\", or change the run")


def _refuse_invalid(zero: dict, path) -> None:
    """DeepSpeed looks at it as well, but later, and ends in a traceback."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    try:
        read = DeepSpeedZeroConfig(**zero)
    except ValueError as error:  # pydantic's
        found = error.errors()[0]
        place = ".".join(["zero_optimization", *map(str, found["loc"])])
        raise UserError(f"deepspeed: '{path}': {place}: {found['msg']}") from None
    _refuse_converted(zero, read, "zero_optimization", path)


def _refuse_converted(section: dict, read, place: str, path) -> None:
    """Raise UserError where DeepSpeed made a number of a text or of true, or a truth of a number."""
    for name, value in section.items():
        taken = getattr(read, name, None)
        if isinstance(value, dict):
            _refuse_converted(value, taken, f"{place}.{name}", path)
        elif isinstance(taken, bool | int | float) and (
                isinstance(value, bool) != isinstance(taken, bool)
                or (isinstance(value, str) and not isinstance(taken, str))):
            needed = "true or false" if isinstance(taken, bool) else "a number"
            raise UserError(f"deepspeed: '{path}': {place}.{name} must be {needed}, found {quoted(value)}")


def _numbers(config, hidden: int, processes: int) -> dict:
    """What "auto" stands for, by its place in the file."""
    accumulated = getattr(config, "gradient_accumulation_steps", 1)
    zero = {
        "reduce_bucket_size": hidden * hidden,
        "allgather_bucket_size": hidden * hidden,
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
        "offload_optimizer.nvme_path": str(config.output_dir) + "/nvme",
    }
    return {f"zero_optimization.{name}": value for name, value in zero.items()} | {
        "train_batch_size": config.per_device_batch_size * accumulated * processes,
        "train_micro_batch_size_per_gpu": config.per_device_batch_size,
        "gradient_accumulation_steps": accumulated,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": config.mixed_precision == "bf16",
        "fp16.enabled": config.mixed_precision == "fp16",
    }


def _filled(node, numbers, place):
    if isinstance(node, dict):  # null says what a missing key says, but accelerate looks into it
        return {name: _filled(value, numbers, f"{place}.{name}".lstrip(".")) for name, value in node.items()
                if value is not None}
    if node != "auto":
        return node
    if place not in numbers:
        raise UserError(f"deepspeed: '{place}' cannot be \"auto\"; that is for {', '.join(numbers)}")
    return numbers[place]
