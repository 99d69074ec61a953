"""Test accuracies of a network and of SVMs on its kernels, over five seeds of split, initialisation and order.

The network is an MLP with ReLU under SGD 0.1 for 15 epochs: 64-64-32-10 on digits (1,437 training examples, batch 32),
784-128-64-10 on MNIST-5k (4,000 of its 5,000 and, as "mnist5k, 2000", 2,000 of them, batch 64). The SVMs have the same
examples; C, and the width of the RBF kernel, are chosen by cross-validation on the Gram matrix, the same way for all.
"start" is the tangent kernel of the network as initialised, "middle" that of the state halfway, "end" that of the
trained network.

Results are written after every seed; with ``--resume`` only seeds that are missing run.

    .venv/bin/python tests/benchmarks/svm_table.py [--data digits mnist5k …] [--seeds 5] [--resume]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import RESULTS, write_result


@dataclass(frozen=True)
class Setting:
    """A data set, how many examples are left for training, and the network."""

    data: str
    train: int
    options: dict[str, int]
    widths: tuple[int, ...]
    batch: int


MNIST = (784, 128, 64, 10)
SETTINGS = {
    "digits": Setting("digits", 1437, {}, (64, 64, 32, 10), 32),
    "mnist5k": Setting("mnist5k", 4000, {}, MNIST, 64),
    "mnist5k, 2000": Setting("mnist5k", 2000, {"n_test": 3000}, MNIST, 64),
}
MEASURES = ("accuracy", "agreement", "correlation", "alignment", "effective_rank", "support_vectors", "C")


def network(widths: tuple[int, ...], seed: int) -> nn.Module:
    """An MLP with ReLU."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def compared(name: str, seed: int) -> dict[str, Any]:
    """One seed's network and rows."""
    began = time.perf_counter()
    setting = SETTINGS[name]
    split, model = kx.datasets.load(setting.data, seed=seed, **setting.options), network(setting.widths, seed)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = kx.train(
            model, split.train, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), epochs=15,
            batch_size=setting.batch, seed=seed, out=folder, progress=False,
        )  # fmt: skip
        found = kx.compare_svm(trajectory, model, split.train, split.test, limit=len(split.train), queries=0, seed=seed)
    assert len(found.examples) == setting.train
    rows = {row.kernel: {name: asdict(row)[name] for name in MEASURES} for row in found.kernels}
    print(name, seed, found.network_accuracy, {k: v["accuracy"] for k, v in rows.items()}, flush=True)
    return {"seed": seed, "network": found.network_accuracy, "kernels": rows, "seconds": time.perf_counter() - began}


def table(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and standard deviations over the seeds."""
    made: dict[str, Any] = {"network": {"accuracy": _told([run["network"] for run in runs])}}
    for kernel in runs[0]["kernels"]:
        made[kernel] = {name: _told([run["kernels"][kernel][name] for run in runs]) for name in MEASURES}
    return made


def _told(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--resume", action="store_true", help="keep the seeds whose results are there")
    options = parser.parse_args()
    numbers = measured() if options.resume else {}
    for name in options.data:
        runs = {run["seed"]: run for run in numbers.get(name, {}).get("runs", [])}
        for seed in range(options.seeds):
            if seed in runs:
                continue
            runs[seed] = compared(name, seed)
            ordered = [runs[at] for at in sorted(runs)]
            numbers[name] = {"train_examples": SETTINGS[name].train, "table": table(ordered), "runs": ordered}
            write_result("svm_table", numbers)


def measured() -> dict[str, Any]:
    """The settings' results so far."""
    file = RESULTS / "svm_table.json"
    kept = json.loads(file.read_text()) if file.is_file() else {}
    return {name: kept[name] for name in SETTINGS if name in kept}


if __name__ == "__main__":
    main()
