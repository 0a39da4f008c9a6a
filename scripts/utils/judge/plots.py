"""The pictures in plots/, drawn from metrics.jsonl after training."""

from typing import NamedTuple

import numpy as np

from utils.plotting import DASHES, plt, whole_numbers


def series(rows: list[dict], name: str) -> tuple[list, list]:
    """Steps and values of one metric. After a resume the later of two values of a step counts."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return list(found), list(found.values())


class Panel(NamedTuple):
    """One chart of a picture."""

    title: str
    ylabel: str
    lines: dict[str, tuple[list, list]]  # by their label: x and y
    limit: tuple[str, float] | None = None  # a horizontal line and its label


def curves(path, panels: list[Panel], xlabel: str, kept: tuple[str, int] | None = None) -> None:
    """Line charts, at most two beside each other. Panels without a point are left out.

    Args:
        kept: label and place of a vertical line: the step whose weights were kept.
    """
    panels = [panel._replace(lines={label: line for label, line in panel.lines.items() if line[0]})
              for panel in panels]
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return
    rows = -(-len(panels) // 2)
    figure, axes = plt.subplots(rows, min(2, len(panels)), figsize=(4.4 * min(2, len(panels)), 3.2 * rows),
                                squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, (label, (x, y)) in enumerate(panel.lines.items()):
            axis.plot(x, y, label=label, linestyle=DASHES[number % len(DASHES)],
                      marker="o" if len(x) < 30 else None, markersize=3)
        if panel.limit:
            _draw_limit(axis, *panel.limit)
        if kept:
            axis.axvline(kept[1], color="grey", linestyle=":", linewidth=1.5, label=kept[0])
        axis.set_title(panel.title)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(panel.ylabel)
        whole_numbers(axis)
        axis.grid(alpha=0.3)
        if len(axis.get_legend_handles_labels()[1]) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_limit(axis, label: str, value: float) -> None:
    """A horizontal line; far above the curves, where it would flatten them, only its label."""
    low, high = axis.get_ylim()
    if value <= high + (high - low):
        axis.axhline(value, color="black", linestyle="--", linewidth=1, label=f"{label} {value:g}")
    else:
        axis.plot([], [], color="black", linestyle="--", linewidth=1, label=f"{label} {value:g}, above this")


def plot_sft(run, kept: int) -> None:
    """Loss, and ROUGE on generated summaries; `kept` is the step whose weights were kept."""
    rows = run.read_metrics()
    rouge = {name: series(rows, f"eval/{name}") for name in ("rouge1", "rouge2", "rougeL")}
    losses = {"training": series(rows, "sft/loss"), "validation": series(rows, "eval/loss")}
    curves(run.folder / "plots" / "sft.png",
           [Panel("SFT loss", "nats a token", losses),
            Panel("ROUGE of generated summaries, validation", "F1, 0 to 1", rouge)],
           "step", (f"kept: step {kept}", kept))


def plot_reward(run, pairs: list[tuple[float, float]]) -> None:
    """Loss, accuracy, and how the scores of better and worse summaries lie.

    Args:
        pairs: (score of the better, score of the worse) of each test pair.
    """
    rows = run.read_metrics()
    curves(run.folder / "plots" / "reward.png",
           [Panel("loss, training", "nats a pair", {"loss": series(rows, "reward/loss")}),
            Panel("pair accuracy, validation", "share of pairs",
                  {"accuracy": series(rows, "eval/accuracy")})],
           "step")
    figure, axis = plt.subplots(figsize=(5, 3.4))
    better, worse = zip(*pairs, strict=True)
    low, high = min(map(min, pairs)), max(map(max, pairs))
    for values, label, style in ((better, "preferred", {"histtype": "stepfilled", "alpha": 0.45}),
                                 (worse, "other", {"histtype": "step", "linewidth": 1.8})):
        axis.hist(values, bins=30, range=(low, high), label=label, **style)
    axis.set_title("Scores of the test pairs")
    axis.set_xlabel("score")
    axis.set_ylabel("pairs")
    axis.legend()
    figure.tight_layout()
    figure.savefig(run.folder / "plots" / "score_histogram.png", dpi=120)
    plt.close(figure)


def plot_calibration(run, curves: dict[str, list[tuple[float, float, int]]]) -> None:
    """Reliability curves: (confidence, accuracy, pairs) of each bin, a larger dot for more pairs."""
    figure, axis = plt.subplots(figsize=(5, 3.8))
    axis.plot([0.5, 1], [0.5, 1], color="grey", linestyle=":", label="accuracy = confidence")
    for name, curve in curves.items():
        sure, right, pairs = zip(*curve, strict=True)
        [line] = axis.plot(sure, right, label=name)
        axis.scatter(sure, right, s=[6 + 120 * n / sum(pairs) for n in pairs], color=line.get_color())
    axis.set_title("Accuracy of the test pairs by confidence")
    axis.set_xlabel("confidence in the order")
    axis.set_ylabel("share of pairs in the right order")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(run.folder / "plots" / "calibration.png", dpi=120)
    plt.close(figure)


def plot_lengths(path, lengths: dict[str, np.ndarray]) -> None:
    """Histograms side by side of how many tokens something has, by its name; a dotted line at the median."""
    lengths = {name: sizes for name, sizes in lengths.items() if len(sizes)}
    plural = {"prompt": "prompts", "completion": "completions"}
    figure, axes = plt.subplots(1, len(lengths), figsize=(4.4 * len(lengths), 3.4), squeeze=False)
    for axis, (name, sizes) in zip(axes[0], lengths.items(), strict=True):
        # whole, or some bars would count more lengths than others
        step = -(-int(sizes.max() - sizes.min() + 1) // 40)
        axis.hist(sizes, bins=np.arange(sizes.min(), sizes.max() + step + 1, step) - 0.5)
        axis.axvline(np.median(sizes), color="black", linestyle=":", label=f"median {np.median(sizes):g}")
        axis.set_title(f"{len(sizes)} {plural[name]}")
        axis.set_xlabel("tokens")
        axis.set_ylabel(plural[name])
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_ppo(run, kept: int, kl_budget: float) -> None:
    """Score, KL, length, and gold score or share with EOS against the update.

    Args:
        kept: the update whose policy was kept.
    """
    rows = run.read_metrics()
    gold = {"nearly greedy": series(rows, "eval/gold"), "sampled": series(rows, "eval/gold_sampled")}
    ended = {"rollouts": series(rows, "objective/ended"), "validation": series(rows, "eval/ended")}
    curves(run.folder / "plots" / "ppo.png", [
        Panel("reward model's score", "score", {"rollouts": series(rows, "objective/score"),
                                                "validation": series(rows, "eval/score")}),
        Panel("KL to the SFT policy", "nats a summary", {"rollouts": series(rows, "objective/kl"),
                                                         "validation": series(rows, "eval/kl")},
              ("kl_budget", kl_budget)),
        Panel("length", "tokens", {"rollouts": series(rows, "objective/length"),
                                   "validation": series(rows, "eval/tokens")}),
        Panel("gold score, validation", "gold score, at most 1", gold) if gold["sampled"][0] else
        Panel("summaries that end", "share", ended),
    ], "update", (f"kept: update {kept}", kept))


def plot_runs(path, panels: dict[str, tuple[str, str, dict[str, list[tuple[list, list]]]]]) -> None:
    """Curves of several runs: a faint line for each, and the mean of each group where all of it have a value.

    Args:
        panels: {title: (x label, y label, {group: [(x, y) of each run]})}; those without a point are left
            out.
    """
    panels = {title: panel for title, panel in panels.items()
              if any(x for lines in panel[2].values() for x, _ in lines)}
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, (xlabel, ylabel, groups)) in zip(axes.flat, panels.items(), strict=False):
        for number, (group, lines) in enumerate(groups.items()):
            colour = f"C{number}"
            for x, y in lines:
                axis.plot(x, y, color=colour, alpha=0.3, linewidth=1)
            at = [dict(zip(x, y, strict=True)) for x, y in lines]
            common = [step for step in at[0] if all(step in values for values in at)]
            axis.plot(common, [sum(values[step] for values in at) / len(at) for step in common], color=colour,
                      linewidth=2.2, linestyle=DASHES[number % len(DASHES)], label=group)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.set_ylabel(ylabel)
        whole_numbers(axis)
        axis.grid(alpha=0.3)
        if len(groups) > 1:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_win_rates(path, panels: dict[str, dict[str, list[tuple]]], goal: float) -> None:
    """Win rate against the number of rated prompts, on a logarithmic axis.

    A dotted line stands at .5, where the old model is against itself.

    Args:
        panels: {title: {label of a line: [(prompts, rate, low, high)]}}, the intervals as bars.
        goal: a dashed line.
    """
    figure, axes = plt.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.6), sharey=True, squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        sizes = sorted({point[0] for points in lines.values() for point in points})
        for number, (label, points) in enumerate(lines.items()):
            x, rates, low, high = (np.array(column) for column in zip(*points, strict=True))
            x = x * 1.06 ** (number - (len(lines) - 1) / 2)  # beside each other, so that bars do not overlap
            axis.errorbar(x, rates, [rates - low, high - rates], label=label, capsize=3,
                          marker="o^sD"[number % 4], linestyle=DASHES[number % len(DASHES)])
        axis.axhline(goal, color="black", linestyle="--", linewidth=1, label=f"goal {goal:g}")
        axis.axhline(0.5, color="grey", linestyle=":", linewidth=1, label="the old model")
        axis.set_xscale("log")
        axis.set_xticks(sizes, list(map(str, sizes)))
        axis.minorticks_off()
        axis.set_ylim(0, 1)
        axis.set_title(title)
        axis.set_xlabel("rated prompts")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("win rate of the new model")
    axes[0][0].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_over_optimisation(path, runs: list[dict], best_of_n: list[dict], caption: str) -> None:
    """Reward-model score and gold score against the KL to the SFT policy, after Gao et al., 2210.10760,
    figure 1.

    The axis is KL on a square-root scale: Gao et al. plot against its root, in which the curves are nearly
    parabolas.

    Args:
        runs: {"label": ..., "points": [{"kl", "score", "gold", "greedy_gold"}], "picked": one of the points}
            of each PPO run.
        best_of_n: [{"n", "kl", "score", "gold"}].
    """
    titles = {"score": "reward model's score", "gold": "gold score",
              "greedy_gold": "gold score, nearly greedy summaries"}
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), sharex=True)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for number, run in enumerate(runs):
            axis.plot(*_columns(run["points"], name), color=f"C{number}", marker="o^vDP"[number % 5],
                      markersize=4, linewidth=1.2, label=run["label"])
            axis.plot(*_columns([run["picked"]], name), color=f"C{number}", marker="*", markersize=15,
                      markeredgecolor="black",
                      linestyle="none", zorder=3)
        sampled = [] if name == "greedy_gold" else best_of_n  # it is made of samples
        axis.plot(*_columns(sampled, name), color="black", linestyle="--", marker="s", markersize=4,
                  label="best of n")
        for point in sampled:
            axis.annotate(point["n"], (max(point["kl"], 0), point[name]), xytext=(3, -11),
                          textcoords="offset points", fontsize=7)
        # estimates of a KL of 0 fall on both sides of it
        axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axis.set_xlim(left=0)
        axis.set_title(title)
        axis.set_ylabel("score" if name == "score" else "gold score, at most 1")
        axis.set_xlabel("KL to the SFT policy [nats a summary], square-root scale")
        axis.grid(alpha=0.3)
    axes[1].plot([], [], color="white", marker="*", markersize=12, markeredgecolor="black", linestyle="none",
                 label="best-checkpoint rule")
    axes[1].legend(fontsize=8)
    figure.text(0.5, 0.005, caption, ha="center", va="bottom", fontsize=8)
    figure.tight_layout(rect=(0, 0.05 + 0.035 * caption.count("\n"), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _columns(points, name):
    return [max(point["kl"], 0) for point in points], [point[name] for point in points]
