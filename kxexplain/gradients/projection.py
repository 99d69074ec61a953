r"""Seeded random projection of per-example gradients to short vectors whose inner products are unbiased.

A matrix-shaped parameter's gradient G is projected from both sides, coordinate j by its own pair of Gaussian
vectors l_j, r_j: sketch_j = l_jᵀ G r_j / √k. For G = Σ_r g_r a_rᵀ that is Σ_r (l_j·g_r)(r_j·a_r) / √k, so nothing is
written out, and E⟨sketch(G), sketch(H)⟩ = ⟨G, H⟩ with an error that falls as 1/√k. (The outer product of a k_g- and a
k_a-vector, k = k_g·k_a, costs less but its error falls only as k^(−1/4) where one side's vectors are alike, as
activations are: on a digits network it took four times the dimension for the same error.)

All parameters, and segments that share a block, are *added* in the same coordinates, each with projections of its
own: cross terms vanish on average, so the sum is a projection of the whole gradient. At equal dimension this is closer
than giving every parameter and segment a few coordinates of its own (error 0.17, not 0.29, at 512; digits network).

Source: row-wise tensor random projections, Sun, Guo, Tropp & Udell 2021, arXiv 2105.00105.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.gradients.factors import Dense, Factor, Factors, Outer

SMALLEST = 16
"""Fewer coordinates than this carry nothing but noise."""

WIDTH = 256
"""Segments share a block of coordinates where blocks of their own would be narrower than this."""

ELEMENTS, KEPT = 1 << 22, 1 << 24
"""Numbers that intermediate values, and drawn matrices kept for the next call, may take."""


class Sides(NamedTuple):
    """What one parameter of one segment is multiplied with: ``left`` [k, rows], ``right`` [k, columns]."""

    left: Tensor
    right: Tensor

    @property
    def elements(self) -> int:
        """Numbers held."""
        return self.left.numel() + self.right.numel()


class Projection:
    """Projects gradients along a trajectory's segments to vectors of one length.

    Coordinates are cut into as many blocks as segments, or fewer, none narrower than 256; neighbouring segments then
    share a block. The matrices are regenerated from (seed, segment, parameter name) and the parameter's shape alone,
    so both sides of an inner product, and every form a gradient is kept in, meet the same ones.

    Args:
        shapes: the parameters' shapes, by name; gradients of anything else are left out.
        segments: number of segments.
        dim: length of the vectors.
        seed: of the matrices.

    Raises:
        ArgumentError: fewer than 16 dimensions, or a seed that is no whole number.

    >>> projection = Projection({"weight": (3, 5)}, segments=1, dim=4096)
    >>> g, a = torch.ones(1, 1, 1, 3), torch.ones(1, 1, 5)
    >>> sketch = projection([Outer("weight", None, a, g)], segment=0)
    >>> written = projection([Dense("weight", torch.ones(1, 1, 15))], segment=0)
    >>> torch.allclose(sketch, written, atol=1e-4)
    True
    >>> round(float(sketch.square().sum()))  # ‖g aᵀ‖² = 15
    15
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], segments: int, dim: int, *, seed: int = 0) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < SMALLEST:
            raise ArgumentError(f"got dim={dim!r}; expected a whole number of at least {SMALLEST}, such as 2048")
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ArgumentError(f"got seed={seed!r}; expected a whole number")
        self.shapes = {name: _matrix(shape) for name, shape in shapes.items()}
        self.segments, self.dim, self.seed = segments, dim, seed
        self.blocks = max(1, min(segments, dim // WIDTH))
        self._drawn: dict[tuple[int, str], Sides] = {}

    def columns(self, segment: int) -> slice:
        """The coordinates that a segment's gradients are added to."""
        return self.block(self.block_of(segment))

    def block_of(self, segment: int) -> int:
        """The block that holds a segment's coordinates; the last one, for segments beyond those expected."""
        return min(segment, self.segments - 1) * self.blocks // self.segments

    def block(self, number: int) -> slice:
        """The coordinates of one block."""
        return slice(self.dim * number // self.blocks, self.dim * (number + 1) // self.blocks)

    def __call__(self, factors: Factors, segment: int) -> Float[Tensor, "n c k"]:
        """Sketches of a segment's gradients, as wide as the segment's :meth:`columns`."""
        parts = [part for factor in factors for part in self._parts(factor)]
        if not parts:
            first = factors[0]
            values = first.g[:, :, 0, :1] if isinstance(first, Outer) else first.values[:, :, :1]
            return torch.zeros_like(values).repeat(1, 1, self._width(segment))
        total = self._project(parts[0], segment)
        for part in parts[1:]:
            total += self._project(part, segment)
        return total

    def _width(self, segment: int) -> int:
        columns = self.columns(segment)
        return int(columns.stop - columns.start)

    def _parts(self, factor: Factor) -> Iterator[Factor]:
        """A factor's parameters one by one; the bias of a linear layer is a parameter of its own."""
        if isinstance(factor, Dense):
            if factor.weight in self.shapes:
                yield factor
            return
        if factor.weight in self.shapes:
            yield factor
        if factor.bias in self.shapes:
            yield Dense(str(factor.bias), factor.g.sum(2))

    def _project(self, part: Factor, segment: int) -> Tensor:
        """One parameter's sketches, in portions of examples that keep intermediate values small."""
        sides = self._sides(part, segment)
        k = sides.left.shape[0]
        if isinstance(part, Outer):
            each = (1 + part.g.shape[1]) * part.a.shape[1] * k
        else:
            each = part.values.shape[1] * min(self.shapes[part.weight]) * k
        step = max(1, ELEMENTS // max(1, each))
        pieces = [part]
        if part.rows > step:
            pieces = [part.take(slice(at, at + step)) for at in range(0, part.rows, step)]
        done = [_outer(p, sides) if isinstance(p, Outer) else _dense(p, sides) for p in pieces]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _sides(self, part: Factor, segment: int) -> Sides:
        like = part.g if isinstance(part, Outer) else part.values
        key = (segment, part.weight)
        if key not in self._drawn:
            drawn = self._draw(segment, part.weight)
            if sum(sides.elements for sides in self._drawn.values()) + drawn.elements > KEPT:
                self._drawn.clear()
            self._drawn[key] = drawn
        left, right = self._drawn[key]
        return Sides(left.to(like), right.to(like))

    def _draw(self, segment: int, name: str) -> Sides:
        """The matrices, the same for every device and dtype. A side of length one needs no projection."""
        text = f"{self.seed}/{segment}/{name}"
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        generator, k = torch.Generator().manual_seed(number), self._width(segment)
        left, right = (
            torch.randn(k, length, generator=generator) if length > 1 else torch.ones(k, 1)
            for length in self.shapes[name]
        )
        return Sides(left / math.sqrt(k), right)


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A parameter seen as a matrix: its first axis, and all others as one."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def _outer(factor: Outer, sides: Sides) -> Tensor:
    """Σ_r (l_j·g_r)(r_j·a_r), [n, c, k]."""
    left, right = sides if not factor.transposed else (sides.right, sides.left)
    inputs, outputs = factor.a @ right.T, factor.g @ left.T
    if factor.a.shape[1] == 1:
        return outputs[:, :, 0] * inputs
    return torch.einsum("ncrk,nrk->nck", outputs, inputs)


def _dense(factor: Dense, sides: Sides) -> Tensor:
    """l_jᵀ G r_j, the longer side first, [n, c, k]."""
    left, right = sides
    if right.shape[1] == 1:  # a vector, whose other side is ones
        return factor.values @ left.T
    matrix = factor.values.unflatten(2, (left.shape[1], right.shape[1]))
    if left.shape[1] > right.shape[1]:
        left, right, matrix = right, left, matrix.transpose(2, 3)
    return torch.einsum("ncik,ki->nck", matrix @ right.T, left)
