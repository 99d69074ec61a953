"""Rules that stand for a query's gradient along a segment: the exact one, and the usual approximations.

A path integral ∫⟨∇f(θ), dθ⟩ over the chord from θ to θ' is Σ_k w_k ⟨∇f(θ + c_k Δ), Δ⟩ by quadrature. TracIn's
rule has the single node 0, the midpoint rule ½, and Gauss–Legendre with m nodes is exact for polynomials of
degree 2m−1. None of them adds up to f(θ')−f(θ); the discrete gradient does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kxexplain.errors import ArgumentError

MOST_NODES = 1000
"""Of a Gauss–Legendre rule: finding the nodes takes memory and time that grow with their square and more."""


@dataclass(frozen=True)
class Rule:
    """How a segment's query gradient is formed.

    Attributes:
        name: as it was asked for.
        nodes: (position on the chord in [0, 1], weight) pairs; empty for the discrete gradient.
    """

    name: str
    nodes: tuple[tuple[float, float], ...]

    @property
    def exact(self) -> bool:
        """Whether contributions by this rule add up to the prediction."""
        return not self.nodes


def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights on [0, 1].

    >>> gauss_legendre(1)
    ((0.5, 1.0),)
    """
    positions, weights = np.polynomial.legendre.leggauss(count)
    return tuple((float((x + 1) / 2), float(w / 2)) for x, w in zip(positions, weights, strict=True))


def rule(name: str) -> Rule:
    """A rule by name: ``"discrete"``, ``"start"`` (TracIn), ``"midpoint"`` or ``"gauss-m"`` with m nodes.

    Raises:
        ArgumentError: for any other name.

    >>> [weight for _, weight in rule("gauss-2").nodes]
    [0.5, 0.5]
    """
    if name == "discrete":
        return Rule(name, ())
    if name == "start":
        return Rule(name, ((0.0, 1.0),))
    if name == "midpoint":
        return Rule(name, ((0.5, 1.0),))
    kind, _, count = name.partition("-") if isinstance(name, str) else ("", "", "")
    if kind == "gauss" and count.isdigit() and 0 < int(count) <= MOST_NODES:
        return Rule(name, gauss_legendre(int(count)))
    raise ArgumentError(
        f'got rule {name!r}; expected "discrete", "start", "midpoint" or "gauss-<nodes>" (gauss-2, up to {MOST_NODES})'
    )
