r"""Is the network any different from a support vector machine on its own kernel?

A network trained by gradient flow is f_T(x) = f_0(x) + Σ_i α_i(x) K(x, x_i) with the path kernel K (Domingos 2020).
An SVM on the same Gram matrix keeps K and finds weights of its own, which do not depend on x. Where the two agree,
the kernel is what training learnt; where they do not, the rest is in α.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.attribution.queries import evaluate
from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.kernels.path import path_kernel
from kxexplain.kernels.tangent import tangent_kernel
from kxexplain.learning.comparison import Comparison
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import Trajectory, count, fetch, take
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model

Kernel = Literal["path", "tangent"]
SIGNED = ("hinge", "logistic")
"""Losses whose single output means a class by its sign."""


def compare_svm(
    trajectory: Trajectory,
    model: nn.Module,
    train: Examples,
    test: Examples,
    *,
    C: float = 1.0,
    limit: int = 2000,
    kernel: Kernel = "path",
    seed: int = 0,
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
        C: the SVM's bound on every weight.
        limit: of a larger training set, the SVM gets this many examples, with the classes' proportions kept.
        kernel: ``"path"``, or ``"tangent"`` for the trained network's tangent kernel.
        seed: of the choice of those examples.

    Returns:
        Accuracies, agreement, decision values, support vectors.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples, nothing in a set, only one class, or targets that are no classes.
        ArgumentError: C or limit out of range, an unknown kernel, a trajectory without steps.

    Source: Domingos 2020, arXiv 2012.00152; Cortes & Vapnik 1995.

    >>> import tempfile, torch, kxexplain as kx
    >>> data = kx.datasets.toy(40)
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    >>> trajectory = kx.train(model, data.train, epochs=3, out=tempfile.mkdtemp(), progress=False)
    >>> comparison = compare_svm(trajectory, model, data.train, data.test)
    >>> len(comparison.labels), 0 <= comparison.agreement <= 1
    (40, True)
    """
    _check_arguments(C, limit, kernel)
    trajectory.check_model(model)
    device = next(model.parameters()).device
    last = trajectory.state(trajectory.states[-1].step)
    x_test, raw_test = _whole(test, "test", device)
    _, raw_train = _whole(train, "training", device)
    trajectory.check_dataset(train)
    private = private_copy(model).eval()
    load_model(last, private)
    outputs = torch.cat([evaluate(private, take(x_test, s)) for s in _slices(count(x_test))])
    y_train, y_test = (_classes(raw, outputs, trajectory.loss_name) for raw in (raw_train, raw_test))
    chosen = stratified(y_train, limit, seed)
    with torch.random.fork_rng(devices=[]):
        x_train = fetch(train, chosen, device)[0]
    if kernel == "path":
        gram = path_kernel(trajectory, private, x_train)
        across = path_kernel(trajectory, private, x_test, x_train)
    else:
        gram, across = tangent_kernel(private, x_train), tangent_kernel(private, x_test, x_train)
    return _fit(gram, across, y_train[chosen], (outputs, y_test), chosen=chosen, kernel=kernel, C=C)


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


def _fit(
    gram: Tensor,
    across: Tensor,
    labels: Tensor,
    network: tuple[Tensor, Tensor],
    *,
    chosen: Tensor,
    kernel: str,
    C: float,
) -> Comparison:
    """Divide by the mean diagonal, fit, predict."""
    from sklearn.svm import SVC

    scale = float(gram.diagonal().double().mean())
    if not 0 < scale < float("inf"):
        raise ArgumentError(f"the kernel's mean diagonal is {scale}: the network did not depend on its parameters")
    matrix, rows = (t.double().cpu().numpy() / scale for t in (gram, across))
    svc = SVC(kernel="precomputed", C=C, decision_function_shape="ovo")
    svc.fit((matrix + matrix.T) / 2, labels.cpu().numpy())
    classes = torch.from_numpy(svc.classes_)
    decisions = torch.from_numpy(svc.decision_function(rows)).reshape(len(rows), -1)
    outputs, truth = network
    signs = -1 if len(classes) == 2 else 1  # with two classes, scikit-learn's sign speaks for the second
    return Comparison(
        classes=classes,
        labels=truth.cpu(),
        network=(outputs[:, 0] > 0).long().cpu() if outputs.shape[1] == 1 else outputs.argmax(1).cpu(),
        svm=torch.from_numpy(svc.predict(rows)),
        margins=_pairs(outputs.double().cpu(), classes),
        decisions=decisions * signs,
        support=chosen[torch.from_numpy(svc.support_.astype(np.int64))].sort().values,
        examples=chosen,
        scale=scale,
        kernel=kernel,
        C=float(C),
    )


def _pairs(outputs: Tensor, classes: Tensor) -> Tensor:
    """f_a − f_b for all a < b; −f for one output, whose sign speaks for the second class."""
    if outputs.shape[1] == 1:
        return -outputs
    first, second = torch.combinations(classes, 2).T
    return outputs[:, first] - outputs[:, second]


def _whole(dataset: Examples, name: str, device: torch.device) -> tuple[Inputs, Tensor]:
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise DatasetError(f"the {name} set is empty or has no length; give at least one example")
    with torch.random.fork_rng(devices=[]):
        return fetch(dataset, range(len(dataset)), device)


def _slices(n: int, size: int = 1024) -> list[slice]:
    return [slice(at, at + size) for at in range(0, n, size)]


def _classes(targets: Tensor, outputs: Tensor, loss: str) -> Tensor:
    """Class numbers; of a single output, 1 for targets above 0 and else 0, as the losses take them."""
    single = outputs.shape[1] == 1
    if targets.dim() == 2 and targets.shape[1] == 1 and single:
        targets = targets[:, 0]
    if targets.dim() != 1 or (loss not in SIGNED if single else targets.is_floating_point()):
        raise DatasetError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype} with loss {loss!r} on {outputs.shape[1]} "
            "output(s) are no classes; an SVM is compared with a classifier: give class numbers"
        )
    if single:
        return (targets > 0).long()
    if int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]:
        raise DatasetError(
            f"labels reach from {int(targets.min())} to {int(targets.max())}, outputs are {outputs.shape[1]}"
        )
    return targets.long()


def _check_arguments(C: float, limit: int, kernel: str) -> None:
    if not 0 < C < float("inf"):
        raise ArgumentError(f"got C={C!r}; expected a positive number")
    if isinstance(limit, bool) or limit < 2:
        raise ArgumentError(f"got limit={limit!r}; expected at least 2 examples")
    if kernel not in ("path", "tangent"):
        raise ArgumentError(f'got kernel={kernel!r}; expected "path" or "tangent"')


__all__ = ["Comparison", "compare_svm", "stratified"]
