"""FAISS behind one small class: candidates for the largest inner products, to be looked at exactly afterwards."""

from __future__ import annotations

from collections.abc import Callable

import faiss
import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kxexplain.errors import ArgumentError, IndexFileError
from kxexplain.search.sketches import CHUNK

FLAT, AUTO = "Flat", "auto"
"""Flat: the exact scan of the features as they lie in memory or on disk, for which FAISS keeps nothing."""

SCANNED = 1 << 26
"""Bytes of features up to which the automatic choice scans them all."""

WIDEST = 256
"""Most sub-quantisers of a fast scan: their 8-bit sums must fit 16 bits."""

SAMPLE = 1 << 15
"""Rows that an index is trained on, drawn by their squared length.

Codes learnt from all rows alike serve the long ones worst, which have the largest products: of 50,000 vectors with
log-normal lengths, 1,000 candidates then held 96 % of the ten largest, and this way all."""

Rows = Callable[[Tensor | slice], Float32[Tensor, "m dim"]]


def choose_factory(n: int, dim: int, memory: int) -> str:
    """The kind of index for n features: all are scanned where that is quick, else 4-bit codes of them are.

    The codes (product quantisation, two coordinates to a code of 4 bits, scanned in registers) take dim/4 bytes an
    example for either measure, a sixteenth of float32, and give candidates however the vectors are spread; cells to
    visit only some of (IVF) would need queries that are spread as the examples are, which gradients of outputs and
    updates are not. Fewer codes where the memory does not hold these.

    >>> choose_factory(5000, 512, 4 * 10**9), choose_factory(10**6, 512, 4 * 10**9)
    ('Flat', 'PQ256x4fs')
    """
    if n * dim * 4 <= SCANNED:
        return FLAT
    widths = [m for m in range(min(WIDEST, dim // 2), 0, -1) if dim % m == 0]
    fitting = [m for m in widths if n * m <= memory // 2]
    return f"PQ{fitting[0] if fitting else widths[-1]}x4fs"


class Vectors:
    """Rows that are searched by inner product with the kind of FAISS index that ``factory`` names.

    Args:
        rows: gives the vectors at a slice or at row numbers.
        count: number of rows.
        dim: their length.
        factory: FAISS' description of an index, such as "HNSW32" or "IVF64,Flat".
        lengths: of the rows, [n]; alike if ``None``.
        stored: an index of these rows as bytes, from :meth:`to_bytes`; built if ``None``.

    Raises:
        ArgumentError: FAISS knows no such index, or cannot build it from so few rows.
        IndexFileError: ``stored`` is no index of these rows.

    >>> vectors = Vectors(lambda at: torch.eye(3)[at], 3, 3, "HNSW4")
    >>> vectors.candidates(torch.tensor([[0.0, 2.0, 1.0]]), 2).tolist()
    [[1, 2]]
    """

    def __init__(
        self,
        rows: Rows,
        count: int,
        dim: int,
        factory: str,
        *,
        lengths: Tensor | None = None,
        stored: bytes | None = None,
    ) -> None:
        self.count, self.dim, self.factory = count, dim, factory
        if stored is None:
            self._index = _build(rows, count, dim, factory, lengths)
        else:
            self._index = _restore(stored, count, dim)

    def candidates(self, queries: Float32[Tensor, "q dim"], k: int) -> Int64[Tensor, "q k"]:
        """Rows with large inner products, probably the largest; −1 where the index found fewer than k."""
        return torch.from_numpy(self._index.search(_array(queries), k)[1])

    def to_bytes(self) -> bytes:
        """The FAISS index, for :class:`Vectors` to be made of again."""
        return bytes(faiss.serialize_index(self._index).tobytes())


def check_factory(factory: str, dim: int) -> None:
    """``ArgumentError`` unless FAISS can make an empty index of this kind."""
    if factory != AUTO:
        _empty(factory, dim)


def _array(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows.numpy(), dtype=np.float32)


def _empty(factory: str, dim: int) -> faiss.Index:
    if not isinstance(factory, str):
        raise ArgumentError(f'got factory={factory!r}; expected a text such as "auto", "Flat" or "HNSW32"')
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ArgumentError(
            f'FAISS cannot make an index {factory!r} of {dim} dimensions: {_reason(error)}; "Flat" always works'
        ) from error


def _build(rows: Rows, count: int, dim: int, factory: str, lengths: Tensor | None) -> faiss.Index:
    index = _empty(factory, dim)
    generator = torch.Generator().manual_seed(0)
    try:
        weights = torch.ones(count) if lengths is None else lengths.square() + torch.finfo(lengths.dtype).tiny
        sample = torch.multinomial(weights, min(count, SAMPLE), replacement=lengths is not None, generator=generator)
        index.train(_array(rows(sample)))
        for at in range(0, count, CHUNK):
            index.add(_array(rows(slice(at, min(at + CHUNK, count)))))
        _visit_enough(index)
    except RuntimeError as error:
        raise ArgumentError(
            f'FAISS cannot build {factory!r} from {count} examples: {_reason(error)}; use "Flat", or fewer centroids'
        ) from error
    return index


def _visit_enough(index: faiss.Index) -> None:
    """An eighth of the cells of an inverted file, where FAISS would visit one."""
    cells = faiss.try_extract_index_ivf(index)
    if cells is not None:
        cells.nprobe = max(cells.nprobe, cells.nlist // 8)


def _restore(stored: bytes, count: int, dim: int) -> faiss.Index:
    try:
        index = faiss.deserialize_index(np.frombuffer(stored, np.uint8))
    except RuntimeError as error:
        raise IndexFileError(f"FAISS cannot read the stored index: {_reason(error)}; build it again") from error
    got = (index.ntotal, index.d, index.metric_type, index.is_trained)
    if got != (count, dim, faiss.METRIC_INNER_PRODUCT, True):
        raise IndexFileError(
            f"the stored index holds {got[0]} vectors of {got[1]} dimensions, expected {(count, dim)}; build it again"
        )
    return index


def _reason(error: RuntimeError) -> str:
    """FAISS' message without its place in the source."""
    return str(error).rsplit("Error: ", 1)[-1].strip() or type(error).__name__
