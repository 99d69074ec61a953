"""Rows of numbers, as scikit-learn passes them, as inputs of a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError


def rows_for(model: nn.Module, rows: Any, shape: Sequence[int] | None = None) -> Tensor:
    """An array [n, d], or a tensor, in the model's dtype, on its device, each row in the given shape.

    Raises:
        DatasetError: no array of numbers with at least one row, or rows that do not fit the shape.

    >>> rows_for(nn.Conv2d(1, 1, 2), np.zeros((3, 4)), shape=(1, 2, 2)).shape
    torch.Size([3, 1, 2, 2])
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        values = rows if isinstance(rows, Tensor) else torch.from_numpy(np.require(rows, requirements=["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DatasetError(f"the inputs are no array of numbers ({error}); give one of shape (n, d)") from error
    if values.dim() < 2 or len(values) == 0:
        raise DatasetError(f"got inputs of shape {tuple(values.shape)}; expected (n, d) with at least one row")
    if shape is not None:
        if math.prod(shape) != values[0].numel():
            raise DatasetError(f"rows of shape {tuple(values.shape[1:])} do not fit shape={tuple(shape)}")
        values = values.reshape(len(values), *shape)
    return values.to(like.device, like.dtype)


def check_shape(shape: Any) -> None:
    """``ArgumentError`` unless ``shape`` is ``None`` or some positive whole numbers."""
    if shape is not None and not (
        isinstance(shape, (tuple, list)) and shape and all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise ArgumentError(f"got shape={shape!r}; expected the shape of one input such as (1, 28, 28), or None")
