r"""Linear maps that are exact between two points: secants of nonlinear operations.

For an operation φ with inputs u, u' at the two ends, each function here returns (the ingredients of)
a linear map J with J(u'−u) = φ(u')−φ(u) *exactly*, and J → φ' as u' → u. Chained, they make the
discrete gradient of a network (Gonzalez 1996; McLachlan, Quispel & Robidoux 1999).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Elementwise = Callable[[Tensor], Tensor]

_GAUSS_NODE = 0.5 / 3.0**0.5  # two-point Gauss–Legendre on [−½, ½]: nodes ±1/(2√3), weights ½


def derivative(function: Elementwise, at: Tensor) -> Tensor:
    """φ'(u) of an elementwise function, by autograd."""
    with torch.enable_grad():
        point = at.detach().requires_grad_()
        (slope,) = torch.autograd.grad(function(point).sum(), point)
    return slope


def slope(function: Elementwise, start: Tensor, end: Tensor, values: tuple[Tensor, Tensor]) -> Tensor:
    r"""Secant slope (φ(u')−φ(u))/(u'−u) of a smooth elementwise function.

    Where the quotient would lose digits to cancellation, the slope is the mean of φ' over [u, u'] by
    two-point Gauss–Legendre, whose error |u'−u|⁴ φ⁽⁵⁾/4320 is below rounding for the widths concerned
    (at most ε^{1/5}).

    Args:
        function: φ.
        start: u, any shape.
        end: u', the same shape.
        values: φ(u) and φ(u').

    Returns:
        The slopes, in the shape of ``start``.

    >>> import torch
    >>> u, v = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 1.0])
    >>> slope(torch.exp, u, v, (u.exp(), v.exp()))  # (e² − 1)/2, and e where the ends meet
    tensor([3.1945, 2.7183])
    """
    width, rise = end - start, values[1] - values[0]
    narrow = torch.finfo(start.dtype).eps ** 0.2
    close = (width.abs() <= narrow) & (rise.abs() <= narrow * (values[0].abs() + values[1].abs()))
    close |= width == 0
    if not bool(close.any()):
        return rise / width
    middle, offset = (start + end) / 2, width * _GAUSS_NODE
    low, high = derivative(function, middle - offset), derivative(function, middle + offset)
    mean = (low + high) / 2
    # Near a pole a width that looks narrow is not: there the midpoint and Gauss disagree, and the quotient serves.
    bend = (mean - derivative(function, middle)).abs()
    close &= (bend <= narrow**2 * (low.abs() + high.abs())) | (width == 0)
    mean = torch.where((width == 0) & ~mean.isfinite(), 0.0, mean)  # nothing moved: any slope is exact
    return torch.where(close, mean, rise / torch.where(close, torch.ones_like(width), width))


def kinked_slope(
    function: Elementwise, start: Tensor, end: Tensor, values: tuple[Tensor, Tensor], kinks: Sequence[float]
) -> Tensor:
    """Secant slope of a function that is smooth between the given kinks (ReLU, ELU, hard-swish …).

    Where a kink lies within [u, u'] the plain quotient is taken however close the ends are: the
    derivative jumps there, so no derivative inside the interval would be exact.
    """
    across = torch.zeros_like(start, dtype=torch.bool)
    for kink in kinks:
        across |= (start - kink) * (end - kink) <= 0
    across &= start != end
    smooth = slope(function, start, end, values)
    width = torch.where(across, end - start, torch.ones_like(start))
    return torch.where(across, (values[1] - values[0]) / width, smooth)


def relu_slope(start: Tensor, end: Tensor, values: tuple[Tensor, Tensor]) -> Tensor:
    """Secant slope of ReLU, whose values are given; where the ends meet, autograd's convention (0 at 0).

    >>> import torch
    >>> u, v = torch.tensor([-1.0, 1.0, -2.0, 3.0]), torch.tensor([3.0, 2.0, -1.0, 3.0])
    >>> relu_slope(u, v, (u.relu(), v.relu()))
    tensor([0.7500, 1.0000, 0.0000, 1.0000])
    """
    width, rise = end - start, values[1] - values[0]
    still = width == 0
    return torch.where(still, start > 0, rise.div_(width.masked_fill_(still, 1.0)))


def logarithmic_mean(log_start: Tensor, log_end: Tensor) -> Tensor:
    r"""L(p, p') = (p'−p)/(log p'−log p), from the logarithms; L(p, p) = p. Never overflows for p ≤ 1.

    A gap of zero counts as the smallest number ε, for which (1 − e^−ε)/ε is 1.

    >>> import torch
    >>> logarithmic_mean(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1.0]))
    tensor([1.0000, 0.6321])
    """
    gap = (log_end - log_start).abs_().nan_to_num_(nan=0.0, posinf=torch.inf)  # both −∞: L(0, 0) = 0
    gap.clamp_min_(torch.finfo(gap.dtype).tiny)
    return torch.maximum(log_start, log_end).exp_() * torch.expm1(-gap).div_(-gap)


def rank_one_residual(residual: Tensor, step_norm: Tensor) -> Tensor:
    """r/‖Δu‖², the coefficient of Gonzalez' correction J + r Δuᵀ/‖Δu‖²; 0 where nothing moved."""
    moved = step_norm > 0
    return torch.where(moved, residual / step_norm.masked_fill(~moved, 1.0), torch.zeros_like(residual))
