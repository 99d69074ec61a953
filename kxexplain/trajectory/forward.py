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

Reduction = Literal["mean", "sum"]


class Forward(NamedTuple):
    """A batch's outputs, losses ``(n,)`` and their mean or sum."""

    outputs: Tensor
    losses: Tensor
    total: Tensor


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
    reduction: Reduction,
    around: AbstractContextManager[None] | None = None,
) -> Forward:
    """Run the model (inside ``around``), then the loss, then reduce."""
    with around or nullcontext():
        outputs = call(model, inputs)
    losses = loss(outputs, targets)
    check_losses(losses, targets.shape[0])
    return Forward(outputs, losses, losses.mean() if reduction == "mean" else losses.sum())


def gradients(
    total: Tensor, parameters: Sequence[Tensor], edges: Sequence[GradientEdge] = ()
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of ``total`` at the parameters and at the edges; ``None`` where it has none."""
    if not total.requires_grad:
        raise ModelError(
            "the loss does not depend on any trainable parameter; check requires_grad, and that "
            "neither the model nor the loss detaches its outputs"
        )
    wanted: list[Any] = [*parameters, *edges]  # torch takes both together, its annotation does not
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return list(found[: len(parameters)]), list(found[len(parameters) :])


def assign(parameters: Iterable[nn.Parameter], values: Iterable[Tensor | None]) -> None:
    """Put gradients where an optimiser looks for them."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.grad = value
