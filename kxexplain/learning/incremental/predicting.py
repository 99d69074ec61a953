"""What an incremental model predicts: in kernel form, or by one vector, whichever takes fewer numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.shapes import Inputs

if TYPE_CHECKING:
    from kxexplain.learning.incremental.model import IncrementalModel


def outputs(learner: IncrementalModel, inputs: Inputs) -> Float[Tensor, "n c"]:
    """F(x) + Σ_j K(x, x_j) a_j, or f(x) + ⟨∇f(x), δ⟩."""
    features = learner.features
    if learner.learnt and learner.form == "vector":
        return features.linearised(inputs, learner.vector())
    found = features.outputs(inputs)
    if not learner.learnt:
        return found
    gram = features.gram(features.factors(inputs), learner.held.factors())
    moved = (gram @ learner.engine.coefficients().flatten()).view(found.shape)
    return found + moved.to(found)


def contributions(learner: IncrementalModel, inputs: Inputs) -> Float[Tensor, "n m c"]:
    """K(x, x_j) a_j of every example held."""
    features = learner.features
    if not len(learner.held):
        return features.outputs(inputs)[:, None][:, :0]
    gram = features.gram(features.factors(inputs), learner.held.factors())
    a = learner.engine.coefficients()
    m, c = a.shape
    return torch.einsum("ncmk,mk->nmc", gram.view(-1, c, m, c), a)


def classes(outputs: Float[Tensor, "n c"]) -> Tensor:
    """Class numbers; of one output, its sign."""
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)
