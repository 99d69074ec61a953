"""Convex problems with a known optimum, and plain full-gradient runs on them under every schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning.lagged import LaggedSum
from kxexplain.learning.rates import CAUSAL, HINDSIGHT, LEAST_FLOOR, PLAIN, NormSums, hindsight, rate
from kxexplain.trajectory import resolve


def absolute(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs[:, 0] - targets).abs()


@dataclass(frozen=True)
class Problem:
    """Data, loss, and the optimum: ``minimizer`` (weight, bias) and ``minimum``."""

    data: TensorDataset
    loss: Any
    minimizer: nn.Linear
    minimum: float

    def start(self, seed: int) -> nn.Linear:
        torch.manual_seed(seed)
        weight = self.minimizer.weight
        return nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)


PROBLEMS = ("breast cancer", "digits", "absolute values")


@cache
def problem(name: str, n: int | None = None) -> Problem:
    """A problem on the first ``n`` examples.

    The classes of both data sets are separable as they are, so that no optimum exists: a tenth of every label is spread
    over all classes, and examples are given by their first principal components.
    """
    if name == "absolute values":
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(n or 400, 6, generator=draw, dtype=torch.float64)
        best = nn.Linear(6, 1, dtype=torch.float64)
        with torch.no_grad():
            best.weight.copy_(torch.randn(1, 6, generator=draw, dtype=torch.float64))
            best.bias.fill_(0.5)
            y = best(x)[:, 0]
        return Problem(TensorDataset(x, y), absolute, best, 0.0)
    raw, size = (load_breast_cancer(), 8) if name == "breast cancer" else (load_digits(), 8)
    scaled = (raw.data - raw.data.mean(0)) / (raw.data.std(0) + 1e-9)
    x = torch.from_numpy(PCA(size, whiten=True, random_state=0).fit_transform(scaled))[:n]
    labels = torch.nn.functional.one_hot(torch.from_numpy(raw.target).long()[:n]).double()
    data = TensorDataset(x, 0.9 * labels + 0.1 / labels.shape[1])
    torch.manual_seed(0)  # the same shift of all classes changes no loss: the start decides which minimiser is found
    found, minimum = kx.minimize(nn.Linear(size, labels.shape[1]), data, "cross_entropy")
    assert isinstance(found, nn.Linear)
    return Problem(data, "cross_entropy", found, minimum)


@dataclass(frozen=True)
class Course:
    """A run's rates, norms, gaps and distances to the minimiser, all at the points where steps begin."""

    rates: np.ndarray
    norms: np.ndarray
    gaps: np.ndarray
    distances: np.ndarray


def course(one: Problem, schedule: kx.Schedule, seed: int, steps: int, rate: float = 0.1) -> Course:
    """Full-gradient descent by a schedule, in a bare loop."""
    model, (x, y) = one.start(seed), one.data.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    scheduler = kx.GradientSchedule(optimizer, schedule, steps)
    pairs = list(zip(model.parameters(), one.minimizer.parameters(), strict=True))
    loss, rows = resolve(one.loss)[1], []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model(x), y).mean()
        value.backward()
        distance = sum((p - q).detach().square().sum().item() for p, q in pairs) ** 0.5
        norm = sum(p.grad.square().sum().item() for p, _ in pairs if p.grad is not None) ** 0.5
        optimizer.step()
        rows.append((scheduler.get_lr()[0], norm, value.item() - one.minimum, distance))
    return Course(*np.array(rows).T)


def foreseen(name: str, norms: np.ndarray, radius: float) -> np.ndarray:
    """The rates of a schedule for these norms; constant, linear and cosine begin with the best constant rate."""
    best = radius * hindsight("constant_optimum", norms.tolist(), floor=LEAST_FLOOR)
    if name in PLAIN:
        return best * np.array([PLAIN[name](t, len(norms)) for t in range(1, len(norms) + 1)])
    if name in HINDSIGHT:
        return radius * hindsight(name, norms.tolist(), floor=LEAST_FLOOR)
    sums, found = NormSums(LEAST_FLOOR, history=LaggedSum()), []
    for norm in norms:
        sums.add(float(norm))
        found.append(rate(name, sums, len(norms), radius))
    return np.array(found)


def scheduled(name: str, radius: float, norms: np.ndarray) -> kx.Schedule:
    """A schedule by name, those in hindsight from these norms."""
    if name in CAUSAL:
        return kx.Schedule(name, radius)
    return kx.Schedule(name, radius, norms.tolist()) if name in HINDSIGHT else kx.Schedule(name)
