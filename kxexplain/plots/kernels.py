"""SVMs on many kernels, and their weights beside the network's: the comparison's second row."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from kxexplain.learning.comparison import Comparison
from kxexplain.plots.examples import Gallery, blank, draw_picture
from kxexplain.plots.style import DOWN, FAINT, INK, OTHER, SOFT, UP, tidy, title

MOST_PICTURES = 10


def draw_accuracies(axes: Axes, comparison: Comparison) -> None:
    """Every kernel's accuracy as a bar, the network's as a line; the kernels of the inputs alone in another colour."""
    rows = comparison.kernels
    for at, row in enumerate(rows):
        shade = OTHER if row.kernel in ("rbf", "linear") else UP
        axes.barh(at, row.accuracy, height=0.62, color=shade, zorder=2)
        axes.annotate(
            f"{row.accuracy:.1%}", (0, at), xycoords=("axes fraction", "data"), xytext=(5, 0), va="center",
            textcoords="offset points", fontsize=8.5, fontweight="bold", color="white", zorder=3,
        )  # fmt: skip
    axes.axvline(comparison.network_accuracy, color=INK, linewidth=1.2, zorder=4)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    lowest = min(comparison.network_accuracy, *(row.accuracy for row in rows))
    axes.set_xlim(max(0.0, 2 * lowest - 1 - 0.1), 1)
    axes.set_xlabel("SVM's test accuracy; line: the network", fontsize=8.5, color=SOFT)
    tidy(axes)
    axes.tick_params(axis="y", colors=INK, labelsize=8.5)
    title(axes, "An SVM on each kernel")


def draw_measures(axes: Axes, comparison: Comparison) -> None:
    """Alignment to the right, effective rank written beside: how the kernel took shape."""
    rows = comparison.kernels
    for at, row in enumerate(rows):
        axes.plot([0, row.alignment], [at, at], color=FAINT, linewidth=1.5, zorder=1)
        axes.scatter(row.alignment, at, s=36, color=DOWN, zorder=2)
        axes.annotate(
            f"{row.alignment:.2f}, rank {row.effective_rank:.1f}", (row.alignment, at), xytext=(7, 0),
            textcoords="offset points", va="center", fontsize=8.5, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(row.alignment for row in rows) * 1.6 + 1e-6)
    axes.set_xlabel("alignment with the labels, effective rank", fontsize=8.5, color=SOFT)
    tidy(axes)
    axes.tick_params(axis="y", colors=INK, labelsize=8.5)
    title(axes, "What the kernels know of the labels")


def draw_weights(axes: Axes, comparison: Comparison) -> None:
    """The SVM's weights against the network's median ‖α_i(x)‖, an example a point."""
    if comparison.alphas is None:
        blank(axes, "α was not asked for (queries=0)")
        return
    size = comparison.alphas.size[comparison.examples].double()
    vectors = comparison.weights > 0
    for chosen, shade in ((~vectors, FAINT), (vectors, UP)):
        axes.scatter(size[chosen], comparison.weights[chosen], s=10, color=shade, alpha=0.6, linewidths=0, zorder=2)
    axes.set_xlabel("network: median over queries of ‖α_i(x)‖", fontsize=8.5, color=SOFT)
    axes.set_ylabel("SVM: Σ |dual coefficient|", fontsize=8.5, color=SOFT)
    tidy(axes)
    shared, chance = comparison.support_overlap
    title(axes, f"Largest |α_i|: {shared:.0%} (chance {chance:.0%})")


def draw_parted(part: SubFigure, comparison: Comparison, gallery: Gallery) -> None:
    """Test examples that the two read differently: above what each says, below what it is."""
    numbers = comparison.parted[:MOST_PICTURES].tolist()
    places = part.subplots(1, MOST_PICTURES)
    for axes in places[len(numbers) :]:
        blank(axes)
    for axes, number in zip(places, numbers, strict=False):
        draw_picture(axes, gallery.picture(gallery.input(number)), INK, 1.0)
        ours, theirs, truth = (
            gallery.name(int(values[number])) for values in (comparison.network, comparison.svm, comparison.labels)
        )
        axes.set_title(f"network {ours}\nSVM {theirs}", fontsize=8, color=INK, pad=4)
        axes.set_xlabel(f"label {truth}  #{number}", fontsize=7.5, color=SOFT, labelpad=4)


__all__ = ["draw_accuracies", "draw_measures", "draw_parted", "draw_weights"]
