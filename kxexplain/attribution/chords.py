"""Going along the chords between imported checkpoints: nothing is replayed, every gradient is one at a checkpoint.

Of the chord from θ_k to θ_{k+1}, example i is credited −c_k ∇ℓ_i(θ_k) times its share in the reduced loss, with the
coefficient c_k that the import found (:mod:`kxexplain.trajectory.importing`), in evaluation mode. A parameter that the
chord leaves as it is was frozen, and no example's gradient moved it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kxexplain.attribution.visits import Visits
from kxexplain.attribution.walk import Movement, Segment, Visitor, bounds
from kxexplain.gradients.factors import scale
from kxexplain.gradients.ordinary import StepGradients, layout_of
from kxexplain.shapes import Examples, Tensors
from kxexplain.trajectory import State, Trajectory, fetch
from kxexplain.trajectory.forward import forward, gradients, private_copy
from kxexplain.trajectory.importing import BATCH, moved
from kxexplain.trajectory.states import load_model
from kxexplain.trajectory.updates import Split


class ChordWalk:
    """One pass along imported checkpoints with a private copy of the model.

    Args:
        trajectory: made by :func:`kxexplain.import_checkpoints`.
        model: of its architecture.
        dataset: the training examples.
        stride: chords per segment; one if ``None``.
        budget: bytes that buffered updates may take.
        jacobian: also collect output gradients (for C × C kernels).
        examples: only these dataset indices are gone through, all if ``None``; the movement told is theirs alone.
        dtype: of what is collected and accounted for, if not the model's own.
        tick: called after every chord.

    Raises:
        ModelError: not the architecture of the checkpoints.
        DatasetError: not the examples that were imported with.
    """

    drift: float | None = None
    """There is no replay that could drift."""

    def __init__(
        self,
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        *,
        stride: int | None = None,
        budget: int = 1 << 28,
        jacobian: bool = False,
        examples: Tensor | None = None,
        dtype: torch.dtype | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        trajectory.check_model(model)
        trajectory.check_dataset(dataset)
        self.trajectory, self.dataset = trajectory, dataset
        self.budget, self.jacobian, self.dtype, self.tick = budget, jacobian, dtype, tick
        self.bounds = bounds(trajectory, stride)
        self.loss, self.names = trajectory.loss, trajectory.manifest.optimizer.groups[0].names
        count = trajectory.manifest.dataset.count
        self.share = 1.0 / count if trajectory.manifest.reduction == "mean" else 1.0
        self.indices = torch.arange(count) if examples is None else examples.cpu()
        self.model = private_copy(model).eval()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.names)
        self.parameters: Tensors = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.device = next(iter(self.parameters.values())).device
        with torch.random.fork_rng(devices=[]):
            load_model(trajectory.state(0), self.model)
            inputs, _ = fetch(dataset, self.indices[:BATCH], self.device)
            self.layout = layout_of(self.model, inputs, self.parameters)
        self._visits = Visits()

    def visit(self, visitor: Visitor, segments: range | None = None) -> None:
        """Go along all chords, or those of some segments, telling the visitor."""
        for number in range(len(self.bounds) - 1) if segments is None else segments:
            first, last = self.bounds[number : number + 2]
            start = self.trajectory.state(first)
            segment = Segment(number, first, last, self._values(start), dict, self._values(self.trajectory.state(last)))
            movement = Movement()
            for chord in range(first, last):
                self._chord(chord, segment, movement, visitor)
                self.tick()
            self._flush(segment, visitor)
            visitor.close(segment, movement)

    def _values(self, state: State) -> Tensors:
        values = {**state.parameters, **state.buffers}
        return {name: v.to(self.device, self.dtype or v.dtype) for name, v in values.items() if v.is_floating_point()}

    def _chord(self, chord: int, segment: Segment, movement: Movement, visitor: Visitor) -> None:
        """What all examples put into one chord, batch by batch."""
        start, end = self.trajectory.state(chord), self.trajectory.state(chord + 1)
        weight = self.trajectory.steps[chord].rates[0] * self.share
        free = set(moved(start, end, self.names))
        if weight == 0 or not free:
            return
        load_model(start, self.model)
        parts = Split({n: -weight if n in free else 0.0 for n in self.names}, dict.fromkeys(self.names, 0.0))
        left = len(self.indices) * (segment.last - chord)
        for indices in self.indices.split(BATCH):
            self._batch(indices, left, parts, segment=segment, movement=movement, visitor=visitor)
            left -= len(indices)

    def _batch(
        self, indices: Tensor, left: int, parts: Split, *, segment: Segment, movement: Movement, visitor: Visitor
    ) -> None:
        """Some examples' gradients; ``left`` is how many visits the segment still has."""
        inputs, targets = fetch(self.dataset, indices, self.device)
        watch = StepGradients(self.layout, self.parameters, len(indices), self.jacobian, dtype=self.dtype)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            around = watch.forward(inputs)
            result = forward(self.model, inputs, targets, loss=self.loss, reduction="sum", around=around)
            edges = watch.edges(result.outputs, result.losses, result.total)
            found, at_edges = gradients(result.total, list(self.parameters.values()), edges)
        watch.collect(at_edges)
        sums = {n: g for n, g in zip(self.parameters, found, strict=True) if g is not None}
        movement.add(parts, watch.accounted(sums), {})
        if not watch.factors:
            return
        factors, jacobian = scale(watch.factors, parts.gradient), None
        if watch.jacobian is not None:
            jacobian = scale(watch.jacobian, {name: -factor for name, factor in parts.gradient.items()})
        if not self._visits.fits(factors, len(indices), jacobian):
            self._flush(segment, visitor)
            self._visits.make_room(factors, len(indices), jacobian, self.budget, left)
        self._visits.add(factors, 1.0, jacobian, indices, -watch.pull)

    def _flush(self, segment: Segment, visitor: Visitor) -> None:
        """Hand the gathered updates over."""
        if self._visits.indices:
            visitor.updates(segment, self._visits.joined())
            self._visits.clear()
