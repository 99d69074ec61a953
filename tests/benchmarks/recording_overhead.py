"""What recording costs: one training loop, with and without a recorder, one state per epoch.

MNIST-5k (4,000 training examples), SGD 0.1, batch 64, 2 threads. An MLP 784-128-64-10 ReLU in two loops: "loader", as
loops are usually written (a DataLoader that shuffles and collates), and "tensors", the tightest possible (rows of
whole tensors); and in the former a small CNN ("cnn"), whose steps take longer; the MLP's loops also without logging the
gradient's norm. Two copies of the loop run side by side,
an epoch of the plain one and an epoch of the recorded one in turn, so that what else the machine does meets both alike.
Reported: the median over epochs of recorded / plain (``ratio_epoch``), and the same with what recording costs once (the
checks and the fingerprint before, the first state and the closing) spread over a run of 15 epochs (``ratio``, the one
the limit is for).

    .venv/bin/python tests/benchmarks/recording_overhead.py [--epochs 30]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import write_result

BATCH, RATE, RUN = 64, 0.1, 15
Batches = Callable[[TensorDataset], Iterator[tuple[Tensor, Tensor, Tensor]]]


class Numbered(Dataset[tuple[Tensor, Tensor, int]]):
    """A dataset that says which example it serves."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return (*self.data[index], index)


def loader(data: TensorDataset) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    yield from DataLoader(Numbered(data), batch_size=BATCH, shuffle=True)


def tensors(data: TensorDataset) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    inputs, labels = data.tensors
    for indices in torch.randperm(len(data)).split(BATCH):
        yield inputs[indices], labels[indices], indices


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(800, 10),
    )  # fmt: skip


def epoch(batches: Batches, data: TensorDataset, model: nn.Module, optimizer: Any, step: Any) -> float:
    """Seconds that one epoch of the loop takes."""
    began = time.perf_counter()
    for inputs, labels, indices in batches(data):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step is not None:
            step(indices, loss)
    return time.perf_counter() - began


def measure(
    batches: Batches, network: Callable[[], nn.Module], data: TensorDataset, epochs: int, *, norms: bool = True
) -> dict[str, Any]:
    plain_model, model = network(), network()
    plain_sgd, sgd = (torch.optim.SGD(m.parameters(), lr=RATE) for m in (plain_model, model))
    plain: list[float] = []
    recorded: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        epoch(batches, data, plain_model, plain_sgd, None)  # for warming up
        began = time.perf_counter()
        recorder = kx.record(model, sgd, "cross_entropy", data, out=folder, norms=norms)
        with recorder:
            once = time.perf_counter() - began
            for _ in range(epochs):
                plain.append(epoch(batches, data, plain_model, plain_sgd, None))
                recorded.append(epoch(batches, data, model, sgd, recorder.step))
            began = time.perf_counter()
        once += time.perf_counter() - began
    pairs = [r / p for r, p in zip(recorded, plain, strict=True)]
    seconds = statistics.median(plain)
    return {
        "plain_epoch_s": seconds,
        "recorded_epoch_s": statistics.median(recorded),
        "once_s": once,
        "ratio_epoch": statistics.median(pairs),
        "ratio": statistics.median(pairs) + once / (RUN * seconds),
        "added_us_per_step": 1e6 * (statistics.median(pairs) - 1) * seconds / -(-len(data) // BATCH),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = kx.datasets.mnist5k().train
    cases = {"loader": (loader, mlp), "tensors": (tensors, mlp), "cnn": (loader, cnn)}
    numbers = {name: measure(batches, network, data, arguments.epochs) for name, (batches, network) in cases.items()}
    for name in ("loader", "tensors"):
        numbers[f"{name}, without norms"] = measure(*cases[name], data, arguments.epochs, norms=False)
    write_result("recording_overhead", {"limit_ratio": 1.1, "epochs": arguments.epochs, **numbers})


if __name__ == "__main__":
    main()
