"""A network's own kernel, as a kernel of scikit-learn's: for SVMs, ridge regression, Gaussian processes, PCA."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.gaussian_process.kernels import Kernel
from torch import Tensor, nn

from kxexplain.errors import ArgumentError
from kxexplain.kernels.path import path_kernel
from kxexplain.kernels.tangent import tangent_kernel
from kxexplain.learning.arrays import check_shape, digest, rows_for
from kxexplain.trajectory import Trajectory


class NetworkKernel(Kernel):
    r"""The tangent kernel of a model, or the path kernel along its training, as ``k(X, Y=None)`` with ``k.diag(X)``.

    It goes wherever scikit-learn takes a callable kernel (``SVC``, ``SVR``) or a kernel object (``KernelRidge``,
    ``KernelPCA``, ``GaussianProcessRegressor`` and ``Classifier``, there also in sums and products with others).
    Its values do not depend on parameters that scikit-learn could tune. The last Gram matrix is kept, so that a
    Gaussian process that tunes a factor beside it computes it once.

    Args:
        model: any ``nn.Module``; not changed. As it stands for the tangent kernel; of the recorded architecture for
            the path kernel.
        trajectory: a recorded training: gives the path kernel; the model's tangent kernel if ``None``.
        outputs: ``"trace"`` for the sum over outputs, or one output's number.
        shape: what a row becomes before the model sees it, such as ``(1, 28, 28)``; left as it is if ``None``.
        scale: what all values are divided by; see :meth:`scaled_to`.

    Raises:
        ArgumentError: at a call: ``outputs="full"``, which is no number a pair, or a scale that is not positive.
        DatasetError: at a call: rows that do not fit.

    Source: Jacot et al. 2018, arXiv 1806.07572; Domingos 2020, arXiv 2012.00152.

    >>> from sklearn.svm import SVC
    >>> X, y = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0], [2.0, 0.0]]), [0, 1, 0, 1]
    >>> SVC(kernel=NetworkKernel(nn.Linear(2, 1, bias=False))).fit(X, y).predict([[0.0, 3.0]])
    array([0])
    """

    def __init__(
        self,
        model: nn.Module,
        trajectory: Trajectory | None = None,
        outputs: str | int = "trace",
        shape: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> None:
        self.model = model
        self.trajectory = trajectory
        self.outputs = outputs
        self.shape = shape
        self.scale = scale
        self._kept: dict[bytes, np.ndarray] = {}

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        """Gram matrix [n, m] in float64; with ``eval_gradient`` also its derivative by no parameters, [n, n, 0]."""
        self._check()
        left, right = (None if t is None else rows_for(self.model, t, self.shape) for t in (X, Y))
        if eval_gradient and right is not None:
            raise ArgumentError("got eval_gradient=True and Y; a derivative is given of K(X, X) alone")
        assert left is not None
        key = self._key(left, right)
        if key not in self._kept:
            found = self._matrix(left, right) / self.scale
            self._kept.clear()
            self._kept[key] = found
        gram = self._kept[key].copy()
        return (gram, np.empty((*gram.shape, 0))) if eval_gradient else gram

    def diag(self, X: Any) -> np.ndarray:
        """K(x, x), [n], without the matrix."""
        self._check()
        return self._matrix(rows_for(self.model, X, self.shape), None, diag=True) / self.scale

    def scaled_to(self, X: Any) -> NetworkKernel:
        """The kernel divided by its mean diagonal over some inputs: an SVM's ``C`` then means the same anywhere.

        Raises:
            ArgumentError: the kernel vanishes there.
        """
        mean = float(self.diag(X).mean()) * self.scale
        if not 0 < mean < float("inf"):
            raise ArgumentError(f"the kernel's mean diagonal is {mean}; it cannot be divided by that")
        made = copy.copy(self)
        made.scale = mean
        return made

    def is_stationary(self) -> bool:
        """Whether it depends on differences of inputs only: no."""
        return False

    def __sklearn_clone__(self) -> NetworkKernel:
        return copy.copy(self)  # the model and the recorded training are only read, and need not be copied

    def __repr__(self) -> str:
        kind = "tangent" if self.trajectory is None else "path"
        return f"NetworkKernel({type(self.model).__name__}, {kind}, outputs={self.outputs!r}, scale={self.scale:.3g})"

    def _matrix(self, left: Tensor, right: Tensor | None, *, diag: bool = False) -> np.ndarray:
        outputs: Any = self.outputs
        if self.trajectory is None:
            found = tangent_kernel(self.model, left, right, outputs, diag=diag)
        else:
            found = path_kernel(self.trajectory, self.model, left, right, outputs, diag=diag)
        return np.asarray(found.double().cpu().numpy())

    def _check(self) -> None:
        if self.outputs == "full":
            raise ArgumentError(
                'got outputs="full"; scikit-learn needs one number a pair: "trace" or an output\'s number'
            )
        if not isinstance(self.scale, (int, float)) or not 0 < self.scale < float("inf"):
            raise ArgumentError(f"got scale={self.scale!r}; expected a positive number")
        check_shape(self.shape)

    def _key(self, left: Tensor, right: Tensor | None) -> bytes:
        """What the values depend on: the inputs, the choices, and the parameters as they stand."""
        choices = repr((self.outputs, self.shape, self.scale, id(self.trajectory), right is None))
        parameters = () if self.trajectory is not None else self.model.state_dict().values()
        inputs = (left,) if right is None else (left, right)
        return choices.encode() + digest((*inputs, *parameters))


__all__ = ["NetworkKernel"]
