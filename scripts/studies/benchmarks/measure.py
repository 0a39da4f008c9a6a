"""One comparison from its plan to its figures."""

import subprocess
import sys
import tempfile
from pathlib import Path

from planning import flops
from studies.benchmarks.pairing import PEER_ENVIRONMENT, Turn, figures, refuse_unequal_work, take_turns
from studies.benchmarks.plan import UNITS, Comparison
from studies.benchmarks.posts import Batch
from studies.benchmarks.shapes import SHAPES, save_models
from studies.benchmarks.tasks import PPO_EPOCHS, RESPONSE_TOKENS, Task
from utils.config import PROJECT, UserError

# PPO samples, and packed examples see each other (benchmarks/peers.py)
SAME_LOSS = ("SFTTrainer", "RewardTrainer")


def needed_flops(stage: str, shape: str, k: int, batch: Batch) -> int:
    """Floating-point operations of one repetition."""
    size, (prompts, completions) = SHAPES[shape]["size"], batch.lengths
    if stage == "ppo":
        return flops.ppo(size, prompts, k, RESPONSE_TOKENS, PPO_EPOCHS)
    if stage == "generation":
        return flops.generation(size, prompts, k, RESPONSE_TOKENS)
    return {"sft": flops.sft, "reward": flops.reward}[stage](size, prompts, completions)


def peer_python(stage: str) -> Path | str:
    """The interpreter of the peer: that of .venv-bench for PPO, which is made where it is missing."""
    if stage != "ppo":
        return sys.executable
    python = PEER_ENVIRONMENT / "bin" / "python"
    if not python.exists():
        print(f"making {PEER_ENVIRONMENT} from requirements-bench.txt")
        for command in ([sys.executable, "-m", "venv", PEER_ENVIRONMENT],
                        [python, "-m", "pip", "install", "--quiet", "-r",
                         PROJECT / "requirements-bench.txt"]):
            if subprocess.run(command, check=False).returncode:
                raise UserError(f"{PEER_ENVIRONMENT}: cannot be made; remove it and make it as "
                                f"requirements-bench.txt says, or "
                                "leave ppo out of --stage")
    return python


def write_task(comparison: Comparison, batch: Batch, folder: Path, profile: bool = False) -> Path:
    """What both sides are told, in a folder of its own with the models beside it. They are made once for each
    shape.
    """
    models, work = folder / comparison.shape, Path(tempfile.mkdtemp(dir=folder))
    if not models.exists():
        save_models(comparison.shape, models)
    for name in ("policy", "reward"):
        (work / name).symlink_to(models / name)
    task = Task(comparison.stage, comparison.peer, comparison.k, str(work), batch.prompts, batch.completions,
                comparison.repetitions + 1, profile)
    task.save(work / "task.json")
    return work / "task.json"


def turns_of(comparison: Comparison, batch: Batch, folder: Path, processes: int = 1,
             profile: bool = False) -> list[Turn]:
    """The turns that count, after both sides have been seen to do the same. Our side can be several
    processes.
    """
    task = write_task(comparison, batch, folder, profile)
    warm_up, *turns = take_turns(task, peer_python(comparison.stage), comparison.repetitions, processes)
    refuse_unequal_work(warm_up, comparison.peer in SAME_LOSS)
    return turns


def row_of(comparison: Comparison, batch: Batch, turns: list[Turn]) -> dict:
    """One row of the result."""
    unit = UNITS[comparison.stage]
    found = figures(turns, unit, needed_flops(comparison.stage, comparison.shape, comparison.k, batch))
    return {"stage": comparison.stage, "shape": comparison.shape, "k": comparison.k, "peer": comparison.peer,
            "unit": unit,
            **found._asdict()}
