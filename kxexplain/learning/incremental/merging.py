"""Folding what was learnt into the weights, and what that changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.features import TangentFeatures
from kxexplain.learning.incremental.predicting import classes
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import count
from kxexplain.trajectory.forward import private_copy

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel


@dataclass(frozen=True)
class Merged:
    """A network at θ + δ, beside the linearised model that δ was found for.

    Attributes:
        model: the network, an ordinary module.
        examples: how many inputs the two were compared on.
        largest: largest difference of an output.
        relative: 2-norm of the differences, relative to that of what was learnt, f_new − f; 0 for a linear model.
        agreement: share of the inputs for which both predict the same class (of one output: the same sign).
        distance: ‖δ‖ / ‖θ‖.
    """

    model: nn.Module
    examples: int
    largest: float
    relative: float
    agreement: float
    distance: float

    def __str__(self) -> str:
        return (
            f"merged: on {self.examples} inputs, outputs change by {self.largest:.2g} at most "
            f"({self.relative:.1%} of what was learnt), {self.agreement:.1%} of the predictions stay; "
            f"the weights moved by {self.distance:.2%}"
        )


def merge(learner: IncrementalModel, inputs: Inputs | None) -> Merged:
    """θ + δ, compared with f(x) + ⟨∇f(x), δ⟩ on some inputs."""
    if inputs is None and not len(learner.held):
        raise ArgumentError("there are no examples held to measure the change on; give inputs: merge(x)")
    places = [row.inputs for row in learner.held.rows] if inputs is None else [inputs]
    vector, own = learner.vector(), dict(learner.base.named_parameters())
    model = private_copy(learner.base).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True)
            if name in vector:
                parameter.add_(vector[name].to(parameter))
    new = TangentFeatures(model)
    before = torch.cat([learner.features.checked(x) for x in places])
    linear = torch.cat([learner(x).view(count(x), -1) for x in places])
    merged = torch.cat([new.outputs(x) for x in places])
    learnt, gap = (linear - before).norm(), (merged - linear).norm()
    moved = sum(float(v.square().sum()) for v in vector.values()) ** 0.5
    size = sum(float(own[name].detach().double().square().sum()) for name in vector) ** 0.5
    named = [classes(outputs) for outputs in (linear, merged)]
    return Merged(
        model=model,
        examples=len(merged),
        largest=float((merged - linear).abs().max()),
        relative=float(gap / learnt) if learnt > 0 else 0.0,
        agreement=float((named[0] == named[1]).double().mean()),
        distance=moved / size if size > 0 else float("inf"),
    )
