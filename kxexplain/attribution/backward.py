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

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from kxexplain.attribution.ledger import Ledger, against
from kxexplain.attribution.queries import QuerySide
from kxexplain.attribution.rounding import cancelled, without
from kxexplain.attribution.walk import Segment, bounds, mask_of, pull_of, share_of, watch_of, watched
from kxexplain.gradients.discrete import Secant
from kxexplain.gradients.factors import Factors, scale, size, take, wide
from kxexplain.gradients.pile import Pile
from kxexplain.gradients.products import against_dense
from kxexplain.shapes import Tensors
from kxexplain.trajectory import Replayer
from kxexplain.trajectory.clipping import Clipping
from kxexplain.trajectory.optimizers import RECURSIONS, STILL, Coefficient, Recursion


def borders(replayer: Replayer, stride: int | None) -> list[int]:
    """Segment borders: as asked for, and at every recorded state, from where replay sets out."""
    recorded = {state.step for state in replayer.trajectory.states}
    return sorted(recorded | set(bounds(replayer.trajectory, stride)))


@dataclass
class Step:
    """What the backward pass must know of a step."""

    indices: Tensor
    factors: Factors
    alpha: Tensor
    jacobian: Factors | None
    factor: float
    recursions: dict[str, Recursion]
    decaying: Tensors
    strays: Tensors
    """Gradients that are no example's: what clamping by value did, and rounding."""
    penalty: Tensors
    """Gradients of a penalty on the gradient."""

    @property
    def bytes(self) -> int:
        """What it takes to keep."""
        held = [v for r in self.recursions.values() for v in (r.direct, r.intake, r.applied) if isinstance(v, Tensor)]
        held += [*self.decaying.values(), *self.strays.values(), *self.penalty.values()]
        return size([*self.factors, *(self.jacobian or [])]) + sum(t.numel() * t.element_size() for t in held)


@dataclass
class Stretch:
    """Steps of one segment, and what their recursions do not account for.

    Attributes:
        segment: number of the segment.
        steps: in order.
        left: movement that no recursion accounts for.
        moments: change of the moments that none accounts for, up to the end of the stretch.
        buffers: change of the model's buffers.
    """

    segment: int
    steps: list[Step] = field(default_factory=list)
    left: Tensors = field(default_factory=dict)
    moments: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)


class Stretches:
    """Replays a trajectory stretch by stretch, the last one first, each forward from a recorded state.

    Args:
        replayer: entered, at no particular position.
        names: parameters and buffers whose movement is accounted for; ``buffers`` are those of them that are buffers.
        budget: bytes that the steps' gradients may take.
        stride: steps per segment; the recorded states if ``None``.
        jacobian: also collect output gradients (for C × C kernels).
        examples: only these dataset indices are collected, all if ``None``.
        tick: called after every replayed step.
    """

    def __init__(
        self,
        replayer: Replayer,
        names: list[str],
        buffers: set[str],
        budget: int,
        *,
        stride: int | None = None,
        jacobian: bool = False,
        examples: Tensor | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.replayer, self.names, self.buffers = replayer, names, buffers
        self.jacobian, self.tick = jacobian, tick
        self.trajectory = replayer.trajectory
        self.wanted: Tensor | None = None
        self.recorded = [state.step for state in self.trajectory.states]
        self.bounds = borders(replayer, stride)
        self.clipping = Clipping.noted(self.trajectory.manifest.settings)
        self.itemised = RECURSIONS[self.trajectory.manifest.optimizer.name]
        self.parameters, self.layout = watched(replayer)
        replayer.seek(0)
        self.at_start, self.moments_at_start = replayer.copy_state(), self._moments(replayer)
        self._piles: dict[str, Pile] = {}
        self.piece = 0
        probe = self._step(replayer, replayer.copy_state(), self._moments(replayer))
        self.piece = max(1, (budget // 2) // max(1, probe.bytes))
        """Steps whose gradients are held at once."""
        self.wanted = mask_of(self.trajectory, examples)

    @property
    def drift(self) -> float | None:
        """How far replay has come off the recorded states."""
        return self.replayer.drift

    def stretches(self) -> Iterator[tuple[Stretch, Segment]]:
        """The trajectory's stretches with their segments, last first."""
        for first, last in reversed(list(pairwise(self.recorded))):
            states: dict[int, Tensors] = {}
            for stretch in self._interval(first, last, states):
                start, end = self.bounds[stretch.segment : stretch.segment + 2]
                yield stretch, Segment(stretch.segment, start, end, states[start], dict, states[end])

    def _interval(self, first: int, last: int, states: dict[int, Tensors]) -> Iterator[Stretch]:
        """Stretches between two recorded states, last first; fills in the states at the borders between them."""
        self.replayer.seek(first)
        if last - first <= self.piece:
            yield from reversed(self._captured(self.replayer, first, last, states))
            return
        starts: list[tuple[int, Replayer]] = []
        for step in range(first, last):
            if (step - first) % self.piece == 0:
                starts.append((step, self.replayer.twin()))
            self._note(self.replayer, step, states)
            self.replayer.advance()
        self._note(self.replayer, last, states)
        while starts:
            step, twin = starts.pop()
            yield from reversed(self._captured(twin, step, min(step + self.piece, last), states))

    def _note(self, replayer: Replayer, step: int, states: dict[int, Tensors]) -> None:
        if self.bounds[bisect_left(self.bounds, step)] == step:
            states[step] = replayer.copy_state()

    def _captured(self, replayer: Replayer, first: int, last: int, states: dict[int, Tensors]) -> list[Stretch]:
        """The stretches of some replayed steps."""
        for pile in self._piles.values():  # the piece before this one was dealt with
            pile.clear()
        edges = [first, *self.bounds[bisect_right(self.bounds, first) : bisect_left(self.bounds, last)], last]
        found = []
        for start, end in pairwise(edges):
            self._note(replayer, start, states)
            number = bisect_right(self.bounds, start) - 1
            found.append(self._stretch(replayer, number, end))
        self._note(replayer, last, states)
        return found

    def _stretch(self, replayer: Replayer, number: int, end: int) -> Stretch:
        """Redo steps up to ``end``, and beside them the recursions on their own, from the same start."""
        stretch, before, moments = Stretch(number), replayer.copy_state(), self._moments(replayer)
        alone = {name: before[name].clone() for name in self.parameters}
        while replayer.position < end:
            stretch.steps.append(self._step(replayer, alone, moments))
            self.tick()
        after, actual = replayer.copy_state(), self._moments(replayer)
        for name in self.names:
            part = stretch.buffers if name in self.buffers else stretch.left
            part[name] = after[name] - alone.get(name, before[name])
        stretch.moments = {name: actual[name] - moments[name] for name in moments}
        return stretch

    def _step(self, replayer: Replayer, alone: Tensors, moments: Tensors) -> Step:
        """Redo one step; ``alone`` and ``moments`` (parameters and moments) go on as the recursions say."""
        record, own = self.trajectory.steps[replayer.position], self._own(replayer)
        held = {name: dict(replayer.optimizer.state.get(p, {})) for name, p in own.items()}
        watch = watch_of(replayer, self.layout, dict(own), jacobian=self.jacobian)
        replayed = replayer.advance(watch)
        found = replayed.gradients
        taken, sign = watch.accounted(found), record.sign * record.clip
        penalty = {name: sign * extra for name, extra in replayed.penalty.items()}
        recursions, decaying, strays = dict.fromkeys(own, STILL), {}, {}
        for group, rate in zip(self.trajectory.manifest.optimizer.groups, record.rates, strict=True):
            for name in set(group.names) & taken.keys():
                new = replayer.optimizer.state.get(own[name], {})
                recursions[name] = recursion = self.itemised.rule(group.options, rate, held[name], new)
                given = sign * taken[name] + penalty.get(name, 0.0)
                used = self.clipping.clamped(given)
                if used is not given and not torch.equal(used, given):
                    strays[name] = recursion.sign * (used - given)
                gradient = recursion.sign * used
                if name in penalty:
                    penalty[name] = recursion.sign * penalty[name]
                if recursion.l2 or recursion.shrink:
                    decaying[name] = alone[name].clone()
                    gradient += recursion.l2 * alone[name]
                alone[name] -= recursion.direct * gradient + recursion.shrink * alone[name]
                if not _zero(recursion.intake):
                    earlier = recursion.memory * moments[name] if name in moments else 0.0
                    moments[name] = earlier + recursion.intake * gradient
                    alone[name] -= recursion.applied * moments[name]
        adaptive = [n for n, r in recursions.items() if _elementwise((r.direct, r.intake, r.applied))]
        masks, rest = cancelled(watch.factors, found, adaptive)
        for name, stray in rest.items():  # found was replaced by what the shares add up to
            stray = recursions[name].sign * sign * (stray + taken[name] - found[name])
            strays[name] = strays[name] + stray if name in strays else stray
        share, indices, pull = share_of(self.trajectory, record), torch.as_tensor(record.indices), watch.pull
        factors = without(watch.factors, masks)
        jacobian = None if watch.jacobian is None else scale(without(watch.jacobian, masks), dict.fromkeys(own, share))
        if self.wanted is not None:
            kept = self.wanted[indices].nonzero().squeeze(1)
            factors, indices, pull = take(factors, kept), indices[kept], pull[kept]
            jacobian = None if jacobian is None else take(jacobian, kept)
            factors = factors if len(kept) else []
        rows = len(indices)
        return Step(
            indices, self._moved("updates", factors, rows),
            pull_of(pull / -share), None if jacobian is None else self._moved("jacobian", jacobian, rows),
            sign, recursions, decaying, strays, penalty,
        )  # fmt: skip

    def _moved(self, kind: str, factors: Factors, rows: int) -> Factors:
        """The factors in memory that every piece uses again.

        Were they left among what a step allocates and frees, each would keep a hole of that size from closing.
        """
        if self.piece == 0 or not factors or self.wanted is not None:
            return factors
        if kind not in self._piles:
            self._piles[kind] = Pile(factors, self.piece * rows)
        pile = self._piles[kind]
        return pile.moved(factors, rows) if pile.fits(factors, rows) else factors

    def _own(self, replayer: Replayer) -> dict[str, torch.nn.Parameter]:
        return {name: replayer.parameters[name] for name in self.parameters}

    def _moments(self, replayer: Replayer) -> Tensors:
        """Copies of the moments that the optimiser holds."""
        states = {name: replayer.optimizer.state.get(p, {}) for name, p in self._own(replayer).items()}
        held = {name: state.get(self.itemised.moment) for name, state in states.items()}
        return {name: value.detach().clone() for name, value in held.items() if isinstance(value, Tensor)}


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
    a, b, c = (sum((k * mixture[i] for k, mixture in terms if not _zero(mixture[i])), 0.0) for i in range(3))
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
            self.secants = self.walk.side.secants(segment.start, segment.end, self.rows)

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
        total = self._along({n: mixtures[n][0] * v for n, v in values.items() if not _zero(mixtures[n][0])})
        for place, later in enumerate(self.later, 1):
            for name, tensor in later.items():
                if name in values and not _zero(mixtures[name][place]):
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
        if any(_elementwise(mixtures[n]) or mixtures[n] != first for n in names):
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
            if _zero(coefficient) or (place > 0 and name not in self.later[place - 1]):
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
            self.written = {n: p.new_zeros(q, c, p.numel()) for n, p in self.walk.parameters.items()}
            for weight, secant in self.secants:
                for part in (d for f in secant.factors for d in f.dense()):
                    if part.weight in self.written:
                        self.written[part.weight] += weight * part.values
                for name, direction in secant.direction.items():
                    if secant.correction is not None and name in self.written:
                        self.written[name] += weight * secant.correction[..., None] * direction.flatten()
        return self.written


def _zero(value: Coefficient) -> bool:
    return not isinstance(value, Tensor) and value == 0


def _elementwise(values: tuple[Coefficient, ...]) -> bool:
    """Whether elements of one parameter have numbers of their own."""
    return any(isinstance(value, Tensor) for value in values)
