"""Hostile inputs, written down once: data that breaks careless arithmetic or bookkeeping."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

WIDTH, CLASSES = 6, 3


def _plain(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, WIDTH, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(CLASSES, (count,), generator=generator)


def duplicates() -> tuple[Tensor, Tensor]:
    """Every example three times."""
    inputs, targets = _plain(4)
    return inputs.repeat(3, 1), targets.repeat(3)


def zeros() -> tuple[Tensor, Tensor]:
    """Inputs of zero: no gradient in the first matrix."""
    inputs, targets = _plain(10)
    return inputs * 0, targets


def one_example() -> tuple[Tensor, Tensor]:
    """A data set of one."""
    return _plain(1)


def equal_targets() -> tuple[Tensor, Tensor]:
    """Nothing to tell apart."""
    inputs, targets = _plain(10)
    return inputs, targets * 0


def scaled(factor: float) -> Callable[[], tuple[Tensor, Tensor]]:
    """Inputs of another size."""

    def make() -> tuple[Tensor, Tensor]:
        inputs, targets = _plain(10)
        return inputs * factor, targets

    return make


def uneven() -> tuple[Tensor, Tensor]:
    """Features between 1e-6 and 1e3."""
    inputs, targets = _plain(10)
    return inputs * torch.logspace(-6, 3, WIDTH, dtype=inputs.dtype), targets


HOSTILE: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
    "duplicates": duplicates,
    "zeros": zeros,
    "one-example": one_example,
    "equal-targets": equal_targets,
    "tiny": scaled(1e-6),
    "small": scaled(1e-3),
    "large": scaled(30.0),
    "huge": scaled(1e3),
    "uneven": uneven,
}
"""Data by name; :func:`hostile` makes a data set of one of them."""


def hostile(name: str, dtype: torch.dtype) -> TensorDataset:
    """A hostile data set in the dtype asked for."""
    inputs, targets = HOSTILE[name]()
    return TensorDataset(inputs.to(dtype), targets)


SPLITS = {"one step": [4], "batches of one": [1], "last one short": [4], "whole": [64]}
"""Batch sizes by what is hostile about them."""
