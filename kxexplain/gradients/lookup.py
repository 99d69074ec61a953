"""Inner products of the examples' own inputs, which no training changes: computed once, then looked up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kxexplain.gradients.factors import Outer
from kxexplain.gradients.products import InputsMet, inputs_met


class InputProducts:
    """A table of x_i·x for each layer that examples i and queries x enter unchanged.

    For such a layer most of the work of an inner product of gradients, (g·h)(a·b), is a·b where the inputs are wide.

    Args:
        examples: number of examples in the dataset.
        budget: bytes that all tables together may take; what exceeds it is computed each time.
    """

    def __init__(self, examples: int, budget: int) -> None:
        self.examples, self.left = examples, budget
        self._tables: dict[tuple[str, int, int], _Table] = {}

    def of(self, indices: Int[Tensor, " n"], portion: int) -> InputsMet:
        """What gives the products for some of the examples and a portion of the queries (any number, to tell them)."""

        def found(f: Outer, h: Outer) -> Tensor:
            if f.raw is None:
                return inputs_met(f, h)
            table = self._table((f.weight, f.raw, portion), h.a)
            return inputs_met(f, h) if table is None else table.rows(indices, f, h)

        return found

    def _table(self, key: tuple[str, int, int], queries: Tensor) -> _Table | None:
        """The table of a layer, the input it is applied to, and a portion of the queries."""
        table = self._tables.get(key)
        if table is None or not torch.equal(table.queries, queries):
            cost = self.examples * len(queries) * queries.element_size() if table is None else 0
            if cost > self.left:
                return None
            self.left -= cost
            known = torch.zeros(self.examples, dtype=torch.bool, device=queries.device)
            table = _Table(queries, queries.new_empty(self.examples, len(queries)), known)
            self._tables[key] = table
        return table


@dataclass
class _Table:
    queries: Float[Tensor, "m 1 d"]
    values: Float[Tensor, "examples m"]
    known: Tensor

    def rows(self, indices: Tensor, f: Outer, h: Outer) -> Tensor:
        """[n, m] of these examples; those not met before are computed now."""
        missing = (~self.known.index_select(0, indices)).nonzero().squeeze(1)
        if len(missing):
            new = f if len(missing) == len(indices) else f.take(missing)
            self.values[indices[missing]] = inputs_met(new, h)
            self.known[indices[missing]] = True
        return self.values.index_select(0, indices)
