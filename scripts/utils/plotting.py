"""matplotlib as all pictures use it: no screen, colours that colour-blind people can tell apart."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402, F401  (the backend must be chosen first: there may be no screen)

# Okabe and Ito's colours (jfly.uni-koeln.de/color), in an order in which the first four differ most
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#000000", "#CC79A7", "#56B4E9", "#D55E00"]
DASHES = ["-", "--", "-.", ":"]
plt.rcParams["axes.prop_cycle"] = matplotlib.cycler(color=COLOURS)


def whole_numbers(axis) -> None:
    """Let an x axis of steps or updates have ticks at whole numbers only."""
    axis.xaxis.get_major_locator().set_params(integer=True)
