"""Gathering per-example gradients in place equals joining the pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kxexplain.gradients.factors import Dense, Factors, Outer, Served, concatenate, scale, signature, take
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


def test_inputs_that_stay_in_their_batches() -> None:
    """Joined when asked for and not before, taken in part, told apart from those that training changes."""
    pieces = [[replace(step(n)[0], raw=0), *step(n)] for n in (3, 2)]
    pile = Pile(pieces[0], 5, served=True)
    for repeat in range(2):
        pile.clear()
        for piece in pieces:
            pile.add(piece, piece[0].rows, -1.0 - repeat)
        found, joined = (
            pile.gathered(),
            concatenate([scale(p, {"w": -1.0 - repeat, "b": -1.0 - repeat, "v": -1.0 - repeat}) for p in pieces]),
        )
        assert isinstance(found[0], Served)
        assert not isinstance(found[1], Served)
        assert found[0].rows == 5
        some = take(found, torch.tensor([4, 1]))
        assert "a" not in vars(found[0])
        assert "a" not in vars(some[0])
        torch.testing.assert_close(gram(some, joined), gram(take(joined, torch.tensor([4, 1])), joined), rtol=0, atol=0)
        torch.testing.assert_close(gram(found, joined), gram(joined, joined), rtol=0, atol=0)
        assert signature(found) == signature(joined)
        with pytest.raises(AttributeError, match="weights"):
            found[0].weights  # noqa: B018


def test_weights_wait_until_the_gradients_are_gathered() -> None:
    """Each row once, also when some were gathered before."""
    pieces, weights = [step(1), step(2), step(1), step(1)], [2.0, 2.0, 1.0, -3.0]
    pile = Pile(pieces[0], 5)
    names = ("w", "b", "v")
    for count, (piece, weight) in enumerate(zip(pieces, weights, strict=True), 1):
        pile.add(piece, piece[0].rows, weight)
        joined = concatenate(
            [scale(p, dict.fromkeys(names, w)) for p, w in list(zip(pieces, weights, strict=True))[:count]]
        )
        if count != 2:
            torch.testing.assert_close(gram(pile.gathered(), joined), gram(joined, joined), rtol=1e-14, atol=1e-14)


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
