"""What is shown of the comparisons: a table, a figure, the machine."""

import datetime
import os
import re
import statistics
from pathlib import Path

import torch
from matplotlib.ticker import EngFormatter
from rich.table import Table

from studies.benchmarks.clock import PARTS
from studies.benchmarks.cost import Point
from studies.benchmarks.pairing import Turn
from studies.benchmarks.plan import Comparison
from utils.console import show_table
from utils.plotting import plt


def machine() -> str:
    """CPU, cores, threads, torch's version, and the date."""
    names = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return (f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores, "
            f"{torch.get_num_threads()} threads, torch {torch.__version__}, "
            f"{datetime.date.today().isoformat()}")


def print_table(rows: list[dict], goals: list[float | None]) -> None:
    """For people; a ratio below its goal is red."""
    table = Table(title=machine(), title_justify="left")
    for name in ("stage", "shape", "K", "peer", "ours", "theirs", "ratio", "goal", "memory", "utilisation"):
        table.add_column(name, justify="left" if name in ("stage", "shape", "peer") else "right")
    for row, goal in zip(rows, goals, strict=True):
        color = "red" if goal and row["ratio"] < goal else "green"
        table.add_row(
            row["stage"], row["shape"], str(row["k"]), row["peer"], f"{row['ours']:.4g} {row['unit']}/s",
            f"{row['theirs']:.4g} {row['unit']}/s",
            f"[{color}]{row['ratio']:.2f}[/] ({row['ratio_low']:.2f} - {row['ratio_high']:.2f})",
            f"{goal:g}" if goal else "-", f"{row['memory_ratio']:.2f}", f"{row['utilisation']:.0%}",
        )
    show_table(table, markup=True)


def print_profile(plan: list[Comparison], turns: list[list[Turn]]) -> None:
    """Seconds of a turn by part, means over the turns, of each side."""
    table = Table(title="Where the time goes [seconds a turn]", title_justify="left")
    for name in ("stage", "shape", "K", "side", *PARTS, "together"):
        table.add_column(name, justify="left" if name in ("stage", "shape", "side") else "right")
    for comparison, found in zip(plan, turns, strict=True):
        for side, answers in (("ours", [t.ours for t in found]),
                              (comparison.peer, [t.theirs for t in found])):
            seconds = [statistics.fmean(answer["parts"][part] for answer in answers) for part in PARTS]
            cells = [f"{value:.2f} ({value / sum(seconds):.0%})" for value in seconds]
            table.add_row(comparison.stage, comparison.shape, str(comparison.k), side, *cells,
                          f"{sum(seconds):.2f}")
    show_table(table, markup=True)


def plot_costs(path: Path, points: list[Point]) -> None:
    """A row of panels for each stage, a column for each quantity: seconds on the left axis, peak memory on
    the right.
    """
    stages, quantities = (list(dict.fromkeys(column)) for column in list(zip(*points, strict=True))[:2])
    figure, axes = plt.subplots(len(stages), len(quantities),
                                figsize=(3.6 * len(quantities), 2.8 * len(stages)), squeeze=False)
    for stage, row in zip(stages, axes, strict=True):
        for quantity, axis in zip(quantities, row, strict=True):
            part = sorted((point for point in points if (point.stage, point.quantity) == (stage, quantity)),
                          key=lambda p: p.x)
            axis.set_visible(bool(part))
            x = [point.x for point in part]
            axis.plot(x, [point.seconds for point in part], color="C0", marker="o", label="time [s]")
            axis.plot(x, [point.needed for point in part], color="C0", linestyle=":",
                      label="needed at the product rate [s]")
            memory = axis.twinx()
            memory.plot(x, [point.memory / 1024 for point in part], color="C1", marker="s", linestyle="--")
            axis.plot([], [], color="C1", marker="s", linestyle="--", label="peak memory [GiB], right axis")
            for side in (axis, memory):  # room above the largest value: its mark is not cut off
                side.set_ylim(0, 1.12 * max((y for line in side.lines for y in line.get_ydata()), default=1))
            axis.set_xlim(0, 1.06 * max(x, default=1))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10M, not 1.0 and 1e7 in the corner
            axis.set_xlabel(quantity)
            axis.set_ylabel("seconds")
            memory.set_ylabel("GiB")
            axis.set_title(stage)
            axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    figure.suptitle(machine(), fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_ratios(path: Path, rows: list[dict], plan: list[Comparison]) -> None:
    """The ratio of each row with its spread, on a logarithmic axis; a tick where the goal is."""
    figure, axis = plt.subplots(figsize=(8, 1.2 + 0.32 * len(rows)))
    for place, (row, comparison) in enumerate(zip(rows, plan, strict=True)):
        spread = [[row["ratio"] - row["ratio_low"]], [row["ratio_high"] - row["ratio"]]]
        axis.errorbar(row["ratio"], place, xerr=spread, color="C0", marker="o", capsize=3)
        if comparison.goal:
            axis.plot(comparison.goal, place, color="C3", marker="|", markersize=14, markeredgewidth=2)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.plot([], [], color="C3", marker="|", markersize=12, markeredgewidth=2, linestyle="none",
              label="goal")
    axis.set_xscale("log")
    ticks = [tick for tick in (0.5, 1, 2, 4, 8, 16, 32, 64)
             if tick <= 2 * max(row["ratio_high"] for row in rows)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_yticks(range(len(rows)), [f"{c.stage} {c.shape}, K = {c.k}: {c.peer}" for c in plan])
    axis.invert_yaxis()
    axis.set_xlabel("times as fast as the peer (median, smallest and largest turn)")
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=8)
    axis.set_title(machine(), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
