"""Accuracy against time of the ways to take new examples in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from kxexplain.learning.incremental.alternatives import Updates
from kxexplain.plots.style import CLASSES, DOWN, FAINT, INK, SOFT, UP, new_figure, tidy, title

SHADES = {"gradient": CLASSES[1], "ridge": UP, "logistic": CLASSES[2], "fine-tuning": CLASSES[3], "retraining": DOWN}


def plot_updates(found: Updates | Mapping[str, Updates | Sequence[Updates]]) -> Figure:
    """Mean accuracy on new and old data against seconds, a panel for each comparison.

    Args:
        found: one comparison, or several by their titles; of a list (one a seed) the means are drawn.

    Returns:
        A figure. Filled marks are with memory, the line is the accuracy without an update.
    """
    panels = {"accuracy on new and old data": [found]} if isinstance(found, Updates) else {
        name: [each] if isinstance(each, Updates) else list(each) for name, each in found.items()
    }  # fmt: skip
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(0.8 + 2.9 * rows, 2.4 + 3.2 * columns)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, each) in zip(grid.flat, panels.items(), strict=False):
        _draw(axes, each)
        title(axes, name)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3 if columns == 1 else 5,
        frameon=False,
        fontsize=8,
        labelcolor=INK,
    )
    return figure


def _draw(axes: Axes, each: list[Updates]) -> None:
    names = [row.name for row in each[0].rows]
    for name in names:
        both = 100 * sum(one[name].both for one in each) / len(each)
        seconds = sum(one[name].seconds for one in each) / len(each)
        if name == "no update":
            axes.axhline(both, color=SOFT, linewidth=1, linestyle=":", label=name, zorder=1)
            continue
        shade = SHADES[name.partition(",")[0]]
        alone = name.partition(",")[0] in ("gradient", "ridge", "logistic") and "memory" not in name
        axes.scatter(
            [seconds], [both], s=52, marker="o", facecolors="white" if alone else shade, edgecolors=shade,
            linewidths=1.6, label=name, zorder=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("seconds", fontsize=8.5, color=SOFT)
    axes.set_ylabel("mean accuracy, %", fontsize=8.5, color=SOFT)
    axes.grid(True, color=FAINT, linewidth=0.6)
    tidy(axes)
