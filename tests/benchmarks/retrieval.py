"""MNIST-5k: what the index finds against the exact bill, and mislabelled examples.

* Recall@10 of the exact proponents: of candidates alone and re-ranked (100 candidates), by dimension, number type and
  kind of FAISS index; beside it an index of raw pixels and one of penultimate features, whose largest inner products
  and cosines stand for proponents. MLP 784-128-64-10 ReLU, SGD 0.1, batch 64, 15 epochs, 200 queries, the label's
  logit.
* A tenth of the labels flipped: area under the curve of self-influence, of the final loss, of the largest-margin error
  of the final model, and of the loss summed over the epochs' states.

    .venv/bin/python tests/benchmarks/retrieval.py [--queries 200]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[2]))

import kxexplain as kx
from kxexplain.search import GradientIndex
from kxexplain.search.features import Asking
from kxexplain.search.looking import look_up, pair_of
from kxexplain.search.sketches import Sketches, block_list
from kxexplain.search.tuning import recall_at
from kxexplain.search.updates import projection_for, update_features
from tests.benchmarks.environment import RESULTS, write_result
from tests.benchmarks.explain_speed import data, network, record

DIMS = (64, 128, 256, 512, 1024)
FACTORIES = ("Flat", "HNSW32", "IVF64,Flat", "PQ{half}x4fs")
K, RERANK, FLIPPED = 10, 100, 0.1


def by_dimension(parts: Any, queries: Any, exact: Tensor) -> list[dict[str, Any]]:
    """Recall for every dimension and kind of index; one replay a dimension."""
    rows = []
    for dim in DIMS:
        projection = projection_for(parts[0], dim)
        began = time.perf_counter()
        features = update_features(*parts, projection)
        building = time.perf_counter() - began
        asked = Asking(parts[0], parts[1], projection).ask(queries, "label")
        for dtype in (torch.float32, torch.float16):
            kept = Sketches.of(features, block_list(projection), dtype=dtype)
            scores = asked.features @ kept.rows(slice(None)).T
            for factory in FACTORIES if dtype == torch.float32 else ("Flat",):
                name = factory.format(half=dim // 2)
                if factory != "Flat":
                    if dim // 2 > 256 and "PQ" in factory:
                        name = "PQ256x4fs"
                    found = look_up(kept, pair_of(kept, name), asked.features, asked.pushes, RERANK)[0].rows
                    scores = torch.full_like(exact, -torch.inf).scatter_(
                        1, found, torch.arange(RERANK, 0, -1.0).expand(len(found), -1)
                    )
                rows.append({
                    "dim": dim, "dtype": str(dtype).split(".")[1], "factory": name, "build_s": building,
                    "bytes_an_example": kept.nbytes / len(kept), "recall_alone": recall_at(scores, exact, K, K),
                    "recall_reranked": recall_at(scores, exact, K, RERANK),
                })  # fmt: skip
                print(rows[-1], flush=True)
    return rows


def others(dataset: Any, queries: Any, exact: Tensor, model: nn.Module) -> dict[str, Any]:
    """Raw pixels and penultimate features in the place of gradients."""
    inputs, asked = dataset.tensors[0], queries.tensors[0]
    with torch.no_grad():
        penultimate = [model[:-1](x) for x in (asked, inputs)]
    found = {}
    for name, (left, right) in {"pixels": (asked, inputs), "penultimate": tuple(penultimate)}.items():
        for measure in ("inner product", "cosine"):
            a, b = (left, right) if measure == "inner product" else (nn.functional.normalize(t) for t in (left, right))
            scores = a @ b.T
            found[f"{name}, {measure}"] = {
                "recall_alone": recall_at(scores, exact, K, K), "recall_reranked": recall_at(scores, exact, K, RERANK),
            }  # fmt: skip
    return found


def area(scores: Tensor, wrong: Tensor) -> float:
    """Probability that a mislabelled example scores above a right one."""
    return float((scores[wrong][:, None] > scores[~wrong]).float().mean())


def mislabelled(dataset: Any, folder: str) -> dict[str, Any]:
    """A tenth of the labels replaced by another class."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = dataset.tensors[0], dataset.tensors[1].clone()
    chosen = torch.randperm(len(labels), generator=generator)[: int(FLIPPED * len(labels))]
    labels[chosen] = (labels[chosen] + torch.randint(1, 10, (len(chosen),), generator=generator)) % 10
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[chosen] = True
    noisy = TensorDataset(inputs, labels)
    trajectory = record(noisy, folder)
    began = time.perf_counter()
    scores = kx.self_influence(trajectory, network(), noisy)
    seconds = time.perf_counter() - began
    model, summed = network(), torch.zeros(len(labels))
    with torch.no_grad():
        for state in trajectory.states[1:]:
            model.load_state_dict(trajectory.state(state.step).parameters)
            outputs = model(inputs)
            losses = nn.functional.cross_entropy(outputs, labels, reduction="none")
            summed += losses
        other = outputs.scatter(1, labels[:, None], -torch.inf).max(1).values
    margin = other - outputs.gather(1, labels[:, None])[:, 0]
    return {
        "examples": len(labels), "flipped": len(chosen), "limit_auc": 0.97, "self_influence_s": seconds,
        "auc_self_influence": area(scores, wrong), "auc_final_loss": area(losses, wrong),
        "auc_final_margin": area(margin, wrong), "auc_loss_summed_over_epochs": area(summed, wrong),
    }  # fmt: skip


def draw(numbers: dict[str, Any], path: Path) -> None:
    """Recall against dimension, for every kind of index and the other features."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    kinds = {"Flat": "Flat", "HNSW32": "HNSW32", "IVF64,Flat": "IVF64,Flat", "PQ": "4-bit codes (auto)"}
    for part, (field, title) in zip(
        axes, {"recall_alone": "First ten by score", "recall_reranked": f"Among {RERANK} candidates"}.items(),
        strict=True,
    ):  # fmt: skip
        for mark, (kind, label) in zip("osD^", kinds.items(), strict=True):
            rows = [r for r in numbers["index"] if r["factory"].startswith(kind) and r["dtype"] == "float32"]
            part.plot([r["dim"] for r in rows], [r[field] for r in rows], marker=mark, label=label, alpha=0.8, ms=5)
        for style, (name, values) in zip(
            ("--", ":", "-.", (0, (5, 1))), numbers["other_features"].items(), strict=True
        ):
            part.axhline(values[field], color="#888888", linestyle=style, linewidth=1.2, label=name)
        part.axhline(numbers["limit_recall_reranked"], color="#B8402A", linewidth=0.8)
        part.set_xscale("log", base=2)
        part.set_xticks(DIMS, [str(d) for d in DIMS])
        part.set_xlabel("dimension (4 bytes each)")
        part.set_title(title, loc="left", fontsize=11)
        part.set_ylim(0, 1.03)
        part.grid(axis="y", alpha=0.25)
        for side in ("top", "right"):
            part.spines[side].set_visible(False)
    axes[0].set_ylabel("recall@10 of the exact proponents")
    axes[1].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(1.0, 0.2))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=200)
    options = parser.parse_args()
    dataset, queries = data()
    queries = TensorDataset(*(t[: options.queries] for t in queries.tensors))
    with tempfile.TemporaryDirectory() as folder:
        model = network()
        trajectory = record(dataset, f"{folder}/run")
        parts = (trajectory, model, dataset)
        exact = kx.explain(*parts, queries, "label", kernel=False).contributions
        model.load_state_dict(trajectory.state(len(trajectory)).parameters)
        numbers: dict[str, Any] = {
            "limit_recall_reranked": 0.95, "limit_bytes_an_example": 2048, "queries": len(queries),
            "index": by_dimension(parts, queries, exact), "other_features": others(dataset, queries, exact, model),
        }  # fmt: skip
        index = GradientIndex.build(*parts, dim=512)
        few = TensorDataset(*(t[:50] for t in queries.tensors))
        found = index.search(few, K, "label", rerank=RERANK).proponents.ids
        top = exact[:50].topk(K, dim=1).indices
        numbers["searched_reranked_at_512"] = float((top[:, :, None] == found[:, None]).any(2).float().mean())
        numbers["mislabelled"] = mislabelled(dataset, f"{folder}/noisy")
    write_result("retrieval", numbers)
    draw(numbers, RESULTS / "retrieval.png")


if __name__ == "__main__":
    main()
