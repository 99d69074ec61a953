"""Time of ``kx.fit`` (the trainer without recording) against a bare PyTorch loop with the same optimiser.

One epoch (50 to 200 steps) of each in turn, on the same data, model and order of batches; the ratio of every pair of
neighbouring epochs, and the median of these. The bare loop indexes the tensors, and looks at the loss once a step, as a
loop with a progress bar does; "blind" is the same without that. Processor time of the one thread, so that other load on
the machine counts little. kx.fit's checks before the first step (a fingerprint of the data, a trial step) are outside
the timed part: they are made once a run. Each task is also timed with a schedule by gradient norms.

    .venv/bin/python tests/benchmarks/trainer_throughput.py [--pairs 9]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
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


def bare(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, *, looking: bool) -> float:
    """Seconds of one epoch."""
    model, (x, y) = make(), examples.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    order, losses = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)), []
    began = time.process_time()
    for rows in order.split(batch):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item() if looking else loss.detach())
    return time.process_time() - began


def fitted(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, schedule: str | None) -> float:
    """Seconds of one epoch of kx.fit, its checks beforehand not counted."""
    seconds, whole = [], Run.train

    def timed(self: Run, **options: Any) -> None:
        began = time.process_time()
        whole(self, **options)
        seconds.append(time.process_time() - began)

    Run.train = timed  # type: ignore[method-assign]
    try:
        kx.fit(make(), examples, epochs=1, batch_size=batch, schedule=schedule, progress=False)
    finally:
        Run.train = whole  # type: ignore[method-assign]
    return seconds[0]


def compare(make: Callable[[], nn.Module], examples: TensorDataset, batch: int, pairs: int) -> dict[str, Any]:
    ratios: dict[str, list[float]] = {"kx.fit": [], "kx.fit, blind loop": [], "kx.fit, adagrad_norm": []}
    steps, seconds = -(-len(examples) // batch), []
    for _ in range(pairs + 1):
        loop = bare(make, examples, batch, looking=True)
        ratios["kx.fit"].append(fitted(make, examples, batch, None) / loop)
        blind = bare(make, examples, batch, looking=False)
        ratios["kx.fit, blind loop"].append(fitted(make, examples, batch, None) / blind)
        loop_again = bare(make, examples, batch, looking=True)
        ratios["kx.fit, adagrad_norm"].append(fitted(make, examples, batch, "adagrad_norm") / loop_again)
        seconds.append(loop)
    medians = {f"median ratio, {name}": round(statistics.median(values[1:]), 4) for name, values in ratios.items()}
    spread = {f"quartiles, {n}": [round(q, 4) for q in statistics.quantiles(v[1:], n=4)] for n, v in ratios.items()}
    return {"ms a step of the bare loop": round(1000 * statistics.median(seconds[1:]) / steps, 4), **medians, **spread}


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
