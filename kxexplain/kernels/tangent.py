r"""The tangent kernel K_θ(x, x') = ⟨∇_θ f(x), ∇_θ f(x')⟩ of a model as it stands (Jacot et al. 2018)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.gradients.capture import Layout
from kxexplain.gradients.factors import Factors, concatenate, signature
from kxexplain.gradients.ordinary import layout_of, output_gradients, trainable
from kxexplain.gradients.products import gram, gram_trace, squared_norm
from kxexplain.shapes import Inputs
from kxexplain.trajectory.batches import count, take
from kxexplain.trajectory.forward import private_copy

Outputs = Literal["trace", "full"] | int


class TangentKernel:
    """Computes tangent kernels of one model; a private copy is used, in evaluation mode.

    Args:
        model: any module with trainable parameters.
        inputs: some inputs (one is enough), to measure where the model keeps its examples.
        outputs: ``"trace"`` sums over outputs, ``"full"`` gives C × C blocks, a number takes one output.
        batch: examples differentiated at once.

    Raises:
        ModelError: no trainable parameter.
        ArgumentError: an unknown value of ``outputs``.
    """

    def __init__(self, model: nn.Module, inputs: Inputs, outputs: Outputs = "trace", batch: int = 256) -> None:
        self.model = private_copy(model).eval()
        if not trainable(self.model):
            raise ModelError("the model has no trainable parameters: its tangent kernel is empty")
        if outputs not in ("trace", "full") and (isinstance(outputs, bool) or not isinstance(outputs, int)):
            raise ArgumentError(f'got outputs={outputs!r}; expected "trace", "full" or an output number')
        self.outputs, self.batch = outputs, batch
        self.layout: Layout = layout_of(self.model, inputs, trainable(self.model))

    def gradients(self, inputs: Inputs) -> Factors:
        """Per-example output gradients of a batch, in factored form."""
        pieces = []
        for at in range(0, count(inputs), self.batch):
            part = take(inputs, slice(at, at + self.batch))
            pieces.append(output_gradients(self.model, part, self.layout, self._select())[1])
        if len({signature(piece) for piece in pieces}) > 1:
            pieces = [[d for f in piece for d in f.dense()] for piece in pieces]
        return concatenate(pieces)

    def _select(self) -> Any:
        number = self.outputs
        if not isinstance(number, int):
            return None

        def column(values: Tensor) -> Tensor:
            if not -values.shape[1] <= number < values.shape[1]:
                raise ArgumentError(f"output {number} was asked for, but the model has {values.shape[1]}")
            return values[:, [number]]

        return column

    def between(self, left: Factors, right: Factors) -> Tensor:
        """The kernel between two sets of gradients."""
        if self.outputs == "full":
            return gram(left, right).transpose(1, 2)
        return gram_trace(left, right)

    def diagonal(self, inputs: Inputs) -> Tensor:
        """K(x, x), [n], without the matrix; outputs summed."""
        return squared_norm(self.gradients(inputs)).sum(1)


def require_inputs(*batches: Inputs | None) -> None:
    """``DatasetError`` if one of the batches that are given is empty."""
    if any(batch is not None and count(batch) == 0 for batch in batches):
        raise DatasetError("there are no inputs; give at least one")


def tangent_kernel(
    model: nn.Module, x1: Inputs, x2: Inputs | None = None, outputs: Outputs = "trace", *, batch: int = 256
) -> Tensor:
    r"""Gram matrix of the tangent kernel, K(x, x') = ⟨∇_θ f(x), ∇_θ f(x')⟩.

    Args:
        model: any ``nn.Module``; not changed. Evaluated in evaluation mode.
        x1: n inputs, a tensor, tuple or dict of tensors.
        x2: m inputs; ``x1`` itself if ``None``.
        outputs: ``"trace"`` for Σ_c ⟨∇f_c(x), ∇f_c(x')⟩, ``"full"`` for all pairs of outputs, or one output's number.
        batch: examples differentiated at once (memory, not result).

    Returns:
        [n, m], or for ``"full"`` [n, m, C, C].

    Raises:
        ModelError: no trainable parameter.
        DatasetError: no inputs.
        ArgumentError: an unknown value of ``outputs``.

    Source: Jacot, Gabriel & Hongler 2018, arXiv 1806.07572.

    >>> import torch
    >>> model = torch.nn.Linear(2, 1)
    >>> tangent_kernel(model, torch.tensor([[1.0, 2.0], [3.0, 0.0]]))  # x·x' + 1
    tensor([[ 6.,  4.],
            [ 4., 10.]])
    """
    require_inputs(x1, x2)
    kernel = TangentKernel(model, x1, outputs, batch)
    with torch.random.fork_rng(devices=[]):
        left = kernel.gradients(x1)
        right = left if x2 is None else kernel.gradients(x2)
        return kernel.between(left, right)
