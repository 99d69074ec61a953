"""How long the bill takes under Adam, against training and against the matrix product that it cannot do without.

MNIST-5k (4,000 training examples), MLP 784-128-64-10 ReLU, Adam 1e-3, batch 64, one segment per epoch, 2 threads,
target the label's logit. Adam's elementwise preconditioner forbids the factored form, so the floor for q queries is
2·q·n·p operations an epoch: a [q, p] × [p, 64] product per step, timed in the same run.

    .venv/bin/python tests/benchmarks/adam_speed.py [--epochs 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(2)
    split = kx.datasets.mnist5k()
    data, model = split.train, network()
    parameters, steps = sum(p.numel() for p in model.parameters()), epochs * -(-len(data) // BATCH)
    train_plainly(data, 1)
    result: dict[str, Any] = {"epochs": epochs, "training_s": train_plainly(data, epochs)}
    with tempfile.TemporaryDirectory() as folder:
        adam = torch.optim.Adam(model.parameters())
        trajectory = kx.train(
            model, data, "cross_entropy", adam, epochs=epochs, batch_size=BATCH, out=folder, progress=False
        )
        for count in (5, 200):
            queries = TensorDataset(*(t[:count] for t in split.test.tensors))
            began = time.perf_counter()
            explanation = kx.explain(trajectory, network(), data, queries, "label")
            result[f"explain_{count}_s"] = time.perf_counter() - began
            result[f"product_{count}_s"] = product(count, parameters, steps)
            change = explanation.prediction - explanation.baseline
            result[f"remainder_{count}"] = float(explanation.remainder.norm() / change.norm())
    result["explain_5_over_training"] = result["explain_5_s"] / result["training_s"]
    result["limit_explain_5_over_training"] = 6
    result["explain_200_over_product"] = result["explain_200_s"] / result["product_200_s"]
    result["limit_explain_200_over_product"] = 3
    write_result("adam_speed", result)


if __name__ == "__main__":
    main()
