"""Looking up: the rows that a search returns, from an exact scan or from FAISS' candidates looked at exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor

from kxexplain.errors import ArgumentError
from kxexplain.search.sketches import Found, Sketches, directions, joined
from kxexplain.search.vectors import Vectors

FEWEST, MOST, SHARE = 300, 1000, 100
"""FAISS is asked for a hundredth of the rows, within these bounds, or ten times those wanted if that is more: their
exact products decide. Of 60,000 images that finds what the exact scan does (tests/benchmarks/fashion_retrieval.py)."""


def candidates_for(k: int, count: int) -> int:
    """How many rows FAISS is asked for.

    >>> candidates_for(10, 60_000), candidates_for(10, 10**6), candidates_for(200, 60_000)
    (600, 1000, 2000)
    """
    return min(count, max(10 * k, min(MOST, max(FEWEST, count // SHARE))))


def look_up(
    sketches: Sketches, vectors: tuple[Vectors, Vectors], features: Float32[Tensor, "q dim"],
    pushes: Float32[Tensor, "q dim"], k: int,
) -> tuple[Found, Found, Found]:  # fmt: skip
    """As :meth:`Sketches.scan`, but only among the candidates of two FAISS indices: of products and of cosines."""
    influence, nearest = vectors
    wide, units = candidates_for(k, len(sketches)), directions(pushes, sketches.blocks)
    found = []
    for q in range(len(features)):
        feature, unit = features[q : q + 1], units[q : q + 1]
        up, down = influence.candidates(torch.cat([feature, -feature]), wide)
        near = nearest.candidates(unit, wide)[0]
        up, down, near = (rows[rows >= 0] for rows in (up, down, near))
        if min(len(up), len(down), len(near)) < k:
            found.append(sketches.scan(feature, pushes[q : q + 1], k))
            continue
        most = _best(sketches.products(up, feature[0]), up, k)
        least = _best(sketches.products(down, feature[0]), down, k, largest=False)
        found.append((most, least, _best(sketches.cosines(near, unit[0]), near, k)))
    return joined([one[0] for one in found]), joined([one[1] for one in found]), joined([one[2] for one in found])


def _best(scores: Tensor, rows: Tensor, k: int, *, largest: bool = True) -> Found:
    top = scores.topk(k, largest=largest)
    return Found(top.values[None], rows[top.indices][None])


def pair_of(sketches: Sketches, factory: str, stored: Sequence[bytes | None] = (None, None)) -> tuple[Vectors, Vectors]:
    """FAISS' indices of products and of cosines, built or from their bytes."""
    n, dim = sketches.units.shape
    lengths = sketches.norms.norm(dim=1)
    return (
        Vectors(sketches.rows, n, dim, factory, lengths=lengths, stored=stored[0]),
        Vectors(sketches.directions, n, dim, factory, stored=stored[1]),
    )


def chosen_rows(sketches: Sketches, labels: Any, ids: Any) -> Tensor | None:
    """The rows whose example has one of these labels and is one of these; ``None`` for all.

    Raises:
        ArgumentError: labels where examples have none, an id that is not in the index, or nothing is left.
    """
    if labels is None and ids is None:
        return None
    kept = torch.ones(len(sketches), dtype=torch.bool)
    if labels is not None:
        if sketches.labels is None:
            raise ArgumentError("the examples have no labels that are single numbers; leave out labels=, or use ids=")
        wanted = torch.as_tensor([labels] if isinstance(labels, (int, float)) else labels)
        kept &= torch.isin(sketches.labels, wanted.to(sketches.labels.dtype))
    if ids is not None:
        among = torch.zeros(len(sketches), dtype=torch.bool)
        among[rows_of(sketches, id_list(ids))] = True
        kept &= among
    rows = kept.nonzero().squeeze(1)
    if not len(rows):
        raise ArgumentError(f"no example of the index is left with labels={labels!r} among the ids given; widen them")
    return rows


def id_list(ids: Sequence[int] | Tensor) -> Tensor:
    """Dataset indices as a tensor; ``ArgumentError`` for anything else, and for one that occurs twice."""
    try:
        found = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"got ids of type {type(ids).__name__}; expected dataset indices: {error}") from error
    if found.dim() != 1 or found.is_floating_point() or found.dtype == torch.bool or not len(found):
        raise ArgumentError(f"got ids {found.dtype} of shape {tuple(found.shape)}; expected a list of dataset indices")
    if len(found.unique()) < len(found):
        raise ArgumentError("an example occurs twice among the ids; give each once")
    return found.long().cpu()


def rows_of(sketches: Sketches, ids: Tensor) -> Tensor:
    """The rows of examples; ``ArgumentError`` for one that is not in the index."""
    order = sketches.ids.argsort()
    place = torch.searchsorted(sketches.ids[order], ids).clamp_max(max(0, len(sketches) - 1))
    rows = order[place] if len(sketches) else torch.zeros(0, dtype=torch.int64)
    if not len(rows) or not torch.equal(sketches.ids[rows], ids):
        absent = ids[~torch.isin(ids, sketches.ids)].tolist()
        raise ArgumentError(f"the index has no examples {absent[:5]}{' …' if len(absent) > 5 else ''}")
    return rows
