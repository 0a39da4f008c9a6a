"""DeepSpeed's ZeRO (Rajbhandari et al., 1910.02054; offload: 2101.06840, 2104.07857).

Settings, compiled extensions, sharded weights and the engine's checkpoints are handled here. `distributed.py`
hands the settings to accelerate, which makes one engine of what is trained. The frozen models of PPO are
inside that engine, so that ZeRO-3 shards and offloads them, too. Without the key `deepspeed` everything here
is the identity.

Under ZeRO-3 each process holds a part of each weight. A weight is complete only while its module is computed,
or inside `gathered_weights`.
"""

import json
import os
import pickle
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from torch.utils.cpp_extension import get_default_build_root
from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from utils.config import UserError, find_input
from utils.distributed import first_of_a_node, world
from utils.zero_file import read_zero_file

FILE_BYTES = 2**30  # of a file of sharded weights
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
LOCK_SECONDS = 600  # without a file more in a folder where something is compiled
_active = {}  # the one engine of this process and what it was made from; they live until its end


def load_settings(config, model) -> dict | None:
    """The DeepSpeed configuration of a run with every "auto" filled in; None without one.

    Models are loaded for it from now on. DeepSpeed's extensions are compiled here when they are missing.

    Args:
        model: the `Parent` that is trained, for its hidden size.

    Raises:
        UserError: when the file is no such configuration, or asks for what cannot be had here.
    """
    if config.deepspeed is None:
        return None
    path = find_input(config.deepspeed, "deepspeed")
    settings = read_zero_file(path, config, model.hidden_size, world().num_processes)
    if settings["zero_optimization"]["stage"] == 3 and getattr(config, "ema_decay", 0.0):
        raise UserError("ema_decay: the average of the policy is a whole model on each process, which "
                        "ZeRO-3 is to avoid; leave one of the two out")
    if settings["zero_optimization"]["stage"] == 3 and config.load_in_4bit:
        raise UserError("deepspeed: ZeRO-3 shards weights, but not those in 4 bits; take configs/deepspeed/"
                        "zero2.json or none with load_in_4bit, or leave load_in_4bit out")
    if config.resume and "nvme" in _offloaded_to(settings):
        raise UserError("resume: DeepSpeed does not bring back the optimizer states that it had put on NVMe; "
                        "start a new run, or train with zero3_offload.json, which can be resumed")
    _compile_ops(_offloaded_to(settings))
    _form_group()
    _refuse_what_deepspeed_refuses(settings, path)
    _active.update(settings=settings, kept=HfDeepSpeedConfig(settings))
    return settings


def _refuse_what_deepspeed_refuses(settings: dict, path) -> None:
    """Let DeepSpeed read the settings now: when its engine does, a mistake is a traceback after the data."""
    from deepspeed.runtime.config import DeepSpeedConfig
    try:
        DeepSpeedConfig(settings)
    except Exception as error:  # pydantic's, assertions, and whatever a value of a wrong type leads to
        reason = " ".join(str(error).split())
        raise UserError(f"deepspeed: '{path}' is refused by DeepSpeed ({reason})") from None


def _offloaded_to(settings) -> set[str]:
    zero = settings["zero_optimization"]
    return ({zero.get(part, {}).get("device", "none") for part in ("offload_optimizer", "offload_param")}
            - {"none"})


def resumable() -> bool:
    """Whether a checkpoint can bring back what the engine holds; DeepSpeed cannot, of what it had put on
    NVMe.
    """
    return not (_active and "nvme" in _offloaded_to(_active["settings"]))


def _compile_ops(devices: set[str]) -> None:
    """Compile what DeepSpeed would compile in the middle of the run, in silence, and behind locks that a
    killed run leaves.

    Raises:
        UserError: when it cannot be compiled, or when a lock has been left.
    """
    from deepspeed.accelerator import get_accelerator
    wanted = {"CPUAdamBuilder": devices, "PinMemoryBuilder": "nvme" in devices,
              "AsyncIOBuilder": "nvme" in devices,
              "ShareMemCommBuilder": get_accelerator().device_name() == "cpu"}
    with first_of_a_node():
        for kind in [kind for kind, needed in wanted.items() if needed]:
            builder = get_accelerator().create_op_builder(kind)
            folder = _extensions_folder() / builder.name
            _wait_for_lock(folder / "lock")
            if world().is_local_main_process and not any(folder.glob("*.so")):
                print(f"compiling DeepSpeed's {builder.name} into {folder}, once on this "
                      f"machine: a minute or more", flush=True)
            try:
                builder.load(verbose=False)
            except (RuntimeError, ImportError) as error:
                reason = str(error).splitlines()[0]
                if " " in torch.__file__:  # which the linker's command line splits
                    reason = f"torch itself lies in a path with spaces, '{torch.__file__}'"
                raise UserError(f"deepspeed: its extension {builder.name} cannot be compiled here "
                                f"({reason}); it takes g++ and "
                                "ninja, and for NVMe libaio-dev") from None


def _extensions_folder() -> Path:
    """Where torch compiles extensions. It is fixed here, because torch has no public name for its choice."""
    device = f"cu{torch.version.cuda}" if torch.version.cuda else "cpu"
    version = f"py{sys.version_info.major}{sys.version_info.minor}_{device}"
    default = Path(get_default_build_root()) / version.replace(".", "")
    return Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default)))


def _wait_for_lock(lock: Path) -> None:
    """Until another run has compiled. torch would wait for ever for one that was killed."""
    if lock.exists():
        print(f"waiting for '{lock}': another run compiles there", flush=True)
    while lock.exists():
        try:
            newest = max(path.stat().st_mtime for path in lock.parent.iterdir())
        except (FileNotFoundError, ValueError):  # it has just been removed
            continue
        if time.time() - newest > LOCK_SECONDS:
            raise UserError(f"deepspeed: '{lock}' is there, but nothing has been written beside it for "
                            f"{LOCK_SECONDS} seconds: a "
                            "run that was killed while it compiled has left it; remove it")
        time.sleep(1)


def _form_group():
    """Form the group of processes that DeepSpeed wants, also of one process."""
    cuda = world().device.type == "cuda"
    if not torch.distributed.is_initialized():
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else None
        torch.distributed.init_process_group("nccl" if cuda else "gloo", store=torch.distributed.HashStore(),
                                             rank=0,
                                             world_size=1, device_id=device)
        os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    # reuse the existing group; otherwise DeepSpeed assumes a world of one
    deepspeed.init_distributed(auto_mpi_discovery=False)


def use_engine(engine) -> None:
    """Remember the engine whose hooks `gathered_weights` must take out.

    Raises:
        UserError: when DeepSpeed was asked for, but is not in force: its traps fail in silence.
    """
    if not _active:
        return
    if not hasattr(engine, "zero_optimization_stage") or engine.world_size != world().num_processes:
        raise UserError("deepspeed: it was asked for, but the model was not put into its engine for all "
                        "processes; start with torchrun, accelerate launch or deepspeed, without a "
                        "configuration of their own")
    _active["engine"] = engine


@contextmanager
def gathered_weights(model, change: bool = False):
    """Inside, the weights of `model` are complete on every process, also under ZeRO-3.

    They are gathered once, not module by module, which is what sampling needs.

    Args:
        change: keep what is written to them inside, in the same way on every process.
    """
    if not is_deepspeed_zero3_enabled():
        yield model
        return
    from trl.models.utils import add_hooks, remove_hooks
    engine = _active.get("engine")
    with gathered(list(model.parameters()), change):
        if engine is not None:
            remove_hooks(engine)
        try:
            yield model
        finally:
            if engine is not None:
                add_hooks(engine)


@contextmanager
def gathered(weights: list[torch.nn.Parameter], change: bool = False):
    """As `gathered_weights`, of some weights, for reading and writing them; no module may be called inside.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed
    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if change else None):
        yield


class MasterWeights:
    """The weights of a module in float32, as its optimizer has them; all ranks must read them together.

    DeepSpeed computes with rounded ones in mixed precision. Not under ZeRO-3, where a weight is a part.
    """

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def parameters(self) -> Iterator[torch.Tensor]:
        """Of each parameter, in the module's order."""
        if "engine" not in _active:
            yield from self.module.parameters()
            return
        from deepspeed.utils import safe_get_full_fp32_param
        for weight in self.module.parameters():
            master = safe_get_full_fp32_param(weight)
            yield weight if master is None else master  # a frozen weight has none

    def buffers(self) -> Iterator[torch.Tensor]:
        return self.module.buffers()


def full_shape(weight: torch.nn.Parameter) -> torch.Size:
    """The shape of a weight; under ZeRO-3 the parameter itself holds this process's part."""
    return getattr(weight, "ds_shape", weight.shape)


def save_pretrained(model, folder: Path) -> None:
    """`model.save_pretrained` on the main process, also of sharded weights, `FILE_BYTES` of them at a time.

    A larger sharded model becomes several files with an index, as on the hub.
    """
    if not is_deepspeed_zero3_enabled():
        if world().is_main_process:
            model.save_pretrained(folder)
        return
    files, index, size = in_files(dict(model.named_parameters())), {}, 0
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}  # never sharded
    for number, weights in enumerate(files, start=1):
        state = gathered_copy(weights) | (buffers if number == 1 else {})
        if world().is_main_process:
            name = (f"model-{number:05}-of-{len(files):05}.safetensors" if len(files) > 1
                    else SAFE_WEIGHTS_NAME)
            size += sum(weight.nbytes for weight in state.values())
            model.save_pretrained(folder / "part", state_dict=state)
            (folder / "part" / SAFE_WEIGHTS_NAME).rename(folder / name)
            with safe_open(folder / name, "pt") as file:  # some are saved under other names than the model's
                index |= dict.fromkeys(file.keys(), name)
        del state  # before the next ones are gathered
    if world().is_main_process:
        for path in (folder / "part").iterdir():  # its config.json
            path.rename(folder / path.name)
        (folder / "part").rmdir()
        if len(files) > 1:
            index = {"metadata": {"total_size": size}, "weight_map": index}
            (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index))


def in_files(weights: dict[str, torch.nn.Parameter]) -> list[dict[str, torch.nn.Parameter]]:
    """The weights in parts of at most `FILE_BYTES`, one for each file that is written."""
    files, size = [{}], 0
    for name, weight in weights.items():
        size += full_shape(weight).numel() * weight.element_size()
        if files[-1] and size > FILE_BYTES:
            files, size = [*files, {}], full_shape(weight).numel() * weight.element_size()
        files[-1][name] = weight
    return files


def gathered_copy(weights: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of these weights in the main process's memory, nothing on the others; gathered one after the
    other.
    """
    copies = {}
    for name, weight in weights.items():
        with gathered([weight]):
            if world().is_main_process:
                copies[name] = weight.detach().cpu().clone()
    return copies


def save_engine(engine, folder: Path) -> None:
    """DeepSpeed's own checkpoint: weights, optimizer and loss scale, each process its part."""
    engine.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)


def load_engine(engine, folder: Path) -> None:
    """What `save_engine` wrote. The frozen weights are not in it: they are those of the parents."""
    with weights_only(folder):
        engine.load_checkpoint(str(folder), tag="engine", load_module_strict=False)


@contextmanager
def weights_only(folder: Path):
    """Inside, torch.load makes tensors and plain values only, also where DeepSpeed asks it to make anything.

    Files of a checkpoint may come from somebody else, and a pickle can run code. The switch is torch's own.

    Raises:
        UserError: when a file of the folder holds something else.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_engine_types() if _active else []):
            yield
    except pickle.UnpicklingError:  # its text tells how to run what is in the file
        raise UserError(f"resume: a file in '{folder}' holds something else than weights, which could run "
                        "code, so this program did not write it; remove that checkpoint to go on with the "
                        "one before") from None
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _engine_types() -> list[type]:
    """Classes of DeepSpeed that its checkpoints name: numbers with a name, and nothing that acts."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
