"""How long the exact bill takes, against plain training and against Captum's TracInCP, in one run.

MNIST-5k (4,000 training examples), MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, 15 epochs, 200 queries, target the
label's logit, one segment per epoch, 2 threads. Each repeat times in turn: plain unrecorded training, ``kx.explain``
(replay included), Captum's ``TracInCP`` with its sample-wise trick on the same 15 checkpoints (once). Medians over
repeats and the ratio of medians are reported, and the peak memory of ``kx.explain`` in a process of its own.

    .venv/bin/python tests/benchmarks/explain_speed.py [--repeats 5] [--without-captum]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kxexplain as kx
from tests.benchmarks.environment import write_result

EPOCHS, BATCH, RATE, QUERIES = 15, 64, 0.1, 200


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train_plainly(dataset: Any) -> float:
    """The tightest ordinary loop: whole tensors, shuffled indices, no loader."""
    model, (inputs, labels) = network(), dataset.tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(0)
    began = time.perf_counter()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            loss = nn.functional.cross_entropy(model(inputs[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return time.perf_counter() - began


def record(dataset: Any, out: str) -> kx.Trajectory:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    return kx.train(
        model, dataset, "cross_entropy", optimizer, epochs=EPOCHS, batch_size=BATCH, out=out, progress=False
    )


def explain(trajectory: kx.Trajectory, dataset: Any, queries: Any) -> tuple[float, kx.Explanation]:
    began = time.perf_counter()
    explanation = kx.explain(trajectory, network(), dataset, queries, "label")
    return time.perf_counter() - began, explanation


def captum(trajectory: kx.Trajectory, dataset: Any, queries: Any) -> float:
    from captum.influence import TracInCP

    model = network()

    def load(module: nn.Module, step: str) -> float:
        module.load_state_dict(trajectory.state(int(step)).parameters)
        return RATE

    checkpoints = [str(state.step) for state in trajectory.states[1:]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        tracin = TracInCP(
            model, dataset, checkpoints, load, loss_fn=nn.CrossEntropyLoss(reduction="sum"), batch_size=256,
            layers=["0", "2", "4"], sample_wise_grads_per_batch=True,
        )  # fmt: skip
        tracin.influence(queries.tensors, k=None)
    return time.perf_counter() - began


def data() -> tuple[Any, Any]:
    split = kx.datasets.mnist5k()
    return split.train, torch.utils.data.TensorDataset(*(t[:QUERIES] for t in split.test.tensors))


def peak_memory(folder: str) -> float:
    """Peak resident megabytes of a fresh process that only explains."""
    code = (
        "import resource, torch, kxexplain as kx; torch.set_num_threads(2)\n"
        "from tests.benchmarks.explain_speed import data, explain\n"
        f"dataset, queries = data(); explain(kx.Trajectory.open({folder!r}), dataset, queries)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ))
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-captum", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    dataset, queries = data()
    with tempfile.TemporaryDirectory() as folder:
        trajectory = record(dataset, f"{folder}/run")
        train_plainly(dataset)
        plain, ours = [], []
        for _ in range(options.repeats):
            plain.append(train_plainly(dataset))
            seconds, explanation = explain(trajectory, dataset, queries)
            ours.append(seconds)
        result = {
            "plain_training_s": statistics.median(plain),
            "explain_s": statistics.median(ours),
            "explain_over_training": statistics.median(ours) / statistics.median(plain),
            "limit_over_training": 2.5,
            "remainder_relative": float(
                explanation.remainder.norm() / (explanation.prediction - explanation.baseline).norm()
            ),
            "peak_memory_mb": peak_memory(f"{folder}/run"),
            "limit_memory_mb": 1500,
        }
        if not options.without_captum:
            result["captum_tracincp_s"] = captum(trajectory, dataset, queries)
            result["captum_over_explain"] = result["captum_tracincp_s"] / result["explain_s"]
            result["limit_captum_over_explain"] = 15
    write_result(Path(__file__).stem, result)


if __name__ == "__main__":
    main()
