r"""V_t = Σ_{k≤t} a_k / max(1, t−k), one value at a time: exact, and cheap for 10⁵ steps and more.

All weights change with every step, so no running total will do; but V is a convolution with the fixed weights
w(j) = 1 / max(1, j), of which each value must be known as soon as its last term is. Lags below ``NEAR`` are added up
as they are. The lags b ≤ j < 2b (b = NEAR, 2 NEAR, 4 NEAR, …) meet a block of b values whenever a block is complete:
its terms then all lie ahead, and one product of Fourier transforms of length 2b gives them. Every pair (value, lag) is
met exactly once, T steps take O(T log² T) operations, and since the weights of one block differ by a factor of two at
most, the transforms round as little as plain addition does. (On-line convolution: Fischer & Stockmeyer 1974, "Fast
on-line integer multiplication"; this partition of the lags: Gardner 1995, "Efficient convolution without input-output
delay".)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

NEAR = 64
"""Lags below this are added up directly."""


def weights(lags: np.ndarray) -> np.ndarray:
    """w(j) = 1 / max(1, j)."""
    found: np.ndarray = 1.0 / np.maximum(1, lags)
    return found


RECENT = weights(np.arange(NEAR))[::-1].copy()
"""The weights of the last ``NEAR`` values, the oldest first."""


@cache
def _transform(block: int) -> np.ndarray:
    """The Fourier transform of the weights of the lags block … 2·block − 1."""
    return np.fft.rfft(weights(np.arange(block, 2 * block)), 2 * block)


class LaggedSum:
    """V_t for values that come one by one.

    >>> sums = LaggedSum()
    >>> [sums.add(a) for a in (1.0, 1.0, 4.0)]  # 1, 1 + 1, 4 + 1 + 1/2
    [1.0, 2.0, 5.5]
    """

    def __init__(self, values: Sequence[float] = ()) -> None:
        self._count = 0
        self._values = np.zeros(4 * NEAR)
        self._ahead = np.zeros(4 * NEAR)  # what distant values are already known to give each coming sum
        for value in values:
            self._append(value)

    @property
    def values(self) -> list[float]:
        """What was added so far: all there is to keep, since the rest follows from it, to the last bit."""
        found: list[float] = self._values[: self._count].tolist()
        return found

    def add(self, value: float) -> float:
        """Take in a value; returns the sum that ends with it."""
        self._append(value)
        last = self._values[max(0, self._count - NEAR) : self._count]
        return float(last @ RECENT[NEAR - len(last) :] + self._ahead[self._count - 1])

    def _append(self, value: float) -> None:
        if self._count == len(self._values):
            self._values, self._ahead = (np.concatenate([a, np.zeros(len(a))]) for a in (self._values, self._ahead))
        self._values[self._count] = value
        self._count += 1
        block = NEAR
        while self._count % block == 0:
            self._spread(block)
            block *= 2

    def _spread(self, block: int) -> None:
        """Add the terms of the last ``block`` values at lags block … 2·block − 1 to the sums ahead."""
        now, size = self._count, 2 * block
        while len(self._ahead) < now + size:
            self._values, self._ahead = (np.concatenate([a, np.zeros(len(a))]) for a in (self._values, self._ahead))
        terms = np.fft.irfft(np.fft.rfft(self._values[now - block : now], size) * _transform(block), size)
        self._ahead[now : now + size - 1] += terms[:-1]


__all__ = ["LaggedSum"]
