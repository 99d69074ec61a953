"""The ledger: contributions and the other lines of the bill, added up segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kxexplain.attribution.queries import QuerySide
from kxexplain.attribution.result import Explanation, Timeline
from kxexplain.attribution.walk import Movement, Segment, Updates
from kxexplain.gradients.discrete import Secant
from kxexplain.gradients.factors import Factors
from kxexplain.gradients.products import dot, gram
from kxexplain.shapes import Tensors
from kxexplain.trajectory import Trajectory

TIMELINE_BINS = 24
TOP_ON_TIMELINE = 8
LINES = ("contributions", "regularizer", "buffers", "unattributed")


class Ledger:
    """Adds up the bill as a walk passes (:class:`kxexplain.attribution.walk.Visitor`)."""

    def __init__(
        self, side: QuerySide, examples: int, segments: int, *, kernel: bool, timeline: bool = True
    ) -> None:
        self.side, self.segments = side, segments
        q, c = side.prediction.shape
        options: dict[str, Any] = {"dtype": _wide(side.prediction), "device": side.prediction.device}
        self.contributions = torch.zeros(q, examples, c, **options)
        blocks = side.target.components is not None
        self.kernel = torch.zeros(q, examples, c, c if blocks else 1, **options) if kernel else None
        self.lines = {name: torch.zeros(segments, q, c, **options) for name in LINES}
        affordable = side.budget // 4 // max(1, q * examples * c * side.prediction.element_size())
        bins = min(segments, TIMELINE_BINS, affordable) if timeline else 0
        self.bins = torch.zeros(bins, q, examples, c, dtype=side.dtype, device=side.prediction.device)
        self._held: tuple[Segment | None, slice, list[tuple[float, Secant]]] = (None, slice(0), [])

    def _secants(self, segment: Segment, rows: slice) -> list[tuple[float, Secant]]:
        """The queries' gradients, kept while segment and portion stay the same."""
        held_segment, held_rows, held = self._held
        if held_segment is not segment or held_rows != rows:
            with torch.random.fork_rng(devices=[]):
                held = self.side.secants(segment, rows)
            self._held = (segment, rows, held)
        return held

    def updates(self, segment: Segment, updates: Updates) -> None:
        """Add the updates' inner products with the queries' gradients."""
        self.side.fit(segment)
        indices = updates.indices.to(self.contributions.device)
        for rows in self.side.chunks():
            for weight, secant in self._secants(segment, rows):
                found = _against(secant, updates.factors)[..., 0] * weight
                self._add_contributions(segment, rows, indices, found.transpose(1, 2))
                if self.kernel is not None and updates.jacobian is not None:
                    blocks = _against(secant, updates.jacobian) * weight  # [q, c, m, k]
                    self.kernel[rows].index_add_(1, indices, blocks.transpose(1, 2).to(self.kernel.dtype))
                elif self.kernel is not None:
                    pulls = (updates.alpha != 0).to(found.dtype) / updates.alpha.masked_fill(updates.alpha == 0, 1)
                    part = (found * pulls).transpose(1, 2)[..., None]
                    self.kernel[rows].index_add_(1, indices, part.to(self.kernel.dtype))

    def _add_contributions(self, segment: Segment, rows: slice, indices: Tensor, found: Tensor) -> None:
        wide = found.to(self.contributions.dtype)
        self.contributions[rows].index_add_(1, indices, wide)
        self.lines["contributions"][segment.number, rows] += wide.sum(1)
        if len(self.bins):
            bin_number = segment.number * len(self.bins) // self.segments
            self.bins[bin_number, rows].index_add_(1, indices, found.to(self.bins.dtype))

    def close(self, segment: Segment, movement: Movement) -> None:
        """Add the lines that are no example's: regulariser, buffers, and what is left of the movement."""
        self.side.fit(segment)
        names = self.side.names
        delta = {name: segment.end[name] - segment.start[name] for name in names}
        buffers = {name: delta[name] for name in names if name in self.side.buffers}
        left: Tensors = {}
        for name in names:
            if name not in buffers:
                left[name] = delta[name].clone()
                for known in (movement.gradient, movement.decay):
                    if name in known:
                        left[name] -= known[name]
        parts = {"regularizer": movement.decay, "buffers": buffers, "unattributed": left}
        for rows in self.side.chunks():
            for weight, secant in self._secants(segment, rows):
                for line, direction in parts.items():
                    if direction:
                        self.lines[line][segment.number, rows] += (secant.along(direction) * weight).to(
                            self.contributions.dtype
                        )

    def explanation(self, trajectory: Trajectory, dataset: Any, borders: list[int], drift: float) -> Explanation:
        """The finished bill."""
        side = self.side
        scalar = side.target.components is None
        narrow = lambda t: (t[..., 0] if scalar else t).to(side.dtype)  # noqa: E731
        sums = {name: line.sum(0) for name, line in self.lines.items()}
        wide = self.contributions.dtype
        remainder = side.prediction.to(wide) - side.baseline.to(wide) - sum(sums.values())
        kernel = None
        if self.kernel is not None:
            kernel = (self.kernel[..., 0, 0] if scalar else self.kernel).to(side.dtype)
        return Explanation(
            contributions=narrow(self.contributions),
            baseline=narrow(side.baseline),
            prediction=narrow(side.prediction),
            regularizer=narrow(sums["regularizer"]),
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
                "trajectory": str(trajectory.path),
                "model": trajectory.manifest.model.name,
                "examples": trajectory.manifest.dataset.count,
                "steps": len(trajectory),
                "drift": drift,
            },
            dataset=dataset,
            queries=side.inputs,
        )

    def _timeline(self, borders: list[int], narrow: Any) -> Timeline:
        """Totals per segment, and the largest contributors' share in each bin of segments."""
        bins, (q, n, _) = len(self.bins), self.contributions.shape
        k = min(TOP_ON_TIMELINE, n)
        top = self.contributions.abs().sum(2).topk(k, dim=1).indices
        shares = narrow(self.bins.gather(2, top[None, :, :, None].expand(bins, q, k, self.bins.shape[3])))
        starts = [-(-b * self.segments // bins) for b in range(bins)] + [self.segments] if bins else [0]
        return Timeline(
            steps=torch.tensor(borders),
            totals={name: narrow(line) for name, line in self.lines.items()},
            examples=top,
            bins=torch.tensor([borders[s] for s in starts]),
            shares=shares,
        )


def _wide(like: Tensor) -> torch.dtype:
    """The dtype sums are kept in: float64, where the device has it."""
    return like.dtype if like.device.type == "mps" else torch.float64


def _against(secant: Secant, factors: Factors) -> Tensor:
    """⟨D_c(x), gradient_k(x_i)⟩, [q, c, m, k]."""
    found = gram(secant.factors, factors)
    if secant.correction is None:
        return found
    return found + secant.correction[:, :, None, None] * dot(factors, secant.direction)
