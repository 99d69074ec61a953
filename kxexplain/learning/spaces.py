r"""Preconditioned gradient steps in a kernel's function space, over kernel blocks or over features.

A step on a batch B moves f by −(η/b) P Σ_{j∈B} g_j K(·, x_j), with g = ∂ℓ/∂f and the preconditioner
P = I − Σ_{i≤q} (1 − λ_{q+1}/λ_i) e_i ⊗ e_i, which makes the q steepest directions as flat as the next one. λ_i and e_i
are those of a subsample S: for K_SS v_i = σ_i v_i, λ_i = σ_i/|S| and e_i(x) = K(x, S) v_i/√σ_i.

Source: EigenPro 2, Ma & Belkin 2019, arXiv 1806.06144.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.kernels.blocks import spans
from kxexplain.learning.block_kernels import Blocks, blocks_against
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import count, take


@dataclass(frozen=True)
class Preconditioner:
    """The steepest directions of a subsample, and how much of them is taken out of a step.

    Attributes:
        vectors: V, [s, q].
        sigma: σ_1 ≥ … ≥ σ_q, [q].
        damping: 1 − σ_{q+1}/σ_i, [q].
        flattest: λ_{q+1}: the largest eigenvalue left.
        diagonal: the largest K_P(x, x) left, over the subsample.
    """

    vectors: Tensor
    sigma: Tensor
    damping: Tensor
    flattest: float
    diagonal: float

    @classmethod
    def of(cls, gram: Tensor, directions: int) -> Preconditioner:
        """From the subsample's Gram matrix [s, s].

        Raises:
            ArgumentError: the kernel vanishes there, has negative eigenvalues, or is not finite.
        """
        s = len(gram)
        if not bool(gram.isfinite().all()):
            raise ArgumentError(f"the kernel of {s} examples holds NaN or infinite values; check the inputs for them")
        values, vectors = torch.linalg.eigh((gram + gram.T).double() / 2)
        values, vectors = values.flip(0), vectors.flip(1)
        if not float(values[0]) > 0 or float(values[-1]) < -1e-4 * float(values[0]):
            raise ArgumentError(
                f"the kernel's eigenvalues on {s} examples reach from {float(values[-1]):.2g} to "
                f"{float(values[0]):.2g}; expected a positive semi-definite kernel that does not vanish"
            )
        q = min(directions, s - 1, int((values > 1e-6 * values[0]).sum()) - 1)
        sigma = values[:q]
        damping = 1 - values[q] / sigma
        left = gram.diagonal().double() - (damping * sigma * vectors[:, :q].square()).sum(1)
        return cls(vectors[:, :q], sigma, damping, float(values[q]) / s, float(left.max()))

    def rate(self, batch: int) -> float:
        """The largest safe step for a loss of curvature 1: b / (max K_P(x, x) + (b − 1) λ_{q+1})."""
        return batch / (self.diagonal + (batch - 1) * self.flattest)

    def taken_out(self, across: Tensor, pull: Tensor) -> Tensor:
        """Coefficients on the subsample that take the steep directions out of Σ_j g_j K(·, x_j), [s, c].

        Args:
            across: K(x_j, S), [b, s].
            pull: g, [b, c].
        """
        v = self.vectors.to(across.dtype)
        weight = (self.damping / self.sigma).to(across.dtype)
        return v @ (weight[:, None] * (v.T @ (across.T @ pull)))


@runtime_checkable
class Space(Protocol):
    """Where f lives: how it is evaluated, and how a step moves it."""

    coefficients: Tensor
    preconditioner: Preconditioner

    def values(self, rows: Tensor) -> Tensor:
        """F at some of the training examples, [b, c]."""
        ...

    def step(self, rows: Tensor, pull: Tensor, rate: float) -> None:
        """Move f by −rate/b P Σ_j g_j K(·, x_j); the rows are those that :meth:`values` was asked for last."""
        ...

    def predict(self, inputs: Inputs) -> Iterator[Tensor]:
        """F at any inputs, in portions."""
        ...


class KernelSpace:
    """f = Σ_j a_j K(·, x_j) over all n training examples, whose kernel is computed a block of rows at a time."""

    def __init__(
        self, kernel: Any, inputs: Inputs, sample: Tensor, *, directions: int, batch: int, memory: str | int
    ) -> None:
        self._kernel, self._inputs, self._batch = kernel, inputs, batch
        self._blocks: Blocks = blocks_against(kernel, inputs, memory)
        self._sample = sample
        chosen = take(inputs, sample)
        among = blocks_against(kernel, chosen, memory)
        gram = torch.cat([among(take(chosen, part)) for part in spans(0, len(sample), batch)])
        self.preconditioner = Preconditioner.of(gram, directions)
        self.coefficients = gram.new_zeros(count(inputs), 0)
        self._block: Tensor | None = None

    def values(self, rows: Tensor) -> Tensor:
        """Σ_j a_j K(x, x_j)."""
        self._block = self._blocks(take(self._inputs, rows))
        return self._block @ self.coefficients

    def step(self, rows: Tensor, pull: Tensor, rate: float) -> None:
        """The batch's own coefficients take −rate/b g, the subsample's what the preconditioner gives back."""
        assert self._block is not None
        across, self._block = self._block[:, self._sample], None
        weight = rate / len(rows)
        self.coefficients.index_add_(0, rows, pull, alpha=-weight)
        self.coefficients.index_add_(0, self._sample, self.preconditioner.taken_out(across, pull), alpha=weight)

    def predict(self, inputs: Inputs) -> Iterator[Tensor]:
        """Portions of f."""
        for part in spans(0, count(inputs), self._batch):
            yield self._blocks(take(inputs, part)) @ self.coefficients


class FeatureSpace:
    """f = φ(·) W over features of the training examples, which are computed once and held, [n, d]."""

    def __init__(self, features: Any, inputs: Inputs, sample: Tensor, *, directions: int, batch: int) -> None:
        self._features, self._batch = features, batch
        self._held = torch.from_numpy(features.fit(inputs).transform(inputs))
        chosen = self._held[sample]
        self.preconditioner = Preconditioner.of(chosen @ chosen.T, directions)
        self.coefficients = self._held.new_zeros(self._held.shape[1], 0)
        # e_i = Φ_Sᵀ v_i / √σ_i are the steep directions as vectors of weights, [d, q].
        v, root = self.preconditioner.vectors, self.preconditioner.sigma.sqrt()
        self._directions = (chosen.T.double() @ v / root).to(chosen.dtype)

    def values(self, rows: Tensor) -> Tensor:
        """Φ W."""
        return self._held[rows] @ self.coefficients

    def step(self, rows: Tensor, pull: Tensor, rate: float) -> None:
        """W ← W − rate/b P Φᵀ g."""
        gradient = self._held[rows].T @ pull
        damping = self.preconditioner.damping.to(gradient.dtype)
        gradient -= self._directions @ (damping[:, None] * (self._directions.T @ gradient))
        self.coefficients.sub_(gradient, alpha=rate / len(rows))

    def predict(self, inputs: Inputs) -> Iterator[Tensor]:
        """Portions of f."""
        for part in spans(0, count(inputs), self._batch):
            yield torch.from_numpy(self._features.transform(take(inputs, part))) @ self.coefficients


__all__ = ["FeatureSpace", "KernelSpace", "Preconditioner", "Space"]
