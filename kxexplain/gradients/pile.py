"""Per-example gradients of many passes, gathered one after the other in memory that is used again and again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kxexplain.errors import ModelError
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
        self._batches: dict[int, list[tuple[Tensor, int]]] = {
            at: [] for at, f in enumerate(like) if served and isinstance(f, Outer) and f.raw is not None
        }
        self._room = [_room(f, capacity, at in self._batches) for at, f in enumerate(like)]
        self._values = [room.g if isinstance(room, Outer) else room.values for room in self._room]
        self._tensors = self._copied(self._room)
        self._weights: list[tuple[int, float]] = []
        """From which row on the gradients are still to be multiplied by what."""

    def fits(self, factors: Factors, rows: int) -> bool:
        """Whether a pass' gradients can be added."""
        return self.rows + rows <= self.capacity and signature(factors) == self.signature

    def add(self, factors: Factors, rows: int, weight: float) -> None:
        """Add the gradients of one pass, times a number."""
        start, stop = self.rows, self.rows + rows
        torch._foreach_copy_([room[start:stop] for room in self._tensors], self._copied(factors))
        for at, batches in self._batches.items():
            factor = factors[at]
            assert isinstance(factor, Outer)
            batches.append((factor.a, factor.a._version))
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
            Served(room, room.g[rows], _joining(self._batches[at]))
            if isinstance(room, Outer) and at in self._batches
            else room.take(rows)
            for at, room in enumerate(self._room)
        ]

    def clear(self) -> None:
        """Make room."""
        self.rows, self._weights = 0, []
        self._batches = {at: [] for at in self._batches}

    def _copied(self, factors: Factors) -> list[Tensor]:
        """What is copied of such factors."""
        tensors = []
        for at, factor in enumerate(factors):
            if isinstance(factor, Outer):
                if at not in self._batches:
                    tensors.append(factor.a)
                tensors.append(factor.g)
            else:
                tensors.append(factor.values)
        return tensors

    def _weigh(self) -> None:
        """Multiply what was added with its weights, all rows of one weight in one call."""
        if not self._weights:
            return
        stops = [start for start, _ in self._weights[1:]] + [self.rows]
        for (start, weight), stop in zip(self._weights, stops, strict=True):
            if weight != 1:
                torch._foreach_mul_([room[start:stop] for room in self._values], weight)
        self._weights = [(self.rows, 1.0)]


def _room(like: Factor, capacity: int, served: bool) -> Factor:
    """Room for so many examples' gradients, without one for inputs that stay where they are."""
    if served and isinstance(like, Outer):
        return Served(like, like.g.new_empty(capacity, *like.g.shape[1:]), _joining([]))
    return like.emptied(capacity)


def _joining(batches: list[tuple[Tensor, int]]) -> Callable[[], Tensor]:
    """Joins batches, which must be as they came: ``ModelError`` where they are not."""

    def find() -> Tensor:
        if any(batch._version != version for batch, version in batches):
            raise ModelError("the model changes a batch in place after its step; have it keep a copy (x.clone())")
        return torch.cat([batch for batch, _ in batches])

    return find


def bytes_per_row(factors: Factors, rows: int) -> int:
    """Bytes that one example takes."""
    return max(1, size(factors) // max(1, rows))
