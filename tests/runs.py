"""Training runs for tests: plain loops over an explicit order of indices, recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kxexplain as kx
from kxexplain.trajectory.batches import call, fetch
from kxexplain.trajectory.losses import resolve
from tests.cases import EXAMPLES, Problem


def order(examples: int = EXAMPLES, size: int = 5, epochs: int = 2) -> list[list[int]]:
    """Batches of shuffled indices; the last of an epoch may be short."""
    batches = []
    for epoch in range(epochs):
        shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(epoch)).tolist()
        batches += [shuffled[at : at + size] for at in range(0, examples, size)]
    return batches


def run(
    problem: Problem,
    out: Path,
    rate: float = 0.1,
    *,
    batches: Sequence[Sequence[int]] | None = None,
    keep: str | int = "epoch",
    optimizer: torch.optim.Optimizer | None = None,
    before_step: Callable[[int], Any] = lambda step: None,
) -> kx.Trajectory:
    """Train the problem's model in place with SGD (or the optimiser given), recorded in ``out``."""
    model = problem.model.train()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=rate)
    loss = resolve(problem.loss)[1]
    batches = order(len(problem.data)) if batches is None else batches  # type: ignore[arg-type]
    with kx.record(model, optimizer, problem.loss, problem.data, out=out, keep=keep) as recorder:
        for step, indices in enumerate(batches):
            before_step(step)
            optimizer.zero_grad()
            inputs, targets = fetch(problem.data, indices)
            value = loss(call(model, inputs), targets).mean()
            value.backward()
            optimizer.step()
            recorder.step(indices, value.item())
    return recorder.trajectory
