"""Incremental learning for scikit-learn users: ``partial_fit`` and ``predict``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError
from kxexplain.learning.incremental.model import IncrementalModel


class IncrementalClassifier(ClassifierMixin, BaseEstimator):
    """A classifier that learns batch by batch, without retraining: :class:`IncrementalModel` with scikit-learn's calls.

    Args:
        model: a trained network from inputs [n, d] to outputs [n, C]; its k-th output stands for the k-th class. If
            ``None``, a network with random weights is made at the first call, and its tangent kernel learns alone.
        rule: as of :class:`IncrementalModel`, like the next five.
        damping: ρ; chosen by leaving one out if ``None`` (ridge).
        rate: of the gradient rule.
        margin: of the ridge rule.
        remember: how many examples are held at most.
        memory: past inputs whose outputs are to stay.
        hidden: widths of the network that is made if none is given.
        random_state: seed of its weights.

    Attributes:
        classes_: the labels, in the order of the outputs.
        learner_: the :class:`IncrementalModel` at work.
        n_features_in_: d.

    >>> from sklearn.datasets import load_iris
    >>> x, y = load_iris(return_X_y=True)
    >>> classifier = IncrementalClassifier(damping=1.0)
    >>> for part in range(5):
    ...     _ = classifier.partial_fit(x[part::5], y[part::5], classes=[0, 1, 2])
    >>> bool(classifier.score(x, y) > 0.9)
    True
    """

    classes_: np.ndarray

    def __init__(
        self,
        model: Any = None,  # nothing is checked before the first call: scikit-learn asks for that
        *,
        rule: Any = "ridge",
        damping: Any = None,
        rate: Any = 0.1,
        margin: Any = 4.0,
        remember: Any = 500,
        memory: Any = None,
        hidden: Any = (64,),
        random_state: Any = 0,
    ) -> None:
        self.model = model
        self.rule = rule
        self.damping = damping
        self.rate = rate
        self.margin = margin
        self.remember = remember
        self.memory = memory
        self.hidden = hidden
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> IncrementalClassifier:
        """Learn these examples alone: whatever was learnt before is dropped."""
        for name in ("learner_", "classes_", "n_features_in_", "feature_names_in_"):
            if hasattr(self, name):
                delattr(self, name)
        return self.partial_fit(X, y)

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> IncrementalClassifier:
        """Learn some more examples.

        Args:
            X: inputs [n, d].
            y: labels [n]; such as were not seen before gain an output of their own.
            classes: at the first call, the labels in the order of the model's outputs; by default the numbers 0 to
                C − 1 of a model that was given, or else the labels in ``y``.

        Raises:
            ArgumentError: another number of classes than the model has outputs, or other classes than before.
        """
        first = not hasattr(self, "learner_")
        X, y = validate_data(self, X, y, reset=first)
        check_classification_targets(y)
        if first:
            self._begin(X, y, classes)
        elif classes is not None and not set(np.asarray(classes).tolist()) <= set(self.classes_.tolist()):
            raise ArgumentError(f"got other classes than at the first call, which were {self.classes_.tolist()}")
        fresh = [label for label in np.unique(y) if label not in self.classes_]
        order = np.concatenate([self.classes_, fresh]) if fresh else self.classes_
        place = {label: k for k, label in enumerate(order.tolist())}
        labels = torch.tensor([place[label] for label in y.tolist()])
        self.learner_.learn(self._tensor(X), labels, new_classes=bool(fresh))
        self.classes_ = order
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Outputs [n, C]; for two classes f_1 − f_0, [n]."""
        outputs = self._outputs(X)
        if outputs.shape[1] == 2:
            outputs = outputs[:, 1] - outputs[:, 0]
        return np.asarray(outputs.cpu().numpy())

    def predict_proba(self, X: Any) -> np.ndarray:
        """Softmax of the outputs, [n, C]."""
        return np.asarray(self._outputs(X).softmax(1).cpu().numpy())

    def predict(self, X: Any) -> np.ndarray:
        """The label whose output is largest, [n]."""
        numbers = self._outputs(X).argmax(1).cpu().numpy()
        return np.asarray(self.classes_[numbers])

    def _begin(self, X: np.ndarray, y: np.ndarray, classes: Any) -> None:
        found = np.unique(y) if classes is None else np.asarray(classes)
        if self.model is None:
            if len(found) < 2:
                raise DatasetError(f"Classifier can't train when only one class is present: {found.tolist()}")
            model = _network([X.shape[1], *self.hidden, len(found)], self.random_state)
        else:
            model = self.model
        self.learner_ = IncrementalModel(
            model, rule=self.rule, damping=self.damping, rate=self.rate, margin=self.margin, remember=self.remember,
            memory=self.memory,
        )  # fmt: skip
        columns = self.learner_.features.outputs(self._tensor(X[:1])).shape[1]
        if self.model is not None and classes is None:
            found = np.arange(columns)
        if len(found) != columns:
            del self.learner_
            raise ArgumentError(f"got {len(found)} classes for a model of {columns} outputs; name one for each")
        self.classes_ = found

    def _outputs(self, X: Any) -> Tensor:
        check_is_fitted(self, "learner_")
        outputs: Tensor = self.learner_(self._tensor(validate_data(self, X, reset=False)))
        return outputs

    def _tensor(self, X: np.ndarray) -> Tensor:
        first = next(self.learner_.base.parameters())
        return torch.as_tensor(np.ascontiguousarray(X)).to(first)


def _network(sizes: list[int], seed: int) -> nn.Module:
    """A tanh network with random weights, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, after in pairwise(sizes):
            layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


__all__ = ["IncrementalClassifier"]
