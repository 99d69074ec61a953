"""The bill as a waterfall: from the baseline over groups of examples to the prediction."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes

from kxexplain.attribution.result import Explanation
from kxexplain.plots.style import FAINT, INK, OTHER, SOFT, amount, colour, decimals, tidy, tiny

NAMES = {
    "regularizer": "weight decay",
    "penalty": "gradient penalty",
    "buffers": "running statistics",
    "unattributed": "unattributed",
    "remainder": "remainder",
}


@dataclass(frozen=True)
class Bill:
    """One query's bill in a few lines that add up.

    Attributes:
        baseline, prediction: where the waterfall begins and ends.
        lines: (name, amount, colour) of what lies between.
        places: decimals that the amounts are written with.
        omitted: (name, amount) of lines too small to be drawn.
    """

    baseline: float
    prediction: float
    lines: list[tuple[str, float, str]]
    places: int
    omitted: list[tuple[str, float]]

    @classmethod
    def of(cls, explanation: Explanation, query: int, k: int) -> Bill:
        """Group a query's contributions: the k largest proponents, the k largest opponents, the others' net sum."""
        values = explanation.contributions[query].double()
        ranked = explanation.top(k)
        ups = [v for v in ranked.proponent_values[query].double().tolist() if v > 0]
        downs = [v for v in ranked.opponent_values[query].double().tolist() if v < 0]
        rest = float(values.sum()) - sum(ups) - sum(downs)
        others = len(values) - len(ups) - len(downs)
        lines = []
        if ups:
            lines.append((_counted(len(ups), "top proponent"), sum(ups), colour(1)))
        if others:
            lines.append((_counted(others, "other example") + ", net", rest, colour(rest)))
        if downs:
            lines.append((_counted(len(downs), "top opponent"), sum(downs), colour(-1)))
        if explanation.added is not None and explanation.added_names:
            later = float(explanation.added[query].double().sum())
            lines.append((_counted(len(explanation.added_names), "added term") + ", net", later, colour(later)))
        baseline, prediction = (float(t[query]) for t in (explanation.baseline, explanation.prediction))
        scale = max(abs(v) for v in (baseline, prediction, *(v for _, v, _ in lines)))
        places = decimals(scale)
        shown, omitted = [], []
        for line, name in NAMES.items():
            value = float(getattr(explanation, line)[query])
            if abs(value) >= 0.5 * 10.0**-places:
                shown.append((name, value, OTHER))
            elif value != 0:
                omitted.append((name, value))
        return cls(baseline, prediction, lines + shown, places, omitted)


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def draw_waterfall(axes: Axes, bill: Bill) -> None:
    """Bars from baseline to prediction, each beginning where the one above it ended, with its amount."""
    rows = [("baseline (initial model)", 0.0, bill.baseline, INK)]
    at = bill.baseline
    for name, value, shade in bill.lines:
        rows.append((name, at, at + value, shade))
        at += value
    rows.append(("prediction", 0.0, bill.prediction, INK))
    ends = [x for _, start, end, _ in rows for x in (start, end)]
    span = (max(ends) - min(ends)) or 1.0
    for row, (_, start, end, shade) in enumerate(rows):
        axes.barh(row, end - start, left=start, height=0.62, color=shade, zorder=2)
        if row + 1 < len(rows):
            axes.plot([end, end], [row, row + 1], color=SOFT, linewidth=0.8, zorder=1)
        total = row in (0, len(rows) - 1)
        axes.text(
            end + (0.012 if end >= start else -0.012) * span, row, amount(end - start, bill.places, signed=not total),
            va="center", ha="left" if end >= start else "right", fontsize=9, zorder=3,
            fontweight="bold" if total else "normal", color=shade,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(min(ends) - 0.13 * span, max(ends) + 0.13 * span)
    tidy(axes, keep=("bottom",))
    axes.tick_params(axis="y", labelsize=9, colors=INK)
    axes.xaxis.grid(True, color=FAINT, linewidth=0.6)
    if bill.omitted:
        text = ", ".join(f"{name} {tiny(value)}" for name, value in bill.omitted)
        axes.set_xlabel(f"too small to draw: {text}", loc="right", fontsize=7.5, color=SOFT)
