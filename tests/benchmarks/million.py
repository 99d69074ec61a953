"""A million synthetic vectors of dimension 512: memory, recall and latency of the automatic index.

Two kinds: ``isotropic`` (no structure at all, lengths log-normal) and ``clustered`` (4,096 centres and a spread around
each, as gradients of a few classes are). Features are written to disk in chunks and opened memory-mapped; the automatic
choice is compared with the exact scan of all of them, products of either sign and cosines. Each kind in a process of
its own, so that the peak is its own; mapped pages of the features' file count in it.

    .venv/bin/python tests/benchmarks/million.py [--count 1000000] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from kxexplain.search import files
from kxexplain.search.looking import look_up, pair_of
from kxexplain.search.sketches import CHUNK, Found, Sketches, blocks_of, split_lengths
from kxexplain.search.vectors import choose_factory
from tests.benchmarks.environment import write_result

DIM, BLOCKS, QUERIES, K, CENTRES = 512, 2, 50, 10, 4096
LIMIT = 4 * 10**9


def vectors(kind: str, rows: int, seed: int) -> Tensor:
    """Some of the vectors."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, DIM, generator=generator)
    if kind == "clustered":
        centres = torch.randn(CENTRES, DIM, generator=torch.Generator().manual_seed(0))
        values = centres[torch.randint(CENTRES, (rows,), generator=generator)] + 0.5 * values
    return values * torch.randn(rows, 1, generator=generator).mul(0.5).exp()


def write(kind: str, count: int, folder: Path) -> Sketches:
    """All vectors on disk, as an index keeps them."""
    blocks = blocks_of(BLOCKS, DIM)
    with (
        files.new_array(folder / files.UNITS, (count, DIM), "float32") as units,
        files.new_array(folder / files.NORMS, (count, BLOCKS), "float32") as norms,
    ):
        for at in range(0, count, CHUNK):
            rows = slice(at, min(at + CHUNK, count))
            u, n = split_lengths(vectors(kind, rows.stop - at, 1 + at), blocks)
            units[rows], norms[rows] = u.numpy(), n.numpy()
    return files.mapped(folder, torch.arange(count), None, (DIM, BLOCKS))


def recall(found: Found, exact: Found) -> float:
    """Part of the exact rows that were found."""
    return float((exact.rows[:, :, None] == found.rows[:, None]).any(2).float().mean())


def milliseconds(call: Any, queries: Tensor) -> dict[str, float]:
    """Median and 95th percentile of single queries."""
    times = []
    for q in range(len(queries)):
        began = time.perf_counter()
        call(queries[q : q + 1])
        times.append(1000 * (time.perf_counter() - began))
    return {"p50_ms": statistics.median(times), "p95_ms": statistics.quantiles(times, n=20)[-1]}


def measure(kind: str, count: int, threads: int) -> dict[str, Any]:
    """Build, search, compare."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        sketches = write(kind, count, Path(folder))
        factory = choose_factory(count, DIM, LIMIT)
        began = time.perf_counter()
        pair = pair_of(sketches, factory)
        building = time.perf_counter() - began
        queries = vectors(kind, QUERIES, 10**9)
        look_up(sketches, pair, queries[:1], queries[:1], K)
        latency = milliseconds(lambda q: look_up(sketches, pair, q, q, K), queries)
        found = look_up(sketches, pair, queries, queries, K)
        exact = sketches.scan(queries, queries, K)
        scanning = milliseconds(lambda q: sketches.scan(q, q, K), queries[:5])
        return {
            "count": count, "dim": DIM, "threads": threads, "factory": factory, "build_s": building,
            "faiss_mb": sum(len(index.to_bytes()) for index in pair) / 1e6, "features_mb": sketches.nbytes / 1e6,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            **{f"recall_at_10_{name}": recall(f, e)
               for name, f, e in zip(("largest", "smallest", "cosine"), found, exact, strict=True)},
            "three_lists": latency, "exact_scan": scanning,
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10**6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        print(json.dumps(measure(options.inside, options.count, options.threads)))
        return
    numbers: dict[str, Any] = {"limit_peak_mb": 4000, "limit_recall_at_10": 0.9}
    for kind in ("isotropic", "clustered"):
        command = [sys.executable, __file__, "--inside", kind, "--count", str(options.count)]
        run = subprocess.run(
            [*command, "--threads", str(options.threads)], capture_output=True, text=True, check=True
        )  # fmt: skip
        numbers[kind] = json.loads(run.stdout.splitlines()[-1])
    write_result("million", numbers)


if __name__ == "__main__":
    main()
