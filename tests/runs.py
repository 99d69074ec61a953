"""Training runs for tests: plain loops over an explicit order of indices, recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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


class Reach(NamedTuple):
    """Learning rates found by doubling: the least, the largest that trains, the largest that stays finite."""

    least: float
    training: float
    finite: float


def reach(case: Case, dtype: torch.dtype) -> Reach:
    """Up to which rate the loss never rises tenfold, and up to which nothing overflows."""
    rate, training, finite = 0.02, 0.01, 0.01
    while rate < 1e4:
        problem = case.build(dtype)
        losses = _losses(problem, rate)
        values = [*losses, float(call(problem.model.eval(), problem.inputs).abs().sum())]
        values += [float(t.abs().sum()) for t in problem.model.state_dict().values()]
        if not all(math.isfinite(value) for value in values):
            break
        finite = rate
        if training == rate / 2 and max(losses) < 10 * losses[0]:
            training = rate
        rate *= 2
    return Reach(0.01, training, finite)


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
