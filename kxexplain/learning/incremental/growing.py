"""What changes a model that has learnt already: more outputs, a memory, another device or precision."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.encoding import checked_labels
from kxexplain.learning.incremental.held import Batch, Identity
from kxexplain.learning.incremental.intake import grown_features, padded
from kxexplain.learning.incremental.ridge import RidgeRule
from kxexplain.learning.incremental.rules import Learnt
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import fetch, mapped

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel


def grow(learner: IncrementalModel, extra: int, inputs: Inputs) -> None:
    """Add outputs that begin at a constant; what was learnt stays, and the examples held are differentiated anew.

    The constant is as low as the lowest outputs of the inputs that bring the new classes.

    A new output depends on its own row of the last layer only, while that row is zero: outputs that were there before
    keep their gradients, and their kernel.

    Raises:
        ModelError: the model does not end in a linear layer.
        ArgumentError: a system with examples that are no longer held.
    """
    if isinstance(learner.engine, RidgeRule) and learner.engine.released:
        raise ArgumentError(
            "classes cannot be added once more examples were learnt than are held (remember="
            f"{learner.settings.remember}); go on from merge().model, or with a larger remember="
        )
    bias = float(learner.features.outputs(inputs).min(1).values.mean())
    features = grown_features(learner.features, extra, bias, inputs, learner.settings.parameters)
    rows, protected, learnt = learner.held.rows, learner.held.protected, learner.engine.learnt()
    origin, growth, numbers = learner.origin or learner.features.digest(), learner.growth, learner.numbers
    learner.start(features)
    learner.origin, learner.growth, learner.numbers = origin, [*growth, (extra, bias)], numbers
    a = None if learnt.a is None else torch.nn.functional.pad(learnt.a, (0, extra))
    vector = None if learnt.vector is None else padded(learnt.vector, features)
    resume(learner, [_widened(row, extra, bias) for row in rows], protected, replace(learnt, a=a, vector=vector))


def resume(learner: IncrementalModel, rows: list[Batch], protected: int, learnt: Learnt) -> None:
    """Hold these examples, whose gradients are taken anew, and go on from what was learnt."""
    learner.engine.frozen = learnt.vector if learner.settings.rule != "gradient" else None
    for row in rows:
        learner.held.add(learner.batch(row.ids, row.inputs, row.targets))
    learner.held.protected = protected
    learner.engine.restore(learnt)


def protect(learner: IncrementalModel, memory: Any) -> None:
    """Hold past examples for good, before anything is learnt.

    Raises:
        ArgumentError: neither a batch nor a dataset.
        DatasetError: inputs or targets that do not fit the model.
    """
    plain = isinstance(memory, (Tensor, dict))
    if not plain and not hasattr(memory, "__len__"):
        raise ArgumentError(f"got memory={memory!r}; expected a batch of inputs, or a dataset of (input, target)")
    device = learner.features.like.device
    inputs, targets = (memory, None) if plain else fetch(memory, range(len(memory)), device)
    outputs = learner.features.checked(inputs)
    if targets is not None:
        targets = checked_labels(targets, len(outputs), outputs.shape[1], grow=False)
    names: list[Identity] = [f"memory {i}" for i in range(len(outputs))]
    learner.held.add(learner.batch(names, inputs, targets))
    learner.held.protected = len(learner.held)
    learner.engine.rebuild()


def moved(learner: IncrementalModel, change: Callable[[Tensor], Tensor]) -> None:
    """Follow the model's weights to another device or precision: gradients are taken anew, what was learnt stays."""
    rows, protected, learnt = learner.held.rows, learner.held.protected, learner.engine.learnt()
    like, numbers, kept = learner.features.like, learner.numbers, (learner.growth, learner.origin, learner.regression)
    tensors = {name: t.to(like) for name, t in learnt.system.items()}
    vector = None if learnt.vector is None else {name: t.to(like) for name, t in learnt.vector.items()}
    learnt = replace(learnt, a=None if learnt.a is None else learnt.a.to(like), vector=vector, system=tensors)
    learner.start(learner.features)
    learner.numbers, (learner.growth, learner.origin, learner.regression) = numbers, kept
    resume(learner, [_changed(row, change) for row in rows], protected, learnt)


def _changed(row: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    targets = None if row.targets is None else change(row.targets)
    return replace(row, inputs=mapped(row.inputs, change), targets=targets)


def _widened(row: Batch, extra: int, bias: float) -> Batch:
    """Targets that are numbers say nothing about the new outputs: they are to stay."""
    targets: Tensor | None = row.targets
    if targets is not None and targets.is_floating_point():
        targets = torch.nn.functional.pad(targets, (0, extra), value=bias)
    return replace(row, targets=targets)
