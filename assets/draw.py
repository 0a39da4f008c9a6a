"""Draw assets/logo.png: one prompt, its completions, and the one that is preferred.

    python assets/draw.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first: there may be no screen)
from matplotlib.patches import FancyBboxPatch  # noqa: E402

INK, MUTED, BLUE, GREEN, PAPER = "#1b2a3d", "#5b6b7e", "#2f6fde", "#1f9d6b", "#f6f8fb"


def bar(axis, x, y, width, height, colour, alpha=1.0):
    """A rounded bar in a coordinate system whose unit is one pixel of the picture."""
    style = f"round,pad=0,rounding_size={height / 2}"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, linewidth=0, facecolor=colour,
                                  alpha=alpha))


def main():
    figure = plt.figure(figsize=(6.4, 2.0), dpi=100)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 640), ylim=(0, 200))
    axis.axis("off")
    card = FancyBboxPatch((2, 2), 636, 196, boxstyle="round,pad=0,rounding_size=18", linewidth=0,
                          facecolor=PAPER, zorder=0)
    axis.add_patch(card)
    for y, width, colour in ((145, 62, BLUE), (71, 50, BLUE), (34, 70, BLUE), (108, 84, GREEN)):
        chosen = colour == GREEN
        axis.plot([150, 153, 161, 172], [100, 100, y + 11, y + 11], color=colour, linewidth=3.2,
                  alpha=1 if chosen else 0.45,
                  solid_capstyle="round", solid_joinstyle="round")
        bar(axis, 172, y, width, 22, colour, 1 if chosen else 0.45)
    bar(axis, 36, 89, 112, 22, INK)  # the prompt, once
    axis.plot([266, 271, 281], [119, 113, 127], color=GREEN, linewidth=3.6, solid_capstyle="round",
              solid_joinstyle="round")
    axis.text(318, 112, "opt-rlhf", fontsize=37, fontweight="bold", color=INK, va="center",
              family="DejaVu Sans")
    axis.text(320, 68, "SFT, reward model, PPO:", fontsize=13, color=MUTED, va="center", family="DejaVu Sans")
    axis.text(320, 47, "a prompt is computed once", fontsize=13, color=MUTED, va="center",
              family="DejaVu Sans")
    # no software version and no date in the file: the same drawing, the same bytes
    figure.savefig(Path(__file__).parent / "logo.png", transparent=True, metadata={"Software": None})


if __name__ == "__main__":
    main()
