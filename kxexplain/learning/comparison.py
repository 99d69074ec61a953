"""What a comparison of a network with a support vector machine finds: look it up, print it, plot it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from rich.console import Console
from rich.table import Table
from torch import Tensor


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
        x, y = (t.double().flatten() - t.double().mean() for t in (self.decisions, self.margins))
        norm = float(x.norm() * y.norm())
        return float(x @ y) / norm if norm > 0 else float("nan")

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
            "correlation": self.correlation if self.correlation == self.correlation else None,
            "support_vectors": len(self.support),
        }

    def to_json(self) -> str:
        """The summary and both predictions for every test example, as JSON text."""
        lists = {name: getattr(self, name).tolist() for name in ("labels", "network", "svm", "support")}
        return json.dumps({**self.summary(), **lists})

    def table(self) -> Table:
        """The summary as a table to print."""
        table = Table(f"{self.kernel} kernel, C = {self.C:g}", "network", "SVM")
        table.add_row("test accuracy", f"{self.network_accuracy:.3f}", f"{self.svm_accuracy:.3f}")
        table.add_row("training examples", "all", f"{len(self.examples)}")
        table.add_row("support vectors", "", f"{len(self.support)}")
        table.add_section()
        table.add_row("same prediction", f"{self.agreement:.3f}", "")
        table.add_row("correlation of margins", f"{self.correlation:.3f}", "")
        return table

    def __str__(self) -> str:
        console = Console(width=78, file=open(os.devnull, "w"), record=True, force_jupyter=False)  # noqa: SIM115 - closed with the console
        with console.file:
            console.print(self.table())
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


__all__ = ["Comparison"]
