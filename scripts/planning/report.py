"""Output of the planner: tables, JSON rows, a figure."""

from pathlib import Path

from rich.table import Table

from planning.architectures import OPT, model_of
from planning.duration import Duration
from planning.fit import Batches, Plan, Setup, plan
from planning.memory import GIB, Zero
from utils.console import show_table
from utils.plotting import plt

# columns of the table, and the terms (names of items) that each sums up
COLUMNS = {
    "weights": ("weights", "gathered"), "gradients": ("gradients", "step"), "optimizer": ("optimizer",),
    "frozen": ("frozen models",), "activations": ("activations",), "logits": ("logits",),
    "generation": ("kv cache", "sampling", "scoring"),
    "other": ("base", "buffers", "pinned", "loading", "saving"),
}


def gibibytes(count: float) -> str:
    """Bytes as GiB, 0 as a dash."""
    return f"{count / GIB:.1f}" if count else "-"


def total(one: Plan, names: tuple[str, ...], places: tuple[str, ...]) -> int:
    """Bytes of the items with these names in these places."""
    return sum(item.bytes for item in one.items if item.name in names and item.place in places)


def print_plans(plans: list[Plan], batches: list[Batches], setup: Setup) -> None:
    """Print a table: GiB of one process for each term, and the peaks.

    A peak is less than the sum of its terms, because not all of them are allocated at the same time.

    Args:
        batches: the largest batches that fit, for each plan.
    """
    where = f"{setup.processes} processes on this CPU" if setup.cpu else f"{setup.processes} GPUs"
    title = f"{setup.model}, {where}, {setup.precision} [GiB of one process]"
    table = Table(title=title, title_justify="left")
    for name in ("stage", "ZeRO"):
        table.add_column(name)
    gpu_column = () if setup.cpu else ("GPU",)
    for name in (*COLUMNS, *gpu_column, "host", "NVMe", "fits", "micro-batch", "sampling"):
        table.add_column(name, justify="right")
    places = ("device", "host") if setup.cpu else ("device",)
    for one, largest in zip(plans, batches, strict=True):
        table.add_row(
            one.stage, one.zero.name, *(gibibytes(total(one, names, places)) for names in COLUMNS.values()),
            *(gibibytes(one.device) for _ in gpu_column), gibibytes(one.host), gibibytes(one.nvme),
            "[green]yes[/]" if one.fits else "[red]no[/]", f"{largest.micro_batch}, {largest.recomputing}",
            str(largest.generation_batch),
            end_section=one.stage != plans[-1].stage and one.zero == plans[-1].zero,
        )
    show_table(table, markup=True)
    print("GPU: peak of one GPU. host, NVMe: peak of a node, all its processes together. micro-batch: the "
          "largest that fits, without and with gradient checkpointing [prompts]. sampling: the largest "
          "generation_batch that fits [prompts; in the reward stage rows scored].")


def print_verdict(stage: str, best: Plan | None, time: Duration, advice: list[str]) -> None:
    """Print the fastest configuration that fits, or a warning with advice, and how long the stage takes."""
    if best is not None:
        print(f"{stage}: {best.zero.name} is the fastest that fits")
    elif advice:
        print(f"{stage}: NOTHING FITS. It would with one of: {'; '.join(advice)}")
    else:
        print(f"{stage}: NOTHING FITS, and no single change makes it fit.")
    hours = "" if time.hours is None else f", {time.hours:.3g} hours"
    print(f"  {time.tokens} tokens in a micro-batch of all processes, {time.flops:.3g} FLOPs{hours}")


def row_of(one: Plan, batches: Batches, time: Duration) -> dict:
    """A plan as a JSON object. Sizes are in bytes."""
    terms = [{"name": item.name, "bytes": item.bytes, "place": item.place, "alive": list(item.alive)}
             for item in one.items]
    return {
        "stage": one.stage, "zero": one.zero.name,
        "device_bytes": one.device, "host_bytes": one.host, "nvme_bytes": one.nvme, "fits": one.fits,
        "largest_micro_batch": batches.micro_batch, "largest_micro_batch_checkpointing": batches.recomputing,
        "largest_generation_batch": batches.generation_batch,
        **time._asdict(), "terms": terms,
    }


def plot_sizes(path: Path, stages: list[str], choices: list[Zero], setup: Setup) -> None:
    """Plot the peak of one GPU (or this machine) over the OPT models, a line for each configuration."""
    width = 4.6 * len(stages)  # inches
    figure, axes = plt.subplots(1, len(stages), figsize=(width, 4.2), squeeze=False, sharey=True)
    memory = setup.host_memory if setup.cpu else setup.device_memory
    parameters = [model_of(name, "model").parameters / 1e9 for name in OPT]
    for axis, stage in zip(axes[0], stages, strict=True):
        for number, zero in enumerate(choices):
            plans = [plan(stage, zero, setup._replace(model=name)) for name in OPT]
            peaks = [(one.host if setup.cpu else one.device) / GIB for one in plans]
            axis.plot(parameters, peaks, color=f"C{number}", marker="osD^vP*"[number % 7], markersize=4,
                      linewidth=1.2, label=zero.name)
        if memory:
            axis.axhline(memory / GIB, color="black", linestyle="--", linewidth=1,
                         label=f"memory, {memory / GIB:g} GiB")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(parameters, [name.removeprefix("facebook/opt-") for name in OPT], fontsize=8)
        axis.minorticks_off()
        low, high = axis.get_ylim()
        ticks = [2.0**i for i in range(-1, 12) if low <= 2.0**i <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.set_title(stage)
        axis.set_xlabel("OPT model")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("this machine [GiB]" if setup.cpu else "peak of one GPU [GiB]")
    axes[0][0].legend(fontsize=7)
    devices = f"{setup.processes} {'processes' if setup.cpu else 'GPUs'}"
    figure.suptitle(f"{devices}, {setup.precision}, micro-batch {setup.micro_batch}, prompt {setup.prompt}, "
                    f"completion {setup.completion}, K = {setup.k}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
