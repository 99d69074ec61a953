"""Hinge loss with weight decay, trained by full-batch steps and read off the recorded run, beside libsvm.

Breast cancer (569 × 30) and the digits 3 and 8 (357 × 64), standardised; C as given, decay λ = 1/(nC) on the weights,
none on the intercept; η_t = 2/(λ(t + 100)) for the steps given, in float64. The dual coefficients are those that
``kx.dual_coefficients`` finds in the recorded trajectory, beside ``SVC(kernel="linear").dual_coef_``. Limits:
correlation at least 0.999, largest difference at most 2 % of the largest coefficient (which is C); beyond them the
script fails.

    .venv/bin/python tests/benchmarks/convex.py [--steps 10000] [--problems …]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from tests.benchmarks.environment import RESULTS, write_result


def breast_cancer() -> tuple[np.ndarray, np.ndarray]:
    """Malignant or benign."""
    return load_breast_cancer(return_X_y=True)


def threes_and_eights() -> tuple[np.ndarray, np.ndarray]:
    """Two digits that look alike."""
    x, y = load_digits(return_X_y=True)
    rows = (y == 3) | (y == 8)
    return x[rows], (y[rows] == 8).astype(np.int64)


START, CORRELATION, DIFFERENCE = 100, 0.999, 0.02
PROBLEMS = {"breast cancer": (breast_cancer, 0.1), "digits 3 and 8": (threes_and_eights, 0.01)}


def standardised(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    """Zero mean, unit variance; constant columns stay."""
    return torch.from_numpy((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), 1)), torch.from_numpy(y)


def trained(x: Tensor, y: Tensor, decay: float, steps: int, folder: str) -> kx.Trajectory:
    """Full-batch subgradient steps from zero."""
    model = nn.Linear(x.shape[1], 1).double()
    nn.init.zeros_(model.weight)
    groups = [{"params": [model.weight], "weight_decay": decay}, {"params": [model.bias]}]
    optimizer, hinge = torch.optim.SGD(groups, lr=1.0), kx.trajectory.LOSSES["hinge"]
    with kx.record(model, optimizer, "hinge", TensorDataset(x, y), out=folder, keep=1000) as recorder:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2 / (decay * (step + START))
            optimizer.zero_grad()
            value = hinge(model(x), y).mean()
            value.backward()
            optimizer.step()
            recorder.step(range(len(y)), value.item())
    return recorder.trajectory


def measure(name: str, steps: int) -> dict[str, Any]:
    """One problem."""
    make, bound = PROBLEMS[name]
    x, y = standardised(*make())
    decay, began = 1 / (len(y) * bound), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trajectory = trained(x, y, decay, steps, folder)
        recorded = time.perf_counter() - began
        model = nn.Linear(x.shape[1], 1).double()
        found = kx.dual_coefficients(trajectory, model, TensorDataset(x, y), anchors=16)
    ours, theirs = found.coefficients[:, 0].numpy(), np.zeros(len(y))
    svc = SVC(kernel="linear", C=bound, tol=1e-6).fit(x, y)
    theirs[svc.support_] = svc.dual_coef_[0]
    mine = np.abs(ours) > 0.02 * bound
    return {
        "examples": len(y),
        "C": bound,
        "steps": steps,
        "correlation": float(np.corrcoef(ours, theirs)[0, 1]),
        "largest_difference_over_largest_coefficient": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        "libsvm_support_vectors": len(svc.support_),
        "ours_above_2_percent_of_C": int(mine.sum()),
        "of_these_support_vectors": int(np.isin(np.flatnonzero(mine), svc.support_).sum()),
        "libsvm_above_2_percent_of_C_missed": int((~mine & (np.abs(theirs) > 0.04 * bound)).sum()),
        "misfit": found.misfit,
        "recording_s": recorded,
        "reading_off_s": time.perf_counter() - began - recorded,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    options = parser.parse_args()
    file = RESULTS / "convex.json"
    kept = json.loads(file.read_text()) if file.is_file() and options.problems != list(PROBLEMS) else {}
    numbers: dict[str, Any] = {"limit_correlation": CORRELATION, "limit_difference": DIFFERENCE}
    numbers |= {name: kept[name] for name in PROBLEMS if name in kept}
    for name in options.problems:
        numbers[name] = measure(name, options.steps)
    write_result("convex", numbers)
    missed = [name for name in options.problems if not within(numbers[name])]
    if missed:
        sys.exit(f"beyond the limits: {', '.join(missed)}")


def within(found: dict[str, Any]) -> bool:
    """Whether the coefficients are libsvm's, and the support set."""
    close = found["correlation"] >= CORRELATION and found["largest_difference_over_largest_coefficient"] <= DIFFERENCE
    inside = found["of_these_support_vectors"] == found["ours_above_2_percent_of_C"]
    return bool(close and inside and found["libsvm_above_2_percent_of_C_missed"] == 0)


if __name__ == "__main__":
    main()
