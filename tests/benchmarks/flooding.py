"""Flooding on wrong labels: final losses and accuracies at several levels.

The first 500 training images of the digits, a fifth of their labels replaced at random, MLP 64-256-10 ReLU, Adam 5e-3,
batch 32, 60 epochs: without flooding the wrong labels are learnt by heart. Five seeds (labels, initialisation, order),
mean ± standard deviation; training scores are against the wrong labels, test scores against the right ones of all 360
test images.

    .venv/bin/python tests/benchmarks/flooding.py [--seeds 5]
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import TensorDataset

import kxexplain as kx
from tests.benchmarks.environment import write_result
from tests.benchmarks.schedules import Task, scores, summary

LEVELS = (None, 0.1, 0.3, 0.5, 0.8)
EXAMPLES, WRONG, EPOCHS = 500, 0.2, 60


def noisy(data: TensorDataset, seed: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    x, y = (tensor[:EXAMPLES] for tensor in data.tensors)
    wrong = torch.rand(len(y), generator=draw) < WRONG
    return TensorDataset(x, torch.where(wrong, torch.randint(0, 10, (len(y),), generator=draw), y))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    split = kx.datasets.digits()
    rows: dict[str, list[tuple[float, ...]]] = {str(level): [] for level in LEVELS}
    for seed in range(seeds):
        task = Task(noisy(split.train, seed), split.test, 256, 32, EPOCHS)
        for level in LEVELS:
            objective = kx.Objective(flooding=level)
            model = task.run(seed, make=lambda p: torch.optim.Adam(p, lr=5e-3), objective=objective)
            rows[str(level)].append((*scores(model, task.train), *scores(model, task.test)))
        print("seed", seed, "done", flush=True)
    numbers = {"seeds": seeds, "by_level": {level: summary(found) for level, found in rows.items()}}
    write_result("flooding", numbers)


if __name__ == "__main__":
    main()
