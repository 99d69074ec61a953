"""Rows of numbers, as scikit-learn passes them, and datasets, as inputs of a model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import fetch


def rows_for(model: nn.Module, rows: Any, shape: Sequence[int] | None = None) -> Tensor:
    """An array [n, d], or a tensor, in the model's dtype, on its device, each row in the given shape.

    Raises:
        ModelError: no model.
        DatasetError: no array of numbers with at least one row, or rows that do not fit the shape.

    >>> rows_for(nn.Conv2d(1, 1, 2), np.zeros((3, 4)), shape=(1, 2, 2)).shape
    torch.Size([3, 1, 2, 2])
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"got {type(model).__name__} as the model; expected a torch.nn.Module")
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


def whole(dataset: Examples, name: str, device: torch.device | None) -> tuple[Inputs, Tensor]:
    """All inputs and targets of a dataset, the random state left as it was.

    Raises:
        DatasetError: it is empty or has no length; ``name`` says which one.

    >>> whole(torch.utils.data.TensorDataset(torch.ones(1, 2), torch.ones(1)), "training", None)
    (tensor([[1., 1.]]), tensor([1.]))
    """
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        raise DatasetError(f"the {name} set is empty or has no length; give at least one example")
    with torch.random.fork_rng(devices=[]):
        return fetch(dataset, range(len(dataset)), device)


def digest(tensors: Iterable[Tensor]) -> bytes:
    """A fingerprint of values, shapes and dtypes, in order.

    >>> digest([torch.zeros(2)]) == digest([torch.zeros(2)]), digest([torch.zeros(2)]) == digest([torch.zeros(1, 2)])
    (True, False)
    """
    made = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        made.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return made.digest()


__all__ = ["check_shape", "digest", "rows_for", "whole"]
