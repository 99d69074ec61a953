"""What recording costs: a training loop with and without a recorder, one state per epoch.

MNIST-5k (4,000 training examples), SGD 0.1, batch 64, 2 threads. An MLP 784-128-64-10 ReLU in two loops: "loader", as
loops are usually written (a DataLoader that shuffles and collates), and "tensors", the tightest possible (rows of
whole tensors, no loader); and in the former a small CNN ("cnn"), whose steps take longer; the MLP's loops also with the
gradient's norm in the log ("with norms"). An epoch of the plain loop and one of the recorded loop run in turn, so that
what else the machine does meets both alike, and a step that takes more than ten times the median counts as ten: the
machine was elsewhere. Reported: recorded / plain (``ratio_epoch``), and the same with what recording costs once (the
checks and the fingerprint before, the first state and the closing) spread over a run of 15 epochs (``ratio``, the one
the limit is for). "train" is ``kx.train`` against ``kx.fit``, its loop unrecorded: whole runs of 15 epochs in turn.

    .venv/bin/python tests/benchmarks/recording_overhead.py [--epochs 60]
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

BATCH, RATE, RUN, OUTLIER = 64, 0.1, 15, 10
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


def epoch(batches: Batches, data: TensorDataset, model: nn.Module, optimizer: Any, step: Any) -> list[float]:
    """Seconds that each step of an epoch of the loop takes."""
    times, began = [], time.perf_counter()
    for inputs, labels, indices in batches(data):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step is not None:
            step(indices, loss)
        now = time.perf_counter()
        times.append(now - began)
        began = now
    return times


def typical(times: list[float]) -> float:
    """The mean, of which a single time is at most ``OUTLIER`` medians."""
    most = OUTLIER * statistics.median(times)
    return statistics.fmean([min(one, most) for one in times])


def measure(
    batches: Batches, network: Callable[[], nn.Module], data: TensorDataset, epochs: int, *, norms: bool = False
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
                plain += epoch(batches, data, plain_model, plain_sgd, None)
                recorded += epoch(batches, data, model, sgd, recorder.step)
            began = time.perf_counter()
        once += time.perf_counter() - began
    steps = RUN * -(-len(data) // BATCH)
    step, more = typical(plain), typical(recorded) - typical(plain)
    return {
        "plain_step_us": 1e6 * step,
        "added_us_per_step": 1e6 * more,
        "once_s": once,
        "ratio_epoch": 1 + more / step,
        "ratio": 1 + (more + once / steps) / step,
    }


def functions(data: TensorDataset, times: int) -> dict[str, Any]:
    """``kx.train`` against ``kx.fit``."""
    found: dict[str, list[float]] = {"fit": [], "train": []}
    options = {"epochs": RUN, "batch_size": BATCH, "progress": False}
    for _ in range(times):
        for name, seconds in found.items():
            model = mlp()
            sgd = torch.optim.SGD(model.parameters(), lr=RATE)
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                if name == "fit":
                    kx.fit(model, data, "cross_entropy", sgd, **options)
                else:
                    kx.train(model, data, "cross_entropy", sgd, out=folder, **options)
                seconds.append(time.perf_counter() - began)
    ratios = [train / fit for train, fit in zip(found["train"], found["fit"], strict=True)]
    medians = {f"{name}_s": statistics.median(seconds) for name, seconds in found.items()}
    return {**medians, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = kx.datasets.mnist5k().train
    cases = {"loader": (loader, mlp), "cnn": (loader, cnn), "tensors": (tensors, mlp)}
    numbers = {
        name: measure(batches, network, data, arguments.epochs // (6 if name == "cnn" else 1))
        for name, (batches, network) in cases.items()
    }
    for name in ("loader", "tensors"):
        numbers[f"{name}, with norms"] = measure(*cases[name], data, arguments.epochs, norms=True)
    numbers["train"] = functions(data, max(1, arguments.epochs // 4))
    write_result("recording_overhead", {"limit_ratio": 1.1, "epochs": arguments.epochs, **numbers})


if __name__ == "__main__":
    main()
