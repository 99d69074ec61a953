"""Values computed from parameters alone (a normed weight, a gate 2 − w, a product of two matrices): chain rule by row.

A derived value counts as a parameter of its own, under a name that no parameter has; contacts give every example's
gradient at it, and this module takes that on to the parameters. The computation is done again on copies for that,
whose graph is small and outlives the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kxexplain.gradients import nested
from kxexplain.gradients.factors import Dense, Factors
from kxexplain.gradients.interception import name_of
from kxexplain.gradients.sources import Source

MARK = "derived value "
"""Begins a derived value's name: no parameter's name has a blank."""


@dataclass(frozen=True)
class Derived:
    """A derived value and the copies of the parameters that it was computed from."""

    value: Tensor
    parameters: Mapping[str, Tensor]


class Derivations:
    """The derived values met in a forward pass, by name.

    Args:
        parameters: name → tensor.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._whole = parameters
        self._copies: dict[str, Derived] = {}
        self._made: dict[str, Derived] = {}

    def parameters(self, name: str) -> set[str]:
        """The parameters behind a name, which may be a parameter's own."""
        return set(self._made[name].parameters) if name in self._made else {name}

    def derive(
        self, func: Callable[..., Any], args: Any, kwargs: Any, output: Tensor, sources: Mapping[int, Source]
    ) -> Source | None:
        """A source for the output of a call; ``None`` if not all of it comes from parameters and constants."""
        from kxexplain.gradients.table import DETERMINISTIC

        tensors = [value for value in nested.leaves((args, kwargs)) if isinstance(value, Tensor)]
        if name_of(func) not in DETERMINISTIC or any(t.requires_grad and id(t) not in sources for t in tensors):
            return None
        behind = [self._behind(sources[id(t)]) for t in tensors if id(t) in sources]
        known = {id(t): self._value(sources[id(t)]) for t in tensors if id(t) in sources}
        swap = lambda value: known.get(id(value), value)  # noqa: E731
        with torch.enable_grad():
            value = func(*nested.change(args, swap), **nested.change(kwargs, swap))
        name = f"{MARK}{len(self._made)}"
        self._made[name] = Derived(value, {k: t for d in behind for k, t in d.parameters.items()})
        return Source(name, output, output.numel())

    def _behind(self, source: Source) -> Derived:
        if source.name in self._made:
            return self._made[source.name]
        if source.name not in self._copies:
            copy = self._whole[source.name].detach().clone().requires_grad_()
            self._copies[source.name] = Derived(copy, {source.name: copy})
        return self._copies[source.name]

    def _value(self, source: Source) -> Tensor:
        """The source's value, computed from the copies."""
        whole = self._behind(source).value
        if source.index is None:
            return whole
        with torch.enable_grad():
            return whole.flatten()[source.index]

    def carried(self, factors: Factors) -> Factors:
        """Gradients at derived values carried on to the parameters behind them."""
        if not self._made:
            return factors
        found: Factors = []
        for factor in factors:
            if not any(name in self._made for name in factor.names):
                found.append(factor)
                continue
            for part in factor.dense():
                found += self._carry(part) if part.weight in self._made else [part]
        return found

    def _carry(self, part: Dense) -> Factors:
        """Row by row, or by the value's Jacobian where that has fewer rows."""
        derived, (n, c, size) = self._made[part.weight], part.values.shape
        names, copies = list(derived.parameters), list(derived.parameters.values())
        rows = part.values.reshape(n * c, size)
        by_jacobian = size < len(rows)
        pulled = [
            torch.autograd.grad(
                derived.value, copies, row.view(derived.value.shape), retain_graph=True, materialize_grads=True
            )
            for row in (torch.eye(size, dtype=rows.dtype, device=rows.device) if by_jacobian else rows)
        ]
        found: Factors = []
        for name, column in zip(names, zip(*pulled, strict=True), strict=True):
            stacked = torch.stack(column).reshape(len(column), -1)
            values = rows @ stacked if by_jacobian else stacked
            found.append(Dense(name, values.view(n, c, -1)))
        return found
