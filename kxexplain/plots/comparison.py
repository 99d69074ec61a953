"""The network beside the support vector machine: accuracies, margins, where they part, and other kernels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from kxexplain.learning.comparison import Comparison
from kxexplain.plots.examples import Gallery
from kxexplain.plots.kernels import draw_accuracies, draw_measures, draw_parted, draw_weights
from kxexplain.plots.style import DOWN, FAINT, INK, SOFT, UP, heading, new_figure, parts, tidy, title

DENSITY = LinearSegmentedColormap.from_list("density", ["#DCE9F4", "#5B9BD0", "#0B3F70"])
MOST_CLASSES = 12
"""With more classes the cells of the table are not labelled."""


def plot_comparison(
    comparison: Comparison, *, classes: Sequence[str] | None = None, image_shape: Sequence[int] | None = None
) -> Figure:
    """Draw a network beside an SVM on its own kernel.

    From left to right: both accuracies and the share of equal predictions; the SVM's decision values against the
    network's margins, for all test examples and pairs of classes; how often each predicts what. Below, where more
    kernels were compared: an SVM's accuracy on each; how they are aligned with the labels; the SVM's weights against
    the network's α. At the bottom, where inputs are pictures: test examples that the two read differently.

    Args:
        comparison: what :func:`kxexplain.learning.svm.compare_svm` found.
        classes: the class numbers' meanings.
        image_shape: (height, width) or (channels, height, width) of inputs that are pictures, if not found out.

    >>> import tempfile, torch, kxexplain as kx
    >>> from kxexplain.learning.svm import compare_svm
    >>> data, model = kx.datasets.toy(20), torch.nn.Linear(2, 2)
    >>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), progress=False)
    >>> figure = plot_comparison(compare_svm(trajectory, model, data.train, data.test))
    """
    gallery = Gallery.of(comparison.test, None, image_shape, classes) if comparison.test is not None else None
    heights = [4.3]
    more = len(comparison.kernels) > 1 or comparison.alphas is not None
    pictures = gallery is not None and gallery.kind == "image" and len(comparison.parted) > 0
    heights += ([0.9 + 0.4 * max(6, len(comparison.kernels))] if more else []) + ([1.9] if pictures else [])
    figure = new_figure(sum(heights))
    same = f"{comparison.agreement:.1%}"
    heading(
        figure, f"Network and SVM on its {comparison.kernel} kernel: the same prediction for {same} of "
        f"{len(comparison.labels):,} test examples", size=13,
    )  # fmt: skip
    rows = parts(figure, heights)
    left, centre, right = rows[0].subplots(1, 3, width_ratios=[0.8, 1.25, 1.25])
    _draw_shares(left, comparison)
    _draw_margins(centre, comparison)
    _draw_table(right, comparison, classes)
    if more:
        left, centre, right = rows[1].subplots(1, 3)
        draw_accuracies(left, comparison)
        draw_measures(centre, comparison)
        draw_weights(right, comparison)
    if pictures:
        assert gallery is not None
        draw_parted(rows[-1], comparison, gallery)
    return figure


def _draw_shares(axes: Axes, comparison: Comparison) -> None:
    bars = (
        ("network\naccuracy", comparison.network_accuracy, INK),
        ("SVM\naccuracy", comparison.svm_accuracy, UP),
        ("same\nprediction", comparison.agreement, SOFT),
    )
    for at, (_, value, shade) in enumerate(bars):
        axes.bar(at, value, width=0.62, color=shade)
        axes.annotate(
            f"{value:.1%}", (at, value), xytext=(0, 3), textcoords="offset points", ha="center",
            fontsize=9, fontweight="bold", color=shade,
        )  # fmt: skip
    axes.set_xticks(range(3), [name for name, *_ in bars])
    axes.set_ylim(0, 1.1)
    axes.set_yticks([])
    tidy(axes, keep=("bottom",))
    axes.tick_params(axis="x", colors=INK, labelsize=8.5)
    title(axes, f"{len(comparison.support):,} of {len(comparison.examples):,} are support vectors")


def _draw_margins(axes: Axes, comparison: Comparison) -> None:
    x, y = (t.double().flatten().numpy() for t in (comparison.margins, comparison.decisions))
    axes.axhline(0, color=FAINT, linewidth=1, zorder=0)
    axes.axvline(0, color=FAINT, linewidth=1, zorder=0)
    if len(x) > 3000:
        cells = axes.hexbin(x, y, gridsize=45, mincnt=1, cmap=DENSITY, norm=LogNorm(), linewidths=0)
        cells.set_zorder(2)
    else:
        axes.scatter(x, y, s=12, color=UP, alpha=0.45, linewidths=0, zorder=2)
    axes.set_xlabel("network: output a − output b", fontsize=8.5, color=SOFT)
    axes.set_ylabel("SVM: decision value of a against b", fontsize=8.5, color=SOFT)
    tidy(axes)
    title(axes, f"Decision values against margins: correlation {comparison.correlation:.3f}")


def _draw_table(axes: Axes, comparison: Comparison, classes: Sequence[str] | None) -> None:
    """How often the network said the row and the SVM the column; off the diagonal, they part."""
    numbers = sorted({*comparison.classes.tolist(), *comparison.network.tolist(), *comparison.svm.tolist()})
    place = {number: at for at, number in enumerate(numbers)}
    table = np.zeros((len(numbers), len(numbers)), dtype=int)
    for ours, theirs in zip(comparison.network.tolist(), comparison.svm.tolist(), strict=True):
        table[place[ours], place[theirs]] += 1
    apart = table * (1 - np.eye(len(numbers), dtype=int))
    axes.imshow(np.sign(table - apart), cmap=LinearSegmentedColormap.from_list("one", ["#FFFFFF", "#E7EEF5"]), vmin=0)
    shade = LinearSegmentedColormap.from_list("apart", ["#FBE3DA", DOWN])
    axes.imshow(np.ma.masked_equal(apart, 0), cmap=shade, vmin=0, vmax=max(3, int(apart.max())))
    names = [str(classes[n]) if classes is not None and n < len(classes) else str(n) for n in numbers]
    if len(numbers) <= MOST_CLASSES:
        for i, j in np.argwhere(table):
            heavy = apart[i, j] > 0.6 * max(3, apart.max())
            tone = "white" if heavy else INK if apart[i, j] else SOFT
            axes.text(j, i, str(table[i, j]), ha="center", va="center", fontsize=8, color=tone)
        slanted = 40 if max(map(len, names)) > 2 else 0
        axes.set_xticks(range(len(names)), names, rotation=slanted, ha="right" if slanted else "center")
        axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("SVM says", fontsize=8.5, color=SOFT)
    axes.set_ylabel("network says", fontsize=8.5, color=SOFT)
    tidy(axes, keep=())
    title(axes, f"They part on {int(apart.sum())} test examples")
