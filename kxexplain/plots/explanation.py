"""One prediction's explanation as a figure: waterfall, proponents and opponents, timeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure, SubFigure
from torch import Tensor

from kxexplain.attribution.result import Explanation
from kxexplain.errors import ArgumentError
from kxexplain.plots.bill import Bill, draw_waterfall
from kxexplain.plots.examples import Gallery, draw_picture
from kxexplain.plots.largest import draw_bars, draw_pictures, draw_points
from kxexplain.plots.style import INK, amount, decimals, heading, new_figure, parts, title
from kxexplain.plots.timeline import draw_course, draw_shares


def plot_explanation(
    explanation: Explanation,
    query: int = 0,
    *,
    k: int = 6,
    image_shape: Sequence[int] | None = None,
    dataset: Any = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> Figure:
    """Draw why a model predicts what it predicts.

    From top to bottom: the bill as a waterfall from baseline to prediction; the k largest proponents and opponents,
    as pictures where inputs are images, as points where they are points in the plane, else as bars; the output over
    training, and when the largest contributors acted.

    Args:
        explanation: of one output or of all; of all, the largest output of the query is drawn.
        query: which query.
        k: how many proponents and how many opponents.
        image_shape: (height, width) or (channels, height, width) of inputs that are pictures; found out by itself
            for inputs of such a shape, and for flat ones whose number of values is a square.
        dataset: the training examples, where the explanation was loaded from a file.
        classes: the class numbers' meanings.
        name: what to call the query in the title.

    Raises:
        ArgumentError: no such query, k below 1, or an ``image_shape`` that does not fit.

    >>> import tempfile, torch, kxexplain as kx
    >>> data = kx.datasets.toy(20)
    >>> model = torch.nn.Linear(2, 2)
    >>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), progress=False)
    >>> figure = plot_explanation(kx.explain(trajectory, model, data.train, torch.zeros(1, 2)))
    >>> figure.savefig(tempfile.mkdtemp() + "/why.png")
    """
    if not -len(explanation) <= query < len(explanation):
        raise ArgumentError(f"query {query} was asked for, but there are {len(explanation)}")
    query %= len(explanation)
    if explanation.all_outputs:
        explanation = explanation.of_output(int(explanation.prediction[query].argmax()))
    known = explanation.dataset if dataset is None else dataset
    own = _row(explanation.queries, query)
    gallery = Gallery.of(known, own, image_shape, classes)
    middle = {"image": 4.4, "point": 4.2, "number": 0.9 + 0.3 * k}[gallery.kind if known is not None else "number"]
    figure = new_figure(0.5 + 2.7 + middle + 2.6)
    heading(figure, _headline(explanation, query, gallery, name), size=14)
    top, centre, bottom = parts(figure, [2.7, middle, 2.6])
    ranked = explanation.top(k)
    _draw_top(top, explanation, query, k=k, gallery=gallery, own=own)
    if gallery.kind == "image" and known is not None:
        draw_pictures(centre, gallery, ranked, query, what=_quantity(explanation, query, gallery))
    elif gallery.kind == "point" and known is not None:
        draw_points(centre, gallery, explanation, query, own=own, k=k)
    else:
        draw_bars(centre.subplots(1, 2), gallery, ranked, query)
    course, shares = bottom.subplots(1, 2, width_ratios=[1, 1.05])
    draw_course(course, explanation, query)
    draw_shares(shares, explanation, query, gallery)
    return figure


def _row(queries: Any, query: int) -> Any:
    return queries[query] if isinstance(queries, Tensor) else None


def _quantity(explanation: Explanation, query: int, gallery: Gallery) -> str:
    """What was explained, in words."""
    target = str(explanation.facts.get("target"))
    if explanation.output is None:
        return "the loss" if target == "loss" else target
    regression = explanation.labels is not None and explanation.labels.is_floating_point()
    output = "the output" if regression else f"output “{gallery.name(explanation.output[query])}”"
    return f"the margin of {output}" if target == "margin" else output


def _headline(explanation: Explanation, query: int, gallery: Gallery, name: str | None) -> str:
    value = float(explanation.prediction[query])
    what = _quantity(explanation, query, gallery)
    text = (
        f"Why {what} is {amount(value, max(0, decimals(abs(value)) - 1), signed=False)} for {name or f'query {query}'}"
    )
    labels = explanation.labels
    if labels is None or labels.dim() != 1:
        return text
    if labels.is_floating_point():
        return f"{text}, whose target is {gallery.name(labels[query])}"
    text += f", labelled “{gallery.name(labels[query])}”"
    wrong = explanation.output is not None and int(explanation.output[query]) != int(labels[query])
    return text + (": misclassified" if wrong and explanation.facts.get("target") == "predicted" else "")


def _draw_top(part: SubFigure, explanation: Explanation, query: int, *, k: int, gallery: Gallery, own: Any) -> None:
    if gallery.kind == "image" and own is not None:
        left, axes = part.subplots(1, 2, width_ratios=[1, 3.6])
        draw_picture(left, gallery.picture(own), INK, 1.2)
        title(left, "The query")
    else:
        axes = part.subplots(1, 1)
    bill = Bill.of(explanation, query, k)
    draw_waterfall(axes, bill)
    total = amount(float(explanation.contributions[query].double().sum()), bill.places)
    n = explanation.contributions.shape[1]
    title(axes, f"{n:,} training examples put {total} on top of the initial model's output")
