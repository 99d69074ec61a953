"""Fashion-MNIST's 60,000 images: building the index against training, its size, and the latency of single queries.

MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, some epochs with a state each; an index of 512 dimensions, by the automatic
choice and by the exact scan. A query's time includes its gradients and all three lists (proponents,
opponents, nearest), and is taken as when somebody works with a saved index: in a process that opens it and does nothing
else. Beside it the same queries answered exactly, over all examples, by ``kx.explain``.

    .venv/bin/python tests/benchmarks/fashion_retrieval.py [--epochs 3] [--queries 40] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from kxexplain.search import GradientIndex
from kxexplain.search.tuning import recall_at
from tests.benchmarks.environment import write_result
from tests.benchmarks.fashion import CASES, mlp, train_plainly

DIM, K = 512, 10


def set_threads(threads: int) -> None:
    """Of torch and FAISS."""
    import faiss  # after torch, as by kxexplain itself: else each has threads of its own, which wait for each other

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


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


def served(folder: str, queries: int, threads: int) -> dict[str, Any]:
    """Opening the index, and the latencies, in a process of its own."""
    call = f"asked({folder!r}, {queries}, {threads})"
    code = f"import json; from tests.benchmarks.fashion_retrieval import asked; print(json.dumps({call}))"
    root = str(Path(__file__).parents[2])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def asked(folder: str, queries: int, threads: int) -> dict[str, Any]:
    """What :func:`served` measures."""
    set_threads(threads)
    split = kx.datasets.fashion_mnist(n_train=CASES["mlp"].examples, n_test=queries, flat=True)
    trajectory, inputs = kx.Trajectory.open(f"{folder}/run"), split.test.tensors[0]
    began = time.perf_counter()
    index = GradientIndex.load(f"{folder}/index", trajectory, mlp(), split.train)
    return {
        "opening_s": time.perf_counter() - began, "automatic": latency(index, inputs),
        "exact_scan": latency(replace(index, factory="Flat"), inputs),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--queries", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    set_threads(options.threads)
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
        numbers |= served(folder, options.queries, options.threads)
        queries = split.test.tensors[0]
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
