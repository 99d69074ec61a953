"""Something that a recorder takes along: it looks on while a loop trains, and makes something of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from kxexplain.trajectory.trajectory import Trajectory


class Beside(Protocol):
    """What a recorder calls, besides writing."""

    def attached(self) -> AbstractContextManager[None]:
        """Entered while the loop runs."""
        ...

    def logged(self, step: int, indices: list[int], rates: tuple[float, ...], factor: float) -> None:
        """A step was logged: its examples, its rates, and what the loop multiplied the gradient by."""
        ...

    def saved(self, step: int) -> None:
        """The state after so many steps was recorded."""
        ...

    def complete(self, trajectory: Trajectory) -> None:
        """The loop has ended without an error."""
        ...
