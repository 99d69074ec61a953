"""Kernels of the inputs alone, which know nothing of the network: what its kernel has to be better than."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.learning.precomputed import choose_C
from kxexplain.shapes import Inputs

WIDTHS = (0.3, 1.0, 3.0, 10.0)
"""γ among which cross-validation chooses, in units of 1 / (d · variance of the inputs)."""


def vectors(inputs: Inputs) -> Float[Tensor, "n d"] | None:
    """Inputs as vectors, in float64; ``None`` where they are no single tensor of floating-point numbers."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
        return None
    return inputs.flatten(1).double()


def rbf(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """exp(−γ ‖x − y‖²).

    >>> rbf(torch.zeros(1, 2), torch.ones(1, 2), 0.5)
    tensor([[0.3679]])
    """
    return torch.exp(-gamma * torch.cdist(x, y).square())


def tuned_rbf(train: Tensor, test: Tensor, labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Both matrices at the width with the best cross-validated accuracy, each width with its own best C."""
    unit = 1 / (train.shape[1] * max(float(train.var()), 1e-12))
    best, found = -1.0, unit
    for width in WIDTHS:
        _, accuracy = choose_C(rbf(train, train, width * unit).cpu().numpy(), labels.cpu().numpy(), seed=seed)
        if accuracy > best:
            best, found = accuracy, width * unit
    return rbf(train, train, found), rbf(test, train, found)


__all__ = ["rbf", "tuned_rbf", "vectors"]
