"""What theory guarantees of a run, beside what was measured."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kxexplain.learning.bounds import LAST, Bounds, last_bound, weighted_mean_bound
from kxexplain.plots.style import DOWN, FAINT, INK, OTHER, SOFT, UP, heading, logarithmic, new_figure, tidy, title

HORIZONS = 60
"""At so many steps at most the bounds are evaluated anew."""


def plot_bounds(bounds: Bounds, *, name: str = "") -> Figure:
    """Gaps along a run with the bounds for any rates, and at its end every guarantee beside what was measured.

    Args:
        bounds: of :func:`kxexplain.bounds`.
        name: of the run, for the heading.

    Returns:
        A figure of its own: gaps and bounds by step on the left, the guarantees at the last step on the right.
    """
    figure = new_figure(4.2)
    heading(figure, f"{name}: measured gaps and their bounds" if name else "Measured gaps and their bounds")
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    _draw_course(left, bounds)
    _draw_guarantees(right, bounds)
    return figure


def _draw_course(axes: Axes, bounds: Bounds) -> None:
    rates, norms, total = bounds.rates, bounds.norms, len(bounds.rates)
    at = np.unique(np.geomspace(1, total, min(total, HORIZONS)).astype(int))
    if bounds.gaps is not None:
        steps = np.arange(1, total + 1)
        mean = np.cumsum(rates * bounds.gaps) / np.maximum(np.cumsum(rates), np.finfo(float).tiny)
        axes.plot(steps, np.maximum(bounds.gaps, 0), color=UP, linewidth=1.5, label="gap")
        axes.plot(steps, np.maximum(mean, 0), color=DOWN, linewidth=1.5, label="weighted mean gap")
    for colour, bound, label in (
        (DOWN, weighted_mean_bound, "bound on the mean"),
        (UP, last_bound, "bound on the gap"),
    ):
        values = [bound(rates[:t], norms[:t], bounds.distance) for t in at]
        axes.plot(at, values, "--", color=colour, linewidth=1.2, label=label)
    logarithmic(axes, "x")
    logarithmic(axes, "y")
    axes.set_xlabel("step", fontsize=8.5, color=SOFT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    title(axes, "If training had ended at this step" if bounds.full else "If it had ended at this step (batch losses)")
    tidy(axes)
    axes.legend(fontsize=7.5, frameon=False, labelcolor=INK)


def _draw_guarantees(axes: Axes, bounds: Bounds) -> None:
    names = [f"{one.name}\n{one.of}" for one in bounds.guarantees]
    rows = np.arange(len(names))[::-1]
    for row, one in zip(rows, bounds.guarantees, strict=True):
        colour = UP if one.of == LAST else DOWN
        axes.plot(one.right, row, "|", color=colour, markersize=16, markeredgewidth=2.2)
        if one.left is not None and one.left > 0:
            axes.plot([one.left, one.right], [row, row], color=FAINT, linewidth=1.5, zorder=0)
            axes.plot(one.left, row, "o", color=colour, markersize=6)
    axes.axvline(bounds.optimum, color=OTHER, linewidth=1.2, linestyle=":")
    axes.annotate(
        "continuous optimum\nof the last gap's bound", (bounds.optimum, 0.02), (4, 0),
        xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7.5, color=OTHER,
    )  # fmt: skip
    logarithmic(axes, "x")
    axes.set_yticks(rows, names)
    axes.set_ylim(-1.1, len(names) - 0.4)
    title(axes, "At the end: measured (dot), bound (bar)")
    tidy(axes)


__all__ = ["plot_bounds"]
