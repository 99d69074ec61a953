r"""A Gram matrix block by block: what is in memory at once is chosen, whatever the matrix' size.

The gradients of some columns (a *panel*) are kept while those of the rows pass by, some at a time; a panel and rows
are multiplied in *tiles*. Of a symmetric matrix only the tiles on and below the diagonal are computed; the others are
their mirror images, and tiles on the diagonal are made of their own lower half: the matrix is exactly symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.kernels.appetite import Appetite

Span: TypeAlias = slice
Buffer: TypeAlias = Tensor | np.ndarray

TILE = 256
"""Rows and columns multiplied at once, at most: large enough for matrix products to run at full speed."""

CACHE = 1 << 27
"""Bytes that rows take while they are differentiated, at most: more leaves the processor's cache and gains nothing."""


@dataclass(frozen=True)
class Plan:
    """How a matrix is cut.

    Attributes:
        batch: examples differentiated at once.
        panel: columns whose gradients are kept.
        tile: rows and columns multiplied at once.
        joint: examples of both sides together that may be differentiated in one pass; 0 if that gains nothing.
        pairs: entries of the matrix made in such a pass, at most.
    """

    batch: int
    panel: int
    tile: int
    joint: int = 0
    pairs: int = 0

    @classmethod
    def within(cls, budget: int, needs: Appetite, batch: int | None) -> Plan:
        """A plan for so many bytes.

        Args:
            budget: half of it is for a panel, a quarter for rows while they are differentiated, an eighth for a tile.
            needs: what an example takes.
            batch: examples differentiated at once, if the caller has chosen.
        """

        def rows(working: int) -> int:
            return max(1, min(budget // 4, CACHE) // max(1, working) if batch is None else batch)

        tile = int((budget / 8 / max(1, needs.pair)) ** 0.5)
        return cls(
            batch=rows(needs.working),
            panel=max(1, budget // 2 // max(1, needs.kept)),
            tile=max(1, min(tile, TILE)),
            joint=rows(needs.joint) if needs.joint else 0,
            pairs=budget // 8 // max(1, needs.joint_pair),
        )

    def at_once(self, n: int, m: int) -> bool:
        """Whether n × m examples can be differentiated and multiplied in one pass."""
        return n + m <= self.joint and n * m <= self.pairs

    def steps(self, n: int, m: int, *, symmetric: bool) -> list[tuple[Span, Span | None]]:
        """Panels, and the rows that each of them meets; ``None`` where it meets itself."""
        found: list[tuple[Span, Span | None]] = []
        for panel in spans(0, m, self.panel):
            if symmetric:
                found.append((panel, None))
            found += [(panel, rows) for rows in spans(panel.stop if symmetric else 0, n, self.batch)]
        return found

    def tiles(self, rows: Span, columns: Span, *, lower: bool) -> Iterator[tuple[Span, Span]]:
        """The tiles of rows × columns; only those on and below the diagonal if ``lower``."""
        for i in spans(rows.start, rows.stop, self.tile):
            yield from ((i, j) for j in spans(columns.start, i.start if lower else columns.stop, self.tile))
            if lower:
                yield i, i


def spans(start: int, stop: int, length: int) -> list[Span]:
    """Pieces of a range.

    >>> spans(0, 5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(at, min(at + length, stop)) for at in range(start, stop, length)]


def mirrored(block: Tensor) -> Tensor:
    """K(x', x) from K(x, x'): a C × C block is transposed as well."""
    block = block.transpose(0, 1)
    return block.transpose(2, 3) if block.dim() == 4 else block


def symmetrised(block: Tensor) -> Tensor:
    """A block on the diagonal, its upper half replaced by the mirror image of the lower."""
    n, c = block.shape[0], block.shape[2] if block.dim() == 4 else 1
    lower = block.reshape(n, n, c, c).transpose(1, 2).reshape(n * c, n * c).tril()
    whole = lower + lower.tril(-1).T
    return whole.view(n, c, n, c).transpose(1, 2).reshape(block.shape)


@dataclass(frozen=True)
class Target:
    """A matrix being filled.

    Attributes:
        values: the matrix, anywhere: in memory, on a disk, on another device than the model's.
        symmetric: a block stands for its mirror image as well.
    """

    values: Tensor
    symmetric: bool

    def put(self, rows: Span, columns: Span, block: Tensor, *, add: bool) -> None:
        """Write a block, or add it to what is there."""
        if self.symmetric and rows == columns:
            block = symmetrised(block)
        self._write((rows, columns), block, add)
        if self.symmetric and rows != columns:
            self._write((columns, rows), mirrored(block), add)

    def _write(self, place: tuple[Span, Span], block: Tensor, add: bool) -> None:
        there = self.values[place]
        if add:
            there.add_(block.to(there.device))
        else:
            there.copy_(block)


def buffer(out: Buffer | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The caller's buffer as a tensor that shares its memory, or a new one.

    Raises:
        ArgumentError: not of this shape and of the dtype of ``like``, or not to be written into.
    """
    if out is None:
        return like.new_empty(shape)
    if not isinstance(out, (Tensor, np.ndarray)):
        raise ArgumentError(f"got out of type {type(out).__name__}; expected a torch tensor or a NumPy array or memmap")
    wanted: Any = like.dtype if isinstance(out, Tensor) else _numpy_dtype(like.dtype)
    if tuple(out.shape) != shape or out.dtype != wanted:
        raise ArgumentError(
            f"got out of shape {tuple(out.shape)} and dtype {out.dtype}; the result has shape {shape} and dtype "
            f"{like.dtype}: make it with that shape and dtype"
        )
    if isinstance(out, np.ndarray):
        if not out.flags.writeable or any(stride < 0 for stride in out.strides):
            raise ArgumentError("out is read-only or reversed; open a memmap with mode 'r+' or 'w+', or copy the array")
        out = torch.from_numpy(out)
    if any(stride == 0 and length > 1 for stride, length in zip(out.stride(), out.shape, strict=True)):
        raise ArgumentError("entries of out share memory (it was expanded); give one that holds every entry")
    return out


def _numpy_dtype(dtype: torch.dtype) -> Any:
    """The dtype of a NumPy array that can hold such values; ``None`` if there is none."""
    try:
        return torch.empty(0, dtype=dtype).numpy().dtype
    except TypeError:
        return None
