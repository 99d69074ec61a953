"""Does α_i depend on x, and do models trained on halves add up? Per architecture and learning rate, on digits.

600 training examples, cross-entropy, SGD, batch 32, 8 epochs; α_i(x) for 60 test images: the ᾱ of the first 30 predict
the other 30 (``kx.alpha_variation``). The additive guess is measured on all 360 test images: halves of 300 at the rate
given, everything at the same rate and epochs (the means over the batch make the steps alike) and, for the sum over
examples to count alike, at twice the rate.

    .venv/bin/python tests/benchmarks/alpha_independence.py [--epochs 8]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import write_result

RATES = (0.01, 0.1, 0.5)
TRAIN, QUERIES = 600, 60


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 32), activation(), nn.Linear(32, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(64, 10),
    "mlp, relu": lambda: mlp(nn.ReLU),
    "mlp, tanh": lambda: mlp(nn.Tanh),
    "cnn": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 10)
    ),
}


def trained(name: str, data: Any, rate: float, epochs: int, out: Path) -> tuple[kx.Trajectory, nn.Module]:
    torch.manual_seed(0)
    model = NETWORKS[name]()
    sgd = torch.optim.SGD(model.parameters(), lr=rate)
    return kx.train(model, data, optimizer=sgd, epochs=epochs, batch_size=32, out=out, progress=False), model


def measure(name: str, rate: float, epochs: int) -> dict[str, Any]:
    split = kx.datasets.digits()
    data, (x, y) = Subset(split.train, range(TRAIN)), split.test.tensors
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        whole, model = trained(name, data, rate, epochs, out / "whole")
        alphas = kx.alpha_variation(whole, model, data, Subset(split.test, range(QUERIES)))
        parts = [
            trained(name, Subset(data, rows), rate, epochs, out / f"{rows.start}")[0]
            for rows in (range(TRAIN // 2), range(TRAIN // 2, TRAIN))
        ]
        twice, _ = trained(name, data, 2 * rate, epochs, out / "twice")
        alike, summed = (kx.additive_guess(*parts, run, model, x).summary(y) for run in (whole, twice))
    found = {"alpha": alphas.summary(), "additive, same rate": alike, "additive, twice the rate": summed}
    print(name, rate, found, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {f"{name}, rate {rate}": measure(name, rate, options.epochs) for name in NETWORKS for rate in RATES}
    write_result("alpha_independence", {"epochs": options.epochs, **numbers})


if __name__ == "__main__":
    main()
