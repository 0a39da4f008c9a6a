"""The curves of a real run's seeds, three panels: SFT, reward model, PPO.

    python scripts/studies/real_run/curves.py docs/real/h200.json assets/real.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# stage, its metric, what the axis says; PPO's score and KL share a panel
PANELS = (("sft", "eval/rouge_avg", "SFT: ROUGE mean, validation"),
          ("reward", "eval/accuracy", "reward model: pair accuracy, validation"),
          ("ppo", "objective/score", "PPO: score of the update"))


def points(run: dict, stage: str, metric: str) -> tuple[list, list]:
    """Steps and values of a metric of one run; empty when the run has none."""
    rows = [row for name, rows in run.get(stage, {}).items() if name in ("metrics", "metrics, stopped")
            for row in rows if metric in row]
    return [row["step"] for row in rows], [row[metric] for row in rows]


def draw(runs: dict, target: Path) -> None:
    """`runs`: of each run by name, by stage, its `metrics`."""
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.2), dpi=100)
    for axis, (stage, metric, title) in zip(axes, PANELS, strict=True):
        for number, (name, run) in enumerate(runs.items()):
            steps, values = points(run, stage, metric)
            if steps:
                axis.plot(steps, values, f"C{number}", marker=".", label=name)
        axis.set(title=title, xlabel="update" if stage == "ppo" else "step")
        axis.legend(fontsize=8)
    right = axes[-1].twinx()
    for number, run in enumerate(runs.values()):
        right.plot(*points(run, "ppo", "objective/kl"), f"C{number}", linestyle=":")
    right.set_ylabel("dotted: KL [nats a summary]")
    figure.tight_layout()
    figure.savefig(target, metadata={"Software": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["runs"], Path(sys.argv[2]))
