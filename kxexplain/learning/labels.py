"""Targets and outputs as class numbers."""

from __future__ import annotations

from torch import Tensor

from kxexplain.errors import DatasetError

SIGNED = ("hinge", "logistic")
"""Losses whose single output means a class by its sign."""


def class_numbers(targets: Tensor, outputs: Tensor, loss: str) -> Tensor:
    """Class numbers; of a single output, 1 for targets above 0 and else 0, as the losses take them.

    Raises:
        DatasetError: the targets are no classes, or reach beyond the outputs.

    >>> import torch
    >>> class_numbers(torch.tensor([-1.0, 1.0]), torch.zeros(2, 1), "hinge")
    tensor([0, 1])
    """
    single = outputs.shape[1] == 1
    if targets.dim() == 2 and targets.shape[1] == 1 and single:
        targets = targets[:, 0]
    if targets.dim() != 1 or (loss not in SIGNED if single else targets.is_floating_point()):
        raise DatasetError(
            f"targets of shape {tuple(targets.shape)} and {targets.dtype} with loss {loss!r} on {outputs.shape[1]} "
            "output(s) are no classes; an SVM is compared with a classifier: give class numbers"
        )
    if single:
        return (targets > 0).long()
    if int(targets.min()) < 0 or int(targets.max()) >= outputs.shape[1]:
        raise DatasetError(
            f"labels reach from {int(targets.min())} to {int(targets.max())}, outputs are {outputs.shape[1]}"
        )
    return targets.long()


def predicted_classes(outputs: Tensor) -> Tensor:
    """The largest output's number; of a single output, whether it is positive.

    >>> import torch
    >>> predicted_classes(torch.tensor([[0.5], [-1.0]]))
    tensor([1, 0])
    """
    return (outputs[:, 0] > 0).long() if outputs.shape[1] == 1 else outputs.argmax(1)


__all__ = ["SIGNED", "class_numbers", "predicted_classes"]
