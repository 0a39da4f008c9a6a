"""The pictures in plots/, drawn from metrics.jsonl after training."""

import matplotlib

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
           {"SFT loss per token": {"loss": series(rows, "sft/loss")}, "ROUGE, generated, validation": rouge}, "step")


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
    axis.hist([better, worse], bins=30, range=(low, high), label=["preferred", "other"], histtype="stepfilled", alpha=0.5)
    axis.set_title("Scores of the test pairs")
    axis.set_xlabel("score")
    axis.legend()
    figure.tight_layout()
    figure.savefig(run.folder / "plots" / "score_histogram.png", dpi=120)
    plt.close(figure)


def plot_ppo(run) -> None:
    """Score, KL, length and gold score against the update."""
    rows = run.read_metrics()
    curves(run.folder / "plots" / "ppo.png", {
        "reward model's score": {"rollouts": series(rows, "objective/score"), "validation": series(rows, "eval/score")},
        "KL [nats a summary]": {"rollouts": series(rows, "objective/kl")},
        "length [tokens]": {"rollouts": series(rows, "objective/length"), "validation": series(rows, "eval/tokens")},
        "gold score": {"validation": series(rows, "eval/gold")},
    }, "update")
