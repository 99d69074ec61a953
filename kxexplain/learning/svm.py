r"""Is the network any different from a support vector machine on its own kernel?

A network trained by gradient flow is f_T(x) = f_0(x) + Σ_i α_i(x) K(x, x_i) with the path kernel K (Domingos 2020).
An SVM on the same Gram matrix keeps K and finds weights of its own, which do not depend on x. Where the two agree,
the kernel is what training learnt; where they do not, the rest is in α.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from kxexplain.attribution.queries import evaluate
from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.kernels.budget import progress_bar
from kxexplain.kernels.path import path_kernel
from kxexplain.kernels.tangent import tangent_kernel
from kxexplain.learning.alphas import AlphaVariation, alpha_variation
from kxexplain.learning.arrays import whole
from kxexplain.learning.comparison import Comparison, KernelRow, correlation, overlap
from kxexplain.learning.labels import class_numbers, predicted_classes
from kxexplain.learning.measures import alignment, effective_rank
from kxexplain.learning.precomputed import FittedSVM, fit_svm
from kxexplain.learning.vector_kernels import tuned_rbf, vectors
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import Trajectory, count, fetch, take
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model

Kernel = Literal["path", "tangent"]
OTHERS = ("path", "start", "middle", "end", "rbf", "linear")
"""Kernels to compare with: the path kernel, the tangent kernel at three states, and two of the inputs alone."""


def compare_svm(
    trajectory: Trajectory,
    model: nn.Module,
    train: Examples,
    test: Examples,
    *,
    C: float | None = None,
    limit: int = 2000,
    kernel: Kernel = "path",
    against: Sequence[str] = OTHERS,
    queries: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    r"""Fit ``SVC(kernel="precomputed")`` on the network's own kernel and compare the two on a test set.

    The Gram matrix is of the flow path kernel, traced over outputs (:func:`kxexplain.path_kernel`), and divided by
    the mean of its diagonal, K / (1/n Σ_i K(x_i, x_i)): its size depends on the learning rate, the number of steps
    and the width of the network, and without the division so would the meaning of ``C``.
    SVC decides between pairs of classes; its decision value for (a, b) stands beside f_a(x) − f_b(x).

    Args:
        trajectory: the recorded training.
        model: a model of the recorded architecture; only its code is used, and it is not changed.
        train: the training examples, as recorded: (input, class number).
        test: examples to compare the predictions on.
        C: the SVMs' bound on every weight; chosen for each kernel by cross-validation on its Gram matrix if ``None``.
        limit: of a larger training set, the SVMs get this many examples, with the classes' proportions kept.
        kernel: ``"path"``, or ``"tangent"`` for the trained network's tangent kernel.
        against: more kernels to fit an SVM on: ``"path"``; the tangent kernel at the ``"start"`` (the network as
            initialised), the ``"middle"`` and the ``"end"`` of training; of the inputs, where these are vectors or
            pictures, ``"rbf"`` (its width chosen by cross-validation, too) and ``"linear"``. Empty for none.
        queries: of so many test examples α_i(x) is computed, to see whether it depends on x and whether the support
            vectors are the examples with the largest |α_i|; fewer where there are many outputs, 0 for none.
        seed: of the choice of examples and of the folds.
        progress: show a bar over the kernels.

    Returns:
        Accuracies, agreement, decision values, support vectors, a row for every kernel, and α's variation.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples, nothing in a set, only one class, or targets that are no classes.
        ArgumentError: C, limit, queries or seed out of range, an unknown kernel, a trajectory without steps.

    Source: Domingos 2020, arXiv 2012.00152; Cortes & Vapnik 1995.

    >>> import tempfile, torch, kxexplain as kx
    >>> data = kx.datasets.toy(40)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> trajectory = kx.train(model, data.train, epochs=3, out=tempfile.mkdtemp(), progress=False)
    >>> comparison = compare_svm(trajectory, model, data.train, data.test)
    >>> len(comparison.labels), 0 <= comparison.agreement <= 1
    (40, True)
    >>> [row.kernel for row in comparison.kernels]
    ['path', 'start', 'middle', 'end', 'rbf', 'linear']
    """
    _check_arguments(C, limit, kernel, against, queries, seed)
    study = _Study.of(trajectory, model, train, test, limit=limit, seed=seed)
    own = "path" if kernel == "path" else "end"
    names = [own, *(name for name in OTHERS if name in against and name != own)]
    if study.train_rows is None:
        names = [name for name in names if name not in ("rbf", "linear")]
    fitted: dict[str, FittedSVM] = {}
    rows = []
    with progress_bar(progress, len(names) + 1, "comparing") as tick:
        alphas = study.alphas(queries, train, test)
        tick()
        for name in names:
            gram, across = study.kernels(name)
            fitted[name] = fit_svm(gram, across, study.labels, C, seed)
            rows.append(study.row(name, gram, fitted[name], alphas))
            tick()
    svm = fitted[own]
    return Comparison(
        classes=svm.classes,
        labels=study.truth.cpu(),
        network=predicted_classes(study.outputs).cpu(),
        svm=svm.predicted,
        margins=_pairs(study.outputs.double().cpu(), svm.classes),
        decisions=svm.decisions,
        support=study.chosen[svm.support],
        examples=study.chosen,
        scale=svm.scale,
        kernel=kernel,
        C=svm.C,
        weights=svm.weights,
        kernels=tuple(rows),
        alphas=alphas,
        test=test,
    )


@dataclass(frozen=True)
class _Study:
    """What all kernels of one comparison share: the inputs of both sides, the network's outputs, the labels."""

    trajectory: Trajectory
    model: nn.Module
    chosen: Tensor
    inputs: tuple[Inputs, Inputs]
    labels: Tensor
    truth: Tensor
    outputs: Tensor
    train_rows: Tensor | None
    test_rows: Tensor | None
    seed: int

    @classmethod
    def of(
        cls, trajectory: Trajectory, model: nn.Module, train: Examples, test: Examples, *, limit: int, seed: int
    ) -> _Study:
        """Check everything, evaluate the network, choose the examples."""
        Trajectory.required(trajectory).check_model(model)
        device = next(model.parameters()).device
        x_test, raw_test = whole(test, "test", device)
        _, raw_train = whole(train, "training", device)
        trajectory.check_dataset(train)
        private = private_copy(model).eval()
        load_model(trajectory.state(trajectory.states[-1].step), private)
        outputs = torch.cat([evaluate(private, take(x_test, s)) for s in _slices(count(x_test))])
        labels, truth = (class_numbers(raw, outputs, trajectory.loss_name) for raw in (raw_train, raw_test))
        chosen = stratified(labels, limit, seed)
        with torch.random.fork_rng(devices=[]):
            x_train = fetch(train, chosen, device)[0]
        return cls(
            trajectory, private, chosen, (x_train, x_test), labels[chosen.to(labels.device)], truth, outputs,
            vectors(x_train), vectors(x_test), seed,
        )  # fmt: skip

    def kernels(self, name: str) -> tuple[Tensor, Tensor]:
        """The Gram matrix of the training examples, and the test examples' rows."""
        if name == "path":
            return tuple(path_kernel(self.trajectory, self.model, x, y) for x, y in self._pairs())  # type: ignore[return-value]
        if name in ("rbf", "linear"):
            assert self.train_rows is not None
            assert self.test_rows is not None
            if name == "linear":
                return self.train_rows @ self.train_rows.T, self.test_rows @ self.train_rows.T
            return tuned_rbf(self.train_rows, self.test_rows, self.labels, self.seed)
        steps = [state.step for state in self.trajectory.states]
        middle = min(steps, key=lambda step: abs(2 * step - steps[0] - steps[-1]))
        at = {"start": steps[0], "middle": middle, "end": steps[-1]}[name]
        load_model(self.trajectory.state(at), self.model)
        return tuple(tangent_kernel(self.model, x, y) for x, y in self._pairs())  # type: ignore[return-value]

    def row(self, name: str, gram: Tensor, svm: FittedSVM, alphas: AlphaVariation | None) -> KernelRow:
        """What is told about one kernel."""
        network = predicted_classes(self.outputs).cpu()
        return KernelRow(
            kernel=name,
            accuracy=float((svm.predicted == self.truth.cpu()).double().mean()),
            agreement=float((svm.predicted == network).double().mean()),
            correlation=correlation(svm.decisions, _pairs(self.outputs.double().cpu(), svm.classes)),
            C=svm.C,
            support_vectors=len(svm.support),
            alignment=alignment(gram, self.labels),
            effective_rank=effective_rank(gram),
            support_overlap=float("nan") if alphas is None else overlap(alphas.size[self.chosen], svm.support),
        )

    def alphas(self, queries: int, train: Examples, test: Examples) -> AlphaVariation | None:
        """α over some test examples, as many as the C × C kernel's memory allows."""
        each = self.trajectory.manifest.dataset.count * self.outputs.shape[1] ** 2 * 8
        chosen = range(min(queries, len(test), ROOM // each))
        if len(chosen) < 2:
            return None
        return alpha_variation(self.trajectory, self.model, train, Subset(test, chosen))  # type: ignore[arg-type]

    def _pairs(self) -> tuple[tuple[Inputs, Inputs | None], ...]:
        return (self.inputs[0], None), (self.inputs[1], self.inputs[0])


ROOM = 500_000_000
"""Bytes that the C × C path kernel of the queries may take."""


def stratified(labels: Tensor, limit: int, seed: int = 0) -> Tensor:
    """Rising indices of at most ``limit`` examples, each class in its proportion and with at least one.

    Raises:
        DatasetError: all examples are of one class.
        ArgumentError: fewer examples are allowed than there are classes.

    >>> stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 3).shape
    torch.Size([3])
    """
    classes, sizes = labels.cpu().unique(return_counts=True)
    if len(classes) < 2:
        raise DatasetError(f"all training examples are of class {classes.tolist()}; an SVM needs two classes")
    if limit < len(classes):
        raise ArgumentError(f"got limit={limit}; expected at least {len(classes)}, one example a class")
    if limit >= len(labels):
        return torch.arange(len(labels))
    # Each example's place within its class, as a fraction: the smallest fractions are a stratified sample.
    random = np.random.default_rng(seed)
    place = np.zeros(len(labels))
    for number, size in zip(classes.tolist(), sizes.tolist(), strict=True):
        members = np.flatnonzero(labels.cpu().numpy() == number)
        place[random.permutation(members)] = np.arange(size) / size
    return torch.from_numpy(np.sort(np.argsort(place, kind="stable")[:limit]))


def _pairs(outputs: Tensor, classes: Tensor) -> Tensor:
    """f_a − f_b for all a < b; −f for one output, whose sign speaks for the second class."""
    if outputs.shape[1] == 1:
        return -outputs
    first, second = torch.combinations(classes, 2).T
    return outputs[:, first] - outputs[:, second]


def _slices(n: int, size: int = 1024) -> list[slice]:
    return [slice(at, at + size) for at in range(0, n, size)]


def _check_arguments(C: float | None, limit: int, kernel: str, against: Sequence[str], queries: int, seed: int) -> None:
    if C is not None and not 0 < C < float("inf"):
        raise ArgumentError(f"got C={C!r}; expected a positive number, or None to choose it by cross-validation")
    if isinstance(limit, bool) or limit < 2:
        raise ArgumentError(f"got limit={limit!r}; expected at least 2 examples")
    if kernel not in ("path", "tangent"):
        raise ArgumentError(f'got kernel={kernel!r}; expected "path" or "tangent"')
    unknown = [name for name in against if name not in OTHERS]
    if isinstance(against, str) or unknown:
        raise ArgumentError(f"got against={against!r}; expected some of {', '.join(OTHERS)}, as a list")
    if isinstance(queries, bool) or not isinstance(queries, int) or queries < 0:
        raise ArgumentError(f"got queries={queries!r}; expected a whole number, 0 for none")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:  # scikit-learn takes no larger one
        raise ArgumentError(f"got seed={seed!r}; expected a whole number from 0 to 2**32 - 1")


__all__ = ["OTHERS", "Comparison", "compare_svm", "stratified"]
