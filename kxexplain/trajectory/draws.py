"""Which steps drew random numbers, and what a replay must be told so that it draws the same."""

from __future__ import annotations

from kxexplain.trajectory import rng

QUIET = 16
"""After so many steps between and in which no random number was drawn, nobody looks at forward passes any more."""

MORE = 2
"""After so many of them, where the loop drew when it was expected to."""


class Draws:
    """Follows the generators from step to step.

    A replay repeats the steps only, and not what a loop draws beside them (a loader's order): a step that drew from
    another state than a replay would have come to needs to be told. Where it is not known when a step began, as in the
    quiet, a draw may have been the loop's, which concerns no replay, or the step's: then a replay that begins it with
    the state before draws the same. Only where both drew, in the first steps after a quiet, will it not arrive; so the
    quiet is interrupted where the loop is expected to draw.

    >>> import torch
    >>> cpu = torch.device("cpu")
    >>> draws = Draws(rng.capture(cpu))
    >>> begun = rng.capture(cpu)
    >>> _ = torch.rand(1)  # the first step draws
    >>> draws.logged(begun, rng.capture(cpu))  # a replay begins it with the state that is recorded
    >>> _ = torch.rand(1)  # the loop draws
    >>> begun = rng.capture(cpu)
    >>> _ = torch.rand(1)  # and so does the second step
    >>> draws.logged(begun, rng.capture(cpu)) is begun
    True
    """

    def __init__(self, state: rng.RngState, *, steps_only: bool = False) -> None:
        self.steps_only = steps_only
        """Nothing but the steps draws, so that a replay needs not be told anything."""
        self.steps_without = 0
        """So many steps in a row are known not to have drawn, nor the loop beside them (but where it was expected)."""
        self.expected = False
        """Whether the loop is expected to draw before the next step, as loaders do for the order of an epoch."""
        self.begin(state)

    def begin(self, state: rng.RngState) -> None:
        """The next step begins with these states."""
        self.state = state
        """What the last step left behind."""
        self._content = rng.content(state)
        self._replayed = [state]  # what a replay may have come to at this point

    @property
    def quiet(self) -> bool:
        """Whether nothing seems to draw, nor is about to."""
        return self.steps_without >= QUIET and not self.expected

    def recorded(self) -> None:
        """A state was recorded, from which a replay may begin."""
        if not (self.steps_only or rng.same(self._replayed[-1], self.state)):
            self._replayed.append(self.state)

    def logged(self, begun: rng.RngState | None, now: rng.RngState) -> rng.RngState | None:
        """A step has ended; returns the states that a replay must be told it began with.

        ``begun`` are those it did begin with, if somebody looked, and ``now`` those after it.
        """
        before, left = self.state, self._content
        self.state = now
        if self.steps_only:
            self.steps_without += 1
            return None
        self._content = found = rng.content(now)
        started, told = before if begun is None else begun, None
        drew = found != (left if begun is None else rng.content(begun))
        if drew:
            if not all(rng.same(state, started) for state in self._replayed):
                told = started
            self._replayed = [{}] if begun is None else [now]
        if drew:
            self.steps_without = 0
        elif found == left:
            self.steps_without += 1
        else:  # the loop drew
            self.steps_without = min(self.steps_without, QUIET - MORE) if self.expected else 0
        self.expected = False
        return told
