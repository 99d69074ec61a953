r"""What a gradient moves in each segment, found out while training goes on: a fixed lag behind the last step.

Under momentum and Adam a gradient g_t goes on moving the parameters in later steps, with coefficients c_{t,s}
(:mod:`kxexplain.search.carried`) that those steps decide. A moment forgets: after L steps, with memory^L ≤ 1e-9, what
is still to come of g_t is beneath float32. So steps wait in a queue; when enough of them do, their recursions are read
backward, and all but the last L, whose coefficients are known by then, are handed on. Without a moment L = 0, and
nothing waits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kxexplain.attribution.stretches import Step
from kxexplain.gradients.factors import Factors
from kxexplain.search.carried import NEGLIGIBLE, Carried, weighted
from kxexplain.trajectory.records import OptimizerRecord

HELD = 1 << 30
"""Bytes that waiting steps may take."""

Add = Callable[[int, Tensor, Factors], None]
"""Takes a segment, examples, and what they put into the parameters there."""


def lag(optimizer: OptimizerRecord) -> int:
    """After how many steps nothing is left of a gradient in any moment.

    >>> from kxexplain.trajectory.records import GroupRecord
    >>> lag(OptimizerRecord("SGD", (GroupRecord(("w",), {"momentum": 0.9}),)))
    197
    >>> lag(OptimizerRecord("SGD", (GroupRecord(("w",), {"momentum": 0}),)))
    0
    """
    memory = 0.0
    for group in optimizer.groups:
        first = group.options["betas"][0] if "betas" in group.options else 0.0
        memory = max(memory, float(group.options.get("momentum", 0)), float(first))
    if memory == 0:
        return 0
    return math.ceil(math.log(NEGLIGIBLE) / math.log(memory)) if memory < 1 else 1 << 62


class Delayed:
    """A queue of steps whose gradients have not yet moved all that they will move.

    Args:
        names: the parameters.
        lag: how many later steps a gradient waits for.
        add: is told what every gradient moved.
    """

    def __init__(self, names: list[str], lag: int, add: Add) -> None:
        self.names, self.lag, self.add = names, lag, add
        self.waiting: list[tuple[int, Step]] = []

    def fits(self, step: Step) -> bool:
        """Whether so many steps like this one as have to wait can be held."""
        return (self.lag + 1) * step.bytes <= HELD

    def put(self, segment: int, step: Step) -> None:
        """Queue a step; hands on what has waited long enough, once as many steps as the lag have."""
        self.waiting.append((segment, step))
        room = max(self.lag + 1, HELD // max(1, step.bytes))
        if len(self.waiting) >= min(2 * self.lag + 1, room):
            self._hand_on(len(self.waiting) - self.lag)

    def close(self) -> None:
        """Hand on all that waits: training is over."""
        self._hand_on(len(self.waiting))

    def _hand_on(self, count: int) -> None:
        """The first ``count`` steps, from the last one's recursion backward."""
        carried = Carried(self.names)
        for at in reversed(range(len(self.waiting))):
            segment, step = self.waiting[at]
            moved = carried.back(step, segment)
            if at < count and step.factors:
                with torch.no_grad():
                    for s, by in moved.items():
                        for rows, factors in weighted(step.factors, by):
                            self.add(s, step.indices[rows], factors)
        del self.waiting[:count]
