"""Which steps drew random numbers, and what a replay must be told so that it draws the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kxexplain.trajectory import rng

QUIET = 4
"""After so many steps that drew no random number, nobody looks at forward passes any more,"""

STRIDE = 16
"""and at the generators only so often: what a look costs is a good part of a short step."""


class Told(NamedTuple):
    """The generator states with which a step began."""

    step: int
    state: rng.RngState


class Draws:
    """Follows the generators from step to step.

    A replay repeats the steps only, and not what a loop draws beside them (a loader's order): a step that drew from
    another state than a replay would have come to needs to be told. Where it is not known when a step began, as in the
    quiet, a draw may have been the loop's, which concerns no replay, or the steps': then a replay that begins the first
    of them with the state before draws the same. Only where both drew between two looks will it not arrive.

    >>> draws = Draws(torch.device("cpu"))
    >>> draws.began()
    >>> _ = torch.rand(1)  # the first step draws
    >>> draws.logged(0)  # a replay begins it with the state that is recorded
    >>> _ = torch.rand(1)  # the loop draws
    >>> draws.began()
    >>> _ = torch.rand(1)  # and so does the second step
    >>> draws.logged(1).step
    1
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin(0, rng.capture(device))
        self.steps_without = 0
        """So many steps in a row are known not to have drawn."""

    def begin(self, step: int, state: rng.RngState) -> None:
        """``step`` is the next one, and begins with these states."""
        self.step, self.state = step, state
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

    def logged(self, step: int) -> Told | None:
        """This step has ended; returns what a replay must be told."""
        if self._started is None and self.quiet and (step + 1) % STRIDE:
            return None
        return self.look(step + 1)

    def look(self, upcoming: int) -> Told | None:
        """All steps before ``upcoming`` have ended; what a replay must be told of those since the last look."""
        if upcoming == self.step:
            return None
        now, told = rng.capture(self.device), None
        seen = self._started is not None
        first, started = (upcoming - 1, self._started) if self._started is not None else (self.step, self.state)
        if rng.same(now, started):
            self.steps_without += 1
        else:
            if not all(rng.same(state, started) for state in self._replayed):
                told = Told(first, started)
            self._replayed = [now] if seen else [{}]
            self.steps_without = 0
        self.step, self.state, self._started = upcoming, now, None
        return told
