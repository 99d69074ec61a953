"""When in training a prediction came about."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from kxexplain.attribution.result import Explanation
from kxexplain.plots.bill import NAMES
from kxexplain.plots.examples import Gallery, blank
from kxexplain.plots.style import FAINT, INK, OTHER, SIGNED, SOFT, UP, amount, decimals, tidy, title

STYLES = {"regularizer": "--", "penalty": (0, (5, 1)), "buffers": ":", "unattributed": "-."}


def draw_course(axes: Axes, explanation: Explanation, query: int) -> None:
    """The bill's running total over training, and the other lines' where they can be seen.

    At recorded states of plain SGD that is the model's output. An optimiser with a memory goes on moving the parameters
    by a gradient after its step; all of that stands where the gradient was put in, so the two agree at the end only.
    """
    line = explanation.timeline
    steps = line.steps.tolist()
    cumulative = {
        name: np.concatenate([[0.0], np.cumsum(total[:, query].double().cpu().numpy())])
        for name, total in line.totals.items()
    }
    running = float(explanation.baseline[query]) + np.sum(list(cumulative.values()), axis=0)
    span = float(np.ptp(running)) or 1.0
    places = max(0, decimals(float(np.abs(running).max())) - 1)
    axes.axhline(0, color=FAINT, linewidth=1)
    axes.fill_between(steps, running[0], running, color=UP, alpha=0.10, linewidth=0)
    axes.plot(steps, running, color=INK, linewidth=1.8, label="running total of the bill")
    for name, style in STYLES.items():
        if name in cumulative and np.abs(cumulative[name]).max() > 0.005 * span:
            axes.plot(steps, cumulative[name], style, color=OTHER, linewidth=1.4, label=NAMES[name])
    axes.plot(steps[-1], running[-1], "o", color=INK, markersize=5, clip_on=False)
    axes.annotate(
        amount(float(running[-1]), places, signed=False), (steps[-1], float(running[-1])),
        xytext=(7, 0), textcoords="offset points", va="center", fontsize=9, fontweight="bold", color=INK,
        annotation_clip=False,
    )  # fmt: skip
    if len(axes.lines) > 3:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    tidy(axes)
    _steps_axis(axes, steps)
    axes.yaxis.grid(True, color=FAINT, linewidth=0.6)
    title(axes, _course_title(steps, running))


def _course_title(steps: list[int], running: np.ndarray) -> str:
    """Between which states half of the change was put in; where the half was passed more than once, the last time.

    >>> _course_title([0, 90, 135], np.array([0.0, 1.0, 4.0]))
    'Half-way was reached between steps 90 and 135 of 135'
    >>> _course_title([0, 1, 2], np.array([0.0, 2.0, 2.5]))
    'Half-way was reached by step 1 of 2'
    """
    change = running[-1] - running[0]
    if len(steps) < 3 or change == 0 or not np.isfinite(running).all():
        return "The bill over training"
    behind = np.flatnonzero((running - running[0]) / change < 0.5)
    before, after = steps[int(behind[-1])], steps[int(behind[-1]) + 1]
    when = f"by step {after:,}" if after == before + 1 else f"between steps {before:,} and {after:,}"
    return f"Half-way was reached {when} of {steps[-1]:,}"


def draw_shares(axes: Axes, explanation: Explanation, query: int, gallery: Gallery) -> None:
    """What the largest contributors put in, by time: a row an example, blue up and orange-red down."""
    line = explanation.timeline
    shares = line.shares[:, query].double().cpu().numpy().T if line.shares.numel() else np.zeros((0, 0))
    if shares.size == 0:
        blank(axes, "the shares over time were not kept (memory)")
        return
    borders = line.bins.tolist()
    shares = shares / np.maximum(1, np.diff(borders))  # bins may differ in length
    largest = float(np.abs(shares).max()) or 1.0
    examples = line.examples[query].tolist()
    mesh = axes.pcolormesh(
        borders, np.arange(len(examples) + 1), shares, cmap=SIGNED, vmin=-largest, vmax=largest,
        edgecolors="white", linewidth=0.6,
    )  # fmt: skip
    axes.set_yticks(np.arange(len(examples)) + 0.5, [gallery.caption(i) for i in examples])
    axes.set_ylim(len(examples), 0)
    tidy(axes, keep=())
    axes.tick_params(axis="y", labelsize=8, colors=INK)
    _steps_axis(axes, borders)
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.015, aspect=18)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=0, colors=SOFT)
    title(axes, f"When the {len(examples)} largest contributors acted (amount per step)")


def _steps_axis(axes: Axes, steps: list[int]) -> None:
    axes.set_xlim(steps[0], steps[-1] if steps[-1] > steps[0] else steps[0] + 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("training step", fontsize=8.5, color=SOFT)
