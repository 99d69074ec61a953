r"""Cholesky factors that follow their matrix: rows that come and go, and changes of low rank, without a refit.

A = L Lᵀ, L lower triangular. Costs are of order p² k for a change of rank k, where a new factor would take p³.
Source: Golub & Van Loan, Matrix Computations, 6.5.4; the block form by QR, Gill, Golub, Murray & Saunders 1974.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError

PANEL = 64
"""Columns changed at once."""


def factor(matrix: Float[Tensor, "p p"], floor: float, what: str) -> Float[Tensor, "p p"]:
    """L with L Lᵀ = matrix.

    Args:
        matrix: symmetric.
        floor: squared pivots of this size and below are rounding.
        what: the damping in use, for the message.

    Raises:
        ArgumentError: the matrix is singular; the message gives the damping that mends it.

    >>> factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 1e-6, "0")
    tensor([[2., 0.],
            [1., 1.]])
    """
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if int(info) or not bool((lower.diagonal().square() > floor).all()):
        raise singular(floor, what)
    return lower


def singular(floor: float, what: str) -> ArgumentError:
    """The error for a system that has no solution in this precision."""
    return ArgumentError(
        f"with damping={what} the system K + damping·I is singular in this precision (examples that repeat each other, "
        f"or outputs that do not depend on the parameters taken); damping={max(10 * floor, 1e-12):.1e} mends it"
    )


def solved(lower: Float[Tensor, "p p"], right: Float[Tensor, " p"]) -> Float[Tensor, " p"]:
    """A⁻¹ b by two triangular systems; ``torch.cholesky_solve`` copies the factor first, which takes longer.

    >>> solved(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([4.0, 2.0]))  # of [[4, 2], [2, 2]]
    tensor([1., 0.])
    """
    half = torch.linalg.solve_triangular(lower, right[:, None], upper=False)
    found: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)[:, 0]
    return found


def bordered(
    lower: Float[Tensor, "p p"],
    cross: Float[Tensor, "p k"],
    corner: Float[Tensor, "k k"],
    floor: float,
    what: str,
) -> Float[Tensor, "q q"]:
    """The factor of [[A, cross], [crossᵀ, corner]] from that of A: the new rows are solved for, the old stay.

    Raises:
        ArgumentError: the larger matrix is singular.

    >>> bordered(torch.tensor([[2.0]]), torch.tensor([[2.0]]), torch.tensor([[2.0]]), 0.0, "0")
    tensor([[2., 0.],
            [1., 1.]])
    """
    rows = torch.linalg.solve_triangular(lower, cross, upper=False).T
    own = factor(corner - rows @ rows.T, floor, what)
    p, k = cross.shape
    grown = lower.new_zeros(p + k, p + k)
    grown[:p, :p], grown[p:, :p], grown[p:, p:] = lower, rows, own
    return grown


def without(lower: Float[Tensor, "p p"], gone: slice) -> Float[Tensor, "q q"]:
    """The factor of A with some neighbouring rows and columns left out.

    What stood below them, S, is given back: L₃₃ L₃₃ᵀ + S Sᵀ, an update, which cannot fail.

    >>> without(torch.tensor([[2.0, 0.0], [1.0, 1.0]]), slice(0, 1)).square().round()  # of [[4, 2], [2, 2]]
    tensor([[2.]])
    """
    first, last, p = gone.start, gone.stop, len(lower)
    size = p - (last - first)
    left = lower.new_zeros(size, size)
    left[:first, :first], left[first:, :first] = lower[:first, :first], lower[last:, :first]
    left[first:, first:] = updated(lower[last:, last:], lower[last:, gone])
    return left


def updated(lower: Float[Tensor, "p p"], rows: Float[Tensor, "p k"]) -> Float[Tensor, "p p"]:
    """The factor of A + V Vᵀ, panel by panel.

    An orthogonal Q turns [L V] into [L' 0] without changing [L V][L V]ᵀ; of each panel's columns it is the Q of a QR.

    >>> updated(torch.tensor([[3.0]]), torch.tensor([[4.0]]))
    tensor([[5.]])
    """
    lower, rows, p = lower.clone(), rows.clone(), len(lower)
    for start in range(0, p, PANEL):
        stop = min(start + PANEL, p)
        width = stop - start
        block = torch.cat([lower[start:stop, start:stop], rows[start:stop]], 1)
        q, r = torch.linalg.qr(block.T, mode="complete")
        signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(lower)
        lower[start:stop, start:stop] = (r[:width] * signs[:, None]).T.tril()
        below = torch.cat([lower[stop:, start:stop], rows[stop:]], 1) @ q
        lower[stop:, start:stop], rows[stop:] = below[:, :width] * signs, below[:, width:]
    return lower


def downdated(lower: Float[Tensor, "p p"], rows: Float[Tensor, "p k"], floor: float) -> Float[Tensor, "p p"]:
    r"""The factor of A − V Vᵀ, column by column, by hyperbolic reflections of all k at once.

    With l the pivot, x its row of V and l' = √(l² − x·x): c' = (l c − V x) / l', V' = V − (c + c') xᵀ / (l + l').

    Raises:
        ArgumentError: A − V Vᵀ is not positive definite.

    >>> downdated(torch.tensor([[5.0]]), torch.tensor([[4.0]]), 0.0)
    tensor([[3.]])
    """
    lower, rows = lower.clone(), rows.clone()
    for k in range(len(lower)):
        x, pivot = rows[k].clone(), float(lower[k, k])
        square = pivot**2 - float(x @ x)
        if not square > floor:
            raise ArgumentError(
                "what is to be taken out of the system was not put in as it is now, or rounding has grown too large; "
                "load a saved state, or learn the examples afresh"
            )
        new = math.sqrt(square)
        column = lower[k:, k].clone()
        lower[k:, k] = (pivot * column - rows[k:] @ x) / new
        rows[k:] -= torch.outer(column + lower[k:, k], x) / (pivot + new)
    return lower
