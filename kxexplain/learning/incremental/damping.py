r"""Damping by leaving one out, in closed form.

With H = K + ρI and a = H⁻¹ r, the error that ridge regression makes on an example it has not seen is
e_j = ((H⁻¹)_jj)⁻¹ a_j: blocks of C × C for C outputs, and nothing is refitted. One eigendecomposition of K serves
every ρ. Source: Allen 1974 (PRESS); Rasmussen & Williams 2006, 5.4.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

GRID = torch.logspace(-6, 2, 17, dtype=torch.float64)
"""Dampings tried, as parts of the Gram matrix' mean diagonal."""

ALONE = 0.1
"""The part taken where there is nothing to leave out: a single example."""


def left_out(values: Tensor, vectors: Tensor, residual: Float[Tensor, "n c"], damping: float) -> Float[Tensor, "n c"]:
    """Every example's residual when it is left out of the ridge solve, for K = vectors diag(values) vectorsᵀ.

    >>> left_out(torch.tensor([1.0, 1.0]), torch.eye(2), torch.tensor([[2.0], [3.0]]), 1.0)
    tensor([[2.],
            [3.]])
    """
    n, c = residual.shape
    weights = 1 / (values.clamp(min=0) + damping)
    a = vectors @ (weights * (vectors.T @ residual.flatten()))
    rows = vectors.view(n, c, -1)
    blocks = (rows * weights) @ rows.transpose(1, 2)
    found: Tensor = torch.linalg.solve(blocks, a.view(n, c, 1))[..., 0]
    return found


def chosen(gram: Float[Tensor, "p p"], residual: Float[Tensor, "n c"], judged: Tensor | slice = slice(None)) -> float:
    """The damping with the least mean squared error left out, over a grid about the Gram matrix' mean diagonal.

    Args:
        gram: K over examples and outputs, an example's outputs next to each other.
        residual: what is to be learnt.
        judged: the examples whose error counts.

    Returns:
        ρ; a tenth of the mean diagonal where only one example is there.

    >>> noise = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    >>> chosen(torch.ones(4, 4, dtype=torch.float64), noise)  # a constant cannot learn it: as much damping as there is
    100.0
    """
    scale = float(gram.diagonal().mean()) or 1.0
    if len(residual) < 2:
        return ALONE * scale
    values, vectors = torch.linalg.eigh(gram)
    floor = float(torch.finfo(gram.dtype).eps) * float(values[-1]) * len(gram)
    dampings: list[float] = [d for d in (GRID * scale).tolist() if d > floor]
    errors = [float(left_out(values, vectors, residual, d)[judged].square().mean()) for d in dampings]
    return dampings[min(range(len(errors)), key=errors.__getitem__)]
