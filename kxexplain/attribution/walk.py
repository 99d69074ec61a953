"""Going along a trajectory segment by segment: what each example put into the parameters, and where they went."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kxexplain.attribution.visits import Updates, Visits
from kxexplain.errors import ArgumentError
from kxexplain.gradients.discrete import Change
from kxexplain.gradients.factors import scale, take
from kxexplain.gradients.ordinary import StepGradients, layout_of
from kxexplain.gradients.uses import Layout
from kxexplain.shapes import Tensors
from kxexplain.trajectory import Replayer, StepRecord, Trajectory, split
from kxexplain.trajectory.batches import fetch
from kxexplain.trajectory.updates import Split


@dataclass
class Segment:
    """A stretch of steps between two parameter states.

    Attributes:
        number: place among the segments.
        first: the step it begins at.
        last: the step it ends at.
        start: parameters and floating-point buffers at ``first``.
        find_end: fetches those at ``last``, once.
    """

    number: int
    first: int
    last: int
    start: Tensors
    find_end: Callable[[], Tensors]
    _end: Tensors | None = None
    _change: Change | None = None

    def change(self, names: list[str]) -> Change:
        """What it changed of these names' values, which are the same whoever asks."""
        if self._change is None:
            self._change = Change.between(self.start, self.end, names)
        return self._change

    @property
    def end(self) -> Tensors:
        """Parameters and floating-point buffers at ``last``."""
        if self._end is None:
            self._end = self.find_end()
        return self._end


@dataclass
class Movement:
    """How the parameters moved over a segment, by cause; summed over its steps.

    Attributes:
        gradient: by the examples' gradients.
        decay: by the regulariser.
        penalty: by a penalty on the gradient.
    """

    gradient: Tensors = field(default_factory=dict)
    decay: Tensors = field(default_factory=dict)
    penalty: Tensors = field(default_factory=dict)

    def add(self, parts: Split, gradients: Tensors, before: Tensors, penalty: Tensors | None = None) -> None:
        """Account for one step."""
        _add(self.gradient, gradients, parts.gradient)
        if penalty:
            _add(self.penalty, penalty, parts.gradient)
        if parts.decays:
            _add(self.decay, {name: before[name] for name in gradients if parts.decay[name] != 0}, parts.decay)


def _add(sums: Tensors, values: Tensors, by: dict[str, float]) -> None:
    """Add by · values to the sums, all parameters of one factor in one call."""
    for name, value in values.items():
        if name not in sums:
            sums[name] = torch.zeros_like(value)
    for factor in {by[name] for name in values}:
        names = [name for name in values if by[name] == factor]
        torch._foreach_add_([sums[name] for name in names], [values[name] for name in names], alpha=factor)


@runtime_checkable
class Visitor(Protocol):
    """Makes something of a trajectory as :func:`walk` passes along it."""

    def updates(self, segment: Segment, updates: Updates) -> None:
        """Some of the segment's updates; called as often as the memory budget asks for."""

    def close(self, segment: Segment, movement: Movement) -> None:
        """The segment is over."""


def bounds(trajectory: Trajectory, stride: int | None) -> list[int]:
    """Segment borders: the recorded states, or every ``stride`` steps.

    Raises:
        ArgumentError: for a stride below 1, or a trajectory without a step.
    """
    if len(trajectory) == 0:
        raise ArgumentError("the trajectory has no steps: there is nothing to explain; train first")
    if stride is None:
        return [state.step for state in trajectory.states]
    if isinstance(stride, bool) or not isinstance(stride, int) or stride < 1:
        raise ArgumentError(f"got stride={stride!r}; expected a number of steps of at least 1, or None")
    return [*range(0, len(trajectory), stride), len(trajectory)]


def watched(replayer: Replayer) -> tuple[Tensors, Layout]:
    """The parameters that the optimiser moves, and where the model keeps its examples; leaves the replayer anywhere.

    All of them count as trainable meanwhile: one that begins frozen may be freed later.
    """
    replayer.seek(0)
    groups = replayer.trajectory.manifest.optimizer.groups
    parameters: Tensors = {name: replayer.parameters[name] for group in groups for name in group.names}
    for parameter in parameters.values():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.random.fork_rng(devices=[]):
        inputs, _ = fetch(replayer.dataset, replayer.trajectory.steps[0].indices, replayer.device)
        return parameters, layout_of(replayer.model, inputs, parameters)


def share_of(trajectory: Trajectory, record: StepRecord) -> float:
    """An example's weight in the reduced loss."""
    return 1.0 / len(record.indices) if trajectory.manifest.reduction == "mean" else 1.0


def mask_of(trajectory: Trajectory, examples: Tensor | None) -> Tensor | None:
    """Which of all training examples are meant, [train]; ``None`` for all."""
    if examples is None:
        return None
    mask = torch.zeros(trajectory.manifest.dataset.count, dtype=torch.bool)
    mask[examples.cpu()] = True
    return mask


def is_steady(trajectory: Trajectory) -> bool:
    """Whether an example is served alike every time, and not augmented at random."""
    return not trajectory.manifest.dataset.random


def state_of(replayer: Replayer, dtype: torch.dtype | None) -> Tensors:
    """Copies of the replayed parameters and floating-point buffers, in their own type or another."""
    return {name: value.to(dtype or value.dtype) for name, value in replayer.copy_state().items()}


def watch_of(
    replayer: Replayer, layout: Layout, parameters: Tensors, *, jacobian: bool, dtype: torch.dtype | None
) -> StepGradients:
    """Watches the examples' gradients in the replayer's next step; they are given in ``dtype``, or the model's own.

    What an input penalty adds to an example's loss passes through the layers' derivatives, which no contact describes.
    """
    rows = len(replayer.trajectory.steps[replayer.position].indices)
    return StepGradients(
        layout, parameters, rows, jacobian,
        steady=is_steady(replayer.trajectory), whole=bool(replayer.objective.input_penalty), dtype=dtype,
    )  # fmt: skip


class Walk:
    """One pass along a trajectory with a private copy of the model.

    Args:
        replayer: entered, at no particular position.
        stride: steps per segment; the recorded states if ``None``.
        budget: bytes that buffered updates may take.
        jacobian: also collect output gradients (for C × C kernels).
        examples: only these dataset indices are collected, all if ``None``. Steps without one of them are replayed
            without a look, or not at all where a recorded state lies behind them, and nothing else is accounted for:
            ``close`` is not called.
        dtype: of what is collected and accounted for, if not the model's own.
        tick: called after every step.
    """

    def __init__(
        self,
        replayer: Replayer,
        *,
        stride: int | None = None,
        budget: int = 1 << 28,
        jacobian: bool = False,
        examples: Tensor | None = None,
        dtype: torch.dtype | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.replayer, self.budget, self.jacobian, self.dtype, self.tick = replayer, budget, jacobian, dtype, tick
        self.trajectory = replayer.trajectory
        self.bounds = bounds(self.trajectory, stride)
        self.recorded = {state.step for state in self.trajectory.states}
        self.wanted = mask_of(self.trajectory, examples)
        self.parameters, self.layout = watched(replayer)
        replayer.seek(0)
        self._visits = Visits()
        self._watch = watch_of(replayer, self.layout, self.parameters, jacobian=jacobian, dtype=dtype)
        self._known: tuple[object, Split | None] = (None, None)

    @property
    def drift(self) -> float | None:
        """How far replay has come off the recorded states."""
        return self.replayer.drift

    def _split(self, record: StepRecord) -> Split | None:
        """How this step splits, which is as the last one did while the rates stay."""
        rates = (record.rates, record.sign, record.clip)
        if rates != self._known[0]:
            self._known = (rates, split(self.trajectory.manifest.optimizer, record))
        return self._known[1]

    def visit(self, visitor: Visitor, segments: range | None = None) -> None:
        """Replay the trajectory, or consecutive segments of it whose first begins at a recorded state."""
        segments = range(len(self.bounds) - 1) if segments is None else segments
        for number in segments:
            first, last = self.bounds[number : number + 2]
            steps = range(first, last) if self.wanted is None else self._concerned(first, last)
            if len(steps):
                self._go_to(first)
                segment = Segment(number, first, last, state_of(self.replayer, self.dtype), self._end_finder(last))
                movement = Movement()
                while self.replayer.position <= steps[-1]:
                    self._step(segment, movement, visitor)
                if self.replayer.position == last:
                    segment._end = segment._end or state_of(self.replayer, self.dtype)
                self._flush(segment, visitor)
                if self.wanted is None:
                    visitor.close(segment, movement)
            for _ in range(last - (steps[-1] + 1 if len(steps) else first)):
                self.tick()

    def _concerned(self, first: int, last: int) -> list[int]:
        """The steps in which an example that is asked for took part."""
        assert self.wanted is not None
        return [t for t in range(first, last) if bool(self.wanted[self.trajectory.steps[t].indices].any())]

    def _go_to(self, step: int) -> None:
        """Come to the start of a segment, from where the replay is or from a recorded state."""
        state = max(s for s in self.recorded if s <= step)
        if not state <= self.replayer.position <= step:
            self.replayer.seek(state)
        while self.replayer.position < step:
            self.replayer.advance()

    def _step(self, segment: Segment, movement: Movement, visitor: Visitor) -> None:
        step = self.replayer.position
        record = self.trajectory.steps[step]
        parts = self._split(record)
        if parts is None or (self.wanted is not None and not bool(self.wanted[record.indices].any())):
            self.replayer.advance()
        else:
            decaying = self.wanted is None and parts.decays
            before = state_of(self.replayer, self.dtype) if decaying else {}
            watch = self._watch.renewed(len(record.indices))
            taken = self.replayer.advance(watch)
            if self.wanted is None:
                penalty = {name: self._placed(extra) for name, extra in taken.penalty.items()}
                movement.add(parts, watch.accounted(taken.gradients), before, penalty)
            self._keep(watch, record, parts, segment, visitor)
        self.tick()

    def _keep(self, watch: StepGradients, record: StepRecord, parts: Split, segment: Segment, visitor: Visitor) -> None:
        """Gather what one step's examples did; the arithmetic waits until many steps can share it."""
        share = share_of(self.trajectory, record)
        factors, weight = watch.factors, parts.common
        if weight is None:
            factors, weight = scale(factors, parts.gradient), 1.0
        jacobian = None
        if watch.jacobian is not None:
            jacobian = scale(watch.jacobian, {name: -factor * share for name, factor in parts.gradient.items()})
        indices, pull = torch.from_numpy(record.indices), watch.pull
        if self.wanted is not None:
            rows = self.wanted[indices].nonzero().squeeze(1)
            factors, indices, pull = take(factors, rows), indices[rows], pull[rows]
            jacobian = None if jacobian is None else take(jacobian, rows)
        if len(indices) == 0 or not factors:
            return
        if not self._visits.fits(factors, len(indices), jacobian):
            self._flush(segment, visitor)
            self._visits.make_room(factors, len(indices), jacobian, self.budget, self._left(segment))
        self._visits.add(factors, weight, jacobian, indices, pull / -share)

    def _left(self, segment: Segment) -> int:
        """Number of example visits from the step just made to the segment's end."""
        return sum(len(step.indices) for step in self.trajectory.steps[self.replayer.position - 1 : segment.last])

    def _flush(self, segment: Segment, visitor: Visitor) -> None:
        """Hand the gathered updates over."""
        if self._visits.indices:
            self._watch.renewed(0)  # what the last step left behind needs no memory meanwhile
            visitor.updates(segment, self._visits.joined())
            self._visits.clear()

    def _end_finder(self, last: int) -> Callable[[], Tensors]:
        """The state at ``last``: recorded, or found by a replay of its own that runs ahead."""

        def find() -> Tensors:
            if last in self.recorded:
                state = self.trajectory.state(last)
                values = {**state.parameters, **state.buffers}
                return {k: self._placed(v) for k, v in values.items() if v.is_floating_point()}
            ahead = self.replayer.twin()
            while ahead.position < last:
                ahead.advance()
            return state_of(ahead, self.dtype)

        return find

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.replayer.device, self.dtype or value.dtype)
