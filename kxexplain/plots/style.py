"""What all pictures share: colours, the way numbers are written, and plain axes."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

UP, DOWN = "#0F6CB6", "#D1491B"
"""Proponents and opponents: blue and orange-red, which differ in lightness too (Okabe & Ito's pair, deepened)."""
INK, SOFT, FAINT, PAPER = "#22303C", "#66727D", "#D5DADF", "#FFFFFF"
OTHER = "#8A6FB0"
"""Lines of the bill that are no example's: regulariser, buffers, unattributed, remainder."""
SIGNED = LinearSegmentedColormap.from_list("kxexplain", [DOWN, "#F0A98C", "#F7F7F5", "#8DBBE0", UP])
CLASSES = ("#4C5B68", "#B08A2E", "#4F8A5B", "#8A6FB0", "#3D8C95", "#A65A7A")
WIDTH = 11.0
DPI = 120


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of its own canvas, in inches, that lays out its parts by itself."""
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.03, hspace=0.03)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def parts(figure: Figure | SubFigure, heights: list[float]) -> list[SubFigure]:
    """A figure cut into parts that lie below one another."""
    return list(np.atleast_1d(figure.subfigures(len(heights), 1, height_ratios=heights)))  # type: ignore[arg-type]


def columns_of(figure: Figure | SubFigure, widths: list[float]) -> list[SubFigure]:
    """A figure cut into parts that lie side by side."""
    return list(np.atleast_1d(figure.subfigures(1, len(widths), width_ratios=widths)))  # type: ignore[arg-type]


def heading(part: Figure | SubFigure, text: str, *, size: float = 10.5, weight: str = "bold") -> None:
    """A title at the left edge of a figure or of a part of one."""
    part.suptitle(text, x=0.012, ha="left", fontsize=size, fontweight=weight, color=INK)


def title(axes: Axes, text: str) -> None:
    """An axes' title, at its left edge."""
    axes.set_title(text, loc="left", fontsize=9.5, fontweight="bold", color=INK, pad=7)


def tidy(axes: Axes, *, keep: tuple[str, ...] = ("left", "bottom")) -> None:
    """Thin, quiet axes: only the named sides stay."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)
        spine.set_color(FAINT)
    axes.tick_params(colors=SOFT, labelsize=8, length=0)
    axes.set_axisbelow(True)


def logarithmic(axes: Axes, which: str) -> None:
    """The axis "x" or "y" in powers of ten, with numbers between them where it spans few; call it after drawing."""
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    few = 0 < low < high and math.log10(high / low) < 2.5
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if few else (1.0,)))
    axis.set_minor_locator(NullLocator())
    if few:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def colour(value: float) -> str:
    """Blue for what pushed up, orange-red for what pushed down."""
    return UP if value >= 0 else DOWN


def decimals(scale: float) -> int:
    """How many decimals give numbers of this size four figures.

    >>> decimals(31.0), decimals(0.5), decimals(2500.0)
    (2, 4, 0)
    """
    if not math.isfinite(scale) or scale <= 0:
        return 2
    return min(9, max(0, 3 - math.floor(math.log10(scale))))


def amount(value: float, places: int = 2, *, signed: bool = True) -> str:
    """A number as it is printed in a picture, with a true minus sign.

    >>> amount(1.234), amount(-0.5, 1), amount(3, 0, signed=False)
    ('+1.23', '−0.5', '3')
    """
    if not math.isfinite(value):
        return str(value)
    text = f"{value:+,.{places}f}" if abs(value) < 1e6 else f"{value:+.3g}"
    if not signed:
        text = text.removeprefix("+")
    return text.replace("-", "−")


def tiny(value: float) -> str:
    """A number that is rounding, in powers of ten.

    >>> tiny(-1.5e-6)
    '−1.5e−06'
    """
    return f"{value:+.1e}".replace("-", "−")
