"""The estimators, held to the network they stand for; scikit-learn's own checks are in test_check_estimator.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from torch import nn

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.learning.estimators import PathKernelClassifier, PathKernelRegressor
from tests.laws import assert_complete

QUICK: dict[str, Any] = {"hidden": (8,), "epochs": 10, "learning_rate": 0.3, "batch_size": 16}


@pytest.mark.parametrize("classes", [2, 4])
def test_decisions_are_the_networks_logits(classes: int) -> None:
    x, y = kx.datasets.digits().train[:400]
    x, y = x[y < classes].numpy(), y[y < classes].numpy()
    found = PathKernelClassifier(epochs=5, weight_decay=1e-3, random_state=0).fit(x, y)
    decisions, logits = found.decision_function(x), found.network(x)
    assert decisions.dtype == np.float32
    assert decisions.shape == ((len(x),) if classes == 2 else (len(x), classes))
    np.testing.assert_allclose(decisions, logits[:, 0] if classes == 2 else logits, atol=1e-4)
    assert found.score(x, y) > 0.9
    probabilities = found.predict_proba(x)
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-5)
    assert (found.classes_[probabilities.argmax(1)] == found.predict(x)).all()
    assert_complete(found.explain(x[:3], target="all", kernel=False), 1e-5)


def test_regression_in_the_targets_own_units() -> None:
    x = np.random.default_rng(0).normal(size=(80, 3))
    y = 1000 + 50 * x[:, 0] + 20 * x[:, 1]
    found = PathKernelRegressor(random_state=0, epochs=15).fit(x, y)
    np.testing.assert_allclose(
        found.predict(x), found.target_shift_ + found.target_spread_ * found.network(x)[:, 0], rtol=1e-10
    )
    assert found.score(x, y) > 0.8


def test_a_copy_carries_its_training_with_it(tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(30, 2))
    y = x[:, 0] > 0
    found = PathKernelClassifier(**QUICK, random_state=0).fit(x, y)
    twin, said = copy.deepcopy(found), found.decision_function(x)
    assert twin.path_ != found.path_
    del found
    np.testing.assert_array_equal(twin.decision_function(x), said)
    kept = PathKernelClassifier(**QUICK, random_state=0, out=tmp_path / "run").fit(x, y)
    assert len(kx.Trajectory.open(tmp_path / "run")) == len(kept.trajectory_) == 20
    np.testing.assert_array_equal(copy.deepcopy(kept).decision_function(x), said)


def test_modules_of_ones_own_and_scikit_learns_tools() -> None:
    x = np.random.default_rng(0).normal(size=(40, 2))
    y = np.where(x[:, 0] * x[:, 1] > 0, "same", "different")
    make = lambda d, c: nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, c))  # noqa: E731
    found = PathKernelClassifier(module=make, epochs=3, random_state=0)
    assert isinstance(clone(found).fit(x, y).module_[1], nn.Tanh)
    assert len(cross_val_score(found, x, y, cv=2)) == 2


def test_errors() -> None:
    x = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(DatasetError, match="1 class"):
        PathKernelClassifier().fit(x, np.zeros(10))
    for wrong, message in (
        ({"hidden": (8, 0)}, r"hidden=\(8, 0\)"),
        ({"module": nn.Linear(2, 1)}, "expected a function"),
    ):
        with pytest.raises(ArgumentError, match=message):
            PathKernelRegressor(**wrong).fit(x, x[:, 0])
    with pytest.raises(DatasetError, match="Unknown label type"):
        PathKernelClassifier().fit(x, x[:, 0])
    with pytest.raises(DatasetError, match="contains NaN"):
        PathKernelRegressor().fit(x * np.nan, x[:, 0])
    with pytest.raises(DatasetError, match="could not convert"):
        PathKernelRegressor().fit(x, ["a"] * 10)
    with pytest.raises(ModelError, match="gave a int"):
        PathKernelRegressor(module=lambda d, c: 3).fit(x, x[:, 0])
    with pytest.raises(ArgumentError, match="learning_rate=-1"):
        PathKernelRegressor(learning_rate=-1).fit(x, x[:, 0])
    assert torch.is_grad_enabled()
