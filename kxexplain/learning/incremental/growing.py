"""More outputs for a model that has learnt already."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kxexplain.learning.incremental.held import Batch
from kxexplain.learning.incremental.intake import grown_features, padded
from kxexplain.learning.incremental.rules import Learnt
from kxexplain.shapes import Inputs

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel


def grow(learner: IncrementalModel, extra: int, bias: float, inputs: Inputs) -> None:
    """Add outputs that begin at a constant; what was learnt stays, and the examples held are differentiated anew.

    A new output depends on its own row of the last layer only, while that row is zero: outputs that were there before
    keep their gradients, and their kernel.

    Raises:
        ModelError: the model does not end in a linear layer.
    """
    features = grown_features(learner.features, extra, bias, inputs, learner.parameters_taken)
    rows, protected, learnt = learner.held.rows, learner.held.protected, learner.engine.learnt()
    origin, growth, numbers = learner.origin or learner.features.digest(), learner.growth, learner.numbers
    learner.start(features)
    learner.origin, learner.growth, learner.numbers = origin, [*growth, (extra, bias)], numbers
    a = None if learnt.a is None else torch.nn.functional.pad(learnt.a, (0, extra))
    vector = None if learnt.vector is None else padded(learnt.vector, features)
    resume(learner, [_widened(row, extra, bias) for row in rows], protected, replace(learnt, a=a, vector=vector))


def resume(learner: IncrementalModel, rows: list[Batch], protected: int, learnt: Learnt) -> None:
    """Hold these examples, whose gradients are taken anew, and go on from what was learnt."""
    learner.engine.frozen = learnt.vector if learner.rule != "gradient" else None
    for row in rows:
        learner.held.add(learner.batch(row.ids, row.inputs, row.targets))
    learner.held.protected = protected
    learner.engine.restore(learnt)


def _widened(row: Batch, extra: int, bias: float) -> Batch:
    """Targets that are numbers say nothing about the new outputs: they are to stay."""
    targets: Tensor | None = row.targets
    if targets is not None and targets.is_floating_point():
        targets = torch.nn.functional.pad(targets, (0, extra), value=bias)
    return replace(row, targets=targets)
