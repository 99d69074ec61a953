"""A run at a glance: loss, gradient norm and learning rate, step by step."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kxexplain.plots.style import DOWN, FAINT, INK, OTHER, SOFT, UP, heading, logarithmic, new_figure, tidy, title
from kxexplain.trajectory import Trajectory

SMOOTH = 0.05
"""The thick line is the median over this part of the run."""


def plot_training(trajectory: Trajectory, *, name: str = "") -> Figure:
    """Loss, gradient norm (where it was logged) and learning rate of every step of a trajectory.

    Thin lines are the steps, thick ones their median over a twentieth of the run. Steps that ascended (flooding) are
    marked below the losses. A gradient's norm is that which the optimiser was given, after clipping.
    """
    steps = list(trajectory.steps)
    losses, norms = (np.array([getattr(step, key) for step in steps]) for key in ("loss", "gradient_norm"))
    shown = ["loss", "gradient", "rate"] if np.isfinite(norms).any() else ["loss", "rate"]
    what = f"{', '.join(shown[:-1])} and {shown[-1]}"
    figure = new_figure(3.3)
    heading(figure, f"{name}: {what}" if name else what.capitalize())
    axes = figure.subplots(1, len(shown))
    _draw(axes[0], "loss of the batch", losses, UP)
    if "gradient" in shown:
        _draw(axes[1], "norm of the gradient", norms, DOWN)
    rates = np.array([step.rates for step in steps]).reshape(len(steps), -1)
    for group in range(rates.shape[1]):
        _draw(axes[-1], "learning rate", rates[:, group], OTHER)
    up = np.array([step.step + 1 for step in steps if step.sign < 0])
    if len(up):
        axes[0].plot(up, np.full(len(up), 0.02), "|", color=INK, markersize=5, transform=axes[0].get_xaxis_transform())
        axes[0].annotate(f"{len(up):,} steps ascended", (0.02, 0.05), xycoords="axes fraction", fontsize=7.5, color=INK)
    return figure


def _draw(axes: Axes, name: str, values: np.ndarray, colour: str) -> None:
    steps = np.arange(1, len(values) + 1)
    shown = np.where(values > 0, values, np.nan)
    axes.plot(steps, shown, color=colour, linewidth=0.6, alpha=0.45)
    width = max(1, round(SMOOTH * len(values)))
    if width > 1:
        axes.plot(steps[width - 1 :] - width // 2, _median(values, width), color=colour, linewidth=1.8)
    if (values > 0).any():
        logarithmic(axes, "y")
    axes.set_xlabel("step", fontsize=8.5, color=SOFT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    title(axes, name)
    tidy(axes)


def _median(values: np.ndarray, width: int) -> np.ndarray:
    found: np.ndarray = np.median(np.lib.stride_tricks.sliding_window_view(values, width), axis=1)
    return np.where(found > 0, found, np.nan)


__all__ = ["plot_training"]
