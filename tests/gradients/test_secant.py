"""Slopes against closed forms in 60 digits: cancellation, kinks, saturation, singular places."""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kxexplain.gradients.secant import (
    derivative,
    kinked_slope,
    logarithmic_mean,
    rank_one_residual,
    relu_slope,
    slope,
)

mpmath.mp.dps = 60
mpf = mpmath.mpf

SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[mpf], mpf]]] = {
    "tanh": (torch.tanh, mpmath.tanh),
    "sigmoid": (torch.sigmoid, lambda u: 1 / (1 + mpmath.exp(-u))),
    "exp": (torch.exp, mpmath.exp),
    "gelu": (F.gelu, lambda u: u * (1 + mpmath.erf(u / mpmath.sqrt(2))) / 2),
    "silu": (F.silu, lambda u: u / (1 + mpmath.exp(-u))),
    "softplus": (lambda u: F.softplus(u, threshold=50), lambda u: mpmath.log(1 + mpmath.exp(u))),
    "sin": (torch.sin, mpmath.sin),
    "erf": (torch.erf, mpmath.erf),
    "atan": (torch.atan, mpmath.atan),
}
POSITIVE: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[mpf], mpf]]] = {
    "log": (torch.log, mpmath.log),
    "sqrt": (torch.sqrt, mpmath.sqrt),
    "rsqrt": (torch.rsqrt, lambda u: 1 / mpmath.sqrt(u)),
    "reciprocal": (torch.reciprocal, lambda u: 1 / u),
    "power 1.5": (lambda u: u**1.5, lambda u: u ** mpf("1.5")),
    "log1p": (torch.log1p, lambda u: mpmath.log(1 + u)),
}
WIDTHS = [1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 1e-3, 1e-2, 0.05, 0.09, 0.2, 1.0, 4.0]
DTYPES = [torch.float64, torch.float32]


def exact(function: Callable[[mpf], mpf], start: Tensor, end: Tensor) -> Tensor:
    """The secant slope of the numbers given, rounded once."""
    values = []
    for a, b in zip(start.tolist(), end.tolist(), strict=True):
        a, b = mpf(a), mpf(b)
        if a == b:
            values.append(mpmath.diff(function, a))
        else:
            values.append((function(b) - function(a)) / (b - a))
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def found_and_exact(pair, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    function, precise = pair
    found = slope(function, start, end, (function(start), function(end)))
    return found.double(), exact(precise, start, end)


def rise_error(pair, start: Tensor, end: Tensor) -> Tensor:
    """|J Δu − Δv| beyond the rounding of u and v themselves, relative to |Δv|: what completeness suffers."""
    function, _precise = pair
    found, want = found_and_exact(pair, start, end)
    width = (end.double() - start.double()).abs()
    largest = torch.stack([t.abs() for t in (start, end, function(start), function(end))]).amax(0)
    rounding = torch.finfo(start.dtype).eps * largest.double()
    error = (found - want).abs() * width - 8 * rounding
    return (error / (want.abs() * width).clamp_min(1e-300)).clamp_min(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(SMOOTH))
def test_smooth_functions_everywhere(name: str, dtype: torch.dtype) -> None:
    """From saturation to saturation, ends from equal to far apart."""
    places = torch.tensor([-30.0, -9.0, -3.0, -1.0, -1e-4, 0.0, 1e-6, 0.3, 1.0, 2.5, 8.0, 20.0], dtype=dtype)
    limit = 1e-11 if dtype == torch.float64 else 2e-6
    for width in [0.0, *WIDTHS]:
        for sign in (1, -1):
            end = places + sign * width
            assert float(rise_error(SMOOTH[name], places, end).max()) <= limit, (name, width)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(POSITIVE))
def test_functions_with_a_singular_place(name: str, dtype: torch.dtype) -> None:
    """Near zero a function bends on the scale of its argument, not of 1: small widths are not all alike."""
    limit = 1e-11 if dtype == torch.float64 else 2e-6
    for scale in (1e-10, 1e-6, 1e-4, 1e-2, 0.1, 1.0, 1e4):
        for ratio in (1 + 1e-9, 1 + 1e-6, 1 + 1e-4, 1.001, 1.01, 1.1, 1.3, 2.0, 10.0):
            start = torch.tensor([scale], dtype=dtype)
            ends = torch.cat([start * ratio, start / ratio])
            starts = start.expand(2).contiguous()
            assert float(rise_error(POSITIVE[name], starts, ends).max()) <= limit, (name, scale, ratio)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SMOOTH, *POSITIVE])
def test_no_digits_are_lost_to_cancellation(name: str, dtype: torch.dtype) -> None:
    """Nearly equal ends: the slope itself is accurate, not only its product with the width."""
    pair = {**SMOOTH, **POSITIVE}[name]
    starts = torch.tensor([0.5, 0.9, 1.0, 1.7], dtype=dtype)
    for width in (0.0, 1e-15, 1e-12, 1e-8, 1e-6, 1e-5):
        found, want = found_and_exact(pair, starts, starts + width)
        torch.testing.assert_close(found, want, rtol=1e-11 if dtype == torch.float64 else 3e-6, atol=0.0)


def test_across_a_pole_the_quotient_is_taken() -> None:
    start, end = torch.tensor([-1.0, -1e-3]), torch.tensor([1.0, 1e-3])
    found = slope(torch.reciprocal, start, end, (start.reciprocal(), end.reciprocal()))
    torch.testing.assert_close(found * (end - start), end.reciprocal() - start.reciprocal())


KINKED = {
    "elu": (F.elu, (0.0,)),
    "celu": (F.celu, (0.0,)),
    "selu": (F.selu, (0.0,)),
    "hardswish": (F.hardswish, (-3.0, 3.0)),
    "abs": (torch.abs, (0.0,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(KINKED))
def test_across_kinks_the_rise_is_exact(name: str, dtype: torch.dtype) -> None:
    function, kinks = KINKED[name]
    eps = torch.finfo(dtype).eps
    for kink in kinks:
        for width in (*WIDTHS, 1e-20):
            ends = torch.tensor([kink, kink + width / 3, kink + width, kink - width], dtype=dtype)
            start, end = (t.flatten() for t in torch.meshgrid(ends, ends, indexing="ij"))
            values = (function(start), function(end))
            found = kinked_slope(function, start, end, values, kinks)
            assert bool(found.isfinite().all())
            error = (found * (end - start) - (values[1] - values[0])).abs()
            largest = torch.maximum(values[0].abs(), values[1].abs())
            assert bool((error <= 8 * eps * largest).all()), (name, kink, width)


def test_relu() -> None:
    start = torch.tensor([-1.0, 1.0, -2.0, 0.0, 3.0, 0.0, -0.0, 1e-30])
    end = torch.tensor([3.0, 2.0, -1.0, 0.0, 3.0, 1.0, 0.0, -1e-30])
    expected = torch.tensor([0.75, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.5])
    torch.testing.assert_close(relu_slope(start, end, (start.relu(), end.relu())), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logarithmic_mean(dtype: torch.dtype) -> None:
    """(p'−p)/(log p'−log p) for p from 1 to e^−90, from equal to far apart; never above the arithmetic mean."""
    logs = torch.tensor([0.0, -1e-7, -1e-3, -0.5, -1.0, -5.0, -40.0, -90.0], dtype=dtype)
    a, b = (t.flatten() for t in torch.meshgrid(logs, logs, indexing="ij"))
    found = logarithmic_mean(a, b).double()
    want = []
    for x, y in zip(a.tolist(), b.tolist(), strict=True):
        x, y = mpf(x), mpf(y)
        want.append(float(mpmath.exp(x) if x == y else (mpmath.exp(y) - mpmath.exp(x)) / (y - x)))
    rtol = 1e-13 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=rtol, atol=1e-45)
    assert torch.equal(logarithmic_mean(a, b), logarithmic_mean(b, a))


def test_logarithmic_mean_of_nothing_is_nothing() -> None:
    """p = 0 at one end or at both (masked scores): the mean is 0, not NaN."""
    never = torch.tensor([-torch.inf, -torch.inf, -1.0])
    found = logarithmic_mean(never, torch.tensor([-torch.inf, -1.0, -torch.inf]))
    torch.testing.assert_close(found, torch.zeros(3))


def test_derivative() -> None:
    at = torch.linspace(-2, 2, 7, dtype=torch.float64)
    torch.testing.assert_close(derivative(torch.tanh, at), 1 - at.tanh() ** 2)
    assert not derivative(torch.tanh, at).requires_grad


def test_rank_one_residual() -> None:
    found = rank_one_residual(torch.tensor([2.0, 3.0, 0.0]), torch.tensor([4.0, 0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.5, 0.0, 0.0]))
