"""A trajectory's steps in stretches, the last one first: replayed forward, each with its recursion, read backward."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from kxexplain.attribution.rounding import cancelled, without
from kxexplain.attribution.visits import pull_of
from kxexplain.attribution.walk import Segment, bounds, mask_of, share_of, state_of, watch_of, watched
from kxexplain.gradients.factors import Factors, scale, size, take
from kxexplain.gradients.pile import Pile
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
        dtype: of what is collected and accounted for, if not the model's own.
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
        dtype: torch.dtype | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.replayer, self.names, self.buffers = replayer, names, buffers
        self.jacobian, self.dtype, self.tick = jacobian, dtype, tick
        self.trajectory = replayer.trajectory
        self.wanted: Tensor | None = None
        self.recorded = [state.step for state in self.trajectory.states]
        self.bounds = borders(replayer, stride)
        self.clipping = Clipping.noted(self.trajectory.manifest.settings)
        self.itemised = RECURSIONS[self.trajectory.manifest.optimizer.name]
        self.parameters, self.layout = watched(replayer)
        replayer.seek(0)
        self.at_start, self.moments_at_start = self._state(replayer), self._moments(replayer)
        self._piles: dict[str, Pile] = {}
        self.piece = 0
        probe = self._step(replayer, self._state(replayer), self._moments(replayer))
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
            states[step] = self._state(replayer)

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
        stretch, before, moments = Stretch(number), self._state(replayer), self._moments(replayer)
        alone = {name: before[name].clone() for name in self.parameters}
        while replayer.position < end:
            stretch.steps.append(self._step(replayer, alone, moments))
            self.tick()
        after, actual = self._state(replayer), self._moments(replayer)
        for name in self.names:
            part = stretch.buffers if name in self.buffers else stretch.left
            part[name] = after[name] - alone.get(name, before[name])
        stretch.moments = {name: actual[name] - moments[name] for name in moments}
        return stretch

    def _step(self, replayer: Replayer, alone: Tensors, moments: Tensors) -> Step:
        """Redo one step; ``alone`` and ``moments`` (parameters and moments) go on as the recursions say."""
        record, own = self.trajectory.steps[replayer.position], self._own(replayer)
        held = {name: dict(replayer.optimizer.state.get(p, {})) for name, p in own.items()}
        watch = watch_of(replayer, self.layout, dict(own), jacobian=self.jacobian, dtype=self.dtype)
        concerned = self.wanted is None or bool(self.wanted[record.indices].any())
        replayed = replayer.advance(watch if concerned else None)
        found = replayed.gradients
        taken, sign = watch.accounted(found), record.sign * record.clip
        penalty = {name: sign * self._cast(extra) for name, extra in replayed.penalty.items()}
        recursions, decaying, strays = dict.fromkeys(own, STILL), {}, {}
        for group, rate in zip(self.trajectory.manifest.optimizer.groups, record.rates, strict=True):
            for name in set(group.names) & taken.keys():
                new = replayer.optimizer.state.get(own[name], {})
                recursion = self.itemised.rule(group.options, rate, held[name], new)
                recursions[name] = recursion = recursion if self.dtype is None else recursion.cast(self.dtype)
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
                if not is_zero(recursion.intake):
                    earlier = recursion.memory * moments[name] if name in moments else 0.0
                    moments[name] = earlier + recursion.intake * gradient
                    alone[name] -= recursion.applied * moments[name]
        adaptive = [n for n, r in recursions.items() if is_elementwise((r.direct, r.intake, r.applied))]
        masks, rest = cancelled(watch.factors, found, adaptive)
        for name, stray in rest.items():  # found was replaced by what the shares add up to
            stray = recursions[name].sign * sign * (stray + taken[name] - found[name])
            strays[name] = strays[name] + stray if name in strays else stray
        share, indices = share_of(self.trajectory, record), torch.as_tensor(record.indices)
        pull = watch.pull if concerned else replayed.outputs.new_zeros(len(indices), 1)
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

    def _state(self, replayer: Replayer) -> Tensors:
        return state_of(replayer, self.dtype)

    def _cast(self, value: Tensor) -> Tensor:
        return value.to(self.dtype or value.dtype)

    def _moments(self, replayer: Replayer) -> Tensors:
        """Copies of the moments that the optimiser holds."""
        states = {name: replayer.optimizer.state.get(p, {}) for name, p in self._own(replayer).items()}
        held = {name: state.get(self.itemised.moment) for name, state in states.items()}
        return {name: self._cast(value.detach()).clone() for name, value in held.items() if isinstance(value, Tensor)}


def is_zero(value: Coefficient) -> bool:
    """Whether a coefficient is the number 0."""
    return not isinstance(value, Tensor) and value == 0


def is_elementwise(values: tuple[Coefficient, ...]) -> bool:
    """Whether elements of one parameter have numbers of their own."""
    return any(isinstance(value, Tensor) for value in values)
