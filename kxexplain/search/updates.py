r"""The training side of the index: P_{s,i}, what every example put into the parameters in segment s, projected.

The work is cut into *parts*: the steps of some consecutive segments, a pure function of recorded files. Their features
add, so parts can be done one after the other, skipped where they are done already, or shared out over workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float32, Int64
from torch import Tensor, nn

from kxexplain.attribution.decompose import forward_walk, remembers
from kxexplain.attribution.queries import moving_names
from kxexplain.attribution.stretches import Stretches
from kxexplain.attribution.visits import Updates
from kxexplain.attribution.walk import Movement, Segment, bounds
from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.projection import Projection
from kxexplain.kernels.budget import progress_bar
from kxexplain.search.carried import Carried, weighted
from kxexplain.shapes import Examples
from kxexplain.trajectory import Replayer, Trajectory, split
from kxexplain.trajectory.optimizers import RECURSIONS
from kxexplain.trajectory.records import OptimizerRecord

PARTS = 16
"""At most so many parts: each is a file as long as the examples and as wide as a block."""

BUDGET = 1 << 28
"""Bytes that gathered gradients may take."""

Blocks = dict[int, Float32[Tensor, "train k"]]
"""Features by block of coordinates; a block without an entry is zero."""

Sink = Callable[[int, Blocks], None]
"""Takes the number of a part and its features."""


def projection_for(trajectory: Trajectory, dim: int, *, seed: int = 0, segments: int | None = None) -> Projection:
    """The projection of a trajectory's trained parameters, one segment between every two recorded states.

    ``segments`` says for how many the coordinates are cut up, if for another number than there are.

    Raises:
        ArgumentError: a dimension below 16, or a trajectory without steps.
    """
    moving = set(moving_names(trajectory, *(trajectory.state(trajectory.states[i].step) for i in (0, -1))))
    shapes = {t.name: t.shape for t in trajectory.manifest.model.parameters if t.name in moving}
    return Projection(shapes, segments or len(bounds(trajectory, None)) - 1, dim, seed=seed)


def parts_of(segments: int) -> list[range]:
    """The segments of every part.

    >>> parts_of(3), len(parts_of(100))
    ([range(0, 1), range(1, 2), range(2, 3)], 16)
    """
    count = min(segments, PARTS)
    return [range(segments * i // count, segments * (i + 1) // count) for i in range(count)]


def check_optimizer(trajectory: Trajectory) -> None:
    """``ArgumentError`` for an optimiser whose steps nobody can divide among the examples."""
    optimizer = trajectory.manifest.optimizer
    if trajectory.manifest.logged and not plain(trajectory) and optimizer.name not in RECURSIONS:
        raise ArgumentError(
            f"the trajectory's optimiser is {described(optimizer)}, whose steps are not divided among the examples; "
            f"an index can be made of those of {', '.join(RECURSIONS)}"
        )


def plain(trajectory: Trajectory) -> bool:
    """Whether every step is the sum of its own examples' updates: SGD without momentum, or imported checkpoints."""
    return not trajectory.manifest.logged or split(trajectory.manifest.optimizer, trajectory.steps[0]) is not None


def described(optimizer: OptimizerRecord) -> str:
    """An optimiser's name, and for SGD what makes it another than the plain one."""
    return "SGD with momentum" if optimizer.name == "SGD" else optimizer.title


class UpdateFeatures:
    """Adds up projected updates, as a walk passes (:class:`kxexplain.attribution.walk.Visitor`) or step by step.

    Args:
        projection: of gradients to features.
        ids: the examples wanted, [n], in the order of the features.
        examples: number of training examples.
    """

    def __init__(self, projection: Projection, ids: Int64[Tensor, "n"], examples: int) -> None:
        self.projection, self.count = projection, len(ids)
        self.row = torch.full((examples,), -1)
        self.row[ids] = torch.arange(len(ids))
        self.blocks: Blocks = {}

    def updates(self, segment: Segment, updates: Updates) -> None:
        """Project and add some of the segment's updates."""
        self.add(segment.number, updates.indices, updates.factors)

    def close(self, segment: Segment, movement: Movement) -> None:
        """What moved the parameters besides examples is no example's."""

    def add(self, segment: int, indices: Tensor, factors: Factors) -> None:
        """Add what some visits of examples put into the parameters in a segment."""
        if not len(indices) or not factors:
            return
        block, place = self.projection.block_of(segment), self.projection.columns(segment)
        if block not in self.blocks:
            self.blocks[block] = torch.zeros(self.count, place.stop - place.start)
        sketches = self.projection(factors, segment)[:, 0].to("cpu", torch.float32)
        rows = self.row[indices.cpu()]
        if bool((rows < 0).any()):
            sketches, rows = sketches[rows >= 0], rows[rows >= 0]
        self.blocks[block].index_add_(0, rows, sketches)

    def taken(self) -> Blocks:
        """The sums so far; begins anew."""
        blocks, self.blocks = self.blocks, {}
        return blocks


def update_features(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    projection: Projection,
    *,
    ids: Int64[Tensor, "n"] | None = None,
    wanted: Iterable[int] | None = None,
    sink: Sink | None = None,
    progress: bool = False,
) -> Float32[Tensor, "n dim"] | None:
    """Features of training examples, on the CPU, in one pass along the trajectory.

    Args:
        trajectory: the recorded training, or imported checkpoints.
        model: of its architecture.
        dataset: the training examples.
        projection: of gradients to features (:func:`projection_for`).
        ids: the examples wanted, all if ``None``.
        wanted: numbers of the parts wanted, all if ``None``; without memory of earlier steps only their steps are gone
            through, with memory all later ones as well.
        sink: told every part as it is done; if ``None`` they are added up.
        progress: show a bar over the steps.

    Returns:
        The sum of all parts, unless a sink takes them.

    Raises:
        ModelError: not the recorded architecture.
        DatasetError: not the recorded examples.
        ArgumentError: an optimiser whose steps are not itemised.
        ReplayError: the log does not lead to the recorded states.
    """
    check_optimizer(trajectory)
    count = trajectory.manifest.dataset.count
    visitor = UpdateFeatures(projection, torch.arange(count) if ids is None else ids, count)
    parts = parts_of(len(bounds(trajectory, None)) - 1)
    chosen = range(len(parts)) if wanted is None else sorted(wanted)
    features = torch.zeros(visitor.count, projection.dim) if sink is None else None

    def add(part: int, blocks: Blocks) -> None:
        assert features is not None
        for block, values in blocks.items():
            features[:, projection.block(block)] += values

    collect = _backward if remembers(trajectory, "line") else _forward
    with progress_bar(progress, len(trajectory), "indexing") as tick:
        collect(trajectory, model, dataset, visitor, {n: parts[n] for n in chosen}, sink or add, ids=ids, tick=tick)
    return features


def _forward(
    trajectory: Trajectory, model: nn.Module, dataset: Examples, visitor: UpdateFeatures, parts: dict[int, range],
    sink: Sink, *, ids: Tensor | None, tick: Callable[[], None],
) -> None:  # fmt: skip
    with forward_walk(trajectory, model, dataset, examples=ids, budget=BUDGET, tick=tick) as walk:
        for number, segments in parts.items():
            walk.visit(visitor, segments)
            sink(number, visitor.taken())


def _backward(
    trajectory: Trajectory, model: nn.Module, dataset: Examples, visitor: UpdateFeatures, parts: dict[int, range],
    sink: Sink, *, ids: Tensor | None, tick: Callable[[], None],
) -> None:  # fmt: skip
    """From the last step to the first of the first part, since later steps tell what a gradient still moves."""
    first = min((segments.start for segments in parts.values()), default=0)
    part = {s: number for number, segments in parts.items() for s in segments}
    with Replayer(trajectory, model, dataset) as replayer:
        walk = Stretches(replayer, [], set(), BUDGET, examples=ids, tick=tick)
        carried, last = Carried(walk.parameters), None
        for stretch, segment in walk.stretches():
            number = part.get(segment.number)
            if last is not None and number != last:
                sink(last, visitor.taken())
            if segment.number < first:
                return
            last = number
            for step in reversed(stretch.steps):
                moved = carried.back(step, segment.number)
                if number is not None and step.factors:
                    for s, by in moved.items():
                        for rows, factors in weighted(step.factors, by):
                            visitor.add(s, step.indices[rows], factors)
        if last is not None:
            sink(last, visitor.taken())
