"""scikit-learn's whole list of checks, each of which must pass or stand in the table with the reason why it cannot."""

from __future__ import annotations

from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

import kxexplain as kx

QUICK: dict[str, Any] = {"hidden": (8,), "epochs": 10, "batch_size": 16}

CANNOT_APPLY = {
    "check_array_api_input": "runs only where SCIPY_ARRAY_API was set before scipy's first import",
}
"""Checks that scikit-learn leaves out by itself, and why; none fails."""


class AnyWidth(nn.Module):
    """A network for rows of any length, as the checks have them."""

    def __init__(self, weights: tuple[np.ndarray, ...] | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
        with torch.no_grad():
            for parameter, weight in zip(self.parameters(), weights or (), strict=False):
                parameter.copy_(torch.from_numpy(weight))

    def forward(self, rows: Tensor) -> Tensor:
        made: Tensor = self.layers(nn.functional.adaptive_avg_pool1d(rows, 4))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """By value: scikit-learn compares pickles, and torch's name the place in memory."""
        return AnyWidth, (tuple(parameter.detach().numpy().copy() for parameter in self.parameters()),)


def network() -> nn.Module:
    torch.manual_seed(0)
    return AnyWidth()


@pytest.mark.parametrize(
    "estimator",
    [
        pytest.param(kx.PathKernelClassifier(**QUICK, learning_rate=0.3), marks=pytest.mark.slow),
        pytest.param(kx.PathKernelRegressor(**QUICK), marks=pytest.mark.slow),
        kx.TangentFeatures(network(), dim=32),
    ],
    ids=lambda estimator: type(estimator).__name__,
)
def test_every_check_passes_but_for_those_that_cannot_apply(estimator: Any, monkeypatch: Any) -> None:
    # One check passes arguments of a wrong type to __init__, which the tests' own type checks would refuse.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    found = check_estimator(estimator, on_fail=None, on_skip=None)
    left = {one["check_name"]: (one["status"], one["exception"]) for one in found if one["status"] != "passed"}
    failed = {name: exception for name, (status, exception) in left.items() if status != "skipped"}
    assert failed == {}
    assert set(left) == set(CANNOT_APPLY)
    assert len(found) > 40
