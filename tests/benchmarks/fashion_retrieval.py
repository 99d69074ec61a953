"""Fashion-MNIST's 60,000 images: building the index against training, its size, and the latency of single queries.

MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, some epochs with a state each; an index of 512 dimensions, by the automatic
choice and by the exact scan. A query's time includes its gradients and all three lists (proponents,
opponents, nearest); beside it the same queries answered exactly, over all examples, by ``kx.explain``.

    .venv/bin/python tests/benchmarks/fashion_retrieval.py [--epochs 3] [--queries 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from kxexplain.search import GradientIndex
from kxexplain.search.tuning import recall_at
from tests.benchmarks.environment import write_result
from tests.benchmarks.fashion import CASES, mlp, train_plainly

DIM, K = 512, 10


def latency(index: GradientIndex, queries: Any) -> dict[str, float]:
    """Milliseconds of single queries, wall clock and the process' own."""
    index.search(queries[:1], K, rerank=0)
    wall, own = [], []
    for q in range(1, len(queries)):
        began, busy = time.perf_counter(), time.process_time()
        index.search(queries[q : q + 1], K, rerank=0)
        wall.append(1000 * (time.perf_counter() - began))
        own.append(1000 * (time.process_time() - busy))
    return {
        "p50_ms": statistics.median(wall), "p95_ms": statistics.quantiles(wall, n=20)[-1],
        "p50_processor_ms": statistics.median(own),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    setting = replace(CASES["mlp"], epochs=options.epochs)
    split = kx.datasets.fashion_mnist(n_train=setting.examples, n_test=options.queries, flat=True)
    numbers: dict[str, Any] = {
        "limit_p50_ms": 20, "examples": setting.examples, "epochs": options.epochs, "dim": DIM,
        "training_s": train_plainly(setting, split.train),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        began = time.perf_counter()
        trajectory = kx.train(
            model, split.train, "cross_entropy", sgd, epochs=options.epochs, batch_size=64, out=f"{folder}/run",
            progress=False,
        )  # fmt: skip
        numbers["recorded_training_s"] = time.perf_counter() - began
        parts = (trajectory, mlp(), split.train)
        began = time.perf_counter()
        index = GradientIndex.build(*parts, DIM, out=f"{folder}/index")
        numbers["build_s"] = time.perf_counter() - began
        numbers["build_over_training"] = numbers["build_s"] / numbers["training_s"]
        numbers["factory"] = index.factory
        numbers["index_mb"] = sum(f.stat().st_size for f in Path(f"{folder}/index").iterdir()) / 1e6
        began = time.perf_counter()
        index = GradientIndex.load(f"{folder}/index", *parts)
        numbers["opening_s"] = time.perf_counter() - began
        queries = split.test.tensors[0]
        numbers["automatic"] = latency(index, queries)
        scanned = replace(index, factory="Flat")
        numbers["exact_scan"] = latency(scanned, queries)
        began = time.perf_counter()
        exact = kx.explain(*parts, queries, kernel=False).contributions
        numbers["explain_all_s"] = time.perf_counter() - began
        scores = index._asking.ask(queries, "predicted").features @ index.features.T
        numbers["recall_alone"] = recall_at(scores, exact, K, K)
        numbers["recall_reranked_100"] = recall_at(scores, exact, K, 100)
        found = index.search(queries, K, rerank=0).proponents.ids
        top = exact.topk(K, dim=1).indices
        numbers["recall_automatic_alone"] = float((top[:, :, None] == found[:, None]).any(2).float().mean())
    write_result("fashion_retrieval", numbers)


if __name__ == "__main__":
    main()
