r"""Kernels traced over outputs, whose two sides' gradients are made in one pass and meet column by column.

A linear layer of one position has gradients g_c aᵀ, and Σ_c ⟨g_c aᵀ, h_c bᵀ⟩ = (a·b) Σ_c g_c·h_c: once a column's
products are added up its gradients are not needed any more. So they are multiplied while they are in the processor's
cache, and no room for all columns is taken.
"""

from __future__ import annotations

from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.gradients.capture import Capture
from kxexplain.gradients.contacts import is_plain
from kxexplain.gradients.factors import take
from kxexplain.gradients.ordinary import Rooms, Select, assemble, loose_gradients, passes, trainable, watched
from kxexplain.gradients.products import gram_trace
from kxexplain.gradients.uses import Layout, Use
from kxexplain.shapes import Inputs


def passing(capture: Capture) -> list[int]:
    """Numbers of the uses whose gradients need no room: linear layers of parameters that are used nowhere else."""
    behind = Counter(
        name for use in capture.uses for s in use.sources.values() for name in capture.derivations.parameters(s.name)
    )
    alone = {name for name, times in behind.items() if times == 1} - capture.loose
    return [
        number
        for number, use in enumerate(capture.uses)
        if is_plain(use) and all(source.name in alone for source in use.sources.values())
    ]


def joint_trace(
    model: nn.Module, inputs: Inputs, rows: int, layout: Layout, select: Select | None = None
) -> Float[Tensor, "n m"]:
    """Σ_c ⟨∇f_c(x), ∇f_c(x')⟩ between the first examples and the others.

    Args:
        model: evaluated in the mode it is in.
        inputs: a batch of n + m, which the model may change in place.
        rows: n.
        layout: from :func:`~kxexplain.gradients.ordinary.layout_of` on inputs of the same kind.
        select: the quantities to differentiate; every output if ``None``.
    """
    with torch.enable_grad():
        values, capture = watched(model, inputs, layout, select)
        loose = loose_gradients(values, {n: p for n, p in trainable(model).items() if n in capture.loose})
        met, rest = _met(values, capture, rows)
        factors = assemble(capture, [rest.get(number) for number in range(len(capture.uses))], loose)
    left, right = slice(0, rows), slice(rows, len(values))
    total = gram_trace(take(factors, left), take(factors, right)) if factors else None
    for number, products in met.items():
        term = _inputs_met(capture.uses[number], rows).mul_(products)
        total = term if total is None else total.add_(term)
    return values.new_zeros(rows, len(values) - rows) if total is None else total


def _met(values: Tensor, capture: Capture, rows: int) -> tuple[dict[int, Tensor], dict[int, Tensor | None]]:
    """Σ_c g_c·h_c of the uses that need no room, [n, m], and the other uses' gathered gradients."""
    met: dict[int, Tensor] = {}
    if not capture.uses or not values.requires_grad or values.shape[1] == 0:
        return met, {}
    meeting = passing(capture)
    others = [number for number in range(len(capture.uses)) if number not in meeting]
    rooms = Rooms([capture.uses[number] for number in others], values.shape[1])
    for column, passed in enumerate(passes(values, capture.edges())):
        for number in meeting:
            gradient = passed[number]
            if gradient is None:
                continue
            left, right = gradient[:rows], gradient[rows:].T
            if number in met:
                met[number].addmm_(left, right)
            else:
                met[number] = left @ right
        rooms.put(column, [passed[number] for number in others])
    return met, dict(zip(others, rooms.gathered(), strict=True))


def _inputs_met(use: Use, rows: int) -> Tensor:
    """Inner products of what a linear layer was applied to, 1 added where there is a bias; a new tensor."""
    a: Tensor = use.held["x"].detach()
    products = a[:rows] @ a[rows:].T
    return products.add_(1) if "bias" in use.sources else products
