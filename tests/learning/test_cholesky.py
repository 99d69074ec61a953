"""Changes of a Cholesky factor against factors made anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.cholesky import bordered, downdated, factor, updated, without


def positive(p: int, seed: int = 0) -> Tensor:
    rows = torch.randn(p, 2 * p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return rows @ rows.T


@pytest.mark.parametrize("p", [1, 5, 64, 150])
@pytest.mark.parametrize("k", [1, 7])
def test_changes_equal_new_factors(p: int, k: int) -> None:
    a, v = positive(p), torch.randn(p, k, dtype=torch.float64)
    lower = torch.linalg.cholesky(a)
    more = torch.linalg.cholesky(a + v @ v.T)
    torch.testing.assert_close(updated(lower, v), more, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(downdated(more, v, 0.0), lower, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("gone", [slice(0, 3), slice(4, 6), slice(97, 100), slice(0, 100)])
def test_rows_left_out_and_added(gone: slice) -> None:
    a = positive(100)
    keep = [i for i in range(100) if i not in range(100)[gone]]
    lower = torch.linalg.cholesky(a)
    torch.testing.assert_close(without(lower, gone), torch.linalg.cholesky(a[keep][:, keep]), rtol=1e-10, atol=1e-10)
    part = torch.linalg.cholesky(a[:90, :90])
    torch.testing.assert_close(bordered(part, a[:90, 90:], a[90:, 90:], 0.0, "0"), lower, rtol=1e-10, atol=1e-10)


def test_many_changes_do_not_drift() -> None:
    a, lower = positive(20), torch.linalg.cholesky(positive(20))
    draw = torch.Generator().manual_seed(1)
    for _ in range(50):
        v = torch.randn(20, 2, dtype=torch.float64, generator=draw)
        lower = downdated(updated(lower, v), v, 0.0)
    torch.testing.assert_close(lower @ lower.T, a, rtol=1e-9, atol=1e-9)


def test_singular_systems_say_what_mends_them() -> None:
    twice = torch.ones(2, 2, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=r"damping=0 .* singular.*damping=.* mends it"):
        factor(twice, 1e-12, "0")
    with pytest.raises(ArgumentError, match="mends it"):
        bordered(torch.ones(1, 1).double(), torch.ones(1, 1).double(), torch.ones(1, 1).double(), 1e-12, "0")
    with pytest.raises(ArgumentError, match="was not put in"):
        downdated(torch.ones(1, 1), 2 * torch.ones(1, 1), 0.0)
