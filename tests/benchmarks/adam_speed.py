"""How long the bill takes under Adam, against training and against the matrix product that it cannot do without.

MNIST-5k (4,000 training examples), MLP 784-128-64-10 ReLU, Adam 1e-3, batch 64, one segment per epoch, 2 threads,
target the label's logit. Adam's elementwise preconditioner forbids the factored form, so the floor for q queries is
2·q·n·p operations an epoch: a [q, p] × [p, 64] product per step, timed before and after the bill.

    .venv/bin/python tests/benchmarks/adam_speed.py [--epochs 3]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from tests.benchmarks.environment import write_result

BATCH = 64


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train_plainly(data: TensorDataset, epochs: int) -> float:
    """The tightest ordinary loop."""
    model, (inputs, labels) = network(), data.tensors
    optimizer = torch.optim.Adam(model.parameters())
    began = time.perf_counter()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


def product(queries: int, parameters: int, steps: int) -> float:
    """Seconds of the matrix products alone."""
    left, right = torch.randn(queries, parameters), torch.randn(parameters, BATCH)
    began = time.perf_counter()
    for _ in range(steps):
        left @ right
    return time.perf_counter() - began


def explain(trajectory: kx.Trajectory, data: TensorDataset, queries: TensorDataset) -> tuple[float, kx.Explanation]:
    """Seconds that the bill takes, and the bill."""
    began = time.perf_counter()
    explanation = kx.explain(trajectory, network(), data, queries, "label")
    return time.perf_counter() - began, explanation


def compare(
    count: int, repeats: int, run: Callable[[], tuple[float, kx.Explanation]], peer: Callable[[], float]
) -> Any:
    """Both in turn, so that what else the machine does meets them alike: the median of the ratios."""
    ours, theirs = [], []
    for _ in range(repeats):
        before = peer()
        seconds, explanation = run()
        ours.append(seconds)
        theirs.append((before + peer()) / 2)
    change = explanation.prediction - explanation.baseline
    return {
        f"explain_{count}_s": statistics.median(ours),
        "peer_s": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        "remainder": float(explanation.remainder.norm() / change.norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="of the bill for 5 queries; a third of it for 200")
    options = parser.parse_args()
    epochs = options.epochs
    torch.set_num_threads(2)
    split = kx.datasets.mnist5k()
    data, model = split.train, network()
    parameters, steps = sum(p.numel() for p in model.parameters()), epochs * -(-len(data) // BATCH)
    few, many = (TensorDataset(*(t[:count] for t in split.test.tensors)) for count in (5, 200))
    train_plainly(data, 1)
    with tempfile.TemporaryDirectory() as folder:
        adam = torch.optim.Adam(model.parameters())
        trajectory = kx.train(
            model, data, "cross_entropy", adam, epochs=epochs, batch_size=BATCH, out=folder, progress=False
        )
        result = {
            "epochs": epochs,
            "against_training": compare(
                5, options.repeats, lambda: explain(trajectory, data, few), lambda: train_plainly(data, epochs)
            ) | {"limit": 6},
            "against_product": compare(
                200, -(-options.repeats // 3),
                lambda: explain(trajectory, data, many), lambda: product(200, parameters, steps),
            ) | {"limit": 3},
        }  # fmt: skip
    write_result("adam_speed", result)


if __name__ == "__main__":
    main()
