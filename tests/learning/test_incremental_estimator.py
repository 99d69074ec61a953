"""The scikit-learn estimator: its protocol, and agreement with the model it wraps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import estimator_checks_generator
from torch import nn

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError

QUICK = (
    "check_estimators_partial_fit_n_features", "check_estimators_nan_inf", "check_estimators_pickle",
    "check_classifiers_classes", "check_n_features_in_after_fitting", "check_no_attributes_set_in_init",
)  # fmt: skip
"""scikit-learn's checks that every run takes; the others are slow ones."""

CHECKS = [
    pytest.param(check, id=name, marks=() if name in QUICK else pytest.mark.slow)
    for _, check in estimator_checks_generator(kx.IncrementalClassifier(damping=1.0, hidden=(16,)))
    for name in [getattr(check, "func", check).__name__]
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("check", CHECKS)
def test_scikit_learns_own_checks(check: Any) -> None:
    check(kx.IncrementalClassifier(damping=1.0, hidden=(16,)))


def test_it_is_the_incremental_model() -> None:
    x, y = load_iris(return_X_y=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    classifier, learner = kx.IncrementalClassifier(model, damping=0.5), kx.IncrementalModel(model, damping=0.5)
    for part in range(3):
        classifier.partial_fit(x[part:60:3], y[part:60:3])
        learner.learn(torch.from_numpy(x[part:60:3]), torch.from_numpy(y[part:60:3]))
    np.testing.assert_allclose(classifier.decision_function(x), learner(torch.from_numpy(x)).numpy(), rtol=1e-9)
    assert classifier.predict(x).tolist() == learner.predict(torch.from_numpy(x)).tolist()
    np.testing.assert_allclose(classifier.predict_proba(x).sum(1), 1)


def test_labels_of_any_kind_and_new_ones() -> None:
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    classifier = kx.IncrementalClassifier(damping=0.5)
    classifier.partial_fit(x[:100:2], names[:100:2])
    assert classifier.classes_.tolist() == ["setosa", "versicolor"]
    classifier.partial_fit(x[1::2], names[1::2])
    assert classifier.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    assert classifier.score(x, names) > 0.9
    pipeline = make_pipeline(StandardScaler(), clone(classifier))
    assert pipeline.fit(x, names).score(x, names) > 0.95


def test_wrong_classes() -> None:
    x, y = load_iris(return_X_y=True)
    with pytest.raises(ArgumentError, match="2 classes for a model of 3 outputs"):
        kx.IncrementalClassifier(nn.Linear(4, 3)).partial_fit(x, y, classes=[0, 1])
    with pytest.raises(DatasetError, match="one class"):
        kx.IncrementalClassifier().partial_fit(x[:5], y[:5])
    classifier = kx.IncrementalClassifier(damping=1.0).partial_fit(x, y)
    with pytest.raises(ArgumentError, match="other classes"):
        classifier.partial_fit(x, y, classes=[5, 6])
