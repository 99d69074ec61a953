r"""Learning rates from gradient norms: one formula a function.

With G_t the gradient's norm at step t = 1, 2, … T, R the radius, Q_t = Σ_{k≤t} G_k^{-2} and
V_t = Σ_{k≤t} G_k² / max(1, t−k):

    adagrad_norm    R / √Σ_{k≤t} G_k²                 Streeter & McMahan 2010; Ward, Wu & Bottou 2019
    inverse_square  R G_t^{-2} / √Q_t
    last_iterate    R / √(T V_t)
    warmup_decay    R G_t^{-2} / √Q_t · (1 − t/(T+1))
    refined         R G_t^{-2} (Q_{T+1} − Q_t) / Q_{T+1}^{3/2}    norms of an earlier run; Defazio et al. 2023
    constant_optimum         R / √Σ_{k≤T} G_k²       norms of an earlier run
    inverse_square_optimum   R G_t^{-2} / √Q_T       norms of an earlier run

(arXiv 2310.07831 has the last-iterate analysis.) Rates that fall to zero are given the horizon T+1: at T they would be
zero, a step wasted, and the last denominator of the bound on the last iterate would vanish. G_{T+1} is taken to be G_T.

Guards. A norm below ``TINY`` counts as zero: its step is given the rate 0 and enters no sum, since a zero gradient says
nothing. Where norms are inverted, one counts as at least ``floor`` times the largest so far (for norms of an earlier
run: of all), so no step weighs more than floor^{-2} times another. Norms are kept in units of the first one that is not
zero, so their own size can neither overflow nor vanish. One that is not finite, or ``HUGE`` times the first, is an
error raised before the step is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from kxexplain.errors import ArgumentError, TrainingError
from kxexplain.learning.lagged import LaggedSum

Rates = Float64[np.ndarray, " step"]

TINY, HUGE = 1e-150, 1e150
FLOOR, LEAST_FLOOR = 1e-3, 1e-12


@dataclass
class NormSums:
    """What the formulas need to know of the norms so far, in units of the first one.

    Attributes:
        floor: part of the largest norm that an inverted one counts as at least.
        step: number of norms so far, t.
        unit: the first norm that is not zero; 0 before it.
        last: the present norm, floored.
        largest: the largest norm.
        squares: Σ G_k².
        inverses: Q_t = Σ G_k^{-2}, floored.
        lagged: V_t; 0 unless ``history`` is kept.
        history: sums up V_t, where a formula asks for it.
    """

    floor: float = FLOOR
    step: int = 0
    unit: float = 0.0
    last: float = 0.0
    largest: float = 0.0
    squares: float = 0.0
    inverses: float = 0.0
    lagged: float = 0.0
    history: LaggedSum | None = None

    def add(self, norm: float) -> None:
        """Take in the norm of one more gradient.

        Raises:
            TrainingError: it is not finite, or out of all proportion to the first.
        """
        if not (math.isfinite(norm) and norm <= HUGE * (self.unit or norm)):
            raise TrainingError(
                f"the norm of the gradient at step {self.step} is {norm} (the first was {self.unit}); the parameters "
                "were left as they are. Lower the radius or the learning rate, or check the data"
            )
        self.step += 1
        still = norm < TINY
        self.unit = self.unit or (0.0 if still else norm)
        size = 0.0 if still else norm / self.unit
        self.largest = max(self.largest, size)
        self.last = 0.0 if still else max(size, self.floor * self.largest)
        self.squares += size**2
        self.inverses += 0.0 if still else self.last**-2
        if self.history is not None:
            self.lagged = self.history.add(size**2)


def adagrad_norm(sums: NormSums, steps: int) -> float:
    """1 / √Σ_{k≤t} G_k²."""
    return 1 / math.sqrt(sums.squares)


def inverse_square(sums: NormSums, steps: int) -> float:
    """G_t^{-2} / √Q_t."""
    return 1 / (sums.last**2 * math.sqrt(sums.inverses))


def last_iterate(sums: NormSums, steps: int) -> float:
    """1 / √(T V_t)."""
    return 1 / math.sqrt(steps * sums.lagged)


def warmup_decay(sums: NormSums, steps: int) -> float:
    """G_t^{-2} / √Q_t · (1 − t/(T+1))."""
    return inverse_square(sums, steps) * (1 - sums.step / (steps + 1))


CAUSAL: dict[str, Callable[[NormSums, int], float]] = {
    "adagrad_norm": adagrad_norm,
    "inverse_square": inverse_square,
    "last_iterate": last_iterate,
    "warmup_decay": warmup_decay,
}
"""Formulas of (what the norms so far add up to, T) for the radius 1 and the unit 1."""


def rate(formula: str, sums: NormSums, steps: int, radius: float) -> float:
    """η_t of a causal formula; 0 where the gradient is zero.

    >>> sums = NormSums()
    >>> sums.add(3.0), sums.add(4.0)
    (None, None)
    >>> round(rate("adagrad_norm", sums, 10, radius=1.0), 12)
    0.2
    """
    return 0.0 if sums.last == 0 else radius / sums.unit * CAUSAL[formula](sums, steps)


def refined(norms: Rates) -> Rates:
    """G_t^{-2} (Q_{T+1} − Q_t) / Q_{T+1}^{3/2} with G_{T+1} = G_T; for equal norms linear decay.

    >>> refined(np.ones(3)) * 8
    array([3., 2., 1.])
    """
    weights = norms**-2.0
    left = np.cumsum(np.append(weights, weights[-1])[::-1])[::-1]  # Q_{T+1} − Q_{t−1}
    rates: Rates = weights * left[1:] / left[0] ** 1.5
    return rates


def constant_optimum(norms: Rates) -> Rates:
    """1 / √Σ_{k≤T} G_k², at every step."""
    return np.full(len(norms), np.sum(norms**2) ** -0.5)


def inverse_square_optimum(norms: Rates) -> Rates:
    """G_t^{-2} / √Q_T."""
    weights = norms**-2.0
    rates: Rates = weights / np.sqrt(np.sum(weights))
    return rates


HINDSIGHT: dict[str, Callable[[Rates], Rates]] = {
    "refined": refined,
    "constant_optimum": constant_optimum,
    "inverse_square_optimum": inverse_square_optimum,
}
"""Formulas of all norms of an earlier run, for the radius 1."""


def smoothed(norms: Rates, part: float) -> Rates:
    """The median over a window of this part of the run around every step; ends are repeated.

    >>> smoothed(np.array([1.0, 9.0, 2.0, 3.0]), 0.75)
    array([1., 2., 3., 3.])
    """
    half = int(part * len(norms)) // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(norms, half, mode="edge"), 2 * half + 1)
    found: Rates = np.median(windows, axis=1)
    return found


def hindsight(formula: str, norms: Sequence[float], floor: float = FLOOR, smooth: float = 0.0) -> Rates:
    """The rates of all steps by a formula in hindsight, for the radius 1; zero gradients count as at the floor.

    Raises:
        ArgumentError: no norms, or one that is not a finite number of at least zero, or all zero.
    """
    values = np.asarray(norms, dtype=np.float64)
    largest = float(values.max(initial=0.0))
    if values.ndim != 1 or not (np.isfinite(values).all() and (values >= 0).all() and largest >= TINY):
        raise ArgumentError(
            f"got {values.size} norms up to {largest:g}; expected one finite number >= 0 a step, not all of them zero: "
            "give the norms of a recorded run"
        )
    rates: Rates = HINDSIGHT[formula](smoothed(np.maximum(values / largest, floor), smooth)) / largest
    return rates


PLAIN: dict[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: 1 - (step - 1) / steps,
    "cosine": lambda step, steps: 0.5 * (1 + math.cos(math.pi * (step - 1) / steps)),
}
"""For comparison, factors of the optimiser's own rate that look at no gradient: of (t, T)."""

COORDINATES = "adagrad"
"""R / √Σ_{k≤t} g_k² coordinate by coordinate: what ``torch.optim.Adagrad`` does at the rate R."""

NAMES = (*CAUSAL, COORDINATES, *HINDSIGHT, *PLAIN)
HORIZON = ("last_iterate", "warmup_decay", *HINDSIGHT, "linear", "cosine")
"""Those that must know the number of steps beforehand."""
