r"""Damping by leaving one out, without a refit.

Ridge regression, in closed form: with H = K + ρI and a = H⁻¹ r, the error on an example that was not seen is
e_j = ((H⁻¹)_jj)⁻¹ a_j: blocks of C × C for C outputs. One eigendecomposition of K serves every ρ. Source: Allen 1974
(PRESS); Rasmussen & Williams 2006, 5.4.2.

Kernel logistic regression has no closed form. One Newton step from the optimum of all examples towards that of the
others is taken instead: u_j + (I − G_jj W_j)⁻¹ G_jj (p_j − y_j), with G = Φ (ΦᵀWΦ + ρI)⁻¹ Φᵀ. Source: Rad & Maleki 2020
(arXiv 1801.10243, approximate leave-one-out); Beirami et al. 2017 (arXiv 1711.05420).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning.incremental.encoding import probabilities
from kxexplain.learning.incremental.optimum import Curvature, losses, newton

GRID = torch.logspace(-6, 2, 17, dtype=torch.float64)
"""Dampings tried, as parts of the Gram matrix' mean diagonal."""

ALONE = 0.1
"""The part taken where there is nothing to leave out: a single example."""

JUDGED = 600
"""Rows of the Gram matrix that the damping is chosen on, at most; of a larger one, examples at equal distances."""


def some(n: int, c: int) -> Int[Tensor, " k"]:
    """The examples to choose on, of n with c outputs.

    >>> some(4, 300)
    tensor([0, 3])
    """
    k = n if n * c <= JUDGED else max(2, JUDGED // c)
    rows: Tensor = torch.linspace(0, n - 1, k).round().long().unique()
    return rows


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


def chosen(gram: Float[Tensor, "p p"], residual: Float[Tensor, "n c"]) -> float:
    """The damping with the least mean squared error left out, over a grid about the Gram matrix' mean diagonal.

    Args:
        gram: K over examples and outputs, an example's outputs next to each other.
        residual: what is to be learnt.

    Returns:
        ρ; a tenth of the mean diagonal where only one example is there.

    >>> noise = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
    >>> chosen(torch.ones(4, 4, dtype=torch.float64), noise)  # a constant cannot learn it: as much damping as there is
    100.0
    """
    if len(residual) < 2:
        return ALONE * _scale(gram)
    values, vectors = torch.linalg.eigh(gram)
    floor = float(torch.finfo(gram.dtype).eps) * float(values[-1]) * len(gram)
    dampings: list[float] = [d for d in (GRID * _scale(gram)).tolist() if d > floor]
    return min(dampings, key=lambda d: float(left_out(values, vectors, residual, d).square().mean()))


def left_out_logistic(
    gram: Float[Tensor, "p p"], outputs: Float[Tensor, "n c"], goal: Float[Tensor, "n c"], damping: float
) -> Float[Tensor, "n c"]:
    r"""Every example's outputs when it is left out of kernel logistic regression, by one Newton step.

    G = (K − KS (ρI + SᵀKS)⁻¹ SᵀK) / ρ, of which the examples' own blocks are needed.

    Args:
        gram: K over examples and outputs, an example's outputs next to each other.
        outputs: at the optimum of all examples.
        goal: the probabilities aimed at.
        damping: ρ.

    >>> u = torch.tensor([[0.4011], [-0.4011]])  # the optimum of two examples with K = I, ρ = 1: u = a = y − p
    >>> left_out_logistic(torch.eye(2), u, torch.tensor([[1.0], [0.0]]), 1.0).abs().round(decimals=3)
    tensor([[0.],
            [0.]])
    """
    n, c = outputs.shape
    p = probabilities(outputs)
    curvature = Curvature.at(p, gram, damping)
    root, wide = curvature.root, gram.view(n, c, n * c)
    half = torch.linalg.solve_triangular(curvature.lower, (root.transpose(1, 2) @ wide).view(n * c, n * c), upper=False)
    columns = half.T.reshape(n, c, n * c)
    own = gram.view(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    g = (own - columns @ columns.transpose(1, 2)) / damping
    hessian = root @ root.transpose(1, 2)
    step = torch.linalg.solve(torch.eye(c).to(g) - g @ hessian, g @ (p - goal)[..., None])
    found: Tensor = outputs + step[..., 0]
    return found


def chosen_logistic(gram: Float[Tensor, "p p"], base: Float[Tensor, "n c"], goal: Float[Tensor, "n c"]) -> float:
    """The damping with the least mean cross-entropy left out, over the same grid, from the largest downward.

    Args:
        gram: K over examples and outputs, an example's outputs next to each other.
        base: outputs without any term.
        goal: the probabilities aimed at.

    Returns:
        ρ; a tenth of the mean diagonal where only one example is there.
    """
    if len(base) < 2:
        return ALONE * _scale(gram)
    errors: dict[float, float] = {}
    a = torch.zeros_like(base)
    for damping in (GRID * _scale(gram)).flip(0).tolist():
        try:
            a, _ = newton(gram, base, goal, damping, a)
            outputs = base + (gram @ a.flatten()).view_as(a)
            error = float(losses(left_out_logistic(gram, outputs, goal, damping), goal).mean())
        except (ArgumentError, TrainingError):
            break  # smaller ones have no optimum in this precision
        errors[damping] = error
    return min(errors, key=lambda d: errors[d] if errors[d] == errors[d] else float("inf"))


def _scale(gram: Tensor) -> float:
    return float(gram.diagonal().mean()) or 1.0
