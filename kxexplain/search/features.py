r"""The queries' side of the index: C_i(x) = Σ_s ⟨D_s(x), P_{s,i}⟩ ≈ ⟨query's feature, example's feature⟩.

The discrete gradients D_s(x) come from recorded states alone. Both sides are projected segment by segment
(:class:`kxexplain.gradients.projection.Projection`) and laid side by side over the segments; where there are more
segments than the dimension has room for, neighbouring ones are added in one block, with projections of their own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from kxexplain.attribution.queries import Ends, QuerySide
from kxexplain.attribution.targets import ResolvedTarget, TargetSpec, resolve_target
from kxexplain.attribution.walk import Segment, bounds
from kxexplain.errors import ArgumentError
from kxexplain.gradients.discrete import Secant
from kxexplain.gradients.factors import Dense
from kxexplain.gradients.projection import Projection
from kxexplain.gradients.two_point import TwoPoint
from kxexplain.kernels import quadrature
from kxexplain.shapes import Inputs
from kxexplain.trajectory import Trajectory, fetch

MEMORY = 10**9
"""Bytes that the queries' gradients may take."""

KEPT = 1 << 28
"""Bytes of recorded states, and of what lies between them, that stay in memory from one search to the next."""

CLASS_LOSSES = ("cross_entropy", "hinge", "logistic")
"""Losses whose label can be read off the outputs."""


def recorded_segments(trajectory: Trajectory, device: torch.device) -> Iterator[Segment]:
    """The segments between recorded states, from the states' files alone."""

    def values(step: int) -> dict[str, Tensor]:
        state = trajectory.state(step)
        return {k: t.to(device) for k, t in {**state.parameters, **state.buffers}.items() if t.is_floating_point()}

    borders = bounds(trajectory, None)
    start = values(borders[0])
    for number, (first, last) in enumerate(pairwise(borders)):
        end = values(last)
        yield Segment(number, first, last, start, lambda: {}, end)
        start = end


def query_features(
    segments: Iterable[Segment], side: QuerySide, projection: Projection
) -> Float32[Tensor, "query dim"]:
    """Features of queries about one number each; on the CPU."""
    return sketched(segments, side, projection, 1)[:, 0]


def sketched(
    segments: Iterable[Segment], side: QuerySide, projection: Projection, columns: int
) -> Float32[Tensor, "query c dim"]:
    """Features of queries about some numbers each; on the CPU."""
    features = torch.zeros(side.rows, columns, projection.dim)
    with torch.random.fork_rng(devices=[]):
        for segment in segments:
            place = features[..., projection.columns(segment.number)]
            for rows in side.chunks():
                for weight, secant in side.secants(segment.change(side.names), rows):
                    sketches = _sketch(secant, projection, segment.number) * weight
                    place[rows] += sketches.to("cpu", torch.float32)
    return features


def _both(one: ResolvedTarget, other: ResolvedTarget) -> ResolvedTarget:
    """Two numbers about every query, from one pass through the model."""

    def select(values: Tensor, rows: Tensor | slice) -> Tensor:
        parts = [one.select(values, rows), other.select(values, rows)]
        followed = [part for part in parts if isinstance(part, TwoPoint)]
        return TwoPoint.beside(followed) if len(followed) == len(parts) else torch.cat(parts, 1)

    return ResolvedTarget(f"{one.name}, {other.name}", select, None, 2)


def _sketch(secant: Secant, projection: Projection, segment: int) -> Tensor:
    """The sketch of D + correction · Δ, [q, c, k]."""
    found = projection(secant.factors, segment)
    if secant.correction is None:
        return found
    direction = projection([Dense(n, d.reshape(1, 1, -1)) for n, d in secant.direction.items()], segment)
    return found + secant.correction[:, :, None] * direction


def descent(trajectory: Trajectory, side: QuerySide) -> tuple[QuerySide | None, str]:
    """The queries' losses as what is asked about, from a side asked about all outputs; and what that is called.

    With the given labels, else with those the outputs stand for; ``None`` where neither can be had.

    Raises:
        TargetError: the labels do not fit the loss.
    """
    outputs, labels, name = side.prediction, side.labels, "loss of the given label"
    if labels is None:
        if trajectory.loss_name not in CLASS_LOSSES:
            return None, "target"
        labels, name = _predicted(outputs, trajectory.loss_name), "loss of the predicted label"
    return replace(side, target=resolve_target("loss", outputs, labels, trajectory.loss, side.shape)), name


def _predicted(outputs: Tensor, loss: str) -> Tensor:
    """The labels that a class loss would call right: the largest output, or the sign where outputs stand alone."""
    if outputs.shape[1] > 1 and loss != "logistic":
        return outputs.argmax(1)
    positive = (outputs > 0).to(outputs.dtype)
    return positive if outputs.shape[1] > 1 else positive[:, 0].long()


@dataclass(frozen=True)
class Asked:
    """Queries, ready to be looked up.

    Attributes:
        features: of what is asked about, [q, dim].
        pushes: of the way the query's own loss would push the parameters, [q, dim].
        name: of the target.
        measure: what the pushes are of.
        output: the output number asked about per query, [q], where there is one.
        labels: the queries' labels, where given.
        inputs: the queries' inputs.
    """

    features: Float32[Tensor, "q dim"]
    pushes: Float32[Tensor, "q dim"]
    name: str
    measure: str
    output: Tensor | None
    labels: Tensor | None
    inputs: Inputs


class Asking:
    """Makes queries' features; keeps the recorded states in memory where they take little."""

    def __init__(self, trajectory: Trajectory, model: nn.Module, projection: Projection) -> None:
        self.trajectory, self.model, self.projection = trajectory, model, projection
        self._segments: list[Segment] = []

    @cached_property
    def _ends(self) -> Ends:
        return Ends.of(self.trajectory, self.model)

    def ask(self, queries: Any, target: TargetSpec) -> Asked:
        """The features of these queries.

        Raises:
            ModelError, DatasetError, TargetError: as :meth:`GradientIndex.search`.
            ArgumentError: gradients that are not finite.
        """
        rule = quadrature.rule("discrete")
        self.trajectory.check_model(self.model)
        side = QuerySide.prepare(self._ends, queries, "all", rule, MEMORY)
        outputs, loss = side.prediction, self.trajectory.loss if target == "loss" else None
        asked = replace(side, target=resolve_target(target, outputs, side.labels, loss, side.shape))
        losses, measure = descent(self.trajectory, side)
        if losses is None:
            features = pushes = self._features(asked, 1)[:, 0]
        else:
            found = self._features(replace(side, target=_both(asked.target, losses.target)), 2)
            features, pushes = found[:, 0], -found[:, 1]
        return Asked(
            features, pushes, asked.target.name, measure, asked.target.output, side.labels, side.inputs
        )  # fmt: skip

    def _features(self, side: QuerySide, columns: int) -> Tensor:
        features = sketched(self._along(side.prediction.device), side, self.projection, columns)
        if not bool(features.isfinite().all()):
            raise ArgumentError("the queries' gradients are not finite; search for finite inputs and targets")
        return features

    def _along(self, device: torch.device) -> Iterable[Segment]:
        """The segments, from memory if they were small enough to stay there."""
        if self._segments:
            return self._segments
        first = self.trajectory.state(self.trajectory.states[0].step)
        each = sum(t.nbytes for t in (*first.parameters.values(), *first.buffers.values()))
        segments = recorded_segments(self.trajectory, device)
        if 3 * each * len(self.trajectory.states) > KEPT:  # a segment's middle and direction are kept with its end
            return segments
        self._segments = list(segments)
        return self._segments


def example_labels(dataset: Any, count: int) -> Tensor | None:
    """The training examples' labels, [train], if they are single numbers."""
    with torch.random.fork_rng(devices=[]):
        pieces = [fetch(dataset, range(at, min(at + 4096, count)))[1].cpu() for at in range(0, count, 4096)]
    return torch.cat(pieces) if all(piece.dim() == 1 for piece in pieces) else None
