r"""Is α_i really independent of x? How much α_i(x) varies over queries, and what it costs to pretend that it does not.

A network is f(x) = f_0(x) + Σ_i K(x, x_i) α_i(x), a support vector machine Σ_i K(x, x_i) α_i. With one ᾱ_i for all
queries in place of α_i(x), the network takes the SVM's true form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.table import Table
from torch import Tensor, nn

from kxexplain.attribution import Explanation, explain
from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.learning.labels import class_numbers, predicted_classes
from kxexplain.shapes import Examples
from kxexplain.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class AlphaVariation:
    r"""How α_i(x) varies over queries x.

    Axes: train, output.

    Attributes:
        mean: ᾱ_i, the constant that fits the contributions K(x, x_i) α_i(x) of the queries best (least squares: a
            mean of α_i(x) weighted by K²), [train, output].
        size: the median over queries of ‖α_i(x)‖, where K(x, x_i) can be inverted, [train].
        spread: the median over queries of ‖α_i(x) − its median‖, relative to the median's norm, [train]: 0 where α_i is
            the same for all queries; NaN for an example that never pulled.
        unexplained: the share of an example's contributions that no constant explains,
            √(Σ_x ‖K α_i(x) − K ᾱ_i‖² / Σ_x ‖K α_i(x)‖²), [train].
        labels: classes of the second half of the queries, whose outputs are predicted with the first half's ᾱ.
        network: the network's classes for them.
        constant: those of the true SVM form f_0(x) + Σ_i K(x, x_i) ᾱ_i (and the bill's other lines).
        error: ‖f of the SVM form − f‖ / ‖f − f_0‖ on them.
    """

    mean: Float[Tensor, "train output"]
    size: Float[Tensor, " train"]
    spread: Float[Tensor, " train"]
    unexplained: Float[Tensor, " train"]
    labels: Int[Tensor, " query"]
    network: Int[Tensor, " query"]
    constant: Int[Tensor, " query"]
    error: float

    @property
    def network_accuracy(self) -> float:
        """Share of the second half of the queries that the network has right."""
        return float((self.network == self.labels).double().mean())

    @property
    def constant_accuracy(self) -> float:
        """Share that the true SVM form has right."""
        return float((self.constant == self.labels).double().mean())

    def summary(self) -> dict[str, Any]:
        """The numbers."""
        return {
            "spread_median": _median(self.spread),
            "unexplained_median": _median(self.unexplained),
            "network_accuracy": self.network_accuracy,
            "constant_alpha_accuracy": self.constant_accuracy,
            "constant_alpha_agreement": float((self.network == self.constant).double().mean()),
            "constant_alpha_error": self.error,
        }

    def table(self) -> Table:
        """The numbers as a table to print."""
        table = Table("α_i(x) over queries", "")
        for name, value in self.summary().items():
            table.add_row(name.replace("_", " "), f"{value:.3f}")
        return table

    def __repr__(self) -> str:
        told = ", ".join(f"{name} {value:.3f}" for name, value in self.summary().items())
        return f"AlphaVariation({told})"


def alpha_variation(
    trajectory: Trajectory,
    model: nn.Module,
    train: Examples,
    queries: Examples,
    *,
    memory: str | int = "1GB",
    progress: bool = False,
) -> AlphaVariation:
    r"""Measure how α_i(x) varies over queries, and the accuracy of the true SVM form.

    Args:
        trajectory: the recorded training.
        model: a model of the recorded architecture; not changed.
        train: the training examples, as recorded.
        queries: labelled examples, at least two; the kernel takes queries × train × outputs² numbers.
        memory: bytes for intermediate values.
        progress: show a bar over the replayed steps.

    Raises:
        ArgumentError: fewer than two queries.
        DatasetError: not the recorded examples, or targets that are no classes.
        ModelError: not the recorded architecture.

    Source: Domingos 2020, arXiv 2012.00152: "unlike in kernel machines, the α_i depend on x".

    >>> import tempfile, kxexplain as kx
    >>> data, model = kx.datasets.toy(20), nn.Linear(2, 2)
    >>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), progress=False)
    >>> found = alpha_variation(trajectory, model, data.train, data.test)
    >>> bool(found.unexplained.max() < 1e-3)  # of a linear model α does not depend on x
    True
    """
    if not hasattr(queries, "__len__") or len(queries) < 2:
        raise ArgumentError("got fewer than 2 queries; half of them give the means, half are predicted with them")
    bill = explain(trajectory, model, train, queries, target="all", memory=memory, progress=progress)
    if bill.labels is None:
        raise DatasetError("the queries have no labels; give a dataset of (input, class number)")
    labels = class_numbers(bill.labels, bill.prediction, trajectory.loss_name)
    half = len(bill) // 2
    kernel, put = bill.kernel.double(), bill.contributions.double()
    first, mean = _constant(kernel[:half], put[:half]), _constant(kernel, put)
    fitted = torch.einsum("qncd,nd->qnc", kernel, mean)
    said, error = _predicted(bill, kernel, first, half)
    size, spread = _variation(bill.alpha.double())
    return AlphaVariation(
        mean=mean, size=size, spread=spread,
        unexplained=_ratio((put - fitted).square().sum((0, 2)), put.square().sum((0, 2))).sqrt(),
        labels=labels[half:].cpu(),
        network=predicted_classes(bill.prediction[half:]).cpu(),
        constant=predicted_classes(said).cpu(),
        error=error,
    )  # fmt: skip


def _constant(kernel: Tensor, put: Tensor) -> Tensor:
    """ᾱ_i = (Σ_x KᵀK)⁺ Σ_x Kᵀ C_i(x), [n, c]; 0 where an example never met a query."""
    squares = torch.einsum("qnac,qnad->ncd", kernel, kernel)
    pulled = torch.einsum("qnac,qna->nc", kernel, put)
    return torch.einsum("ncd,nd->nc", torch.linalg.pinv(squares, hermitian=True), pulled)


def _predicted(bill: Explanation, kernel: Tensor, mean: Tensor, start: int) -> tuple[Tensor, float]:
    """Outputs of the true SVM form for the queries from ``start`` on, and their relative error."""
    lines = (bill.baseline, bill.regularizer, bill.buffers, bill.unattributed)
    said = sum(line[start:].double() for line in lines) + torch.einsum("qncd,nd->qc", kernel[start:], mean)
    truth = bill.prediction[start:].double()
    change = float((truth - bill.baseline[start:].double()).norm())
    return said, float((said - truth).norm()) / change if change > 0 else float("nan")


def _variation(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Median norm over queries, and the median relative distance from the median, [n] each."""
    middle = alpha.nanmedian(0).values
    size = alpha.norm(dim=2).nanmedian(0).values
    return size, _ratio((alpha - middle).norm(dim=2).nanmedian(0).values, middle.norm(dim=1))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, torch.nan)


def _median(values: Tensor) -> float:
    return float(values.nanmedian())


__all__ = ["AlphaVariation", "alpha_variation"]
