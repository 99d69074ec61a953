"""The largest contributions of a query: as pictures, as points in the plane, or as bars."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import SubFigure
from torch import Tensor

from kxexplain.attribution.result import Explanation, Ranking
from kxexplain.plots.examples import Gallery, blank, draw_tile
from kxexplain.plots.style import DOWN, FAINT, INK, SIGNED, SOFT, UP, amount, decimals, heading, parts, tidy, title

MARKERS = "os^Dvp*X"


def draw_pictures(part: SubFigure, gallery: Gallery, ranked: Ranking, query: int, *, what: str) -> None:
    """Proponents and opponents as two rows of pictures."""
    columns = max(6, ranked.proponents.shape[1])
    sides = (
        (ranked.proponents, ranked.proponent_values, f"Proponents: the examples that pushed {what} up the most", UP),
        (ranked.opponents, ranked.opponent_values, f"Opponents: the examples that pushed {what} down the most", DOWN),
    )
    places = decimals(float(max(values[query].abs().max() for _, values, _, _ in sides)))
    for row, (indices, values, text, shade) in zip(parts(part, [1, 1]), sides, strict=True):
        heading(row, text, size=9.5)
        sign = 1 if shade == UP else -1
        tiles = row.subplots(1, columns)
        shown = [(i, v) for i, v in _pairs(indices, values, query) if v * sign > 0]
        for axes, (index, value) in zip(tiles, shown, strict=False):
            draw_tile(axes, gallery, index, colour=shade, amount=amount(value, places))
        for axes in tiles[len(shown) :]:
            blank(axes)


def draw_points(part: SubFigure, gallery: Gallery, explanation: Explanation, query: int, *, own: Any, k: int) -> None:
    """All examples in the plane, coloured by contribution; beside them the largest as bars."""
    plane, listed = part.subplots(1, 2, width_ratios=[1.45, 1])
    n = explanation.contributions.shape[1]
    pairs = [gallery.dataset[i] for i in range(n)]
    points = np.array([np.asarray(point, dtype=float) for point, _ in pairs])
    names = [gallery.name(label) for _, label in pairs]
    values = explanation.contributions[query].double().cpu().numpy()
    largest = float(np.abs(values).max()) or 1.0
    kinds = sorted(set(names))
    for number, kind in enumerate(kinds):
        rows = np.array([name == kind for name in names])
        strength = np.sqrt(np.abs(values[rows]) / largest)
        mesh = plane.scatter(
            *points[rows].T, c=values[rows], s=14 + 90 * strength, marker=MARKERS[number % len(MARKERS)],
            cmap=SIGNED, vmin=-largest, vmax=largest, edgecolors=SOFT, linewidths=0.4, label=f"label {kind}",
        )  # fmt: skip
    if own is not None:
        x, y = own.double().cpu().tolist()
        plane.plot(x, y, "*", color="#FFD23F", markeredgecolor=INK, markersize=17, label="the query", zorder=4)
    plane.set_aspect("equal", adjustable="datalim")
    tidy(plane)
    plane.tick_params(pad=7)  # so that the first labels of the two axes keep clear of each other
    if len(kinds) <= len(MARKERS):
        legend = plane.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.85))
        for handle in legend.legend_handles[: len(kinds)]:
            handle.set(facecolor=FAINT, sizes=[36])
    bar = part.colorbar(mesh, ax=plane, pad=0.015, aspect=16, shrink=0.6, anchor=(0.0, 0.0))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7.5, length=0, colors=SOFT)
    title(plane, "Each training example, coloured by its contribution")
    ranked = explanation.top(k)
    largest_rows = [(i, v) for i, v in _pairs(ranked.proponents, ranked.proponent_values, query) if v > 0]
    largest_rows += [(i, v) for i, v in reversed(_pairs(ranked.opponents, ranked.opponent_values, query)) if v < 0]
    bars(listed, gallery, largest_rows)
    title(listed, "The largest, up and down")


def draw_bars(sides: Any, gallery: Gallery, ranked: Ranking, query: int) -> None:
    """Proponents and opponents as two lists of bars, on one scale."""
    both = (
        (ranked.proponents, ranked.proponent_values, "Proponents: pushed it up the most", 1),
        (ranked.opponents, ranked.opponent_values, "Opponents: pushed it down the most", -1),
    )
    largest = float(max(values[query].abs().max() for _, values, _, _ in both)) or 1.0
    for axes, (indices, values, text, sign) in zip(sides, both, strict=True):
        rows = [(i, v) for i, v in _pairs(indices, values, query) if v * sign > 0]
        if rows:
            bars(axes, gallery, rows, slots=values.shape[1])
            axes.set_xlim((0, 1.22 * largest) if sign > 0 else (-1.22 * largest, 0))
        else:
            blank(axes, "none")
        title(axes, text)


def bars(
    axes: Axes, gallery: Gallery, rows: list[tuple[int, float]], *, shade: str | None = None, slots: int = 0
) -> None:
    """A bar an example, with its amount; blue up and orange-red down, if not all of one colour.

    Bars are as thick as if there were ``slots`` of them.
    """
    largest = max((abs(v) for _, v in rows), default=1.0)
    places = decimals(largest)
    for row, (_, value) in enumerate(rows):
        own, side = shade or (UP if value >= 0 else DOWN), "left" if value >= 0 else "right"
        axes.barh(row, value, height=0.66, color=own)
        axes.annotate(
            amount(value, places), (value, row), xytext=(4 if value >= 0 else -4, 0), textcoords="offset points",
            va="center", ha=side, fontsize=8, color=own,
        )  # fmt: skip
    low, high = min([0.0, *(v for _, v in rows)]), max([0.0, *(v for _, v in rows)])
    axes.set_xlim(low - (0.35 * largest if low < 0 else 0), high + (0.35 * largest if high > 0 else 0))
    axes.set_ylim(max(len(rows), slots) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [gallery.caption(i) for i, _ in rows])
    axes.set_xticks([])
    tidy(axes, keep=())
    axes.axvline(0, color=FAINT, linewidth=1)
    axes.tick_params(axis="y", labelsize=8.5, colors=INK)


def _pairs(indices: Tensor, values: Tensor, query: int) -> list[tuple[int, float]]:
    return list(zip(indices[query].tolist(), values[query].double().tolist(), strict=True))
