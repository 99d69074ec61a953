"""Kernels between a batch and many centres, block by block: what training a kernel machine asks for again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import take as rows_of
from kxexplain.kernels.tangent import TangentKernel, require_accepted, require_inputs, tangent_kernel
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import count

Blocks = Callable[[Inputs], Tensor]
"""From b inputs to K(x, x_j) for all centres, [b, n]."""


def blocks_against(kernel: Any, centres: Inputs, memory: str | int = "1GB") -> Blocks:
    """A function from batches to their kernel with the centres.

    Args:
        kernel: a module, for its tangent kernel, or a function k(X, Y) giving [b, n] as a tensor or an array.
        centres: the n inputs on the other side.
        memory: of a module: where the centres' gradients fit into half of it they are held, else computed every time.

    >>> linear = lambda x, y: x @ y.T
    >>> blocks_against(linear, torch.eye(2))(torch.ones(1, 2))
    tensor([[1., 1.]])
    """
    if isinstance(kernel, nn.Module):
        return _TangentBlocks(kernel, centres, memory)
    if not callable(kernel):
        raise ArgumentError(f"got kernel={kernel!r}; expected a module or a function k(X, Y)")
    return lambda batch: _as_tensor(kernel(batch, centres), count(batch), count(centres))


def _as_tensor(found: Any, rows: int, columns: int) -> Tensor:
    values = torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    if not isinstance(values, Tensor) or tuple(values.shape) != (rows, columns):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(found).__name__
        raise ArgumentError(f"the kernel gave {shape} for {rows} × {columns} inputs; expected a matrix of that shape")
    return values


class _TangentBlocks:
    """A model's tangent kernel, traced over outputs; the centres' gradients are held where memory allows."""

    def __init__(self, model: nn.Module, centres: Inputs, memory: str | int) -> None:
        require_inputs(centres, None, diag=False)
        self._model, self._centres, self._memory = model, centres, memory
        with torch.random.fork_rng(devices=[]):
            self._kernel = TangentKernel(model, centres, memory=memory)
            held = count(centres) <= self._kernel.plan.panel
            self._held = self._kernel.gradients(centres) if held else None

    def __call__(self, batch: Inputs) -> Tensor:
        if self._held is None:
            return tangent_kernel(self._model, batch, self._centres, memory=self._memory)
        require_inputs(batch, None, diag=False)
        n, m = count(batch), count(self._centres)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            require_accepted(self._kernel.model, batch)
            left = self._kernel.gradients(batch)
            found = self._kernel.like.new_empty(n, m)
            for rows, columns in self._kernel.plan.tiles(slice(0, n), slice(0, m), lower=False):
                found[rows, columns] = self._kernel.between(rows_of(left, rows), rows_of(self._held, columns))
        return found


__all__ = ["Blocks", "blocks_against"]
