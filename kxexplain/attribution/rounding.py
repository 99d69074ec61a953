"""Gradients that are nothing but rounding, which an adaptive optimiser turns into whole steps.

The bias of a layer before batch norm has no gradient: its examples' shares cancel, and what is left of their sum is
rounding. Adam divides it by its own size, so that the bias moves as far as any other parameter, in no example's
direction; itemised, the shares would be millions of times the prediction's change, and cancel. Such an element's
movement is nobody's: it belongs to the line "unattributed".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kxexplain.gradients.factors import Dense, Factors, Outer
from kxexplain.shapes import Tensors

ROUNDINGS = 64
"""A sum smaller than this many roundings of its terms is rounding,"""

AGREE = 1e-2
"""and so is one that differs by this part when it is added up in another order."""

SMALL = 1e-3
"""Only a tensor whose gradient is below this part of the largest one is looked at."""


def cancelled(factors: Factors, gradients: Tensors, names: Sequence[str]) -> tuple[Tensors, Tensors]:
    """The elements of the named parameters whose gradient is rounding.

    Matrices are not looked at: it is shifts that a norm takes away again.

    Returns:
        Which they are, as masks by name, and the part of the gradient that is no example's; both lack the parameters
        that have none.
    """
    masks: Tensors = {}
    rest: Tensors = {}
    if not any(gradients[name].dim() <= 1 for name in names):
        return masks, rest
    largest = dict(zip(gradients, torch._foreach_norm(list(gradients.values()), torch.inf), strict=True))
    limit = SMALL * float(torch.stack(list(largest.values())).max())
    for name in names:
        gradient = gradients[name]
        if gradient.dim() > 1 or float(largest[name]) > limit:
            continue
        shares = [_shares(f, name) for f in factors if name in f.names]
        if not shares:
            continue
        size, total = (torch.stack([s.sum((0, 1)) for s in terms]).sum(0).view_as(gradient)
                       for terms in ([s.abs() for s in shares], shares))  # fmt: skip
        mask = gradient.abs() <= ROUNDINGS * torch.finfo(gradient.dtype).eps * size
        mask = (mask | ((gradient - total).abs() > AGREE * gradient.abs())) & (size > 0)
        if bool(mask.any()):
            masks[name], rest[name] = mask, torch.where(mask, gradient, gradient - total)
    return masks, rest


def without(factors: Factors, masks: Tensors) -> Factors:
    """The factors, zero at the elements masked."""
    kept: Factors = []
    for factor in factors:
        if isinstance(factor, Outer) and factor.bias in masks:
            kept.append(replace(factor, bias=None))
            kept.append(Dense(factor.bias, _shares(factor, factor.bias) * ~masks[factor.bias].flatten()))
        elif isinstance(factor, Dense) and factor.weight in masks:
            kept.append(replace(factor, values=factor.values * ~masks[factor.weight].flatten()))
        else:
            kept.append(factor)
    return kept


def _shares(factor: Outer | Dense, name: str) -> Tensor:
    """Gradients of a vector, [n, c, p]."""
    if isinstance(factor, Dense):
        return factor.values
    if name == factor.bias:
        return factor.g.sum(2)
    return factor.dense()[0].values
