"""Kernel terms instead of retraining: accuracy on new and old data, and time, in four settings on two data sets.

Settings, each with 20 new examples (``--new``) and, for the rows with a memory, 40 old ones:

* sample: 300 examples were trained on; more of the same kind come.
* classes: classes 0 to 4 were trained on (with ten outputs); 5 to 9 come.
* rotation: pictures turned by 30 degrees come; "new" is accuracy on test pictures turned so.
* correction: the new examples were trained on with wrong labels; "new" is accuracy on them, rightly labelled.

Networks 64-32-10 (digits) and 784-128-64-10 (MNIST-5k), ReLU, SGD 0.1, batches of 32, 15 epochs. Full retraining: the
same recipe from the same start, on old and new (on the corrected set, for "correction"). Fine-tuning: on new and
memory, rate and epochs tuned on a fifth kept back; the tuning's time is not counted. Wall and processor time
of one thread.

    .venv/bin/python tests/benchmarks/incremental.py [--seeds 5] [--new 20] [--data digits mnist5k]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.plots import plot_updates
from tests.benchmarks.environment import RESULTS, write_result

WIDTHS = {"digits": (64, 32, 10), "mnist5k": (784, 128, 64, 10)}
SETTINGS = ("sample", "classes", "rotation", "correction")


def network(data: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(WIDTHS[data]):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def setting(name: str, data: kx.datasets.Split, new: int, seed: int) -> dict[str, Any]:
    """Old, new, test sets, and what retraining gets."""
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    draw = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(y), generator=draw)
    pick = lambda rows: TensorDataset(x[rows], y[rows])  # noqa: E731
    if name == "sample":
        return {
            "old": pick(order[:300]),
            "new": pick(order[300 : 300 + new]),
            "old_test": data.test,
            "new_test": data.test,
        }
    if name == "classes":
        late = order[y[order] >= 5][:new]
        early = [TensorDataset(xt[part], yt[part]) for part in (yt < 5, yt >= 5)]
        return {"old": pick(order[y[order] < 5]), "new": pick(late), "old_test": early[0], "new_test": early[1]}
    some = order[:new]
    if name == "rotation":
        turned = kx.datasets.rotated(data, 30)
        fresh = TensorDataset(turned.train.tensors[0][some], y[some])
        return {"old": data.train, "new": fresh, "old_test": data.test, "new_test": turned.test}
    wrong = y.clone()
    wrong[some] = (y[some] + torch.randint(1, 10, (new,), generator=draw)) % 10
    right = pick(some)
    return {"old": TensorDataset(x, wrong), "new": right, "old_test": data.test, "new_test": right, "whole": data.train}


def measured(data_name: str, name: str, new: int, seed: int) -> kx.Updates:
    given = setting(name, kx.datasets.load(data_name), new, seed)
    model = network(data_name, seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with tempfile.TemporaryDirectory() as folder:
        run = kx.train(model, given["old"], optimizer=sgd, epochs=15, out=f"{folder}/run", seed=seed, progress=False)
        return kx.compare_updates(run, model, **given, memory=2 * new, seed=seed)


def averaged(found: list[kx.Updates]) -> list[dict[str, Any]]:
    """Means over seeds, the gap to retraining and how many times less time it took."""
    rows = []
    for name in (row.name for row in found[0].rows):
        each, full = [one[name] for one in found], [one["retraining"] for one in found]
        values: dict[str, Any] = {"name": name}
        for key in ("new", "old", "both", "seconds", "processor", "moved", "kernel_moved"):
            numbers = [getattr(row, key) for row in each]
            values[key] = None if None in numbers else statistics.mean(numbers)
        gaps = [row.both - best.both for row, best in zip(each, full, strict=True)]
        values["gap"], values["gap_sd"] = statistics.mean(gaps), statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        for key, measure in (("times_faster", "seconds"), ("times_faster_processor", "processor")):
            took, best = ([getattr(row, measure) for row in part] for part in (each, full))
            ratio = statistics.median(b / max(t, 1e-9) for t, b in zip(took, best, strict=True))
            values[key] = None if name == "no update" else ratio
        values["settings"] = [row.settings for row in each]
        rows.append(values)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--new", type=int, default=20)
    parser.add_argument("--data", nargs="+", default=list(WIDTHS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    measured("digits", "sample", options.new, 0)  # the first call imports and compiles what the others find ready
    for data in options.data:
        for name in SETTINGS:
            found = [measured(data, name, options.new, seed) for seed in range(options.seeds)]
            results[f"{data}: {name}"] = averaged(found)
            pictures[f"{data}: {name}"] = found
            print(f"{data}: {name}\n{found[0]}", flush=True)
    good = [
        {"setting": at, **{key: row[key] for key in ("name", "gap", "times_faster", "times_faster_processor")}}
        for at, rows in results.items()
        for row in rows
        if row["name"] not in ("no update", "fine-tuning", "retraining")
        and row["gap"] >= -0.01
        and min(row["times_faster"], row["times_faster_processor"]) >= 50
        and row["gap"] > rows[0]["gap"] + 0.01
    ]
    result = {"new_examples": options.new, "seeds": options.seeds, "within_1_point_50_times_faster": good, **results}
    write_result(Path(__file__).stem, result)
    plot_updates(pictures).savefig(RESULTS / f"{Path(__file__).stem}.png", dpi=110)


if __name__ == "__main__":
    main()
