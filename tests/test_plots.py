"""Pictures: made for every kind of input, saved, saying the right amounts, and legible."""

from __future__ import annotations

import dataclasses
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from kxexplain.attribution import Explanation, explain
from kxexplain.errors import ArgumentError
from kxexplain.learning.svm import compare_svm
from kxexplain.learning.trainer import train
from kxexplain.plots import plot_comparison, plot_explanation, plot_neighbors
from kxexplain.plots.bill import Bill
from kxexplain.plots.examples import Gallery
from kxexplain.plots.style import amount
from kxexplain.search import Hits, Neighbors
from kxexplain.trajectory import Trajectory

SHAPES = {
    "flat": (16,),
    "plain": (4, 4),
    "grey": (1, 4, 4),
    "colour": (3, 4, 4),
    "plane": (2,),
    "table": (5,),
    "sequence": (2, 3, 5),
}
KINDS = {"plane": "point", "table": "number", "sequence": "number"}


def problem(shape: tuple[int, ...], out: Path, *, decay: float = 0.0) -> tuple[Trajectory, nn.Module, TensorDataset]:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(18, *shape), torch.arange(18) % 3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(data.tensors[0][0].numel(), 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=decay)
    trajectory = train(model, data, optimizer=optimizer, epochs=3, batch_size=5, out=out, progress=False)
    return trajectory, model, data


def explained(shape: tuple[int, ...], out: Path, target: Any = "predicted", **options: Any) -> Explanation:
    trajectory, model, data = problem(shape, out, **options)
    return explain(trajectory, model, data, TensorDataset(*data[:2]), target, kernel=False)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible() and text.get_text()]


def saved(figure: Figure, folder: Path) -> Path:
    """The figure as a file that is not one colour all over."""
    file = folder / "figure.png"
    figure.savefig(file)
    image = mpl.image.imread(file)
    assert image.shape[0] > 200
    assert image[..., :3].std() > 0.01
    return file


def hidden(axes: Axes) -> set[int]:
    """Labels of ticks that exist but are not drawn: beyond the limits, or of axes that are off."""
    sides = (axes.xaxis, axes.yaxis)
    made = {id(label) for axis in sides for tick in axis.majorTicks for label in (tick.label1, tick.label2)}
    drawn = {id(tick.label1) for axis in sides for tick in axis._update_ticks()} if axes.axison else set()
    return made - drawn


def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts that lie over one another."""
    figure.canvas.draw()
    absent = set().union(*map(hidden, figure.findobj(Axes)))
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and id(t) not in absent]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    inside = [(name, box.shrunk(0.9, 0.9)) for name, box in boxes]
    return [(a, b) for (a, one), (b, other) in combinations(inside, 2) if one.overlaps(other)]


@pytest.mark.parametrize("kind", SHAPES)
def test_an_explanation_of_every_kind_of_input(kind: str, tmp_path: Path) -> None:
    explanation = explained(SHAPES[kind], tmp_path / "run")
    figure = plot_explanation(explanation, 1, k=4)
    saved(figure, tmp_path)
    bill = Bill.of(explanation, 1, 4)
    said = texts(figure)
    assert amount(bill.prediction, bill.places, signed=False) in said
    for name, value, _ in bill.lines:
        assert name in said
        assert amount(value, bill.places) in said
    assert bill.baseline + sum(v for _, v, _ in bill.lines) == pytest.approx(bill.prediction, abs=1e-3)
    assert Gallery.of(explanation.dataset).kind == KINDS.get(kind, "image")
    assert not overlaps(figure)


def test_the_k_largest_are_shown_with_numbers_and_amounts(tmp_path: Path) -> None:
    explanation = explained((1, 4, 4), tmp_path / "run")
    said = texts(plot_explanation(explanation, 0, k=3))
    ranked = explanation.top(3)
    for ids, values in ((ranked.proponents, ranked.proponent_values), (ranked.opponents, ranked.opponent_values)):
        for index, value in zip(ids[0].tolist(), values[0].tolist(), strict=True):
            assert f"#{index}" in said
            assert any(text.startswith(amount(value, 2)) for text in said)


def test_of_all_outputs_the_largest_is_drawn(tmp_path: Path) -> None:
    explanation = explained((5,), tmp_path / "run", target="all")
    figure = explanation.plot(0)
    saved(figure, tmp_path)
    largest = int(explanation.prediction[0].argmax())
    assert any(f"output “{largest}”" in text for text in texts(figure))


@pytest.mark.parametrize("target", ["loss", "margin", "label", 1])
def test_targets_have_names(target: Any, tmp_path: Path) -> None:
    figure = plot_explanation(explained((5,), tmp_path / "run", target=target))
    words = {"loss": "the loss", "margin": "the margin of output", "label": "output “0”", 1: "output “1”"}
    assert words[target] in texts(figure)[-1] or any(words[target] in text for text in texts(figure))


@pytest.mark.parametrize("sign", [1, -1])
def test_when_half_was_made_is_told_as_closely_as_it_is_known(sign: int, tmp_path: Path) -> None:
    found = explained((5,), tmp_path / "run")
    assert found.timeline.steps.tolist() == [0, 4, 8, 12]
    amounts = torch.tensor([1.0, 5.0, -4.0, 3.0, 1.0])[:, None].expand(5, 2) * sign  # runs to 0, 1, 6, 2, 5, 6
    totals = {name: torch.zeros(5, 2) for name in found.timeline.totals} | {"contributions": amounts}
    for steps, when in (
        ([0, 45, 90, 135, 180, 1500], "between steps 135 and 180 of 1,500"),
        (list(range(6)), "by step 4 of 5"),
    ):
        line = dataclasses.replace(found.timeline, steps=torch.tensor(steps), totals=totals)
        figure = plot_explanation(dataclasses.replace(found, timeline=line))
        assert f"Half-way was reached {when}" in texts(figure)
        assert not overlaps(figure)


def test_weight_decay_has_its_own_line(tmp_path: Path) -> None:
    figure = plot_explanation(explained((5,), tmp_path / "run", decay=0.05))
    assert "weight decay" in texts(figure)


def test_regression_has_no_class_names(tmp_path: Path) -> None:
    x = torch.rand(12, 5)
    data, model = TensorDataset(x, -x.sum(1)), nn.Linear(5, 1)
    trajectory = train(model, data, "mse", epochs=2, out=tmp_path / "run", progress=False)
    figure = plot_explanation(explain(trajectory, model, data, TensorDataset(*data[:1]), kernel=False))
    assert any(text.startswith("Why the output is") and "whose target is −" in text for text in texts(figure))


def test_a_loaded_explanation_needs_no_dataset(tmp_path: Path) -> None:
    explanation = explained((4, 4), tmp_path / "run")
    loaded = Explanation.load(explanation.save(tmp_path / "e.safetensors"))
    saved(plot_explanation(loaded), tmp_path)
    with_pictures = plot_explanation(loaded, dataset=explanation.dataset)
    assert len(with_pictures.findobj(mpl.image.AxesImage)) > len(plot_explanation(loaded).findobj(mpl.image.AxesImage))


def test_class_names_and_shape_are_taken(tmp_path: Path) -> None:
    explanation = explained((15,), tmp_path / "run")
    options: dict[str, Any] = {"image_shape": (3, 5), "classes": ("ant", "bee", "cat"), "name": "the first"}
    figure = plot_explanation(explanation, **options)
    said = texts(figure)
    assert {"ant", "bee", "cat"} & set(said)
    assert any("the first" in text for text in said)
    assert figure.findobj(mpl.image.AxesImage)
    with pytest.raises(ArgumentError, match="image_shape"):
        plot_explanation(explanation, image_shape=(4, 4))


def test_wrong_queries_are_refused(tmp_path: Path) -> None:
    explanation = explained((5,), tmp_path / "run")
    with pytest.raises(ArgumentError, match="query 2"):
        plot_explanation(explanation, 2)
    with pytest.raises(ArgumentError, match="k=0"):
        plot_explanation(explanation, k=0)


class Named(Dataset[Any]):
    """Inputs that are dicts: neither pictures nor points."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> tuple[dict[str, Tensor], int]:
        return {"x": torch.full((2,), float(index))}, index % 2


def test_inputs_of_several_parts_are_shown_by_number() -> None:
    assert Gallery.of(Named()).kind == "number"
    assert Gallery.of(Named()).caption(3) == "#3 (1)"


@pytest.mark.parametrize("kind", ["grey", "plane", "table"])
def test_neighbors(kind: str, tmp_path: Path) -> None:
    data = TensorDataset(torch.rand(9, *SHAPES[kind]), torch.arange(9) % 3)
    near = Hits(torch.tensor([[4, 2, 0]]), torch.tensor([[0.9, 0.8, 0.1]]))
    ups = Hits(torch.tensor([[1, 3, 5]]), torch.tensor([[3.0, 2.0, -1.0]]), torch.tensor([[3.25, 2.5, -1.0]]))
    downs = Hits(torch.tensor([[6, 7, 8]]), torch.tensor([[-3.0, -2.0, 1.0]]))
    found = Neighbors(ups, downs, near, torch.tensor([1]), torch.tensor([2]), {}, data, data.tensors[0][:1])
    figure = plot_neighbors(found, data, data.tensors[0][:1], k=3)
    saved(figure, tmp_path)
    said = texts(figure)
    assert any("output “1”" in text and "labelled “2”" in text for text in said)
    assert any(text.startswith("+3.25") for text in said)  # the exact one, where known
    assert not any(text.startswith("#5") for text in said)  # no proponent: it is negative
    assert not overlaps(figure)
    with pytest.raises(ArgumentError, match="query 1"):
        plot_neighbors(found, data, None, 1)


def test_comparison(tmp_path: Path) -> None:
    trajectory, model, data = problem((5,), tmp_path / "run")
    comparison = compare_svm(trajectory, model, data, data, against=["end", "rbf"], queries=6)
    figure = plot_comparison(comparison, classes=("ant", "bee", "cat"))
    saved(figure, tmp_path)
    said = texts(figure)
    assert "An SVM on each kernel" in said
    assert any("Largest |α_i|" in text for text in said)
    assert f"{comparison.network_accuracy:.1%}" in said
    assert any(f"{comparison.correlation:.3f}" in text for text in said)
    assert not overlaps(figure)
    assert comparison.plot(tmp_path / "c.png")
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_nothing_global_changes(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    before = dict(mpl.rcParams)
    plot_explanation(explained((5,), tmp_path / "run"))
    assert not plt.get_fignums()
    assert dict(mpl.rcParams) == before
