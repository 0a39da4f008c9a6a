"""The pictures in plots/, drawn from metrics.jsonl after training."""

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first: there may be no screen)


def series(rows: list[dict], name: str) -> tuple[list, list]:
    """Steps and values of one metric. After a resume the later of two values of a step counts."""
    found = {row["step"]: row[name] for row in rows if row.get(name) is not None}
    return list(found), list(found.values())


def curves(path, panels: dict[str, dict[str, tuple[list, list]]], xlabel: str) -> None:
    """Line charts side by side: {panel title: {label: (x, y)}}. Panels without a point are left out."""
    panels = {title: {k: v for k, v in lines.items() if v[0]} for title, lines in panels.items()}
    panels = {title: lines for title, lines in panels.items() if lines}
    if not panels:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(4.4 * len(panels), 3.4), squeeze=False)
    for axis, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for label, (x, y) in lines.items():
            axis.plot(x, y, label=label, marker="o" if len(x) < 30 else None, markersize=3)
        axis.set_title(title)
        axis.set_xlabel(xlabel)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_sft(run) -> None:
    """Loss, and ROUGE on generated summaries."""
    rows = run.read_metrics()
    rouge = {name: series(rows, f"eval/{name}") for name in ("rouge1", "rouge2", "rougeL")}
    curves(run.folder / "plots" / "sft.png",
           {"SFT loss per token": {"loss": series(rows, "sft/loss")}, "ROUGE, generated, validation": rouge},
           "step")


def plot_reward(run, pairs: list[tuple[float, float]]) -> None:
    """Loss, accuracy, and how the scores of better and worse summaries lie.

    Args:
        pairs: (score of the better, score of the worse) of each test pair.
    """
    rows = run.read_metrics()
    curves(run.folder / "plots" / "reward.png",
           {"loss per pair": {"loss": series(rows, "reward/loss")},
            "pair accuracy, validation": {"accuracy": series(rows, "eval/accuracy")}}, "step")
    figure, axis = plt.subplots(figsize=(5, 3.4))
    better, worse = zip(*pairs, strict=True)
    low, high = min(map(min, pairs)), max(map(max, pairs))
    axis.hist([better, worse], bins=30, range=(low, high), label=["preferred", "other"],
              histtype="stepfilled", alpha=0.5)
    axis.set_title("Scores of the test pairs")
    axis.set_xlabel("score")
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
    figure, axes = plt.subplots(1, len(lengths), figsize=(4.4 * len(lengths), 3.4), squeeze=False)
    for axis, (name, sizes) in zip(axes[0], lengths.items(), strict=True):
        # whole, or some bars would count more lengths than others
        step = -(-int(sizes.max() - sizes.min() + 1) // 40)
        axis.hist(sizes, bins=np.arange(sizes.min(), sizes.max() + step + 1, step) - 0.5)
        axis.axvline(np.median(sizes), color="black", linestyle=":", label=f"median {np.median(sizes):g}")
        axis.set_title(f"{len(sizes)} {name}s")
        axis.set_xlabel("tokens")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_ppo(run) -> None:
    """Score, KL, length and gold score against the update."""
    rows = run.read_metrics()
    curves(run.folder / "plots" / "ppo.png", {
        "reward model's score": {"rollouts": series(rows, "objective/score"),
                                 "validation": series(rows, "eval/score")},
        "KL [nats a summary]": {"rollouts": series(rows, "objective/kl")},
        "length [tokens]": {"rollouts": series(rows, "objective/length"),
                            "validation": series(rows, "eval/tokens")},
        "gold score": {"validation": series(rows, "eval/gold")},
    }, "update")


def plot_seeds(path, panels: dict[str, tuple[str, list[tuple[list, list]]]]) -> None:
    """Curves over seeds: a faint line for each seed, and their mean where all of them have a value.

    Args:
        panels: {title: (x label, [(x, y) of each seed])}; those without a point are left out.
    """
    panels = {title: panel for title, panel in panels.items() if any(x for x, _ in panel[1])}
    if not panels:
        return
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.7 * columns, 3.1 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, (xlabel, lines)) in zip(axes.flat, panels.items(), strict=False):
        for x, y in lines:
            axis.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1)
        at = [dict(zip(x, y, strict=True)) for x, y in lines]
        common = [step for step in at[0] if all(step in values for values in at)]
        axis.plot(common, [sum(values[step] for values in at) / len(at) for step in common], color="tab:blue",
                  linewidth=2.2)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel(xlabel)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
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
            axis.plot(*_columns(run["points"], name), color=f"C{number}", marker="o", markersize=3,
                      linewidth=1.2,
                      label=run["label"])
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
