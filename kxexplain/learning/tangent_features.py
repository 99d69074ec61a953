r"""Sketched tangent features: short vectors φ(x) with ⟨φ(x), φ(x')⟩ ≈ K_θ(x, x'), for linear learners."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import Dense, Factor, Factors
from kxexplain.gradients.ordinary import trainable
from kxexplain.gradients.projection import Projection
from kxexplain.kernels.blocks import spans
from kxexplain.kernels.tangent import TangentKernel
from kxexplain.learning.arrays import check_shape, rows_for
from kxexplain.learning.validation import validated


class TangentFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Gradients of a model's outputs, projected at random to ``dim`` numbers (a scikit-learn transformer).

    φ(x) = Σ_c S_c ∇f_c(x), every output with a seeded projection S_c of its own: cross terms vanish on average, so
    E⟨φ(x), φ(x')⟩ = Σ_c ⟨∇f_c(x), ∇f_c(x')⟩, the traced tangent kernel, with an error that falls as 1/√dim. The
    gradients themselves are never written out. Use it before ``LinearSVC``, ``SGDClassifier`` or
    ``LogisticRegression`` where a Gram matrix would not fit.

    Args:
        model: any ``nn.Module`` as it stands; not changed.
        dim: length of the features, at least 16.
        outputs: ``"trace"`` for all outputs, or one output's number.
        shape: what a row becomes before the model sees it, such as ``(1, 28, 28)``; left as it is if ``None``.
        normalize: divide all features by one number, so that their mean square norm is 1 on the data of ``fit``.
        seed: of the projection.

    Raises:
        ArgumentError: in ``fit``: a wrong dim, seed, ``outputs`` or shape.
        ModelError: in ``fit``: a model without trainable parameters.
        DatasetError: rows that do not fit.

    Source: random projection of rows, Sun et al. 2021, arXiv 2105.00105.

    >>> features = TangentFeatures(nn.Linear(3, 1, bias=False), dim=4096, normalize=False)
    >>> phi = features.fit_transform(np.eye(3))
    >>> np.allclose(phi @ phi.T, np.eye(3), atol=0.1)
    True
    """

    def __init__(
        self,
        model: nn.Module,
        dim: int = 2048,
        outputs: str | int = "trace",
        shape: Sequence[int] | None = None,
        normalize: bool = True,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.dim = dim
        self.outputs = outputs
        self.shape = shape
        self.normalize = normalize
        self.seed = seed

    def fit(self, X: Any, y: Any = None) -> TangentFeatures:
        """Measure the model on some inputs; nothing is learnt but the features' size."""
        if self.outputs == "full":
            raise ArgumentError('got outputs="full"; expected "trace" or an output\'s number')
        check_shape(self.shape)
        outputs: Any = self.outputs
        inputs = self._rows(X, reset=True)
        with torch.random.fork_rng(devices=[]):
            self.kernel_ = TangentKernel(self.model, inputs[:1], outputs)
        shapes = {name: tuple(p.shape) for name, p in trainable(self.kernel_.model).items()}
        self.projection_ = Projection(shapes, self.kernel_.columns, self.dim, seed=self.seed)
        norms = self.kernel_.diagonal(inputs).double() if self.normalize else torch.ones(1)
        self.scale_ = float(norms.mean()) ** 0.5
        if not 0 < self.scale_ < float("inf"):
            raise ArgumentError("the model's gradients vanish on these inputs; there is nothing to project")
        return self

    def transform(self, X: Any) -> np.ndarray:
        """Features [n, dim], in the model's dtype."""
        check_is_fitted(self)
        inputs = self._rows(X, reset=False)
        made = torch.empty(len(inputs), self.dim, dtype=self.kernel_.like.dtype)
        with torch.random.fork_rng(devices=[]):
            for rows in spans(0, len(inputs), max(1, min(self.kernel_.plan.batch, 256))):
                made[rows] = self._sketch(inputs[rows]).cpu()
        return made.div_(self.scale_).numpy()

    @property
    def _n_features_out(self) -> int:
        return self.dim

    def _rows(self, X: Any, *, reset: bool) -> Tensor:
        """Checked as scikit-learn does, which knows flat rows only, and then in the shape that the model takes."""
        rows, shape = X.detach().cpu().numpy() if isinstance(X, Tensor) else X, self.shape
        if getattr(rows, "ndim", 2) > 2:
            shape = rows.shape[1:] if shape is None else shape
            rows = rows.reshape(len(rows), -1)
        return rows_for(self.model, validated(self, rows, reset=reset), shape)

    def _sketch(self, inputs: Tensor) -> Tensor:
        factors = self.kernel_.gradients(inputs)
        made = inputs.new_zeros(len(inputs), self.dim, dtype=self.kernel_.like.dtype)
        for output in range(self.kernel_.columns):
            columns = self.projection_.columns(output)
            made[:, columns] += self.projection_(list(_of_output(factors, output)), output)[:, 0]
        return made


def _of_output(factors: Factors, output: int) -> Iterator[Factor]:
    """The gradients of one output."""
    for factor in factors:
        one = slice(output, output + 1)
        if isinstance(factor, Dense):
            yield replace(factor, values=factor.values[:, one])
        else:
            yield replace(factor, g=factor.g[:, one])


__all__ = ["TangentFeatures"]
