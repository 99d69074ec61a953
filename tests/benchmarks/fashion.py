"""Fashion-MNIST at its real size: what explaining costs there, each case in a process of its own.

* ``mlp``: all 60,000 images, MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, 1 epoch, 20 queries, target the label's logit.
  Its n × p gradients would take 26 GB; the peak must stay below 2 GB.
* ``resnet``: 10,000 images, a residual CNN with batch norm in training mode (78,000 parameters), SGD with momentum 0.9,
  batch 64, 2 epochs, 20 queries. Memory is given to it in two amounts: the peak follows what the caller allows.

    .venv/bin/python tests/benchmarks/fashion.py [--cases mlp resnet]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import write_result

QUERIES, BATCH = 20, 64


class Block(nn.Module):
    """Two 3 × 3 convolutions with batch norm, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.around = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's activations."""
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.around(x))


def resnet() -> nn.Module:
    """A stem, three residual blocks, pooling over the picture, a linear head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def mlp() -> nn.Module:
    """The network of the other benchmarks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Setting:
    """What a case trains, and how."""

    network: Callable[[], nn.Module]
    examples: int
    epochs: int
    momentum: float
    flat: bool
    memory: str = "1GB"


CASES = {
    "mlp": Setting(mlp, 60_000, 1, 0.0, flat=True),
    "resnet": Setting(resnet, 10_000, 2, 0.9, flat=False),
    "resnet, 200MB": Setting(resnet, 10_000, 2, 0.9, flat=False, memory="200MB"),
}


def train_plainly(setting: Setting, data: TensorDataset) -> float:
    """Seconds of the tightest ordinary loop."""
    model, (inputs, labels) = setting.network(), data.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if setting.flat else 0.01, momentum=setting.momentum)
    began = time.perf_counter()
    for _ in range(setting.epochs):
        for rows in torch.randperm(len(labels)).split(BATCH):
            loss = F.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


def measure(setting: Setting) -> dict[str, Any]:
    """Train, record, explain; seconds, peak memory, what remains."""
    torch.set_num_threads(2)
    split = kx.datasets.fashion_mnist(n_train=setting.examples, n_test=QUERIES, flat=setting.flat)
    seconds = train_plainly(setting, split.train)
    model = setting.network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if setting.flat else 0.01, momentum=setting.momentum)
    with tempfile.TemporaryDirectory() as folder:
        trajectory = kx.train(
            model, split.train, "cross_entropy", optimizer,
            epochs=setting.epochs, batch_size=BATCH, out=folder, progress=False,
        )  # fmt: skip
        before = _peak()
        began = time.perf_counter()
        bill = kx.explain(trajectory, setting.network(), split.train, split.test, "label", memory=setting.memory)
        explaining = time.perf_counter() - began
    change = bill.prediction - bill.baseline
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "examples": setting.examples,
        "epochs": setting.epochs,
        "parameters": parameters,
        "memory_given": setting.memory,
        "training_s": seconds,
        "explain_s": explaining,
        "explain_over_training": explaining / seconds,
        "peak_mb_before_explaining": before,
        "peak_mb": _peak(),
        "gradients_written_out_mb": setting.examples * parameters * 4 / 1e6,
        "remainder_relative": float(bill.remainder.norm() / change.norm()),
        "unattributed_relative": float(bill.unattributed.norm() / change.norm()),
        "buffers_relative": float(bill.buffers.norm() / change.norm()),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--inside", choices=list(CASES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(CASES[options.inside])))
        return
    numbers: dict[str, Any] = {"limit_peak_mb": 2000, "limit_remainder": 1e-5}
    for name in options.cases:
        run = subprocess.run([sys.executable, __file__, "--inside", name], capture_output=True, text=True, check=True)
        numbers[name] = json.loads(run.stdout.splitlines()[-1])
    write_result("fashion", numbers)


if __name__ == "__main__":
    main()
