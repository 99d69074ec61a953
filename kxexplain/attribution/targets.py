"""What to explain about a prediction: from the model's outputs to one number a query, or to all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kxexplain.errors import TargetError
from kxexplain.gradients.two_point import TwoPoint
from kxexplain.trajectory.losses import LOSSES, LossFunction, check_losses

TargetSpec = int | str | Callable[[Tensor], Tensor]
NAMES = ("predicted", "label", "margin", "loss", "all")
UNFIT = (IndexError, RuntimeError, TypeError, ValueError)
"""What torch raises where shapes, types or class numbers do not fit."""


@dataclass(frozen=True)
class ResolvedTarget:
    """A target made definite for a batch of queries.

    Attributes:
        name: as it was asked for.
        select: (outputs [n, C], rows) → [n, c]: the quantities, for the queries at ``rows``.
        output: the output number concerned per query, [q], where there is one.
        components: c, or ``None`` for a scalar target.
    """

    name: str
    select: Callable[[Tensor, Tensor | slice], Tensor]
    output: Tensor | None
    components: int | None


def resolve_target(
    target: TargetSpec,
    outputs: Tensor,
    labels: Tensor | None,
    loss: LossFunction | None,
    shape: Sequence[int] | None = None,
) -> ResolvedTarget:
    """Check a target against the queries' final outputs and make it definite.

    Args:
        target: an output's number; ``"predicted"`` (the output that is largest at the end of training),
            ``"label"``, ``"margin"`` (the label's output, or the predicted one where no labels are given, less
            the largest other one), ``"loss"``, ``"all"``, or a function from outputs [n, C] to [n].
        outputs: the trained model's outputs, [q, C].
        labels: the queries' targets, [q], if known.
        loss: the per-example loss of training.
        shape: one example's outputs as the model gives them and the loss of training saw them; (C,) if ``None``.

    Raises:
        TargetError: unknown name, output out of range, labels that are needed and missing or do not fit, or a
            function that returns another shape.
    """
    if callable(target):
        return _function(target, outputs)
    if isinstance(target, bool) or not isinstance(target, (int, str)):
        raise TargetError(f"got target {target!r}; expected an output number, a function, or one of {NAMES}")
    if isinstance(target, int):
        columns = outputs.shape[1]
        if not -columns <= target < columns:
            raise TargetError(f"output {target} was asked for, but the model has {columns} (0 to {columns - 1})")
        return _column(str(target), torch.full((len(outputs),), target % columns, device=outputs.device))
    if target == "all":
        return ResolvedTarget("all", lambda values, rows: values, None, outputs.shape[1])
    if target == "predicted":
        return _column("predicted", outputs.argmax(1))
    if target == "label":
        return _column("label", _classes(labels, outputs, target))
    if target == "margin":
        own = outputs.argmax(1) if labels is None else _classes(labels, outputs, target)
        return _margin(outputs, own)
    if target == "loss":
        return _loss(outputs, labels, loss, outputs.shape[1:] if shape is None else shape)
    raise TargetError(f"got target {target!r}; expected an output number, a function, or one of {NAMES}")


def _column(name: str, column: Tensor) -> ResolvedTarget:
    def select(values: Tensor, rows: Tensor | slice) -> Tensor:
        return values.gather(1, column[rows, None])

    return ResolvedTarget(name, select, column, None)


def _margin(outputs: Tensor, own: Tensor) -> ResolvedTarget:
    if outputs.shape[1] < 2:
        raise TargetError("a margin needs at least two outputs; use target=0")
    rival = outputs.scatter(1, own[:, None], float("-inf")).argmax(1)

    def select(values: Tensor, rows: Tensor | slice) -> Tensor:
        return values.gather(1, own[rows, None]) - values.gather(1, rival[rows, None])

    return ResolvedTarget("margin", select, own, None)


def _loss(outputs: Tensor, labels: Tensor | None, loss: LossFunction | None, shape: Sequence[int]) -> ResolvedTarget:
    if labels is None or loss is None:
        raise TargetError('target "loss" needs labels; give the queries as a dataset of (input, target)')
    known, place = labels, torch.device("cpu") if loss in LOSSES.values() else outputs.device
    try:
        with torch.no_grad():  # not on a GPU if that can be avoided: a class that does not exist would break it
            check_losses(loss(outputs.reshape(-1, *shape).to(place), labels.to(place)), len(outputs))
    except UNFIT as error:
        raise TargetError(
            f"the queries' labels, {labels.dtype} of shape {tuple(labels.shape)}, do not fit the loss of training on "
            f"outputs of shape {tuple(outputs.shape)}: {error}; give labels like the training examples'"
        ) from error

    def select(values: Tensor, rows: Tensor | slice) -> Tensor:
        assert loss is not None
        losses = loss(values if len(shape) == 1 else values.reshape(-1, *shape), known[rows])
        return losses.column() if isinstance(losses, TwoPoint) and losses.start.dim() == 1 else losses.reshape(-1, 1)

    return ResolvedTarget("loss", select, None, None)


def _function(function: Callable[[Tensor], Tensor], outputs: Tensor) -> ResolvedTarget:
    found, alone = (_called(function, rows) for rows in (outputs, outputs[:1]))
    if not isinstance(found, Tensor) or found.shape != (len(outputs),):
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise TargetError(f"the target function returned {got}; expected a tensor of shape ({len(outputs)},)")
    if not isinstance(alone, Tensor) or not torch.allclose(found[:1], alone, rtol=1e-3, atol=1e-6, equal_nan=True):
        raise TargetError(
            "the target function gives the first row another value alone than among the others; expected a function "
            "that takes every row of the outputs for itself, so that it can be called on some of them"
        )

    def select(values: Tensor, rows: Tensor | slice) -> Tensor:
        result = function(values)
        return result[:, None] if isinstance(result, (Tensor, TwoPoint)) else result

    return ResolvedTarget(getattr(function, "__name__", "function"), select, None, None)


def _called(function: Callable[[Tensor], Any], outputs: Tensor) -> Any:
    try:
        return function(outputs)
    except Exception as error:  # whatever the caller's own code raises
        raise TargetError(
            f"the target function failed on outputs of shape {tuple(outputs.shape)}: {error!r}; expected a function "
            "from outputs [n, C], whatever n, to one number per row"
        ) from error


def _classes(labels: Tensor | None, outputs: Tensor, target: str) -> Tensor:
    if labels is None:
        raise TargetError(f'target "{target}" needs labels; give the queries as a dataset of (input, target)')
    if labels.is_floating_point() or labels.dim() != 1:
        raise TargetError(f'target "{target}" needs class numbers; these labels are {labels.dtype}, {labels.dim()}-D')
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= outputs.shape[1]):
        raise TargetError(
            f"labels reach from {int(labels.min())} to {int(labels.max())}, outputs are {outputs.shape[1]}"
        )
    return labels.to(outputs.device)
