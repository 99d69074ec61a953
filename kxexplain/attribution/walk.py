"""Going along a trajectory segment by segment: what each example put into the parameters, and where they went."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import Factors, concatenate, scale, signature, size, take
from kxexplain.gradients.ordinary import StepGradients, layout_of, trainable
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

    @property
    def end(self) -> Tensors:
        """Parameters and floating-point buffers at ``last``."""
        if self._end is None:
            self._end = self.find_end()
        return self._end


@dataclass(frozen=True)
class Updates:
    """What a number of example visits put into the parameters during a segment.

    Attributes:
        indices: the examples' dataset indices, [m]; one may occur several times.
        factors: their updates −η_t s_t g_{t,i}, [m, 1].
        alpha: size of the pull on the outputs, [m]: −∂ℓ/∂f for one output, ‖∂ℓ/∂f‖ for several.
        jacobian: η_t-weighted output gradients w ∇f_c, [m, C], if asked for.
    """

    indices: Tensor
    factors: Factors
    alpha: Tensor
    jacobian: Factors | None


@dataclass
class Movement:
    """How the parameters moved over a segment, by cause; summed over its steps.

    Attributes:
        gradient: by the examples' gradients.
        decay: by the regulariser.
    """

    gradient: Tensors = field(default_factory=dict)
    decay: Tensors = field(default_factory=dict)

    def add(self, parts: Split, gradients: Tensors, before: Tensors) -> None:
        """Account for one step."""
        for name, gradient in gradients.items():
            _add(self.gradient, name, gradient, parts.gradient[name])
            if parts.decay[name] != 0:
                _add(self.decay, name, before[name], parts.decay[name])


def _add(sums: Tensors, name: str, value: Tensor, by: float) -> None:
    if name in sums:
        sums[name].add_(value, alpha=by)
    else:
        sums[name] = value * by


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


class Walk:
    """One pass along a trajectory with a private copy of the model.

    Args:
        replayer: entered, at no particular position.
        stride: steps per segment; the recorded states if ``None``.
        budget: bytes that buffered updates may take.
        jacobian: also collect output gradients (for C × C kernels).
        examples: only these dataset indices are collected, all if ``None``.
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
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.replayer, self.budget, self.jacobian, self.tick = replayer, budget, jacobian, tick
        self.trajectory = replayer.trajectory
        self.bounds = bounds(self.trajectory, stride)
        self.recorded = {state.step for state in self.trajectory.states}
        self.wanted: Tensor | None = None
        if examples is not None:
            self.wanted = torch.zeros(self.trajectory.manifest.dataset.count, dtype=torch.bool)
            self.wanted[examples] = True
        replayer.seek(0)
        self.parameters = trainable(replayer.model)
        self.itemised = self._split(0) is not None
        if not self.itemised:
            name = self.trajectory.manifest.optimizer.name
            message = f"how {name} turns gradients into steps is not itemised: its movement is unattributed"
            warnings.warn(message, stacklevel=4)
        with torch.random.fork_rng(devices=[]):
            inputs, _ = fetch(replayer.dataset, self.trajectory.steps[0].indices, replayer.device)
            self.layout = layout_of(replayer.model, inputs, self.parameters)
        replayer.seek(0)
        self._buffer: list[Updates] = []

    def _split(self, step: int) -> Split | None:
        return split(self.trajectory.manifest.optimizer, self.trajectory.steps[step])

    def visit(self, visitor: Visitor) -> None:
        """Replay the whole trajectory, telling the visitor."""
        for number, (first, last) in enumerate(zip(self.bounds, self.bounds[1:])):
            segment = Segment(number, first, last, self.replayer.copy_state(), self._end_finder(last))
            movement = Movement()
            for _ in range(first, last):
                self._step(segment, movement, visitor)
            segment._end = segment._end or self.replayer.copy_state()
            self._flush(segment, visitor)
            visitor.close(segment, movement)

    def _step(self, segment: Segment, movement: Movement, visitor: Visitor) -> None:
        step = self.replayer.position
        parts = self._split(step)
        if parts is None:
            self.replayer.advance()
        else:
            record = self.trajectory.steps[step]
            decaying = any(parts.decay.values())
            before = self.replayer.copy_state() if decaying else {}
            watch = StepGradients(self.layout, self.parameters, len(record.indices), self.jacobian)
            taken = self.replayer.advance(watch)
            movement.add(parts, taken.gradients, before)
            self._keep(watch, record, parts)
            if sum(_bytes(u) for u in self._buffer) > self.budget:
                self._flush(segment, visitor)
        self.tick()

    def _keep(self, watch: StepGradients, record: StepRecord, parts: Split) -> None:
        """Buffer one step's updates, scaled to what they did to the parameters."""
        indices = torch.as_tensor(record.indices)
        share = 1.0 / len(indices) if self.trajectory.manifest.reduction == "mean" else 1.0
        pull = -watch.pull / share
        alpha = pull[:, 0] if pull.shape[1] == 1 else pull.norm(dim=1)
        factors = scale(watch.factors, parts.gradient)
        jacobian = None
        if watch.jacobian is not None:
            jacobian = scale(watch.jacobian, {name: -rate * share for name, rate in parts.gradient.items()})
        kept = Updates(indices, factors, alpha, jacobian)
        if self.wanted is not None:
            rows = self.wanted[indices].nonzero().squeeze(1)
            if not len(rows):
                return
            kept = Updates(
                indices[rows], take(factors, rows), alpha[rows], None if jacobian is None else take(jacobian, rows)
            )
        self._buffer.append(kept)

    def _flush(self, segment: Segment, visitor: Visitor) -> None:
        """Hand the buffered updates over, joined as far as they have the same uses."""
        pending, self._buffer = self._buffer, []
        while pending:
            head = signature(pending[0].factors)
            alike = [u for u in pending if signature(u.factors) == head]
            pending = [u for u in pending if signature(u.factors) != head]
            if alike[0].factors:
                visitor.updates(segment, _joined(alike))

    def _end_finder(self, last: int) -> Callable[[], Tensors]:
        """The state at ``last``: recorded, or found by a replay of its own that runs ahead."""

        def find() -> Tensors:
            if last in self.recorded:
                state = self.trajectory.state(last)
                values = {**state.parameters, **state.buffers}
                return {k: v.to(self.replayer.device) for k, v in values.items() if v.is_floating_point()}
            ahead = self.replayer.twin()
            while ahead.position < last:
                ahead.advance()
            return ahead.copy_state()

        return find


def _bytes(updates: Updates) -> int:
    return size(updates.factors) + (0 if updates.jacobian is None else size(updates.jacobian))


def _joined(pieces: list[Updates]) -> Updates:
    jacobians = [u.jacobian for u in pieces if u.jacobian is not None]
    return Updates(
        torch.cat([u.indices for u in pieces]),
        concatenate([u.factors for u in pieces]),
        torch.cat([u.alpha for u in pieces]),
        concatenate(jacobians) if jacobians else None,
    )
