"""Networks as scikit-learn estimators: they train and record, and predict by the kernel sum over their examples."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kxexplain.attribution import Explanation, explain
from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.learning.trainer import train
from kxexplain.learning.validation import dataset_errors, validated
from kxexplain.trajectory import Trajectory

Rows = Any
MakeModule = Callable[[int, int], nn.Module]
"""(features, outputs) -> a module."""


class _PathKernelEstimator(BaseEstimator):
    """What classifier and regressor share."""

    def __init__(
        self,
        hidden: Sequence[int] = (32,),
        module: MakeModule | None = None,
        learning_rate: float = 0.1,
        weight_decay: float = 0.0,
        epochs: int = 20,
        batch_size: int = 32,
        standardize: bool = True,
        out: str | PathLike[str] | None = None,
        random_state: Any = None,
    ) -> None:
        self.hidden = hidden
        self.module = module
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.standardize = standardize
        self.out = out
        self.random_state = random_state

    @property
    def trajectory_(self) -> Trajectory:
        """The recorded training."""
        check_is_fitted(self)
        return Trajectory.open(self.path_)

    def explain(self, X: Rows, **options: Any) -> Explanation:
        """The bill of predictions over the training examples; options are those of :func:`kxexplain.explain`.

        Of a regressor the bill is in units of the standardised target.
        """
        return explain(self.trajectory_, self.module_, self.examples_, self._inputs(X), **options)

    def network(self, X: Rows) -> np.ndarray:
        """The network's own outputs [n, outputs], which the kernel sum equals."""
        inputs = self._inputs(X)
        with torch.no_grad():
            return np.asarray(self.module_.eval()(inputs).numpy())

    def _fit(self, X: np.ndarray, targets: Tensor, loss: str, outputs: int) -> None:
        """Build the network, train it, record how."""
        if not all(isinstance(value, (int, float)) and value >= 0 for value in (self.learning_rate, self.weight_decay)):
            got = f"learning_rate={self.learning_rate!r}, weight_decay={self.weight_decay!r}"
            raise ArgumentError(f"got {got}; expected numbers of at least 0")
        self._check_network()
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        self.shift_ = X.mean(0) if self.standardize else np.zeros(X.shape[1], X.dtype)
        spread = X.std(0) if self.standardize else np.ones(X.shape[1], X.dtype)
        self.spread_ = np.where(spread > 0, spread, 1).astype(X.dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self._built(X.shape[1], outputs)
        self.module_ = made.to(torch.from_numpy(np.empty(0, X.dtype)).dtype)
        self.examples_ = TensorDataset(torch.from_numpy((X - self.shift_) / self.spread_), targets)
        self._own_folder = self.out is None
        self.path_ = self._temporary() if self.out is None else str(self.out)
        optimizer = torch.optim.SGD(
            self.module_.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )  # fmt: skip
        train(
            self.module_, self.examples_, loss, optimizer, epochs=self.epochs, batch_size=self.batch_size,
            seed=seed, out=self.path_, overwrite=self.out is not None, progress=False,
        )  # fmt: skip

    def _check_network(self) -> None:
        if self.module is not None:
            if isinstance(self.module, nn.Module) or not callable(self.module):
                got = type(self.module).__name__
                raise ArgumentError(f"got module={got}; expected a function (features, outputs) -> module")
            return
        widths = self.hidden if isinstance(self.hidden, (list, tuple, np.ndarray)) else (None,)
        if not all(isinstance(width, (int, np.integer)) and width > 0 for width in widths):
            raise ArgumentError(f"got hidden={self.hidden!r}; expected the hidden layers' widths, such as (32,)")

    def _built(self, features: int, outputs: int) -> nn.Module:
        if self.module is not None:
            made = self.module(features, outputs)
            if not isinstance(made, nn.Module):
                raise ModelError(f"module(features, outputs) gave a {type(made).__name__}, expected a torch.nn.Module")
            return made
        sizes = [features, *self.hidden]
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))

    def _inputs(self, X: Rows) -> Tensor:
        check_is_fitted(self)
        rows = validated(self, X, reset=False)
        return torch.from_numpy(((rows - self.shift_) / self.spread_).astype(self.spread_.dtype, copy=False))

    def _kernel_sum(self, X: Rows) -> np.ndarray:
        """f_0(x) + Σ_i K(x, x_i) α_i(x) + what decay put in, [n, outputs]: the bill without its remainder."""
        bill = self.explain(X, target="all", kernel=False)
        lines = bill.baseline + bill.regularizer + bill.buffers + bill.unattributed
        return np.asarray((lines + bill.contributions.sum(1)).numpy())

    def __getstate__(self) -> dict[str, Any]:
        """With the recorded training's files, where they lie in a temporary folder that may be gone by then."""
        state = dict(super().__getstate__())
        if state.get("_own_folder"):
            root = Path(self.path_)
            state["_files"] = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        files = state.get("_files")
        super().__setstate__({name: value for name, value in state.items() if name != "_files"})
        if files is not None:
            self.path_ = self._temporary()
            for name, content in files.items():
                path = Path(self.path_, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _temporary(self) -> str:
        """A new folder that is removed with this estimator."""
        path = tempfile.mkdtemp(prefix="kxexplain-")
        weakref.finalize(self, shutil.rmtree, path, True)
        return path


class PathKernelClassifier(ClassifierMixin, _PathKernelEstimator):
    r"""A network as a scikit-learn classifier that predicts as the kernel machine it is.

    ``fit`` trains a network by SGD and records the training; ``decision_function`` is the kernel sum
    f_0(x) + Σ_i K(x, x_i) α_i(x) over the training examples (:func:`kxexplain.explain`), which equals the network's
    logits to rounding, at the cost of a replay of the training. With two classes there is one logit, positive for
    the second.

    Args:
        hidden: widths of an MLP's hidden layers, with ReLU.
        module: a function (features, outputs) -> module, for another network.
        learning_rate: of SGD.
        weight_decay: of SGD.
        epochs: passes over the data.
        batch_size: examples a step.
        standardize: shift and scale every feature to mean 0 and variance 1 before the network.
        out: a folder for the recorded training; a temporary one, which goes with the estimator, if ``None``.
        random_state: of initialisation and order.

    Attributes:
        classes_: the labels.
        module_: the trained network, on standardised inputs.
        path_: the folder of the recorded training; ``trajectory_`` opens it.
        examples_: the training examples as the network saw them.

    Raises:
        ArgumentError: in ``fit``, an argument out of range.
        DatasetError: in ``fit``, fewer than two classes.

    Source: Domingos 2020, arXiv 2012.00152.

    >>> X = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    >>> classifier = PathKernelClassifier(hidden=(8,), random_state=0).fit(X, ["a", "b", "a", "b"])
    >>> classifier.predict([[0.0, 3.0]])
    array(['a'], dtype='<U1')
    >>> bool(np.allclose(classifier.decision_function(X), classifier.network(X)[:, 0]))
    True
    """

    def fit(self, X: Rows, y: Any) -> PathKernelClassifier:
        """Train on inputs [n, d] and labels [n]."""
        X, y = validated(self, X, y, reset=True)
        with dataset_errors():
            check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise DatasetError(
                f"y holds {len(self.classes_)} class; a classifier needs examples of two or more classes"
            )
        single = len(self.classes_) == 2
        targets = torch.from_numpy(np.asarray(codes, dtype=np.int64))
        self._fit(X, targets, "logistic" if single else "cross_entropy", 1 if single else len(self.classes_))
        return self

    def decision_function(self, X: Rows) -> np.ndarray:
        """The kernel sum, [n] for two classes, else [n, classes]."""
        values = self._kernel_sum(X)
        return values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Rows) -> np.ndarray:
        """Labels, [n]."""
        values = self.decision_function(X)
        return np.asarray(self.classes_[(values > 0).astype(int) if values.ndim == 1 else values.argmax(1)])

    def predict_proba(self, X: Rows) -> np.ndarray:
        """Probabilities that the loss gives the logits, [n, classes]."""
        values = torch.from_numpy(self.decision_function(X))
        logits = torch.stack([torch.zeros_like(values), values], 1) if values.dim() == 1 else values
        return np.asarray(logits.softmax(1).numpy())


class PathKernelRegressor(RegressorMixin, _PathKernelEstimator):
    r"""A network as a scikit-learn regressor that predicts as the kernel machine it is.

    As :class:`PathKernelClassifier`, with squared loss on the target shifted and scaled to mean 0 and variance 1.

    Args:
        hidden, module, learning_rate, weight_decay, epochs, batch_size, standardize, out, random_state: as there.

    Attributes:
        target_shift_, target_spread_: of the targets.

    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> regressor = PathKernelRegressor(epochs=50, random_state=0).fit(X, X[:, 0])
    >>> regressor.score(X, X[:, 0]) > 0.9
    True
    """

    def fit(self, X: Rows, y: Any) -> PathKernelRegressor:
        """Train on inputs [n, d] and targets [n]."""
        X, y = validated(self, X, y, reset=True)
        with dataset_errors():
            y = np.asarray(y, dtype=X.dtype)
        self.target_shift_, self.target_spread_ = float(y.mean()), float(y.std()) or 1.0
        targets = torch.from_numpy(((y - self.target_shift_) / self.target_spread_).astype(X.dtype))
        self._fit(X, targets, "mse", 1)
        return self

    def predict(self, X: Rows) -> np.ndarray:
        """Targets, [n]: shift + spread × kernel sum."""
        values = self._kernel_sum(X)[:, 0]
        return np.asarray(self.target_shift_ + self.target_spread_ * values)


__all__ = ["PathKernelClassifier", "PathKernelRegressor"]
