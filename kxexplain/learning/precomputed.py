"""A support vector machine on a Gram matrix, its C chosen by cross-validation on that matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kxexplain.errors import ArgumentError

GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
"""The C among which cross-validation chooses, for a Gram matrix of mean diagonal 1.

On the digits' kernels 1,000 and 10,000 gave what 100 gives, example by example: no weight reaches the bound any more.
"""
FOLDS = 3


@dataclass(frozen=True)
class FittedSVM:
    """What an SVM on a Gram matrix says.

    Attributes:
        classes: class numbers, rising, [class].
        predicted: for the test examples, [test].
        decisions: for every pair of classes a < b, [test, pair]; positive speaks for a.
        support: places of the support vectors among the training examples, rising.
        weights: Σ |dual coefficient| of every training example over its pairs, [n]; 0 for what is no support vector.
        C: the bound used.
        scale: the mean diagonal, by which the matrix was divided.
        validated: the cross-validated accuracy that C was chosen by; NaN where C was given.
    """

    classes: Tensor
    predicted: Tensor
    decisions: Tensor
    support: Tensor
    weights: Tensor
    C: float
    scale: float
    validated: float


def fit_svm(gram: Tensor, across: Tensor, labels: Tensor, C: float | None = None, seed: int = 0) -> FittedSVM:
    """Divide by the mean diagonal, choose C if none is given, fit, predict.

    Args:
        gram: between the training examples, [n, n].
        across: from test to training examples, [test, n].
        labels: of the training examples, [n].
        C: the bound on every weight; by cross-validation among :data:`GRID` if ``None``.
        seed: of the folds.

    Raises:
        ArgumentError: the kernel vanishes.

    >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    >>> fit_svm(x @ x.T, x @ x.T, y, C=1.0).predicted
    tensor([0, 0, 1, 1])
    """
    from sklearn.svm import SVC

    scale = float(gram.diagonal().double().mean())
    if not 0 < scale < float("inf"):
        raise ArgumentError(f"the kernel's mean diagonal is {scale}: the network did not depend on its parameters")
    matrix, rows = (t.double().cpu().numpy() / scale for t in (gram, across))
    matrix, known = (matrix + matrix.T) / 2, labels.cpu().numpy()
    validated = float("nan")
    if C is None:
        C, validated = choose_C(matrix, known, seed=seed)
    svc = SVC(kernel="precomputed", C=C, decision_function_shape="ovo").fit(matrix, known)
    decisions = torch.from_numpy(svc.decision_function(rows)).reshape(len(rows), -1)
    support = torch.from_numpy(svc.support_.astype(np.int64))
    weights = torch.zeros(len(known), dtype=torch.float64)
    weights[support] = torch.from_numpy(np.abs(svc.dual_coef_).sum(0))
    return FittedSVM(
        classes=torch.from_numpy(svc.classes_),
        predicted=torch.from_numpy(svc.predict(rows)),
        decisions=decisions
        * (-1 if len(svc.classes_) == 2 else 1),  # of two, scikit-learn's sign speaks for the second
        support=support.sort().values,
        weights=weights,
        C=float(C),
        scale=scale,
        validated=validated,
    )


def choose_C(
    matrix: np.ndarray, labels: np.ndarray, grid: Sequence[float] = GRID, *, folds: int = FOLDS, seed: int = 0
) -> tuple[float, float]:
    """The C with the best cross-validated accuracy on a Gram matrix, the smallest of equals; and that accuracy.

    Folds keep the classes' proportions. Where no fold leaves two classes to train on, the grid's middle and NaN.

    >>> x = np.r_[-np.ones(6), np.ones(6)] * np.linspace(1, 2, 12)
    >>> choose_C(np.outer(x, x), np.repeat([0, 1], 6))
    (0.01, 1.0)
    """
    from sklearn.svm import SVC

    fold = _folds(labels, folds, seed)
    right = np.zeros(len(grid))
    judged = 0
    for number in range(folds):
        train, held = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        if len(held) == 0 or len(np.unique(labels[train])) < 2:
            continue
        judged += len(held)
        gram, rows = matrix[np.ix_(train, train)], matrix[np.ix_(held, train)]
        for at, C in enumerate(grid):
            svc = SVC(kernel="precomputed", C=C).fit(gram, labels[train])
            right[at] += (svc.predict(rows) == labels[held]).sum()
    if judged == 0:
        return grid[len(grid) // 2], float("nan")
    best = int(right.argmax())
    return grid[best], float(right[best]) / judged


def _folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Every example's fold; within a class they take turns, each class beginning where the last one ended."""
    random, found, start = np.random.default_rng(seed), np.zeros(len(labels), dtype=int), 0
    for number in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == number))
        found[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return found


__all__ = ["FOLDS", "GRID", "FittedSVM", "choose_C", "fit_svm"]
