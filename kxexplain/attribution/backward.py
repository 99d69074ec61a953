r"""The bill where steps remember earlier gradients: one pass backward in time, with a co-state.

With the step of :class:`kxexplain.trajectory.optimizers.Recursion`, a gradient at step t moves the parameters in every
later step. What it is worth to the prediction is its inner product with a co-state u_t, which runs backward:

    v_t = D + y_{t+1}                                    what a movement in step t is worth
    w_t = applied_t ⊙ v_t + memory_{t+1} w_{t+1}          what a moment is worth
    u_t = direct_t ⊙ v_t + intake_t ⊙ w_t                what a gradient is worth: example i contributes −⟨u_t, g_{t,i}⟩
    y_t = y_{t+1} − shrink_t v_t − l2_t u_t              what decay will take from a parameter's value

D is the discrete gradient of the segment that holds t. y is followed where decay is charged back to the updates that it
erodes; else y = 0, and decay is the regulariser's line. Within a segment every co-state is A ⊙ D + B ⊙ W + C ⊙ Y with W
and Y those at the segment's end, and A, B, C do not depend on the query: only W and Y are kept for every query.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from kxexplain.attribution.ledger import Ledger, against
from kxexplain.attribution.queries import QuerySide
from kxexplain.attribution.stretches import Step, Stretch, Stretches, is_elementwise, is_zero
from kxexplain.attribution.walk import Segment
from kxexplain.gradients.discrete import Secant
from kxexplain.gradients.factors import Factors, wide
from kxexplain.gradients.products import against_dense
from kxexplain.shapes import Tensors
from kxexplain.trajectory import Replayer
from kxexplain.trajectory.optimizers import Coefficient


class BackwardWalk(Stretches):
    """Goes along a trajectory from its end to its start with the queries' co-states.

    Args:
        replayer: entered, at no particular position.
        side: the queries.
        charge: weight decay is charged to the updates that it erodes, instead of being a line of its own.
        options: of :class:`Stretches`.
    """

    def __init__(self, replayer: Replayer, side: QuerySide, *, charge: bool = False, **options: Any) -> None:
        super().__init__(replayer, side.names, side.buffers, side.budget, **options)
        self.side, self.charge = side, charge

    def visit(self, ledger: Ledger) -> None:
        """Fill in the ledger."""
        for rows in self._portions():
            _Costate(self, ledger, rows).run()

    def _portions(self) -> list[slice]:
        """Queries in portions whose dense co-states fit the budget."""
        q, c = self.side.prediction.shape
        elements = sum(p.numel() for p in self.parameters.values())
        each = 4 * c * elements * self.side.prediction.element_size()
        count = max(1, min(q, self.side.chunk, (self.side.budget // 2) // each))
        return [slice(at, min(at + count, q)) for at in range(0, q, count)]


Mixture: TypeAlias = tuple[Coefficient, Coefficient, Coefficient]
"""A co-state of one parameter: its coefficients of D, W and Y."""

NONE, GRADIENT, MOMENT, POSITION = (0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


def _sum(*terms: tuple[Coefficient, Mixture]) -> Mixture:
    """Σ coefficient ⊙ mixture."""
    a, b, c = (sum((k * mixture[i] for k, mixture in terms if not is_zero(mixture[i])), 0.0) for i in range(3))
    return a, b, c


class _Costate:
    """The backward recursion for some of the queries."""

    def __init__(self, walk: BackwardWalk, ledger: Ledger, rows: slice) -> None:
        self.walk, self.ledger, self.rows = walk, ledger, rows
        self.later: tuple[Tensors, Tensors] = ({}, {})
        """W and Y: what moments and values at the segment's end are worth, [q, c, p]; zero where missing."""
        self.memory: dict[str, float] = {}
        """How much of the moment the step after the present one keeps."""
        self.moment: dict[str, Mixture] = {}
        self.position: dict[str, Mixture] = {}
        self.segment: Segment | None = None
        self.secants: list[tuple[float, Secant]] = []
        self.written: Tensors = {}
        self.scratch: Tensors = {}
        """Memory for the co-states of a step, used again and again."""

    def run(self) -> None:
        """From the last step to the first."""
        for stretch, segment in self.walk.stretches():
            if self.segment is None or segment.number != self.segment.number:
                self._enter(segment)
            self._leftovers(stretch, segment)
            for step in reversed(stretch.steps):
                self._step(step, segment)
        assert self.segment is not None
        self.ledger.enter("unattributed", self.segment, self.rows, -self._kept_worth(self.walk.moments_at_start))
        if self.walk.charge:
            values = {name: self.walk.at_start[name] for name in self.position}
            self.ledger.enter("regularizer", self.segment, self.rows, self._worth_of(values, self.position))

    def _enter(self, segment: Segment) -> None:
        """Come to a segment from its end: co-states there are what they were at the start of the one behind it."""
        if self.segment is not None:
            moments, positions = ({n: self._dense(n, m) for n, m in c.items()} for c in (self.moment, self.position))
            self.later = tuple({n: t for n, t in c.items() if t is not None} for c in (moments, positions))  # type: ignore[assignment]
        self.moment = dict.fromkeys(self.walk.parameters, MOMENT)
        self.position = dict.fromkeys(self.walk.parameters, POSITION if self.walk.charge else NONE)
        self.segment, self.written = segment, {}
        with torch.random.fork_rng(devices=[]):
            self.secants = self.walk.side.secants(segment.change(self.walk.side.names), self.rows)

    def _step(self, step: Step, segment: Segment) -> None:
        gradient: dict[str, Mixture] = {}
        straight: dict[str, Mixture] = {}
        for name, by in step.recursions.items():
            movement = _sum((1.0, GRADIENT), (1.0, self.position[name]))
            moment = _sum((by.applied, movement), (self.memory.get(name, 0.0), self.moment[name]))
            gradient[name] = _sum((by.direct, movement), (by.intake, moment))
            self.moment[name], self.memory[name] = moment, by.memory
            if name in step.decaying:
                taken = _sum((by.shrink, movement), (by.l2, gradient[name]))
                if self.walk.charge:
                    self.position[name] = _sum((1.0, self.position[name]), (-1.0, taken))
                else:
                    straight[name] = taken
        if straight:
            self.ledger.enter("regularizer", segment, self.rows, -self._worth_of(step.decaying, straight))
        if step.strays:
            self.ledger.enter("unattributed", segment, self.rows, -self._worth_of(step.strays, gradient))
        if step.penalty:
            self.ledger.enter("penalty", segment, self.rows, -self._worth_of(step.penalty, gradient))
        if step.factors:
            signed = {n: _sum((-step.factor * by.sign, gradient[n])) for n, by in step.recursions.items()}
            found = self._against(step.factors, signed)[:, 0]
            blocks = None if step.jacobian is None else -self._against(step.jacobian, signed)
            indices = step.indices.to(found.device)
            self.ledger.credit(segment, self.rows, indices, found, step.alpha.to(found.device), blocks)

    def _leftovers(self, stretch: Stretch, segment: Segment) -> None:
        """What the recursions do not account for, which enters at the stretch's end, and the buffers."""
        worth = {n: _sum((1.0, GRADIENT), (1.0, self.position.get(n, NONE))) for n in stretch.left}
        values = self._worth_of(stretch.left, worth) - self._kept_worth(stretch.moments)
        self.ledger.enter("unattributed", segment, self.rows, values)
        if stretch.buffers:
            self.ledger.enter("buffers", segment, self.rows, self._along(stretch.buffers))

    def _kept_worth(self, moments: Tensors) -> Tensor:
        """What moments are worth that the next step finds."""
        kept = {name: self.memory.get(name, 0.0) * m for name, m in moments.items()}
        return self._worth_of(kept, {name: self.moment[name] for name in kept})

    def _worth_of(self, values: Tensors, mixtures: dict[str, Mixture]) -> Tensor:
        """Inner products of one vector with co-states, [q, c]."""
        total = self._along({n: mixtures[n][0] * v for n, v in values.items() if not is_zero(mixtures[n][0])})
        for place, later in enumerate(self.later, 1):
            for name, tensor in later.items():
                if name in values and not is_zero(mixtures[name][place]):
                    total = total + tensor @ (mixtures[name][place] * values[name]).flatten()
        return total

    def _along(self, direction: Tensors) -> Tensor:
        """⟨D, direction⟩, [q, c]."""
        total = torch.zeros_like(self.secants[0][1].start)
        for weight, secant in self.secants:
            total += weight * secant.along(direction)
        return total

    def _against(self, factors: Factors, mixtures: dict[str, Mixture]) -> Tensor:
        """Inner products of examples' gradients with co-states, [n, k, q, c]."""
        names = {name for factor in factors for name in factor.names}
        first = mixtures[next(iter(names))]
        if any(is_elementwise(mixtures[n]) or mixtures[n] != first for n in names):
            own = self._write_out()
            self.scratch = self.scratch or {n: torch.empty_like(own[n]) for n in own}
            written = {n: self._dense(n, mixtures[n], self.scratch[n]) for n in names}
            filled = {n: torch.zeros_like(own[n]) if t is None else t for n, t in written.items()}
            return against_dense(factors, filled, wide(self.secants[0][1].start))
        total = sum((against(factors, secant) * (weight * first[0]) for weight, secant in self.secants), 0.0)
        for place, later in enumerate(self.later, 1):
            if later and first[place]:
                total = total + against_dense(factors, later, wide(self.secants[0][1].start)) * first[place]
        return total  # type: ignore[return-value]

    def _dense(self, name: str, mixture: Mixture, out: Tensor | None = None) -> Tensor | None:
        """One parameter's co-state written out, [q, c, p], into ``out`` if given; ``None`` for zero."""
        total: Tensor | None = None
        for place, coefficient in enumerate(mixture):
            if is_zero(coefficient) or (place > 0 and name not in self.later[place - 1]):
                continue
            source = self._write_out()[name] if place == 0 else self.later[place - 1][name]
            by = coefficient.flatten() if isinstance(coefficient, Tensor) else coefficient
            if total is None:
                total = torch.mul(source, by, out=out)
            elif isinstance(by, Tensor):
                total.addcmul_(source, by)
            else:
                total.add_(source, alpha=by)
        return total

    def _write_out(self) -> Tensors:
        """D of every parameter, [q, c, p]."""
        if not self.written:
            q, c = self.secants[0][1].start.shape
            dtype = self.walk.dtype
            self.written = {n: p.new_zeros(q, c, p.numel(), dtype=dtype) for n, p in self.walk.parameters.items()}
            for weight, secant in self.secants:
                for part in (d for f in secant.factors for d in f.dense()):
                    if part.weight in self.written:
                        self.written[part.weight] += weight * part.values
                for name, direction in secant.direction.items():
                    if secant.correction is not None and name in self.written:
                        self.written[name] += weight * secant.correction[..., None] * direction.flatten()
        return self.written
