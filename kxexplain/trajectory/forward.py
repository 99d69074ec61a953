"""What training and replay must do in the same way, to the last bit: one step's computation."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from kxexplain.errors import ModelError
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import call
from kxexplain.trajectory.losses import LossFunction, check_losses
from kxexplain.trajectory.objective import Objective, input_penalty, square

Reduction = Literal["mean", "sum"]


PLAIN = Objective()
"""The loss alone."""


class Forward(NamedTuple):
    """A batch's outputs, losses ``(n,)`` with what is added to each, their mean or sum, and the same without."""

    outputs: Tensor
    losses: Tensor
    total: Tensor
    plain: Tensor


class Descent(NamedTuple):
    """The gradients of one step.

    Attributes:
        found: of the whole objective: what the optimiser is given, before clipping.
        examples: of ``total``, which is a sum over the examples.
        penalty: of the penalty on these gradients; ``None`` where there is none.
        edges: of ``total``, at the edges asked for.
        value: the whole objective.
    """

    found: list[Tensor | None]
    examples: list[Tensor | None]
    penalty: list[Tensor | None]
    edges: list[Tensor | None]
    value: Tensor


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that shares nothing with it; ``ModelError`` if it cannot be copied.

    What a module has kept of an earlier call (a weight computed by a hook, say) is copied without its graph.
    """
    if torch.is_inference_mode_enabled():
        raise ModelError(
            "called inside torch.inference_mode(), where no gradient can be taken; leave that block (torch.no_grad() "
            "is no obstacle)"
        )
    kept = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    try:
        private = copy.deepcopy(model, kept)
    except (RuntimeError, TypeError) as error:
        raise ModelError(
            f"the model cannot be copied ({error}); build it afresh instead of passing one that has just been called, "
            "and without attributes that copy.deepcopy refuses"
        ) from error
    private.zero_grad(set_to_none=True)
    return private


def forward(
    model: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    loss: LossFunction,
    reduction: Reduction | None,
    objective: Objective = PLAIN,
    around: AbstractContextManager[None] | None = None,
) -> Forward:
    """Run the model (inside ``around``), then the loss, then reduce, if asked for."""
    inputs = objective.tracked(inputs)
    with around or nullcontext():
        outputs = call(model, inputs)
    losses = losses_of(outputs, targets, loss)
    total = plain = reduced(losses, reduction)
    if objective.input_penalty:
        losses = losses + objective.input_penalty * input_penalty(outputs, inputs)
        total = reduced(losses, reduction)
    return Forward(outputs, losses, total, plain)


def losses_of(outputs: Tensor, targets: Tensor, loss: LossFunction) -> Tensor:
    """One loss per example."""
    losses = loss(outputs, targets)
    check_losses(losses, targets.shape[0])
    return losses


def reduced(losses: Tensor, reduction: Reduction | None) -> Tensor:
    """The mean or the sum of a batch's losses, or these as they are."""
    if reduction is None:
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


class Shares:
    """Every example's weight in the reduced loss, [n], made once for batches of one size.

    The gradient of Σ weights · losses is that of the reduced loss, to the last bit.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction
        self._weights = torch.empty(0)

    def of(self, losses: Tensor) -> Tensor:
        """The weights of these examples."""
        if (
            self._weights.shape != losses.shape
            or self._weights.dtype != losses.dtype
            or self._weights.device != losses.device
        ):
            ones = torch.ones_like(losses)
            self._weights = ones / len(losses) if self.reduction == "mean" else ones
        return self._weights


def descend(
    total: Tensor,
    parameters: Sequence[Tensor],
    objective: Objective = PLAIN,
    edges: Sequence[GradientEdge] = (),
    weights: Tensor | None = None,
) -> Descent:
    """Gradients of an objective made of ``total``, with respect to the parameters, and of ``total`` at the edges.

    ``weights`` are for the loss alone: ``total`` is then the losses, and what counts is Σ weights · total.
    """
    if not objective.parameter_penalty:
        found, at_edges = gradients(total, parameters, edges, weights=weights)
        return Descent(found, found, [None] * len(found), at_edges, total)
    found, at_edges = gradients(total, parameters, edges, twice=True)
    penalty = objective.parameter_penalty * square(found)
    extra: list[Tensor | None] = [None] * len(found)
    if penalty.requires_grad:  # not for losses that are linear in the parameters
        extra = list(torch.autograd.grad(penalty, list(parameters), allow_unused=True))
    examples, at_edges = ([g if g is None else g.detach() for g in part] for part in (found, at_edges))
    both = [g if p is None or g is None else g + p for g, p in zip(examples, extra, strict=True)]
    return Descent(both, examples, extra, at_edges, (total + penalty).detach())


def gradients(
    total: Tensor,
    parameters: Sequence[Tensor],
    edges: Sequence[GradientEdge] = (),
    *,
    twice: bool = False,
    weights: Tensor | None = None,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``total`` at the parameters and at the edges; ``None`` where it has none.

    With ``twice`` they can be differentiated again. With ``weights``, ``total`` may be several numbers: the gradients
    are those of Σ weights · total.
    """
    if not total.requires_grad:
        raise ModelError(
            "the loss does not depend on any trainable parameter; check requires_grad, and that "
            "neither the model nor the loss detaches its outputs"
        )
    if not edges:
        return list(torch.autograd.grad(total, parameters, weights, allow_unused=True, create_graph=twice)), []
    wanted: list[Any] = [*parameters, *edges]  # torch takes both together, its annotation does not
    found = torch.autograd.grad(total, wanted, weights, allow_unused=True, create_graph=twice)
    return list(found[: len(parameters)]), list(found[len(parameters) :])


def assign(parameters: Iterable[nn.Parameter], values: Iterable[Tensor | None]) -> None:
    """Put gradients where an optimiser looks for them."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value
