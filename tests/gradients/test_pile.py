"""Gathering per-example gradients in place equals joining the pieces."""

from __future__ import annotations

import torch

from kxexplain.gradients.factors import Dense, Factors, Outer, concatenate, scale
from kxexplain.gradients.pile import Pile, bytes_per_row
from kxexplain.gradients.products import dot, gram


def step(rows: int) -> list[Outer | Dense]:
    """Factors of one pass: a layer at two positions, and a parameter written out."""
    kinds = {"dtype": torch.float64}
    outer = Outer("w", "b", torch.randn(rows, 2, 3, **kinds), torch.randn(rows, 1, 2, 4, **kinds))
    return [outer, Dense("v", torch.randn(rows, 1, 5, **kinds))]


def test_gathering_is_joining() -> None:
    pieces, weights = [step(3), step(1), step(2)], [0.5, -2.0, 0.0]
    pile = Pile(pieces[0], 6)
    names = ("w", "b", "v")
    for repeat in range(2):  # the memory is used again, and remembers nothing
        pile.clear()
        for piece, weight in zip(pieces, weights, strict=True):
            assert pile.fits(piece, piece[0].rows)
            pile.add(piece, piece[0].rows, weight if repeat else 1.0)
        scaled = [scale(p, dict.fromkeys(names, w if repeat else 1.0)) for p, w in zip(pieces, weights, strict=True)]
        joined = concatenate(scaled)
        torch.testing.assert_close(gram(pile.gathered(), joined), gram(joined, joined), rtol=1e-14, atol=1e-14)
        assert pile.rows == 6


def test_moved_is_the_same_elsewhere() -> None:
    """Every pass stays as it was while others follow."""
    pieces = [step(2), step(3)]
    pile = Pile(pieces[0], 5)
    moved = [pile.moved(piece, piece[0].rows) for piece in pieces]
    for piece, other in zip(pieces, moved, strict=True):
        torch.testing.assert_close(gram(other, other), gram(piece, piece), rtol=0, atol=0)
        assert isinstance(other[1], Dense)
        assert other[1].values.untyped_storage().data_ptr() == moved[0][1].values.untyped_storage().data_ptr()


def test_what_does_not_fit() -> None:
    pile = Pile(step(2), 4)
    pile.add(step(3), 3, 1.0)
    assert pile.fits(step(1), 1)
    assert not pile.fits(step(2), 2)
    assert not pile.fits(step(1)[:1], 1)
    other = Dense("v", torch.zeros(1, 1, 6, dtype=torch.float64))
    assert not pile.fits([step(1)[0], other], 1)


def test_bytes_per_row() -> None:
    assert bytes_per_row(step(7), 7) == 8 * (2 * 3 + 2 * 4 + 5)


def test_passes_that_met_different_uses_are_joined() -> None:
    """What one pass did not meet has gradients of zero there."""
    generator = torch.Generator().manual_seed(0)
    a, g, b = (torch.randn(2, *shape, generator=generator) for shape in ((1, 3), (1, 1, 4), (1, 5)))
    pieces: list[Factors] = [[Outer("matrix", "bias", a, g)], [Dense("other", b)], [Outer("matrix", None, a, g)]]
    joined = concatenate(pieces)
    for name, length in (("matrix", 12), ("bias", 4), ("other", 5)):
        direction = {name: torch.randn(length, generator=generator)}
        expected = torch.cat([dot(piece, direction) for piece in pieces])
        torch.testing.assert_close(dot(joined, direction), expected)
