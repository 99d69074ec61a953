"""Per-example gradients of many passes, gathered one after the other in memory that is used again and again."""

from __future__ import annotations

from kxexplain.gradients.factors import Factors, signature, size, take


class Pile:
    """Room for the gradients of so many examples, all from passes that met the same uses.

    Gathering in place beats joining pieces at the end: the pieces' memory is free for the next pass at once, and
    stays in the processor's cache.

    Args:
        like: factors of one pass.
        capacity: number of examples there is room for.
    """

    def __init__(self, like: Factors, capacity: int) -> None:
        self.signature, self.capacity, self.rows = signature(like), capacity, 0
        self._room = [factor.emptied(capacity) for factor in like]

    def fits(self, factors: Factors, rows: int) -> bool:
        """Whether a pass' gradients can be added."""
        return self.rows + rows <= self.capacity and signature(factors) == self.signature

    def add(self, factors: Factors, rows: int, weight: float) -> None:
        """Add the gradients of one pass, times a number."""
        place = slice(self.rows, self.rows + rows)
        for room, factor in zip(self._room, factors, strict=True):
            room.fill(place, factor, weight)
        self.rows = place.stop

    def moved(self, factors: Factors, rows: int) -> Factors:
        """The gradients of one pass, added; valid until :meth:`clear`."""
        self.add(factors, rows, 1.0)
        return take(self._room, slice(self.rows - rows, self.rows))

    def gathered(self) -> Factors:
        """What was added since the last :meth:`clear`; valid until something is added after it."""
        return take(self._room, slice(0, self.rows))

    def clear(self) -> None:
        """Make room."""
        self.rows = 0


def bytes_per_row(factors: Factors, rows: int) -> int:
    """Bytes that one example takes."""
    return max(1, size(factors) // max(1, rows))
