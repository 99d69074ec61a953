"""Time of ``kx.fit`` (the trainer without recording) against a bare PyTorch loop with the same optimiser.

Step by step in turn, on the same data, model and order of batches: a step of ``kx.fit`` with all that lies around it in
its loop, a step of the bare loop, and so on for an epoch. The ratio of the median steps of either, and over several
epochs the median and the quartiles of that. The bare loop indexes the tensors, and looks at the loss once a step, as a
loop with a progress bar does; "blind" is the same without that. Processor time of the one thread, so that other load on
the machine counts little. What is done once a run is not in a step: the checks before the first (a fingerprint of the
data, a trial step), and what the loop begins with, which is given by itself. Each task is also timed with a schedule by
gradient norms, whose rates are measured in the step.

    .venv/bin/python tests/benchmarks/trainer_throughput.py [--pairs 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning.run import Run
from tests.benchmarks.environment import write_result

LIMIT = 1.05


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


def data(n: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 784, generator=draw), torch.randint(0, 10, (n,), generator=draw))


def bare(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, *, looking: bool) -> Iterator[None]:
    """An epoch, one step at every ``next``."""
    model, (x, y) = make(), examples.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for rows in torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).split(batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if looking else loss.detach())
        yield


def alternating(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, **options: Any) -> np.ndarray:
    """Milliseconds of the steps of kx.fit and of the bare loop, [step, 2]; the first steps are left out."""
    loop, stamps = bare(make, examples, batch, looking=options.pop("looking")), []
    step = Run._step

    def both(self: Run, indices: Tensor, epoch: int) -> None:
        step(self, indices, epoch)
        stamps.append(time.process_time_ns())
        next(loop)
        stamps.append(time.process_time_ns())

    Run._step = both  # type: ignore[method-assign]
    try:
        kx.fit(make(), examples, epochs=1, batch_size=batch, progress=False, **options)
    finally:
        Run._step = step  # type: ignore[method-assign]
    return np.diff(stamps)[1:].reshape(-1, 2) / 1e6


def beginning(make: Callable[[], nn.Module], examples: TensorDataset, batch: int) -> float:
    """Milliseconds that kx.fit's loop takes before its first step."""
    found, began, train, step = [], 0, Run.train, Run._step

    def timed(self: Run, **options: Any) -> None:
        nonlocal began
        began = time.process_time_ns()
        train(self, **options)

    def first(self: Run, indices: Tensor, epoch: int) -> None:
        found.append(time.process_time_ns() - began)
        step(self, indices, epoch)

    Run.train, Run._step = timed, first  # type: ignore[method-assign]
    try:
        kx.fit(make(), TensorDataset(*examples[:batch]), epochs=1, batch_size=batch, progress=False)
    finally:
        Run.train, Run._step = train, step  # type: ignore[method-assign]
    return found[0] / 1e6


def compare(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, pairs: int) -> dict[str, Any]:
    ways: dict[str, dict[str, Any]] = {
        "kx.fit": {"looking": True},
        "kx.fit, blind loop": {"looking": False},
        "kx.fit, adagrad_norm": {"looking": True, "schedule": "adagrad_norm"},
    }
    steps = {name: [] for name in ways}
    for _ in range(pairs + 1):
        for name, options in ways.items():
            steps[name].append(np.median(alternating(make, examples, batch, **options), axis=0))
    ratios = {name: [fitted / loop for fitted, loop in found[1:]] for name, found in steps.items()}
    medians = {f"median ratio, {name}": round(statistics.median(values), 4) for name, values in ratios.items()}
    spread = {f"quartiles, {n}": [round(q, 4) for q in statistics.quantiles(v, n=4)] for n, v in ratios.items()}
    once = statistics.median(beginning(make, examples, batch) for _ in range(pairs))
    loop = statistics.median(found[1] for found in steps["kx.fit"][1:])
    times = {"ms a step of the bare loop": round(loop, 4), "ms a run before the first step": round(once, 4)}
    return {**times, **medians, **spread}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=9)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    tasks = {
        "MLP 784-128-64-10, batch 64": (mlp, data(6400), 64),
        "small CNN, batch 64": (cnn, data(3200), 64),
        "linear 784-10, batch 32": (lambda: nn.Linear(784, 10), data(6400), 32),
    }
    numbers = {name: compare(*task, pairs) for name, task in tasks.items()}
    write_result("trainer_throughput", {"limit": LIMIT, "pairs": pairs, **numbers})


if __name__ == "__main__":
    main()
