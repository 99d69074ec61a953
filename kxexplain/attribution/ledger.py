"""The ledger: contributions and the other lines of the bill, added up segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kxexplain.attribution.queries import QuerySide
from kxexplain.attribution.result import Explanation, Timeline
from kxexplain.attribution.visits import Updates
from kxexplain.attribution.walk import Movement, Segment
from kxexplain.gradients.discrete import Secant
from kxexplain.gradients.factors import Factors, wide
from kxexplain.gradients.lookup import InputProducts
from kxexplain.gradients.products import InputsMet, dot, gram, inputs_met
from kxexplain.shapes import Tensors
from kxexplain.trajectory import Trajectory

TIMELINE_BINS = 24
TOP_ON_TIMELINE = 8
LINES = ("contributions", "regularizer", "penalty", "buffers", "unattributed")


class Ledger:
    """Adds up the bill as a walk passes (:class:`kxexplain.attribution.walk.Visitor`)."""

    def __init__(self, side: QuerySide, examples: int, segments: int, *, kernel: bool, timeline: bool = True) -> None:
        self.side, self.segments = side, segments
        q, c = side.prediction.shape
        options: dict[str, Any] = {"dtype": wide(side.prediction), "device": side.prediction.device}
        # Examples come first while adding up: an update then touches whole rows of memory.
        self.sums = torch.zeros(examples, q, c, **options)
        blocks = c if side.target.components is not None else 1
        self.kernel = self.sums.new_zeros(examples, q, c, blocks, dtype=side.dtype) if kernel else None
        self.lines = {name: torch.zeros(segments, q, c, **options) for name in LINES}
        affordable = side.budget // 4 // max(1, q * examples * c * side.prediction.element_size())
        bins = min(segments, TIMELINE_BINS, affordable) if timeline else 0
        self.bins = torch.zeros(bins, examples, q, c, dtype=side.dtype, device=side.prediction.device)
        if side.steady is not None:
            self.lines["buffers"][0] += (side.steady - side.baseline).to(self.sums.dtype)
        self._products = InputProducts(examples, side.budget // 8)
        self._held: tuple[Segment | None, slice, list[tuple[float, Secant]]] = (None, slice(0), [])

    @property
    def contributions(self) -> Tensor:
        """The examples' sums so far, [q, n, c]."""
        return self.sums.transpose(0, 1)

    def _secants(self, segment: Segment, rows: slice) -> list[tuple[float, Secant]]:
        """The queries' gradients, kept while segment and portion stay the same."""
        held_segment, held_rows, held = self._held
        if held_segment is not segment or held_rows != rows:
            with torch.random.fork_rng(devices=[]):
                held = self.side.secants(segment.change(self.side.names), rows)
            self._held = (segment, rows, held)
        return held

    def updates(self, segment: Segment, updates: Updates) -> None:
        """Add the updates' inner products with the queries' gradients."""
        indices = updates.indices.to(self.sums.device)
        for rows in self.side.chunks():
            for weight, secant in self._secants(segment, rows):
                inputs = self._products.of(indices, rows.start)
                found = _times(against(updates.factors, secant, inputs)[:, 0], weight)
                jacobian, blocks = updates.jacobian, None
                if jacobian is not None:
                    blocks = _times(against(jacobian, secant, inputs), weight)
                self.credit(segment, rows, indices, found, updates.alpha, blocks)

    def credit(
        self, segment: Segment, rows: slice, indices: Tensor, found: Tensor, alpha: Tensor, blocks: Tensor | None
    ) -> None:
        """Add what a number of example visits put into the queries at ``rows``.

        Args:
            segment: where the visits were.
            rows: the queries.
            indices: the examples, [m].
            found: contributions, [m, q, c].
            alpha: size of the pull on the outputs, [m].
            blocks: inner products with the examples' weighted output gradients, [m, k, q, c], if asked for.
        """
        _add_rows(self.sums, rows, indices, found)
        self.lines["contributions"][segment.number, rows] += found.sum(0, dtype=self.sums.dtype)
        if len(self.bins):
            _add_rows(self.bins[segment.number * len(self.bins) // self.segments], rows, indices, found)
        if self.kernel is not None:
            _add_rows(self.kernel, rows, indices, _kernel_part(found, alpha, blocks))

    def enter(self, line: str, segment: Segment, rows: slice, values: Tensor) -> None:
        """Add to a line that is no example's, [q, c]."""
        self.lines[line][segment.number, rows] += values.to(self.sums.dtype)

    def close(self, segment: Segment, movement: Movement) -> None:
        """Add the lines that are no example's: regulariser, penalty, buffers, and what is left of the movement."""
        names = self.side.names
        delta = {name: segment.end[name] - segment.start[name] for name in names}
        buffers = {name: delta[name] for name in names if name in self.side.buffers}
        left: Tensors = {}
        for name in names:
            if name not in buffers:
                left[name] = delta[name].clone()
                for known in (movement.gradient, movement.decay, movement.penalty):
                    if name in known:
                        left[name] -= known[name]
        parts = {"regularizer": movement.decay, "penalty": movement.penalty, "buffers": buffers, "unattributed": left}
        for rows in self.side.chunks():
            for weight, secant in self._secants(segment, rows):
                for line, direction in parts.items():
                    if direction:
                        self.enter(line, segment, rows, secant.along(direction) * weight)

    def explanation(self, trajectory: Trajectory, dataset: Any, borders: list[int], drift: float | None) -> Explanation:
        """The finished bill."""
        side = self.side
        scalar = side.target.components is None
        narrow = lambda t: (t[..., 0] if scalar else t).to(side.dtype).contiguous()  # noqa: E731
        sums = {name: line.sum(0) for name, line in self.lines.items()}
        dtype = self.sums.dtype
        contributions = narrow(self.contributions)
        shown = (contributions[..., None] if scalar else contributions).sum(1, dtype=dtype)
        known = sum((sums[name] for name in LINES if name != "contributions"), shown)
        remainder = side.prediction.to(dtype) - side.baseline.to(dtype) - known
        kernel = None
        if self.kernel is not None:
            kernel = self.kernel.transpose(0, 1)
            kernel = (kernel[..., 0, 0] if scalar else kernel).to(side.dtype).contiguous()
        return Explanation(
            contributions=contributions,
            baseline=narrow(side.baseline),
            prediction=narrow(side.prediction),
            regularizer=narrow(sums["regularizer"]),
            penalty=narrow(sums["penalty"]),
            buffers=narrow(sums["buffers"]),
            unattributed=narrow(sums["unattributed"]),
            remainder=narrow(remainder),
            path_kernel=kernel,
            timeline=self._timeline(borders, narrow),
            output=side.target.output,
            labels=side.labels,
            facts={
                "target": side.target.name,
                "rule": side.rule.name,
                "precision": str(side.dtype).removeprefix("torch."),
                "trajectory": str(trajectory.path),
                "model": trajectory.manifest.model.name,
                "examples": trajectory.manifest.dataset.count,
                "steps": len(trajectory),
                "drift": drift,
            },
            dataset=dataset,
            queries=side.given,
        )

    def _timeline(self, borders: list[int], narrow: Any) -> Timeline:
        """Totals per segment, and the largest contributors' share in each bin of segments."""
        bins, (q, n, _) = len(self.bins), self.contributions.shape
        k = min(TOP_ON_TIMELINE, n)
        top = self.contributions.abs().sum(2).topk(k, dim=1).indices
        shares = narrow(
            self.bins.transpose(1, 2).gather(2, top[None, :, :, None].expand(bins, q, k, self.bins.shape[3]))
        )
        starts = [-(-b * self.segments // bins) for b in range(bins)] + [self.segments] if bins else [0]
        return Timeline(
            steps=torch.tensor(borders),
            totals={name: narrow(line) for name, line in self.lines.items()},
            examples=top,
            bins=torch.tensor([borders[s] for s in starts]),
            shares=shares,
        )


def _times(values: Tensor, weight: float) -> Tensor:
    """The values times a number, in place; the exact rule's is 1, which takes no pass."""
    return values if weight == 1 else values.mul_(weight)


def _add_rows(sums: Tensor, rows: slice, indices: Tensor, values: Tensor) -> None:
    """Add values to sums[indices, rows], where an index may occur several times."""
    everything = rows.start == 0 and rows.stop == sums.shape[1]
    (sums if everything else sums[:, rows]).index_add_(0, indices, values.to(sums.dtype))


def _kernel_part(found: Tensor, alpha: Tensor, blocks: Tensor | None) -> Tensor:
    """W K_t of every visit, [m, q, c, k]: from output gradients, or from the contributions K_t α_t."""
    if blocks is not None:
        return blocks.permute(0, 2, 3, 1)
    pulled = alpha != 0
    inverse = pulled.to(found.dtype) / alpha.masked_fill(~pulled, 1.0)
    return (found * inverse[:, None, None])[..., None]


def against(factors: Factors, secant: Secant, inputs: InputsMet = inputs_met) -> Tensor:
    """Inner products ⟨gradient_k(x_i), D_c(x)⟩, [m, k, q, c]."""
    found = gram(factors, secant.factors, inputs, wide(secant.start))
    if secant.correction is None:
        return found
    return found + dot(factors, secant.direction)[..., None, None] * secant.correction
