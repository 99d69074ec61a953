"""Training runs for tests: plain loops over an explicit order of indices, recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import kxexplain as kx
from kxexplain.trajectory.batches import call, fetch
from kxexplain.trajectory.losses import resolve
from tests.cases import EXAMPLES, Case, Problem


def order(examples: int = EXAMPLES, size: int = 5, epochs: int = 2) -> list[list[int]]:
    """Batches of shuffled indices; the last of an epoch may be short."""
    batches = []
    for epoch in range(epochs):
        shuffled = torch.randperm(examples, generator=torch.Generator().manual_seed(epoch)).tolist()
        batches += [shuffled[at : at + size] for at in range(0, examples, size)]
    return batches


def largest_rate(case: Case, dtype: torch.dtype) -> float:
    """The largest learning rate, found by doubling, at which the loss never rises tenfold and nothing overflows."""
    rate = 0.02
    while rate < 1e4:
        problem = case.build(dtype)
        losses = _losses(problem, rate)
        with torch.no_grad():
            values = [call(problem.model.eval(), problem.inputs), *problem.model.state_dict().values()]
        finite = all(bool(value.isfinite().all()) for value in values)
        if not (finite and all(loss < 10 * losses[0] for loss in losses)):
            break
        rate *= 2
    return rate / 2


def _losses(problem: Problem, rate: float) -> list[float]:
    """The same training, unrecorded."""
    model, losses = problem.model.train(), []
    for indices in order(len(problem.data)):  # type: ignore[arg-type]
        inputs, targets = fetch(problem.data, indices)
        value = resolve(problem.loss)[1](call(model, inputs), targets).mean()
        parameters = list(model.parameters())
        for p, gradient in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            p.data.sub_(gradient, alpha=rate)
        losses.append(value.item())
    return losses


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
