"""What a search found for one query: nearest examples, proponents, opponents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.plots.examples import Gallery, blank, draw_picture, draw_tile
from kxexplain.plots.largest import bars
from kxexplain.plots.style import (
    DOWN,
    INK,
    SOFT,
    UP,
    amount,
    columns_of,
    decimals,
    heading,
    new_figure,
    parts,
    tidy,
    title,
)
from kxexplain.search.neighbors import Hits, Neighbors

NEAR = "#3D7D5B"
MOST = 10
"""Examples shown a row."""


def plot_neighbors(
    neighbors: Neighbors,
    dataset: Any,
    queries: Any,
    query: int = 0,
    *,
    k: int = 6,
    image_shape: Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Figure:
    """Draw a query beside its nearest training examples, its proponents and its opponents.

    Args:
        neighbors: what :meth:`kxexplain.search.GradientIndex.search` found.
        dataset: the training examples.
        queries: the queries' inputs, [query, …], or None where they are not to be shown.
        query: which query.
        k: how many examples a row, at most 10.
        image_shape: (height, width) or (channels, height, width) of inputs that are pictures; found out by itself
            for inputs of such a shape, and for flat ones whose number of values is a square.
        classes: the class numbers' meanings.
        name: what to call the query in the title.

    Raises:
        ArgumentError: no such query, k out of range, or an ``image_shape`` that does not fit.

    >>> import torch, kxexplain as kx
    >>> from kxexplain.search.neighbors import Hits, Neighbors
    >>> hits = Hits(torch.tensor([[4, 2]]), torch.tensor([[0.5, 0.25]]))
    >>> data = kx.datasets.digits()
    >>> figure = plot_neighbors(Neighbors(hits, hits, hits), data.train, data.test.tensors[0][:1])
    """
    if not -len(neighbors) <= query < len(neighbors):
        raise ArgumentError(f"query {query} was asked for, but there are {len(neighbors)}")
    if not 1 <= k <= MOST:
        raise ArgumentError(f"got k={k}; expected 1 to {MOST}")
    query %= len(neighbors)
    own = queries[query] if isinstance(queries, Tensor) else None
    gallery = Gallery.of(dataset, own, image_shape, classes)
    rows = _rows(neighbors, query, k)
    known = neighbors.labels
    label = "" if known is None or known.dim() != 1 else f", labelled “{gallery.name(known[query])}”"
    of = "" if neighbors.output is None else f"output “{gallery.name(neighbors.output[query])}” of "
    if gallery.kind == "image":
        figure = new_figure(0.5 + 2.15 * len(rows))
        _pictures(figure, gallery, rows, own=own, columns=max(k, 5))
    else:
        figure = new_figure(4.6 if gallery.kind == "point" else 1.0 + 0.33 * k)
        _lists(figure, gallery, rows, own=own)
    heading(figure, f"Training examples behind {of}{name or f'query {query}'}{label}", size=14)
    return figure


Row = tuple[str, str, list[tuple[int, float]]]


def _rows(neighbors: Neighbors, query: int, k: int) -> list[Row]:
    """(title, colour, (example, value)s) of each list; proponents are positive and opponents negative."""
    measure = "exact contribution" if neighbors.proponents.contributions is not None else "estimated contribution"
    near = _values(neighbors.nearest, query)[:k]
    ups = [(i, v) for i, v in _values(neighbors.proponents, query) if v > 0][:k]
    downs = [(i, v) for i, v in _values(neighbors.opponents, query) if v < 0][:k]
    return [
        ("Nearest in gradient space (cosine)", NEAR, near),
        (f"Proponents ({measure})", UP, ups),
        (f"Opponents ({measure})", DOWN, downs),
    ]


def _values(hits: Hits, query: int) -> list[tuple[int, float]]:
    return list(zip(hits.ids[query].tolist(), hits.values[query].double().tolist(), strict=True))


def _pictures(figure: Figure, gallery: Gallery, rows: list[Row], *, own: Any, columns: int) -> None:
    left, right = columns_of(figure, [1.0, 3.9])
    if own is not None:
        axes = left.subplots(1, 1)
        draw_picture(axes, gallery.picture(own), INK, 1.2)
        axes.set_anchor("N")
        title(axes, "The query")
    for part, (text, shade, found) in zip(parts(right, [1.0] * len(rows)), rows, strict=True):
        heading(part, text, size=9.5)
        places = 3 if shade == NEAR else decimals(max((abs(v) for _, v in found), default=1.0))
        tiles = np.atleast_1d(part.subplots(1, columns))
        for axes, (index, value) in zip(tiles, found, strict=False):
            draw_tile(axes, gallery, index, colour=shade, amount=amount(value, places, signed=shade != NEAR))
        for axes in tiles[len(found) :]:
            blank(axes)


def _lists(figure: Figure, gallery: Gallery, rows: list[Row], *, own: Any) -> None:
    plane = gallery.kind == "point"
    axes = figure.subplots(1, 1 + len(rows) if plane else len(rows), width_ratios=[1.7, 1, 1, 1] if plane else None)
    if plane:
        _plane(axes[0], gallery, rows, own)
    for part, (text, shade, found) in zip(axes[1:] if plane else axes, rows, strict=True):
        if found:
            bars(part, gallery, found, shade=shade, slots=max(len(f) for _, _, f in rows))
        else:
            blank(part, "none")
        title(part, text.split(" (")[0])


def _plane(axes: Axes, gallery: Gallery, rows: list[Row], own: Any) -> None:
    """All examples as faint points, the lists' in their colours."""
    points = np.array([np.asarray(gallery.input(i), dtype=float) for i in range(len(gallery.dataset))])
    axes.scatter(points[:, 0], points[:, 1], s=12, color=SOFT, alpha=0.35, linewidths=0)
    for size, (text, shade, found) in zip((190, 90, 90), rows, strict=True):
        chosen = points[[i for i, _ in found]]
        hollow = shade == NEAR
        axes.scatter(
            chosen[:, 0], chosen[:, 1], s=size, facecolor="none" if hollow else shade, edgecolor=shade,
            linewidths=1.6, label=text.split(" (")[0],
        )  # fmt: skip
    if own is not None:
        x, y = own.double().cpu().tolist()
        axes.plot(x, y, "*", color="#FFD23F", markeredgecolor=INK, markersize=17, label="the query")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(fontsize=7.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, markerscale=0.6)
    tidy(axes)
    axes.tick_params(pad=7)
