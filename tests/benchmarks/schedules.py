"""What each schedule comes to on digits and Fashion-MNIST, with its radius estimated.

Digits: all 1,437 training images, MLP 64-32-10 ReLU, batch 32, 10 epochs. Fashion-MNIST: the first 10,000 training and
2,000 test images, MLP 784-64-10 ReLU, batch 64, 4 epochs. Five seeds (initialisation and order), mean ± standard
deviation of final loss and accuracy. "sgd tuned" is the constant rate out of RATES with the least loss on a held-back
fifth of the training images (one seed), "cosine tuned" decays from the same rate: these two alone were tuned. Adam has
its default rate. The schedules have no number set by hand; those in hindsight take norms and radius from a recorded
run of warmup_decay with the same seed ("smoothed": the median of these norms over a tenth of the run).

    .venv/bin/python tests/benchmarks/schedules.py [--seeds 5] [--no-fashion]
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning.rates import CAUSAL, COORDINATES, HINDSIGHT
from tests.benchmarks.environment import write_result

RATES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def network(inputs: int, hidden: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def scores(model: nn.Module, data: TensorDataset) -> tuple[float, float]:
    x, y = data.tensors
    with torch.no_grad():
        outputs = model(x)
    return nn.functional.cross_entropy(outputs, y).item(), float((outputs.argmax(1) == y).float().mean())


class Task:
    """Data, sizes, and one run."""

    def __init__(self, train: TensorDataset, test: TensorDataset, hidden: int, batch: int, epochs: int) -> None:
        self.train, self.test, self.hidden, self.batch, self.epochs = train, test, hidden, batch, epochs
        self.width = train.tensors[0].shape[1]

    def run(self, seed: int, data: TensorDataset | None = None, **options: Any) -> nn.Module:
        model = network(self.width, self.hidden, seed)
        make = options.pop("make", None)
        settings = {"epochs": self.epochs, "batch_size": self.batch, "seed": seed, "progress": False}
        kx.fit(model, data or self.train, "cross_entropy", make, **settings, **options)
        return model

    def tuned(self) -> float:
        """The constant rate that does best on a held-back fifth."""
        x, y = self.train.tensors
        cut = len(y) * 4 // 5
        part, held = TensorDataset(x[:cut], y[:cut]), TensorDataset(x[cut:], y[cut:])
        losses = {rate: scores(self.run(100, part, make=sgd(rate)), held)[0] for rate in RATES}
        return min(losses, key=lambda rate: (losses[rate] != losses[rate], losses[rate]))

    def earlier(self, seed: int, folder: str) -> kx.Trajectory:
        model = network(self.width, self.hidden, seed)
        return kx.train(
            model, self.train, schedule="warmup_decay", epochs=self.epochs, batch_size=self.batch, seed=seed,
            out=folder, progress=False,
        )  # fmt: skip


def sgd(rate: float) -> Any:
    return lambda p: torch.optim.SGD(p, lr=rate)


def summary(rows: list[tuple[float, ...]]) -> dict[str, dict[str, float]]:
    names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    values = torch.tensor(rows, dtype=torch.float64)
    return {
        name: {"mean": round(float(column.mean()), 4), "sd": round(float(column.std()), 4)}
        for name, column in zip(names, values.T, strict=True)
    }


def compare(task: Task, seeds: int) -> dict[str, Any]:
    rate = task.tuned()
    ways: dict[str, dict[str, Any]] = {
        "sgd tuned": {"make": sgd(rate)},
        "cosine tuned": {"make": sgd(rate), "schedule": "cosine"},
        "adam": {"make": torch.optim.Adam},
        **{name: {"schedule": name} for name in (*CAUSAL, COORDINATES)},
    }
    smooth = {f"{name} smoothed": name for name in HINDSIGHT if name != "constant_optimum"}
    rows: dict[str, list[tuple[float, ...]]] = {name: [] for name in (*ways, *HINDSIGHT, *smooth)}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            before = task.earlier(seed, folder)
            hindsight = {name: {"schedule": kx.Schedule(name, earlier=before)} for name in HINDSIGHT}
            hindsight |= {
                label: {"schedule": kx.Schedule(name, earlier=before, smooth=0.1)} for label, name in smooth.items()
            }
            for name, options in {**ways, **hindsight}.items():
                try:
                    model = task.run(seed, **options)
                except kx.TrainingError as error:
                    print(name, seed, error)
                    rows[name].append((float("nan"),) * 4)
                    continue
                rows[name].append((*scores(model, task.train), *scores(model, task.test)))
        print("seed", seed, "done", flush=True)
    return {"tuned_rate": rate, "results": {name: summary(found) for name, found in rows.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-fashion", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    split = kx.datasets.digits()
    digits = Task(split.train, split.test, 32, 32, 10)
    numbers: dict[str, Any] = {"seeds": options.seeds, "digits": compare(digits, options.seeds)}
    if not options.no_fashion:
        clothes = kx.datasets.fashion_mnist(n_train=10_000, n_test=2_000, flat=True)
        numbers["fashion_mnist"] = compare(Task(clothes.train, clothes.test, 64, 64, 4), options.seeds)
    write_result("schedules", numbers)


if __name__ == "__main__":
    main()
