"""Per-example gradients of many passes, gathered one after the other in memory that is used again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kxexplain.gradients.factors import Factor, Factors, Outer, Served, signature, size, take


class Pile:
    """Room for the gradients of so many examples, all from passes that met the same uses.

    Gathering in place beats joining pieces at the end: the pieces' memory is free for the next pass at once, and
    stays in the processor's cache.

    Args:
        like: factors of one pass.
        capacity: number of examples there is room for.
        served: the examples' own inputs (:attr:`Outer.raw`) stay in the batches that they came in, which are kept
            instead; they are joined only if somebody asks for them (:class:`Served`).
    """

    def __init__(self, like: Factors, capacity: int, *, served: bool = False) -> None:
        self.signature, self.capacity, self.rows = signature(like), capacity, 0
        self._served = [served and isinstance(f, Outer) and f.raw is not None for f in like]
        self._batches: list[list[Tensor]] = [[] for _ in like]
        self._room = [_room(f, capacity, own) for f, own in zip(like, self._served, strict=True)]
        self._inputs, self._values = self._parts(self._room)
        self._weights: list[tuple[int, float]] = []
        """From which row on the gradients are still to be multiplied by what."""

    def fits(self, factors: Factors, rows: int) -> bool:
        """Whether a pass' gradients can be added."""
        return self.rows + rows <= self.capacity and signature(factors) == self.signature

    def add(self, factors: Factors, rows: int, weight: float) -> None:
        """Add the gradients of one pass, times a number."""
        start, stop = self.rows, self.rows + rows
        inputs, values = self._parts(factors)
        torch._foreach_copy_([room[start:stop] for room in self._inputs + self._values], inputs + values)
        for batches, own, factor in zip(self._batches, self._served, factors, strict=True):
            if own and isinstance(factor, Outer):
                batches.append(factor.a)
        if not self._weights or self._weights[-1][1] != weight:
            self._weights.append((start, weight))
        self.rows = stop

    def moved(self, factors: Factors, rows: int) -> Factors:
        """The gradients of one pass, added; valid until :meth:`clear`."""
        self.add(factors, rows, 1.0)
        return take(self._room, slice(self.rows - rows, self.rows))

    def gathered(self) -> Factors:
        """What was added since the last :meth:`clear`; valid until something is added after it."""
        self._weigh()
        rows = slice(0, self.rows)
        return [
            Served(room, room.g[rows], _joining(batches)) if isinstance(room, Outer) and own else room.take(rows)
            for room, batches, own in zip(self._room, self._batches, self._served, strict=True)
        ]

    def clear(self) -> None:
        """Make room."""
        self.rows, self._weights = 0, []
        self._batches = [[] for _ in self._room]

    def _parts(self, factors: Factors) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs that are copied, and what a weight multiplies."""
        inputs, values = [], []
        for factor, own in zip(factors, self._served, strict=True):
            if isinstance(factor, Outer):
                values.append(factor.g)
                if not own:
                    inputs.append(factor.a)
            else:
                values.append(factor.values)
        return inputs, values

    def _weigh(self) -> None:
        """Multiply what was added with its weights, all rows of one weight in one call."""
        stops = [start for start, _ in self._weights[1:]] + [self.rows]
        for (start, weight), stop in zip(self._weights, stops, strict=True):
            if weight != 1:
                torch._foreach_mul_([room[start:stop] for room in self._values], weight)
        self._weights = [(self.rows, 1.0)]


def _room(like: Factor, capacity: int, served: bool) -> Factor:
    """Room for so many examples' gradients, without their inputs where these stay where they are."""
    if served and isinstance(like, Outer):
        return Served(like, like.g.new_empty(capacity, *like.g.shape[1:]), lambda: like.a)
    return like.emptied(capacity)


def _joining(batches: list[Tensor]) -> Callable[[], Tensor]:
    return lambda: torch.cat(batches)


def bytes_per_row(factors: Factors, rows: int) -> int:
    """Bytes that one example takes."""
    return max(1, size(factors) // max(1, rows))
