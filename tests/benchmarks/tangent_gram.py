"""How long a traced tangent-kernel Gram matrix takes, against the operations it needs and other libraries, in one run.

1,000 × 200 points, 10 outputs, traced:

* ``mlp``: MLP 784-256-256-10.
* ``cnn``: on 1 × 8 × 8, two 3 × 3 convolutions (16 and 32 channels) with ReLU and 2 × 2 pooling, a linear head.
* ``cnn28``: the same on 1 × 28 × 28. The time goes into differentiating the examples: no peers.

What it needs: a plain matrix product that does the structural minimum of operations, 2·n·m·Σ(d_in + C·d_out) over
linear layers, 2·n·m·C·p for a convolution with p parameters, whose gradients are written out. Ours and the product
alternate, ``--repeats`` times. The peers (gram_peers.py) run ``--peer-repeats`` times where they are slow, more often
within 5 seconds, at most ``--repeats`` times. All are warmed up first; medians. A peer's
``largest_relative_difference`` is that of its matrix to ours, relative to the largest entry.

    .venv/bin/python -m tests.benchmarks.tangent_gram [--cases mlp cnn cnn28] [--repeats 15] [--peer-repeats 2]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kxexplain as kx
from tests.benchmarks.environment import write_result
from tests.benchmarks.gram_peers import Gram, available, version_of

N, M, OUTPUTS = 1000, 200, 10
PATIENCE = 5.0  # seconds within which a fast peer is repeated


def mlp() -> nn.Module:
    """784-256-256-10."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise((784, 256, 256, OUTPUTS)):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(flat: int) -> nn.Module:
    """1 → 16 → 32 channels, 3 × 3, pooled twice; then so many values to a linear head."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(flat, OUTPUTS),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A network, its inputs' shape, what is asked of us."""

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    limits: dict[str, float]
    peers: bool = True


CASES = {
    "mlp": Case(mlp, (784,), {"limit_torch_func_over_kxexplain": 50, "limit_kxexplain_over_matrix_product": 4}),
    "cnn": Case(lambda: cnn(128), (1, 8, 8), {"limit_kxexplain_over_matrix_product": 4}),
    "cnn28": Case(lambda: cnn(1568), (1, 28, 28), {}, peers=False),
}


def width(model: nn.Module) -> int:
    """Multiplications that a pair of examples needs at least."""
    total = 0
    for layer in model:
        if isinstance(layer, nn.Linear):
            total += layer.in_features + OUTPUTS * layer.out_features
        elif isinstance(layer, nn.Conv2d):
            total += OUTPUTS * sum(p.numel() for p in layer.parameters())
    return total


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def measure(case: Case, peers: dict[str, Gram], repeats: int, peer_repeats: int) -> dict[str, Any]:
    """Ours and the product in turn, then each peer."""
    torch.manual_seed(0)
    model, x1, x2 = case.network(), torch.randn(N, *case.shape), torch.randn(M, *case.shape)
    left, right = torch.randn(N, width(model)), torch.randn(width(model), M)
    found, _ = kx.tangent_kernel(model, x1, x2), left @ right
    ours, floor = [], []
    for _ in range(repeats):
        ours.append(timed(lambda: kx.tangent_kernel(model, x1, x2))[0])
        floor.append(timed(lambda: left @ right)[0])
    own, least = statistics.median(ours), statistics.median(floor)
    result = {"kxexplain_s": own, "matrix_product_s": least, "kxexplain_over_matrix_product": own / least}
    result |= case.limits
    if not case.peers:
        return result
    found_by = {}
    for name, gram in peers.items():
        gram(model, x1[:4], x2[:2])  # what only a first call does
        runs = repeated(lambda gram=gram: gram(model, x1, x2), peer_repeats, repeats)
        found_by[name] = {"version": version_of(name), **against(runs, found, own, least)}
    tutorial = found_by["torch_func_tutorial"]
    return result | {
        "torch_func_tutorial_s": tutorial["seconds"],
        "torch_func_over_kxexplain": tutorial["over_kxexplain"],
        "largest_relative_difference": max(peer["largest_relative_difference"] for peer in found_by.values()),
        "peers": found_by,
    }


def repeated(gram: Callable[[], Tensor], fewest: int, most: int) -> list[tuple[float, Tensor]]:
    """Times and results of a peer that may be slow."""
    runs = [timed(gram) for _ in range(fewest)]
    while len(runs) < most and sum(seconds for seconds, _ in runs) < PATIENCE:
        runs.append(timed(gram))
    return runs


def against(runs: list[tuple[float, Tensor]], ours: Tensor, own: float, least: float) -> dict[str, Any]:
    """A peer's time, its ratio to ours and to the matrix product, and how far its matrix is from ours."""
    seconds = statistics.median(run[0] for run in runs)
    return {
        "runs": len(runs),
        "seconds": seconds,
        "over_kxexplain": seconds / own,
        "over_matrix_product": seconds / least,
        "largest_relative_difference": float((runs[-1][1] - ours).abs().max() / ours.abs().max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--peer-repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    peers, left_out = available()
    result: dict[str, Any] = {"points": [N, M], "outputs": OUTPUTS, "peers_left_out": left_out}
    for name in options.cases:
        result[name] = measure(CASES[name], peers, options.repeats, options.peer_repeats)
    write_result(Path(__file__).stem, result)


if __name__ == "__main__":
    main()
