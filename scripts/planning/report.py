"""What is shown of the plans: tables, rows, a figure."""

from pathlib import Path

import matplotlib
from rich.console import Console
from rich.table import Table

from planning.architectures import OPT, model_of
from planning.duration import Duration
from planning.fit import Batches, Plan, Setup, plan
from planning.memory import GIB, Zero

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first: there may be no screen)

# columns of the table, and the terms in each
COLUMNS = {"weights": ("weights", "gathered"), "gradients": ("gradients", "step"), "optimizer": ("optimizer",),
           "frozen": ("frozen models",), "activations": ("activations",), "logits": ("logits",),
           "generation": ("kv cache", "sampling", "scoring"), "other": ("base", "buffers", "pinned", "loading", "saving")}


def size(count: float) -> str:
    return f"{count / GIB:.1f}" if count else "-"


def total(one: Plan, names: tuple[str, ...], places: tuple[str, ...]) -> int:
    return sum(item.bytes for item in one.items if item.name in names and item.place in places)


def print_plans(plans: list[Plan], batches: list[Batches], setup: Setup) -> None:
    """For people: GiB of one process, by term; then the peaks, which are less than the sum, for not all is alive at once.

    Args:
        batches: of each plan.
    """
    where = f"{setup.processes} processes on this CPU" if setup.cpu else f"{setup.processes} GPUs"
    table = Table(title=f"{setup.model}, {where}, {setup.precision} [GiB of one process]", title_justify="left")
    for name in ("stage", "ZeRO"):
        table.add_column(name)
    for name in (*COLUMNS, *(() if setup.cpu else ("GPU",)), "host", "NVMe", "fits", "micro-batch", "sampling"):
        table.add_column(name, justify="right")
    for one, most in zip(plans, batches, strict=True):
        places = ("device", "host") if setup.cpu else ("device",)
        table.add_row(one.stage, one.zero.name, *(size(total(one, names, places)) for names in COLUMNS.values()),
                      *(() if setup.cpu else (size(one.device),)), size(one.host), size(one.nvme),
                      "[green]yes[/]" if one.fits else "[red]no[/]", f"{most.micro_batch}, {most.recomputing}",
                      str(most.generation_batch),
                      end_section=one.stage != plans[-1].stage and one.zero == plans[-1].zero)
    Console(width=170).print(table)
    print("GPU: its peak. host, NVMe: of a node with all its processes. micro-batch: the largest that fits, without and with "
          "gradient checkpointing; sampling: the largest generation_batch [prompts; in the reward stage rows scored].")


def print_verdict(stage: str, best: Plan | None, found: Duration, advice: list[str]) -> None:
    """The fastest choice that fits, or a warning; and how long it takes."""
    if best is None:
        print(f"{stage}: NOTHING FITS. " + ("It would with one of: " + "; ".join(advice) if advice else "Nor with one change."))
    else:
        print(f"{stage}: {best.zero.name} is the fastest that fits")
    hours = "" if found.hours is None else f", {found.hours:.3g} hours"
    print(f"  {found.tokens} tokens in a micro-batch of all processes, {found.flops:.3g} FLOPs{hours}")


def row_of(one: Plan, batches: Batches, found: Duration) -> dict:
    """A plan as JSON; bytes."""
    terms = [{"name": item.name, "bytes": item.bytes, "place": item.place, "alive": list(item.alive)} for item in one.items]
    return {"stage": one.stage, "zero": one.zero.name, "device_bytes": one.device, "host_bytes": one.host, "nvme_bytes": one.nvme,
            "fits": one.fits, "largest_micro_batch": batches.micro_batch,
            "largest_micro_batch_checkpointing": batches.recomputing, "largest_generation_batch": batches.generation_batch,
            **found._asdict(), "terms": terms}


def plot_sizes(path: Path, stages: list[str], choices: list[Zero], setup: Setup) -> None:
    """Bytes of one GPU (or of this machine) against the policy's parameters, over the OPT models; a line for each choice."""
    figure, axes = plt.subplots(1, len(stages), figsize=(4.6 * len(stages), 4.2), squeeze=False, sharey=True)
    memory = setup.host_memory if setup.cpu else setup.device_memory
    parameters = [model_of(name, "model").parameters / 1e9 for name in OPT]
    for axis, stage in zip(axes[0], stages, strict=True):
        for number, zero in enumerate(choices):
            plans = [plan(stage, zero, setup._replace(model=name)) for name in OPT]
            axis.plot(parameters, [(one.host if setup.cpu else one.device) / GIB for one in plans], color=f"C{number}",
                      marker="osD^vP*"[number % 7], markersize=4, linewidth=1.2, label=zero.name)
        if memory:
            axis.axhline(memory / GIB, color="black", linestyle="--", linewidth=1, label=f"memory, {memory / GIB:g} GiB")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(parameters, [name.removeprefix("facebook/opt-") for name in OPT], fontsize=8)
        axis.minorticks_off()
        ticks = [2.0**i for i in range(-1, 12)]
        low, high = axis.get_ylim()
        axis.set_yticks([tick for tick in ticks if low <= tick <= high], [f"{tick:g}" for tick in ticks if low <= tick <= high])
        axis.set_title(stage)
        axis.set_xlabel("OPT model")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("this machine [GiB]" if setup.cpu else "peak of one GPU [GiB]")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"{setup.processes} {'processes' if setup.cpu else 'GPUs'}, {setup.precision}, micro-batch "
                    f"{setup.micro_batch}, prompt {setup.prompt}, completion {setup.completion}, K = {setup.k}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
