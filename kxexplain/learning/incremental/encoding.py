r"""What the outputs ought to be: labels as outputs to aim at, as probabilities, and checks of both.

A classifier's outputs have no true values. For the ridge rule a label means: the nearest outputs at which it leads
every other one by a margin m, min ‖z − f‖² so that z_y − z_c ≥ m. An example that is right by so much asks for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kxexplain.errors import ArgumentError, DatasetError


def margin_outputs(outputs: Float[Tensor, "n c"], labels: Int[Tensor, " n"], margin: float) -> Float[Tensor, "n c"]:
    r"""The outputs nearest to the given ones at which the label leads by the margin.

    For several outputs the k largest rivals are lowered to t − m and the label raised to
    t = (f_y + Σ_k (f_(k) + m)) / (k + 1), with the k for which exactly those exceed t − m. A single output is moved to
    ±m/2 on the label's side, if it is not there.

    >>> margin_outputs(torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([1]), 1.0)
    tensor([[1., 2., 0.]])
    """
    if outputs.shape[1] == 1:
        sign = 2 * (labels[:, None] > 0).to(outputs.dtype) - 1
        return sign * (sign * outputs).clamp(min=margin / 2)
    own = outputs.gather(1, labels[:, None])
    rivals = outputs.scatter(1, labels[:, None], float("-inf")) + margin
    ranked = rivals.sort(1, descending=True).values[:, :-1]
    counts = torch.arange(1, ranked.shape[1] + 1, device=outputs.device)
    levels = (own + ranked.cumsum(1)) / (counts + 1)  # t if the k largest rivals are lowered
    needed = (ranked > torch.cat([own, levels[:, :-1]], 1)).sum(1, keepdim=True)
    level = torch.cat([own, levels], 1).gather(1, needed)
    return torch.minimum(outputs, level - margin).scatter(1, labels[:, None], level)


def probabilities(outputs: Tensor) -> Tensor:
    """Softmax of several outputs, the logistic function of one."""
    return outputs.sigmoid() if outputs.shape[1] == 1 else outputs.softmax(1)


def one_hot(labels: Int[Tensor, " n"], columns: int, like: Tensor) -> Tensor:
    """Labels as probabilities, [n, C]; of a single output, [n, 1]."""
    if columns == 1:
        return labels[:, None].to(like)
    return torch.nn.functional.one_hot(labels, columns).to(like)


def as_targets(targets: Any, like: Tensor) -> Tensor:
    """Targets as a tensor with an axis of examples; one number is that of one example.

    Raises:
        DatasetError: anything that is no array of numbers.

    >>> as_targets(2, torch.zeros(1, 3))
    tensor([2])
    """
    try:
        found = torch.as_tensor(targets, device=like.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DatasetError(
            f"got targets {targets!r} ({error}); expected class numbers, or numbers to aim at"
        ) from error
    return found[None] if found.dim() == 0 else found


def checked_labels(targets: Tensor, n: int, columns: int, *, grow: bool) -> Tensor:
    """Class numbers [n] (int64), or numbers [n, C] to aim at.

    Raises:
        DatasetError: another shape, values that are not finite, or classes that the model has no output for.
    """
    if targets.is_floating_point():
        shaped = targets[:, None] if targets.dim() == 1 else targets
        if shaped.shape != (n, columns):
            raise DatasetError(
                f"got targets of shape {tuple(targets.shape)} for {n} example(s) and {columns} output(s); expected "
                f"({n}, {columns}) numbers, or ({n},) class numbers as integers"
            )
        if not bool(shaped.isfinite().all()):
            raise DatasetError("the targets hold NaN or infinite values; clean them first")
        return shaped
    if targets.shape != (n,) or targets.dtype == torch.bool:
        raise DatasetError(
            f"got labels of shape {tuple(targets.shape)} and {targets.dtype} for {n} example(s); expected ({n},) "
            "class numbers"
        )
    classes = max(2, columns)
    low, high = int(targets.min()), int(targets.max())
    if low < 0 or (columns == 1 and high > 1):
        raise DatasetError(f"labels reach from {low} to {high}; expected class numbers from 0 to {classes - 1}")
    if high >= classes and not grow:
        raise DatasetError(
            f"label {high} is unknown: the model has {columns} outputs (0 to {columns - 1}); correct it, or let "
            "outputs be added with learn(..., new_classes=True)"
        )
    return targets.long()


def positive(value: float, name: str, *, zero: bool = False) -> float:
    """The number, if it is one that is finite and above zero.

    Raises:
        ArgumentError: it is not.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not (0 < value < float("inf") or (zero and value == 0)):
        raise ArgumentError(f"got {name}={value!r}; expected a {'number of at least 0' if zero else 'positive number'}")
    return float(value)
