r"""What a gradient moves in each segment, where an optimiser remembers it: the training side of momentum, Adam and kin.

With the step of :class:`kxexplain.trajectory.optimizers.Recursion`, the gradient g_t moves the parameters in its own
segment and, through the moment, in later ones: by −c_{t,s} ⊙ g_t in segment s. Backward in time, with e_s = 1 in the
step's own segment and 0 in the others,

    m_{t,s} = applied_t e_s + memory_{t+1} m_{t+1,s}          c_{t,s} = direct_t e_s + intake_t m_{t,s}

so P_{s,i} = −Σ_t c_{t,s} ⊙ g_{t,i}. These are the co-states of :mod:`kxexplain.attribution.backward` with the segments
in the place of the queries. Numbers stay numbers (momentum); what differs by element (Adam) takes the gradient written
out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from kxexplain.attribution.stretches import Step, is_zero
from kxexplain.gradients.factors import Dense, Factors, scale, take
from kxexplain.trajectory.optimizers import Coefficient

NEGLIGIBLE = 1e-9
"""A segment whose coefficient is below this part of the largest is left out: float32 would not show it."""

ELEMENTS = 1 << 24
"""Numbers that gradients written out may take."""

Moved = dict[str, Coefficient]
"""By parameter, what a gradient is multiplied with."""


class Carried:
    """Goes back over a trajectory's steps and tells what each step's gradients move in which segment.

    >>> import torch
    >>> from kxexplain.trajectory.optimizers import Recursion
    >>> none, recursions = torch.empty(0), {"w": Recursion(intake=1.0, memory=0.5, applied=0.1)}
    >>> step = Step(none, [], none, None, 1.0, recursions, decaying={}, strays={}, penalty={})
    >>> carried = Carried(["w"])
    >>> carried.back(step, 1), carried.back(step, 0)  # the earlier gradient moves 0.1 now, and 0.05 in the next step
    ({1: {'w': -0.1}}, {1: {'w': -0.05}, 0: {'w': -0.1}})
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.moment: dict[str, dict[int, Coefficient]] = {name: {} for name in names}
        self.memory: dict[str, float] = {}

    def back(self, step: Step, segment: int) -> dict[int, Moved]:
        """By segment, the factors of this step's gradients; ``segment`` holds the step."""
        moved: dict[int, Moved] = {}
        for name, by in step.recursions.items():
            memory = self.memory.get(name, 0.0)
            moment = {s: memory * c for s, c in self.moment[name].items()} if memory else {}
            _add(moment, segment, by.applied)
            self.moment[name], self.memory[name] = _kept(moment), by.memory
            gradient = {} if is_zero(by.intake) else {s: by.intake * c for s, c in self.moment[name].items()}
            _add(gradient, segment, by.direct)
            for s, coefficient in gradient.items():
                moved.setdefault(s, {})[name] = -step.factor * by.sign * coefficient
        return moved


def _add(to: dict[int, Coefficient], segment: int, value: Coefficient) -> None:
    if not is_zero(value):
        to[segment] = value + to[segment] if segment in to else value


def _kept(moment: dict[int, Coefficient]) -> dict[int, Coefficient]:
    sizes = {s: float(c.abs().max()) if isinstance(c, Tensor) else abs(c) for s, c in moment.items()}
    least = NEGLIGIBLE * max(sizes.values(), default=0.0)
    return {s: c for s, c in moment.items() if sizes[s] > least}


def weighted(factors: Factors, by: Mapping[str, Coefficient]) -> Iterator[tuple[slice, Factors]]:
    """Gradients times their coefficients, for some of the examples at a time; parameters without one are left out."""
    names = {name for factor in factors for name in factor.names}
    rows = factors[0].rows
    if not any(isinstance(by.get(name), Tensor) for name in names):
        numbers = {name: float(by.get(name, 0.0)) for name in names}
        yield slice(0, rows), scale(factors, numbers)
        return
    elements = sum(c.numel() for c in by.values() if isinstance(c, Tensor))
    portion = max(1, ELEMENTS // max(1, elements))
    for at in range(0, rows, portion):
        place = slice(at, min(at + portion, rows))
        written = [part for f in take(factors, place) for part in f.dense() if part.weight in by]
        yield place, [Dense(part.weight, part.values * _flat(by[part.weight])) for part in written]


def _flat(coefficient: Coefficient) -> Coefficient:
    return coefficient.flatten() if isinstance(coefficient, Tensor) else coefficient
