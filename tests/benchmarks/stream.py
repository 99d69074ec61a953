"""Ten thousand examples, one at a time: time per example and memory stay as they are.

Digits network 64-32-10; its training examples come again and again, with noise. The gradient rule with all 2,410
parameters, and the ridge rule with the last layer's 330, whose system then has 330 rows however many have come; the
last 100 examples stay forgettable. The ridge and the logistic rule with all parameters, whose systems are those of the
last 20 and 10 examples. The last tenth is held against the first tenth of a second model, which learns the same
examples in turn with it: a machine's speed changes within minutes, and meets both alike.

    .venv/bin/python tests/benchmarks/stream.py [--examples 10000]
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kxexplain as kx
from tests.benchmarks.environment import write_result

WAYS: dict[str, dict[str, Any]] = {
    "gradient": {"rule": "gradient", "rate": 0.02, "remember": 100},
    "ridge_last_layer": {"rule": "ridge", "damping": 1.0, "parameters": ["2"], "remember": 100},
    "ridge_window": {"rule": "ridge", "damping": 10.0, "remember": 20},
    "logistic_window": {"rule": "logistic", "damping": 1.0, "remember": 10},
}


def streamed(options: dict[str, Any], count: int) -> dict[str, Any]:
    data = kx.datasets.digits()
    (x, y), (xt, yt) = data.train.tensors, data.test.tensors
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    kx.train(model, torch.utils.data.Subset(data.train, range(300)), epochs=10, out=options.pop("out"), progress=False)
    learner, fresh = kx.IncrementalModel(model, **options), kx.IncrementalModel(model, **options)
    times: dict[str, list[float]] = {"wall": [], "processor": [], "fresh wall": [], "fresh processor": []}
    memory, part = [], max(1, count // 10)
    for i in range(count):
        at = i % len(x)
        example = x[at : at + 1] + 0.1 * torch.randn(1, 64), y[at : at + 1]
        learnt(learner, example, times["wall"], times["processor"])
        if i >= count - part:
            learnt(fresh, example, times["fresh wall"], times["fresh processor"])
        if (i + 1) % 1000 == 0:
            memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    means = {
        f"{name}_ms_by_tenth": [1e3 * sum(times[name][a : a + part]) / part for a in range(0, count, part)]
        for name in ("wall", "processor")
    }
    return {
        **means,
        "last_tenth_over_first_processor": sum(times["processor"][-part:]) / sum(times["fresh processor"]),
        "last_tenth_over_first_wall": sum(times["wall"][-part:]) / sum(times["fresh wall"]),
        "limit_last_over_first": 1.5,
        "peak_memory_mb_by_1000": memory,
        "test_accuracy_before": float((model(xt).argmax(1) == yt).double().mean()),
        "test_accuracy_after": float((learner.predict(xt) == yt).double().mean()),
    }


def learnt(learner: kx.IncrementalModel, example: tuple[Tensor, Tensor], wall: list[float], own: list[float]) -> None:
    """Take an example in, and note the time by the clock and by the processor."""
    began, used = time.perf_counter(), time.process_time()
    learner.learn(*example)
    learner.vector()
    wall.append(time.perf_counter() - began)
    own.append(time.process_time() - used)


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    count = parser.parse_args().examples
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = {name: streamed({**options, "out": f"{folder}/{name}"}, count) for name, options in WAYS.items()}
    write_result(Path(__file__).stem, {"examples": count, **result})


if __name__ == "__main__":
    main()
