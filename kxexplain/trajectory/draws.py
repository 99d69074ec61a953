"""Which steps drew random numbers, and what a replay must be told so that it draws the same."""

from __future__ import annotations

import torch

from kxexplain.trajectory import rng

QUIET = 16
"""After so many steps that drew no random number, nobody looks at forward passes any more."""


class Draws:
    """Follows the generators from step to step.

    A replay repeats the steps only, and not what a loop draws beside them (a loader's order): a step that drew from
    another state than a replay would have come to needs to be told. Where it is not known when a step began, as in the
    quiet, a draw may have been the loop's, which concerns no replay, or the step's: then a replay that begins it with
    the state before draws the same. Only where both drew, the first time after a quiet, will it not arrive.

    >>> draws = Draws(torch.device("cpu"))
    >>> draws.began()
    >>> _ = torch.rand(1)  # the first step draws
    >>> draws.logged()  # a replay begins it with the state that is recorded
    >>> _ = torch.rand(1)  # the loop draws
    >>> draws.began()
    >>> _ = torch.rand(1)  # and so does the second step
    >>> draws.logged() is None
    False
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin(rng.capture(device))
        self.steps_without = 0
        """So many steps in a row are known not to have drawn."""

    def begin(self, state: rng.RngState) -> None:
        """The next step begins with these states."""
        self.state = state
        """What the last logged step left behind."""
        self._started: rng.RngState | None = None
        self._replayed = [state]  # what a replay may have come to at this point

    @property
    def quiet(self) -> bool:
        """Whether steps seem not to draw."""
        return self.steps_without >= QUIET

    def recorded(self) -> None:
        """A state was recorded, from which a replay may begin."""
        self._replayed.append(self.state)

    def began(self, state: rng.RngState | None = None) -> None:
        """The next step begins, with the present states or those given."""
        self._started = rng.capture(self.device) if state is None else state

    def logged(self) -> rng.RngState | None:
        """A step has ended; returns the states that a replay must be told it began with."""
        now, told = rng.capture(self.device), None
        started = self.state if self._started is None else self._started
        if rng.same(now, started):
            self.steps_without += 1
        else:
            if not all(rng.same(state, started) for state in self._replayed):
                told = started
            self._replayed = [{}] if self._started is None else [now]
            self.steps_without = 0
        self.state, self._started = now, None
        return told
