"""FAISS behind one small class: largest inner products over rows of float32 numbers."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from kxexplain.errors import ArgumentError, IndexFileError

FLAT = "Flat"
"""The exact scan: made afresh from the features, never stored."""


class Vectors:
    """Rows that are searched by inner product with the kind of FAISS index that ``factory`` names.

    An index that finds fewer rows than asked for (an inverted file whose visited lists are short) is helped out by a
    scan of all rows, so that a search always gives k.

    Args:
        rows: the vectors, [n, dim], finite.
        factory: FAISS' description of an index, such as "Flat", "HNSW32" or "IVF64,Flat".
        stored: an index of these rows as bytes, from :meth:`to_bytes`; built if ``None``.

    Raises:
        ArgumentError: FAISS knows no such index, or cannot build it from so few rows.
        IndexFileError: ``stored`` is no index of these rows.

    >>> vectors = Vectors(torch.eye(3))
    >>> vectors.search(torch.tensor([[0.0, 2.0, 1.0]]), 2)
    (tensor([[2., 1.]]), tensor([[1, 2]]))
    """

    def __init__(self, rows: Float32[Tensor, "n dim"], factory: str = FLAT, *, stored: bytes | None = None) -> None:
        self.rows, self.factory = rows, factory
        self._index = _build(_array(rows), factory) if stored is None else _restore(stored, rows)

    def search(self, queries: Float32[Tensor, "q dim"], k: int) -> tuple[Float32[Tensor, "q k"], Int64[Tensor, "q k"]]:
        """The k largest inner products of every query and the rows they are with; k at most n."""
        scores, ids = (torch.from_numpy(found) for found in self._index.search(_array(queries), k))
        short = (ids < 0).any(1)
        if bool(short.any()):
            exact = (queries[short] @ self.rows.T).topk(k, dim=1)
            scores[short], ids[short] = exact.values, exact.indices
        return scores, ids

    def to_bytes(self) -> bytes:
        """The FAISS index, for :class:`Vectors` to be made of again."""
        return bytes(faiss.serialize_index(self._index).tobytes())


def check_factory(factory: str, dim: int) -> None:
    """``ArgumentError`` unless FAISS can make an empty index of this kind."""
    _empty(factory, dim)


def _array(rows: Tensor) -> np.ndarray:
    return np.ascontiguousarray(rows.numpy(), dtype=np.float32)


def _empty(factory: str, dim: int) -> faiss.Index:
    if not isinstance(factory, str):
        raise ArgumentError(f'got factory={factory!r}; expected a text such as "Flat" or "HNSW32"')
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ArgumentError(
            f'FAISS cannot make an index {factory!r} of {dim} dimensions: {_reason(error)}; "Flat" always works'
        ) from error


def _build(rows: np.ndarray, factory: str) -> faiss.Index:
    index = _empty(factory, rows.shape[1])
    try:
        index.train(rows)
        index.add(rows)
    except RuntimeError as error:
        raise ArgumentError(
            f"FAISS cannot build {factory!r} from {len(rows)} examples: {_reason(error)}; use "
            '"Flat", or fewer centroids'
        ) from error
    return index


def _restore(stored: bytes, rows: Tensor) -> faiss.Index:
    try:
        index = faiss.deserialize_index(np.frombuffer(stored, np.uint8))
    except RuntimeError as error:
        raise IndexFileError(f"FAISS cannot read the stored index: {_reason(error)}; build it again") from error
    got = (index.ntotal, index.d, index.metric_type, index.is_trained)
    if got != (*rows.shape, faiss.METRIC_INNER_PRODUCT, True):
        raise IndexFileError(
            f"the stored index holds {got[0]} vectors of {got[1]} dimensions, expected {tuple(rows.shape)}; "
            "build it again"
        )
    return index


def _reason(error: RuntimeError) -> str:
    """FAISS' message without its place in the source."""
    return str(error).rsplit("Error: ", 1)[-1].strip() or type(error).__name__
