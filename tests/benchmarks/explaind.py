"""The bill on the cases that ExPLAIND's (arXiv 2505.20076) behaviour is known for, error and time side by side.

MLP 10-32-3, 128 examples of three overlapping clouds, batch 16, 6 epochs (48 steps), 20 test points, every output. The
column ``explaind`` holds what that library reaches on networks of these shapes with its defaults (10 quadrature nodes a
step; 0.33 of a change of 5.2 under batch norm in training mode), as noted when this project began, not measured here:
its errors depend on the data. ``error`` is this library's: the norm of all that the bill does not itemise beyond
rounding, remainder and unattributed together, relative to the norm of the change of the outputs.

    .venv/bin/python tests/benchmarks/explaind.py
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import write_result

EXAMPLES, POINTS, BATCH, EPOCHS, REPEATS = 128, 20, 16, 6, 5
PUBLISHED_SECONDS = 38.0


def network(activation: Callable[[], nn.Module], *, normalised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    between = [nn.BatchNorm1d(32)] if normalised else []
    return nn.Sequential(nn.Linear(10, 32), *between, activation(), nn.Linear(32, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], torch.optim.Optimizer], float]] = {
    "tanh, SGD": (lambda: network(nn.Tanh), lambda p: torch.optim.SGD(p, lr=0.1), 2e-6),
    "ReLU, SGD": (lambda: network(nn.ReLU), lambda p: torch.optim.SGD(p, lr=0.1), 5e-4),
    "ReLU, AdamW": (lambda: network(nn.ReLU), lambda p: torch.optim.AdamW(p, lr=0.01), 1.5e-3),
    "ReLU, momentum": (lambda: network(nn.ReLU), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), 1.7e-3),
    "ReLU, batch norm in training mode": (
        lambda: network(nn.ReLU, normalised=True), lambda p: torch.optim.SGD(p, lr=0.1), 0.33 / 5.2,
    ),
}  # fmt: skip


def clouds() -> tuple[TensorDataset, TensorDataset]:
    """Training examples and test points."""
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 10, generator=generator)
    labels = torch.randint(3, (EXAMPLES + POINTS,), generator=generator)
    inputs = centres[labels] + torch.randn(len(labels), 10, generator=generator)
    return TensorDataset(inputs[:EXAMPLES], labels[:EXAMPLES]), TensorDataset(inputs[EXAMPLES:], labels[EXAMPLES:])


def measure(make: Callable[[], nn.Module], optimizer: Any, known: float) -> dict[str, float]:
    data, points = clouds()
    with tempfile.TemporaryDirectory() as folder:
        trajectory = kx.train(
            make(), data, "cross_entropy", optimizer, epochs=EPOCHS, batch_size=BATCH, out=folder, progress=False
        )
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            bill = kx.explain(trajectory, make(), data, points, "all", stride=1)
            seconds.append(time.perf_counter() - began)
    change = float((bill.prediction - bill.baseline).norm())
    missed = float((bill.remainder + bill.unattributed).norm())
    return {"error": missed / change, "explaind": known, "change": change, "seconds": statistics.median(seconds)}


def main() -> None:
    torch.set_num_threads(2)
    numbers = {name: measure(*case) for name, case in CASES.items()}
    write_result("explaind", {"explaind_seconds": PUBLISHED_SECONDS, "points": POINTS, **numbers})


if __name__ == "__main__":
    main()
