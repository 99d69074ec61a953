"""What a comparison of a network with a support vector machine finds: look it up, print it, plot it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kxexplain.learning.alphas import AlphaVariation

NAMES = {
    "path": "path kernel",
    "start": "tangent, initial",
    "middle": "tangent, halfway",
    "end": "tangent, final",
    "rbf": "RBF",
    "linear": "linear",
}


@dataclass(frozen=True)
class KernelRow:
    """An SVM on one kernel, beside the network.

    Attributes:
        kernel: "path"; "start", "middle" or "end" for the tangent kernel at that state; "rbf"; "linear".
        accuracy: of the SVM, on the test examples.
        agreement: share of the test examples for which it predicts what the network predicts.
        correlation: of its decision values with the network's margins.
        C: its bound on every weight, for a Gram matrix of mean diagonal 1.
        support_vectors: how many.
        alignment: centred kernel-target alignment, on the training examples.
        effective_rank: (tr K)² / tr K² of the centred Gram matrix.
        support_overlap: share of its support vectors among as many examples of largest |α_i|; NaN without α.
    """

    kernel: str
    accuracy: float
    agreement: float
    correlation: float
    C: float
    support_vectors: int
    alignment: float
    effective_rank: float
    support_overlap: float

    @property
    def name(self) -> str:
        """In words."""
        return NAMES[self.kernel]


def correlation(first: Tensor, second: Tensor) -> float:
    """Pearson's, over all elements; NaN where either is constant.

    >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))
    1.0
    """
    x, y = (t.double().flatten() - t.double().mean() for t in (first, second))
    norm = float(x.norm() * y.norm())
    return round(float(x @ y) / norm, 12) if norm > 0 else float("nan")


def overlap(size: Tensor, support: Tensor) -> float:
    """Share of the support vectors, given by place, among as many places of largest size.

    >>> overlap(torch.tensor([3.0, 1.0, 2.0, float("nan")]), torch.tensor([0, 1]))
    0.5
    """
    largest = size.nan_to_num(0.0).argsort(descending=True)[: len(support)]
    return float(torch.isin(largest, support).double().mean())


@dataclass(frozen=True, eq=False)
class Comparison:
    """A network beside a support vector machine on the network's own kernel.

    Axes: test, class pair (a, b) with a < b in the order of ``classes``.

    Attributes:
        classes: the class numbers in the training set, rising.
        labels: the test examples' classes, [test].
        network: the network's predictions, [test].
        svm: the SVM's predictions, [test].
        margins: the network's f_a − f_b for every pair of classes, [test, pair]; ±f for a single output.
        decisions: the SVM's decision value for the same pairs, [test, pair]; positive speaks for a.
        support: dataset indices of the support vectors, rising.
        examples: dataset indices the SVM was trained on, rising.
        scale: the Gram matrix' mean diagonal, by which it was divided before fitting.
        kernel: "path" or "tangent".
        C: the SVM's bound on every weight, for the divided Gram matrix.
        weights: Σ |dual coefficient| of every example of ``examples``, [used].
        kernels: a row for every kernel that an SVM was fitted on, this one's first.
        alphas: how α_i(x) varies over test examples, where it was asked for.
        test: the test examples, for pictures.
    """

    classes: Int[Tensor, " class"]
    labels: Int[Tensor, " test"]
    network: Int[Tensor, " test"]
    svm: Int[Tensor, " test"]
    margins: Float[Tensor, "test pair"]
    decisions: Float[Tensor, "test pair"]
    support: Int[Tensor, " vector"]
    examples: Int[Tensor, " used"]
    scale: float
    kernel: str
    C: float
    weights: Float[Tensor, " used"]
    kernels: tuple[KernelRow, ...] = ()
    alphas: AlphaVariation | None = None
    test: Any = field(default=None, repr=False)

    @property
    def network_accuracy(self) -> float:
        """Share of the test examples that the network has right."""
        return float((self.network == self.labels).double().mean())

    @property
    def svm_accuracy(self) -> float:
        """Share of the test examples that the SVM has right."""
        return float((self.svm == self.labels).double().mean())

    @property
    def agreement(self) -> float:
        """Share of the test examples for which both predict the same, right or wrong."""
        return float((self.network == self.svm).double().mean())

    @property
    def correlation(self) -> float:
        """Pearson's, of the SVM's decision values with the network's margins; NaN where either is constant."""
        return correlation(self.decisions, self.margins)

    @property
    def calibration(self) -> tuple[float, float]:
        """(slope, intercept) of the least-squares line from margins to decision values; NaN for constant margins."""
        x, y = self.margins.double().flatten(), self.decisions.double().flatten()
        spread = float((x - x.mean()).square().sum())
        slope = float(((x - x.mean()) * y).sum()) / spread if spread > 0 else float("nan")
        return slope, float(y.mean()) - slope * float(x.mean())

    @property
    def parted(self) -> Int[Tensor, " part"]:
        """Numbers of the test examples for which the two predict different classes."""
        return torch.nonzero(self.network != self.svm)[:, 0]

    @property
    def support_overlap(self) -> tuple[float, float]:
        """Share of the support vectors among as many examples of largest |α_i|, and what chance would give.

        |α_i| is the median over queries of ‖α_i(x)‖ (:attr:`AlphaVariation.size`); NaN where α was not asked for.
        """
        if self.alphas is None:
            return float("nan"), float("nan")
        shared = overlap(self.alphas.size[self.examples], torch.nonzero(self.weights)[:, 0])
        return shared, len(self.support) / len(self.examples)

    @property
    def weight_correlation(self) -> float:
        """Spearman's, of the SVM's Σ |dual coefficient| with the median ‖α_i(x)‖ over all its examples."""
        if self.alphas is None:
            return float("nan")
        return correlation(_ranks(self.weights), _ranks(self.alphas.size[self.examples].nan_to_num(0.0)))

    def summary(self) -> dict[str, Any]:
        """The numbers, without the predictions: what a table or a log needs."""
        return {
            "kernel": self.kernel,
            "C": self.C,
            "scale": self.scale,
            "train_examples": len(self.examples),
            "test_examples": len(self.labels),
            "network_accuracy": self.network_accuracy,
            "svm_accuracy": self.svm_accuracy,
            "agreement": self.agreement,
            "correlation": _known(self.correlation),
            "calibration": [_known(value) for value in self.calibration],
            "support_vectors": len(self.support),
            "support_overlap": _known(self.support_overlap[0]),
            "support_overlap_by_chance": _known(self.support_overlap[1]),
            "weight_correlation": _known(self.weight_correlation),
            "kernels": [{name: _known(v) for name, v in asdict(row).items()} for row in self.kernels],
            "alphas": None if self.alphas is None else {k: _known(v) for k, v in self.alphas.summary().items()},
        }

    def to_json(self) -> str:
        """The summary and both predictions for every test example, as JSON text."""
        lists = {name: getattr(self, name).tolist() for name in ("labels", "network", "svm", "support")}
        return json.dumps({**self.summary(), **lists})

    def table(self) -> Table:
        """The comparison with the SVM on the one kernel as a table to print."""
        table = Table(f"{self.kernel} kernel, C = {self.C:g}", "network", "SVM")
        table.add_row("test accuracy", f"{self.network_accuracy:.3f}", f"{self.svm_accuracy:.3f}")
        table.add_row("training examples", "all", f"{len(self.examples)}")
        table.add_row("support vectors", "", f"{len(self.support)}")
        table.add_section()
        table.add_row("same prediction", f"{self.agreement:.3f}", "")
        table.add_row("correlation of margins", f"{self.correlation:.3f}", "")
        if self.alphas is not None:
            shared, chance = self.support_overlap
            table.add_row(f"accuracy on {len(self.alphas.labels)} of them", f"{self.alphas.network_accuracy:.3f}", "")
            table.add_row("the same, with one α_i for all x", f"{self.alphas.constant_accuracy:.3f}", "")
            table.add_row(f"vectors with largest |α_i| (chance {chance:.2f})", "", f"{shared:.3f}")
        return table

    def kernel_table(self) -> Table:
        """An SVM on every kernel, as a table to print.

        Columns: test accuracy; agreement with the network; correlation of decision values with its margins; C; support
        vectors; kernel-target alignment; effective rank.
        """
        table = Table("SVM on", "right", "agrees", "corr.", "C", "vectors", "aligned", "rank")
        for row in self.kernels:
            table.add_row(
                row.name, f"{row.accuracy:.3f}", f"{row.agreement:.3f}", f"{row.correlation:.3f}", f"{row.C:g}",
                f"{row.support_vectors}", f"{row.alignment:.3f}", f"{row.effective_rank:.1f}",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        console = Console(width=80, file=open(os.devnull, "w"), record=True, force_jupyter=False)  # noqa: SIM115 - closed with the console
        with console.file:
            console.print(self.table())
            if len(self.kernels) > 1:
                console.print(self.kernel_table())
            return console.export_text().rstrip()

    def __repr__(self) -> str:
        return (
            f"Comparison(network {self.network_accuracy:.3f}, SVM {self.svm_accuracy:.3f}, "
            f"agreement {self.agreement:.3f}, {len(self.labels)} test examples)"
        )

    def plot(self, path: str | os.PathLike[str] | None = None, **options: Any) -> Any:
        """Accuracies, decision values against margins, and where the two disagree: a figure, also saved to ``path``.

        Options are those of :func:`kxexplain.plots.plot_comparison`.
        """
        from kxexplain.plots import plot_comparison

        figure = plot_comparison(self, **options)
        if path is not None:
            figure.savefig(Path(path))
        return figure


def _known(value: Any) -> Any:
    """A number as JSON can hold it: NaN as null."""
    return None if isinstance(value, float) and value != value else value


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    middle: Tensor = counts.cumsum(0).double() - (counts - 1) / 2
    return middle[inverse]


__all__ = ["Comparison", "KernelRow", "correlation", "overlap"]
