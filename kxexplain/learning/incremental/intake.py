"""From what a caller hands over to examples that a rule can take: names, goals, gradients, more outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.gradients import Outer
from kxexplain.learning.incremental.encoding import margin_outputs, one_hot, probabilities
from kxexplain.learning.incremental.features import TangentFeatures, grown
from kxexplain.learning.incremental.held import Batch, Identity
from kxexplain.shapes import Inputs, Tensors
from kxexplain.trajectory import Trajectory
from kxexplain.trajectory.forward import private_copy
from kxexplain.trajectory.states import load_model


def trained(model: Any, architecture: nn.Module | None) -> nn.Module:
    """The model as it was trained: itself, or a copy of the architecture with a trajectory's last state.

    Raises:
        ArgumentError: neither, or a trajectory without an architecture.
        ModelError: not the recorded architecture.
    """
    if isinstance(model, Trajectory):
        if architecture is None:
            raise ArgumentError("with a trajectory, give a model of its architecture: IncrementalModel(run, model)")
        model.check_model(architecture)
        private = private_copy(architecture)
        load_model(model.state(model.states[-1].step), private)
        return private
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"got a {type(model).__name__}; expected a torch.nn.Module or a Trajectory")
    if architecture is not None:
        raise ArgumentError("architecture is for a trajectory; leave it out with a model")
    return model


def named(ids: Iterable[Any] | None, n: int, held: Sequence[Identity], numbers: Iterator[int]) -> list[Identity]:
    """A name for each of n examples: those given, or the next numbers that are free.

    Raises:
        ArgumentError: another number of names, names of another type, or names that are taken.

    >>> named(None, 2, [1], iter(range(9)))
    [0, 2]
    """
    taken = set(held)
    if ids is None:
        fresh = (number for number in numbers if number not in taken)
        return [next(fresh) for _ in range(n)]
    given: list[Any] = list(ids) if isinstance(ids, Iterable) and not isinstance(ids, str) else [ids]
    names: list[Any] = [i.item() if isinstance(i, (Tensor, np.generic)) else i for i in given]
    if len(names) != n or any(isinstance(i, bool) or not isinstance(i, (int, str)) for i in names):
        raise ArgumentError(f"got ids {names[:5]!r} for {n} example(s); expected a whole number or a text for each")
    double = [name for name in names if name in taken]
    double += [name for at, name in enumerate(names) if name in set(names[:at])] if len(set(names)) < n else []
    if double:
        raise ArgumentError(f"id(s) {double[:5]!r} are taken already; forget them first, or give others")
    return names


def goal(rule: str, base: Tensor, targets: Tensor | None, margin: float) -> Tensor:
    """What a rule aims at, [m, C]: probabilities for the logistic rule, else outputs; without targets, as it is.

    Raises:
        DatasetError: numbers that are no probabilities, for the logistic rule.
    """
    if rule == "logistic":
        if targets is None:
            return probabilities(base)
        if not targets.is_floating_point():
            return one_hot(targets, base.shape[1], base)
        low, high = float(targets.min()), float(targets.max())
        sums = targets.sum(1) if base.shape[1] > 1 else targets.new_ones(1)
        if low < 0 or high > 1 or bool(((sums - 1).abs() > 1e-4).any()):
            raise DatasetError("the logistic rule takes class numbers, or probabilities that add up to 1 per example")
        return targets.to(base)
    if targets is None:
        return base
    return targets.to(base) if targets.is_floating_point() else margin_outputs(base, targets, margin)


def batch_of(
    features: TangentFeatures, names: list[Identity], inputs: Inputs, targets: Tensor | None,
    frozen: Tensors | None, *, rule: str, margin: float,
) -> Batch:  # fmt: skip
    """Examples with their output gradients, and what the rule needs to know of them.

    Raises:
        DatasetError: outputs or gradients that are not finite, or targets that the rule cannot take.
    """
    factors, base = features.factors(inputs), features.outputs(inputs).to(features.like)
    values = [base, *(t for f in factors for t in ((f.a, f.g) if isinstance(f, Outer) else (f.values,)))]
    if not all(bool(t.isfinite().all()) for t in values):
        raise DatasetError(
            "the model's outputs or their gradients hold NaN or infinite values at these inputs; leave out what it "
            "cannot be trusted with (inputs far from the training examples'?)"
        )
    shift = torch.zeros_like(base) if frozen is None else features.along(factors, frozen)
    return Batch(names, inputs, targets, factors, base, goal(rule, base, targets, margin), shift)


def grown_features(
    features: TangentFeatures, extra: int, bias: float, inputs: Inputs, parameters: Sequence[str] | None
) -> TangentFeatures:
    """The same model with more outputs, each a constant so far; checked on some inputs.

    Raises:
        ModelError: one output, or a model that does not end in a linear layer.
    """
    before = features.outputs(inputs)
    columns = before.shape[1]
    if columns == 1:
        raise ModelError("a model of one output tells two classes apart and cannot grow; give it two outputs")
    found = TangentFeatures(grown(features.model, columns, extra, bias), parameters)
    after = found.outputs(inputs)
    close = 10 * torch.finfo(before.dtype).eps ** 0.75 * float(before.abs().max() + 1)
    fits = after.shape[1] == columns + extra and float((after[:, :columns] - before).abs().max()) <= close
    if not fits or float((after[:, columns:] - bias).abs().max()) > close:
        raise ModelError(
            "the model's last linear layer does not give its outputs as they are, so none can be added to it; give it "
            "outputs to spare when it is built"
        )
    return found


def padded(vector: Tensors, features: TangentFeatures) -> Tensors:
    """A vector of a model with fewer outputs, with zeros for those that it lacks."""
    found = features.nothing()
    for name, value in vector.items():
        found[name][: len(value)] = value.view(value.shape)
    return found
