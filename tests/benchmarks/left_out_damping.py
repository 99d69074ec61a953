"""The logistic rule with its damping as it begins, 1 % of the kernel's mean diagonal, and as ``tune()`` chooses it.

Settings, networks and numbers of examples are those of ``tests/benchmarks/incremental.py``. Leaving one out asks how
well the other new examples tell of one: where they do, it helps; of labels that were wrong by chance they tell nothing,
and it learns too little of them. For that reason it is a call of its own, and not what the rule begins with.

    .venv/bin/python tests/benchmarks/left_out_damping.py [--seeds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning.incremental.alternatives import accuracy
from tests.benchmarks.environment import write_result
from tests.benchmarks.incremental import SETTINGS, WIDTHS, network, setting

NEW = 20


def measured(data: str, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Accuracies with and without a memory, before and after tuning."""
    given = setting(name, kx.datasets.load(data), NEW, seed)
    model = network(data, seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        kx.train(model, given["old"], optimizer=sgd, epochs=15, out=f"{folder}/run", seed=seed, progress=False)
    x, y = given["old"][:]
    kept = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: 2 * NEW]
    found = {}
    for title, memory in (("logistic", None), ("logistic, memory", TensorDataset(x[kept], y[kept]))):
        learner = kx.IncrementalModel(model, rule="logistic", memory=memory)
        learner.learn(*given["new"][:])
        found[title] = scores(learner, given)
        began = time.process_time()
        learner.tune()
        found[f"{title}, tuned"] = {"tuning_processor_s": time.process_time() - began, **scores(learner, given)}
    return found


def scores(learner: kx.IncrementalModel, given: dict[str, Any]) -> dict[str, float]:
    new, old = (accuracy(learner, *given[part][:]) for part in ("new_test", "old_test"))
    return {"new": new, "old": old, "both": (new + old) / 2, "damping": learner.chosen_damping or 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    results = {}
    for data in WIDTHS:
        for name in SETTINGS:
            found = [measured(data, name, seed) for seed in range(seeds)]
            results[f"{data}: {name}"] = {
                row: {key: statistics.mean(one[row][key] for one in found) for key in values}
                for row, values in found[0].items()
            }
            print(f"{data}: {name}", results[f"{data}: {name}"], flush=True)
    write_result(Path(__file__).stem, {"new_examples": NEW, "seeds": seeds, **results})


if __name__ == "__main__":
    main()
