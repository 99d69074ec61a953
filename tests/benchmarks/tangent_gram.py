"""How long a tangent-kernel Gram matrix takes against the torch.func tutorial's code, in one run.

MLP 784-256-256-10, 1,000 × 200 points, traced over the 10 outputs, 2 threads. The peer is the contraction of
per-example Jacobians as in PyTorch's tutorial "Neural Tangent Kernels" (``vmap(jacrev)``, then einsum), in blocks of
the second argument that fit its memory. Also timed: a plain matrix product doing the structural minimum of
operations, 2·n·m·Σ(d_in + C·d_out). Medians over alternating repeats.

    .venv/bin/python tests/benchmarks/tangent_gram.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import kxexplain as kx
from tests.benchmarks.environment import write_result

SIZES, N, M, BLOCK = (784, 256, 256, 10), 1000, 200, 50


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(SIZES):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def tutorial(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """Jacobian contraction, block by block, as the tutorial does it (trace over outputs)."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def single(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x[None],))[0]

    jacobian = vmap(jacrev(single), (None, 0))
    rows = []
    for a in x1.split(BLOCK):
        ja = [j.flatten(2) for j in jacobian(parameters, a).values()]
        row = []
        for b in x2.split(BLOCK):
            jb = [j.flatten(2) for j in jacobian(parameters, b).values()]
            row.append(sum(torch.einsum("Naf,Maf->NM", p, q) for p, q in zip(ja, jb, strict=True)))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows)


def minimum(width: int) -> Callable[[], Tensor]:
    left, right = torch.randn(N, width), torch.randn(width, M)
    return lambda: left @ right


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    began = time.perf_counter()
    value = function()
    return time.perf_counter() - began, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(2)
    model, x1, x2 = network(), torch.randn(N, SIZES[0]), torch.randn(M, SIZES[0])
    product = minimum(sum(d_in + SIZES[-1] * d_out for d_in, d_out in pairwise(SIZES)))
    ours, floor, peer = [], [], []
    kx.tangent_kernel(model, x1, x2)
    for repeat in range(repeats):
        seconds, found = timed(lambda: kx.tangent_kernel(model, x1, x2))
        ours.append(seconds)
        floor.append(timed(product)[0])
        if repeat < 2:  # the peer takes long and varies little
            seconds, expected = timed(lambda: tutorial(model, x1, x2))
            peer.append(seconds)
    result = {
        "kxexplain_s": statistics.median(ours),
        "matrix_product_s": statistics.median(floor),
        "torch_func_tutorial_s": statistics.median(peer),
        "torch_func_over_kxexplain": statistics.median(peer) / statistics.median(ours),
        "limit_torch_func_over_kxexplain": 50,
        "kxexplain_over_matrix_product": statistics.median(ours) / statistics.median(floor),
        "largest_relative_difference": float((found - expected).abs().max() / expected.abs().max()),
    }
    write_result(Path(__file__).stem, result)


if __name__ == "__main__":
    main()
