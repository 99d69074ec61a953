"""Losses per example, by name or as the caller's own function.

A loss function maps (outputs, targets) to one number per example, shape ``(n,)``; how those are
reduced over the batch is recorded beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch.nn.functional as F
from torch import Tensor

from kxexplain.errors import ArgumentError

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(outputs, targets) -> one loss per example, shape ``(n,)``."""


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(outputs)[target]; targets are class numbers or probabilities per class.

    Outputs ``(n, C)``; further axes (positions) are averaged over.

    >>> import torch
    >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
    tensor([1.3863, 1.3863])
    """
    if outputs.dim() < 2 or outputs.shape[1] < 2:
        raise ArgumentError(
            f"cross_entropy needs outputs of shape (n, C) with C >= 2, got {tuple(outputs.shape)}; "
            "use loss='logistic' for one output"
        )
    targets = targets.to(outputs.dtype) if targets.is_floating_point() else targets.long()
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """(output − target)², averaged over an example's outputs.

    >>> import torch
    >>> mse(torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 4.0]))
    tensor([0., 4.])
    """
    squares = F.mse_loss(outputs, _like(targets, outputs), reduction="none")
    return squares if squares.dim() == 1 else squares.flatten(1).mean(1)


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """One output: max(0, 1 − y·f) with y = +1 for targets > 0, else −1.

    Several: the multi-class margin Σ_{c≠y} max(0, 1 − f_y + f_c) / C.

    >>> import torch
    >>> hinge(torch.tensor([0.25, 0.25]), torch.tensor([1, 0]))
    tensor([0.7500, 1.2500])
    """
    if _single(outputs):
        return F.relu(1 - _signs(targets, outputs) * _column(outputs))
    rows = targets.long().reshape(-1, 1)
    others = 1 - F.one_hot(rows[:, 0], outputs.shape[1]).to(outputs.dtype)
    margins = F.relu(1 - outputs.gather(1, rows) + outputs)
    return (margins * others).sum(1) / outputs.shape[1]


def logistic(outputs: Tensor, targets: Tensor) -> Tensor:
    """One output: log(1 + exp(−y·f)) with y = +1 for targets > 0, else −1.

    Several: one such term per output for multi-label targets in {0, 1}, summed.

    >>> import torch
    >>> logistic(torch.zeros(2, 1), torch.tensor([1, 0]))
    tensor([0.6931, 0.6931])
    """
    if _single(outputs):
        return F.softplus(-_signs(targets, outputs) * _column(outputs))
    terms = F.softplus(outputs) - _like(targets, outputs) * outputs
    return terms.flatten(1).sum(1)


LOSSES: dict[str, LossFunction] = {
    "cross_entropy": cross_entropy,
    "mse": mse,
    "hinge": hinge,
    "logistic": logistic,
}
"""The losses that have a name, and can therefore be found again from a manifest."""

OWN = "own:"
"""Begins the recorded name of a loss, or of an optimiser's class, that was the caller's own."""


def resolve(loss: str | LossFunction) -> tuple[str, LossFunction]:
    """The recorded name and the function of a loss; ``ArgumentError`` for an unknown name.

    >>> resolve("mse")[0], resolve(lambda outputs, targets: outputs[:, 0])[0]
    ('mse', 'own:<lambda>')
    """
    if callable(loss):
        names = [name for name, function in LOSSES.items() if function is loss]
        return (names or [OWN + getattr(loss, "__qualname__", type(loss).__qualname__)])[0], loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ArgumentError(
            f"unknown loss {loss!r}; expected one of {', '.join(LOSSES)}, or a function "
            "(outputs, targets) -> one loss per example"
        )
    return loss, LOSSES[loss]


def check_losses(losses: Tensor, n: int) -> None:
    """``ArgumentError`` unless ``losses`` is one number per example, shape ``(n,)``.

    >>> import torch
    >>> check_losses(torch.zeros(3), 3)
    """
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (n,):
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ArgumentError(
            f"the loss function returned {shape}, expected one loss per example, shape ({n},); "
            "use reduction='none' and average over an example's own axes"
        )


def _single(outputs: Tensor) -> bool:
    return outputs.dim() == 1 or (outputs.dim() == 2 and outputs.shape[1] == 1)


def _column(outputs: Tensor) -> Tensor:
    return outputs if outputs.dim() == 1 else outputs[:, 0]


def _signs(targets: Tensor, outputs: Tensor) -> Tensor:
    """+1 for targets > 0, else −1, shape ``(n,)``."""
    positive = (targets > 0).reshape(outputs.shape[0])
    return 2 * positive.to(outputs.dtype) - 1


def _like(targets: Tensor, outputs: Tensor) -> Tensor:
    """Targets in the outputs' dtype and shape; only axes of length one may be missing or extra."""
    wide = [size for size in targets.shape if size != 1]
    if wide != [size for size in outputs.shape if size != 1]:
        raise ArgumentError(
            f"targets of shape {tuple(targets.shape)} do not fit outputs of shape "
            f"{tuple(outputs.shape)}; give one target value per output"
        )
    return targets.to(outputs.dtype).reshape(outputs.shape)
