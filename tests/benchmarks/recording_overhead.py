"""What recording costs: one training loop, with and without a recorder, one state per epoch.

MNIST-5k (4,000 training examples), MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, 2 threads. Two loops: "loader", as
loops are usually written (a DataLoader that shuffles and collates), and "tensors", the tightest possible (rows of
whole tensors). The recorded time holds everything: the checks and the fingerprint before, the states, the closing.
Repeats alternate plain and recorded, whichever comes first; reported are medians and the ratio of medians, in wall
time and in the process' own CPU time, which other work on the machine disturbs less.

    .venv/bin/python tests/benchmarks/recording_overhead.py [--repeats 7] [--epochs 15]
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

BATCH, RATE = 64, 0.1
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


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def loop(batches: Batches, data: TensorDataset, epochs: int, out: str | None) -> None:
    """The loop itself, recorded if ``out`` is a folder."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    def run(step: Callable[[Tensor, Tensor], None] | None) -> None:
        for _ in range(epochs):
            for inputs, labels, indices in batches(data):
                loss = nn.functional.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if step is not None:
                    step(indices, loss)

    if out is None:
        run(None)
    else:
        with kx.record(model, optimizer, "cross_entropy", data, out=out) as recorder:
            run(recorder.step)


def clocked(work: Callable[[], None]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(batches: Batches, data: TensorDataset, epochs: int, repeats: int) -> dict[str, Any]:
    times: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for repeat in range(repeats + 1):
        for recorded in (False, True) if repeat % 2 else (True, False):
            with tempfile.TemporaryDirectory() as folder:
                out = folder if recorded else None
                spent = clocked(lambda out=out: loop(batches, data, epochs, out))  # type: ignore[misc]
            if repeat:  # the first is for warming up
                times[recorded].append(spent)
    medians = {recorded: [statistics.median(t) for t in zip(*spent, strict=True)] for recorded, spent in times.items()}
    steps = epochs * -(-len(data) // BATCH)
    return {
        "steps": steps,
        "plain_s": medians[False][0],
        "recorded_s": medians[True][0],
        "ratio": medians[True][0] / medians[False][0],
        "plain_cpu_s": medians[False][1],
        "recorded_cpu_s": medians[True][1],
        "ratio_cpu": medians[True][1] / medians[False][1],
        "added_us_per_step": 1e6 * (medians[True][0] - medians[False][0]) / steps,
        "plain_all_s": [round(wall, 4) for wall, _ in times[False]],
        "recorded_all_s": [round(wall, 4) for wall, _ in times[True]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = kx.datasets.mnist5k().train
    numbers = {
        batches.__name__: measure(batches, data, arguments.epochs, arguments.repeats) for batches in (loader, tensors)
    }
    write_result("recording_overhead", {"limit_ratio": 1.1, "epochs": arguments.epochs, **numbers})


if __name__ == "__main__":
    main()
