"""Pictures: labels on every axis, colours that can be told apart, whole ticks, what is kept, no mark cut."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from studies.benchmarks import report
from studies.benchmarks.cost import Point
from utils.judge import plots
from utils.plotting import COLOURS, plt

# Machado, Oliveira and Fernandes (2009), severity 1: what people without red or green cones see, linear RGB
BLIND = {
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "nothing": np.eye(3).tolist(),
}
XYZ = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
       [0.0193339, 0.1191920, 0.9503041]]


def lab(colour, matrix):
    """CIE L*a*b* of a colour as somebody sees it."""
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    white = np.array([0.95047, 1.0, 1.08883])
    xyz = np.array(XYZ) @ np.clip(np.array(matrix) @ linear, 0, 1) / white
    x, y, z = (math.cbrt(v) if v > 216 / 24389 else (24389 / 27 * v + 16) / 116 for v in xyz)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def closest(colours, kind):
    return min(np.linalg.norm(lab(a, BLIND[kind]) - lab(b, BLIND[kind]))
               for a, b in itertools.combinations(colours, 2))


@pytest.mark.parametrize("kind", BLIND)
def test_curves_of_one_chart_can_be_told_apart(kind):
    """A difference of 2 is just seen; matplotlib's orange and green are 5 apart without red cones."""
    assert closest(COLOURS[:4], kind) > 50 and closest(COLOURS, kind) > 15
    assert closest(["#ff7f0e", "#2ca02c"], "protanopia") < 6
    assert plt.rcParams["axes.prop_cycle"].by_key()["color"] == COLOURS


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are drawn, each as it was when it was saved."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def charts(figure):
    return [axis for axis in figure.axes if axis.axison and axis.get_visible()]


def labels(axis):
    return axis.get_legend_handles_labels()[1]


def run_of(folder, rows):
    (folder / "plots").mkdir()
    return SimpleNamespace(folder=folder, read_metrics=lambda: rows)


def ppo_rows(updates, gold=True):
    rows = [{"step": n, "objective/score": n / 9, "objective/kl": n / 8, "objective/length": 20 + n,
             "objective/ended": 1.0} for n in range(1, updates + 1)]
    evaluation = {"eval/score": 0.1, "eval/kl": 0.2, "eval/tokens": 21.0, "eval/ended": 1.0}
    return rows + [{"step": n, **evaluation, **({"eval/gold": 0.5, "eval/gold_sampled": 0.4} if gold else {})}
                   for n in range(0, updates + 1, 2)]


@pytest.mark.parametrize("updates", [1, 2, 3, 4, 16, 300])
@pytest.mark.parametrize("gold", [True, False])
def test_ppos_picture_is_a_grid_that_shows_the_kept_update_and_the_budget(updates, gold, tmp_path, drawn):
    plots.plot_ppo(run_of(tmp_path, ppo_rows(updates, gold)), kept=updates, kl_budget=updates / 8 + 0.1)
    [figure] = drawn
    width, height = figure.get_size_inches()
    assert len(charts(figure)) == 4 and 1 < width / height < 2, "it is read in a column of text"
    for axis in charts(figure):
        assert axis.get_xlabel() == "update" and axis.get_ylabel() and axis.get_title()
        low, high = axis.get_xlim()
        ticks = [tick for tick in axis.get_xticks() if low <= tick <= high]
        assert ticks and all(tick == round(tick) for tick in ticks)
        kept = next(line for line in axis.lines if line.get_label() == f"kept: update {updates}")
        assert set(kept.get_xdata()) == {updates}
    [kl] = [axis for axis in charts(figure) if axis.get_title().startswith("KL")]
    budget = next(line for line in kl.lines if str(line.get_label()).startswith("kl_budget"))
    assert set(budget.get_ydata()) == {updates / 8 + 0.1} and kl.get_ylim()[1] >= updates / 8
    assert [axis.get_title() for axis in charts(figure)][3] == ("gold score, validation" if gold else
                                                                "summaries that end")


def test_a_budget_far_above_the_curve_does_not_flatten_it(tmp_path, drawn):
    plots.plot_ppo(run_of(tmp_path, ppo_rows(16)), kept=0, kl_budget=500.0)
    [kl] = [axis for axis in charts(drawn[0]) if axis.get_title().startswith("KL")]
    assert "kl_budget 500, above this" in labels(kl) and kl.get_ylim()[1] < 4


def test_the_pictures_of_the_other_stages_have_labels(tmp_path, drawn):
    rows = [{"step": n, "sft/loss": 1 / n, "reward/loss": 1 / n} for n in range(1, 30)]
    rows += [{"step": n, "eval/rouge1": 0.5, "eval/rouge2": 0.3, "eval/rougeL": 0.4, "eval/accuracy": 0.7,
              "eval/loss": 1.0} for n in (0, 15, 29)]
    run = run_of(tmp_path, rows)
    plots.plot_sft(run, kept=15)
    plots.plot_reward(run, [(1.0, 0.5), (0.2, 0.4)])
    plots.plot_calibration(run, {"a": [(0.6, 0.5, 3), (0.8, 0.9, 4)], "b": [(0.7, 0.6, 2)]})
    plots.plot_lengths(tmp_path / "lengths.png", {"prompt": np.arange(9), "completion": np.arange(4)})
    plots.plot_runs(tmp_path / "runs.png", {"KL": ("update", "nats", {"A": [([1, 2], [1, 2])],
                                                                      "B": [([1, 2], [2, 3])]})})
    plots.plot_over_optimisation(tmp_path / "over.png", [
        {"label": name, "points": [{"kl": 1, "score": 1, "gold": 1, "greedy_gold": 1}] * 2,
         "picked": {"kl": 1, "score": 1, "gold": 1, "greedy_gold": 1}} for name in "ab"],
        [{"n": 1, "kl": 0, "score": 1, "gold": 1}], "a caption")
    assert len(drawn) == 7
    for figure in drawn:
        assert charts(figure)
        for axis in charts(figure):
            assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title()
    assert labels(charts(drawn[0])[0]) == ["training", "validation", "kept: step 15"]
    assert labels(charts(drawn[-2])[0]) == ["A", "B"]


def test_nothing_of_the_picture_of_costs_is_cut_off(tmp_path, drawn):
    """No mark stands on the frame, and no number with an exponent in a corner."""
    points = [Point(stage, quantity, x, x * 0.1, 800 + x, x * 0.05) for stage in ("reward", "ppo")
              for quantity, xs in (("K", [2, 4, 8]), ("parameters", [1.7e6, 1.06e7])) for x in xs]
    report.plot_costs(tmp_path / "cost.png", points)
    [figure] = drawn
    figure.canvas.draw()
    for axis in charts(figure):
        assert axis.get_ylabel() in ("seconds", "GiB")
        assert axis.xaxis.get_offset_text().get_text() == ""
        for line in axis.lines:
            if len(line.get_xdata()) == 0:
                continue
            places = axis.transData.transform(np.column_stack([line.get_xdata(), line.get_ydata()]))
            mark = (line.get_markersize() / 2 + 1) * figure.dpi / 72 if line.get_marker() != "None" else 0
            box = axis.get_window_extent()
            assert (places[:, 0] + mark <= box.x1).all() and (places[:, 1] + mark <= box.y1).all()
