"""The slow, obvious versions of what the library computes: loops, dense matrices, fine grids.

Nothing here shares code with the library but the calling conventions of models (``call``, ``outputs_2d``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kxexplain.trajectory.batches import call, count, fetch, outputs_2d, take
from kxexplain.trajectory.losses import resolve

Select = Callable[[Tensor], Tensor]


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters; a shared one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    """One vector out of a model's gradients; ``None`` is zero."""
    return torch.cat([(torch.zeros_like(p) if t is None else t).flatten() for t, p in zip(tensors, like, strict=True)])


def one(inputs: Any, index: int) -> Any:
    """A batch of one."""
    return take(inputs, slice(index, index + 1))


def jacobian(model: nn.Module, inputs: Any, select: Select | None = None) -> Tensor:
    """∂f_c(x_i)/∂θ, [n, c, p]: one backward pass for each example and output, each example alone."""
    tensors = list(parameters(model).values())
    rows = []
    for i in range(count(inputs)):
        outputs = outputs_2d(call(model, one(inputs, i)))
        values = (outputs if select is None else select(outputs))[0]
        grads = [torch.autograd.grad(v, tensors, retain_graph=True, allow_unused=True) for v in values]
        rows.append(torch.stack([flat(g, tensors) for g in grads]))
    return torch.stack(rows)


def gram(left: Tensor, right: Tensor) -> Tensor:
    """All inner products of two dense Jacobians, [n, c, m, k], by loops."""
    (n, c, _), (m, k, _) = left.shape, right.shape
    out = left.new_zeros(n, c, m, k)
    for i in range(n):
        for a in range(c):
            for j in range(m):
                for b in range(k):
                    out[i, a, j, b] = left[i, a] @ right[j, b]
    return out


def loss_gradients(model: nn.Module, inputs: Any, targets: Tensor, loss: Any) -> Tensor:
    """∂ℓ_i/∂θ, [n, p], for a batch passed through the model together: one backward pass per example."""
    tensors = list(parameters(model).values())
    losses = resolve(loss)[1](call(model, inputs), targets)
    found = [torch.autograd.grad(v, tensors, retain_graph=True, allow_unused=True) for v in losses]
    return torch.stack([flat(g, tensors) for g in found])


def put(model: nn.Module, vector: Tensor) -> None:
    """Set the trainable parameters from one vector."""
    at = 0
    with torch.no_grad():
        for p in parameters(model).values():
            p.copy_(vector[at : at + p.numel()].view_as(p))
            at += p.numel()


def vector(model: nn.Module) -> Tensor:
    """The trainable parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in parameters(model).values()])


def gauss_legendre(nodes: int) -> list[tuple[float, float]]:
    """Positions and weights on [0, 1]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    return [(float((a + 1) / 2), float(b / 2)) for a, b in zip(x, w, strict=True)]


def path_gradient(
    model: nn.Module, start: Tensor, end: Tensor, inputs: Any, nodes: list[tuple[float, float]], select: Select | None
) -> Tensor:
    """∫₀¹ ∇f(θ + τΔ) dτ by quadrature, [q, c, p]."""
    total: Tensor | None = None
    for position, weight in nodes:
        put(model, start + position * (end - start))
        term = weight * jacobian(model, inputs, select)
        total = term if total is None else total + term
    assert total is not None
    return total


def path_integral(
    model: nn.Module,
    data: Any,
    loss: Any,
    batches: Sequence[Sequence[int]],
    rate: float,
    inputs: Any,
    *,
    nodes: int | list[tuple[float, float]] = 64,
    select: Select | None = None,
    stride: int = 1,
) -> Tensor:
    """Contributions by the path integral, [q, n, c]: SGD redone by hand from the model's present weights.

    Along each segment of ``stride`` steps, C_i = Σ_t ⟨∫∇f, −η ∇ℓ_i/|B|⟩ with the integral along the segment's chord.
    """  # fmt: skip
    model = copy.deepcopy(model)
    quadrature = gauss_legendre(nodes) if isinstance(nodes, int) else nodes
    theta = vector(model)
    contributions: Tensor | None = None
    for first in range(0, len(batches), stride):
        start, updates = theta, []
        for indices in batches[first : first + stride]:
            put(model, theta)
            model.train()
            each = loss_gradients(model, *fetch(data, indices), loss) * (-rate / len(indices))
            updates.append((indices, each))
            theta = theta + each.sum(0)
        model.eval()
        gradient = path_gradient(model, start, theta, inputs, quadrature, select)
        if contributions is None:
            contributions = gradient.new_zeros(gradient.shape[0], len(data), gradient.shape[1])
        for indices, each in updates:
            for i, update in zip(indices, each, strict=True):
                contributions[:, i] += gradient @ update
    assert contributions is not None
    return contributions


def trained(model: nn.Module, data: Any, loss: Any, batches: Sequence[Sequence[int]], rate: float) -> nn.Module:
    """A copy of the model after plain SGD over the batches, by hand."""
    model = copy.deepcopy(model).train()
    for indices in batches:
        step = loss_gradients(model, *fetch(data, indices), loss).mean(0)
        put(model, vector(model) - rate * step)
    return model
