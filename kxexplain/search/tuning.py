"""How many dimensions a recall takes: measured on queries, against their exact contributions."""

from __future__ import annotations

import warnings
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from kxexplain.attribution.decompose import explain
from kxexplain.attribution.targets import TargetSpec
from kxexplain.errors import ArgumentError, UnattributedWarning
from kxexplain.search.features import Asking
from kxexplain.search.sketches import Sketches, block_list
from kxexplain.search.updates import check_optimizer, projection_for, update_features
from kxexplain.shapes import Examples
from kxexplain.trajectory import Trajectory

SMALLEST, LARGEST = 64, 8192
"""Dimensions tried, each twice the one before."""


def recall_at(scores: Float[Tensor, "q n"], exact: Float[Tensor, "q n"], k: int, candidates: int) -> float:
    """Part of the k largest exact contributions that are among the candidates with the largest scores.

    >>> import torch
    >>> recall_at(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[1.0, 3.0, 2.0]]), 2, 2)
    0.5
    """
    n = exact.shape[1]
    wanted = exact.topk(min(k, n), dim=1).indices
    found = scores.topk(min(candidates, n), dim=1).indices
    return float((wanted[:, :, None] == found[:, None]).any(2).float().mean())


def dim_for_recall(
    trajectory: Trajectory,
    model: nn.Module,
    dataset: Examples,
    queries: Any,
    recall: float = 0.95,
    *,
    k: int = 10,
    rerank: int = 100,
    target: TargetSpec = "predicted",
    seed: int = 0,
) -> int:
    """The smallest dimension 64, 128, … 8192 whose candidates hold this part of the exact top k proponents.

    Itemises the queries exactly once (a score of them is enough), and replays the training for every dimension tried.

    Args:
        trajectory: the recorded training.
        model: of its architecture.
        dataset: the training examples.
        queries: inputs, or a dataset, such as will be searched for.
        recall: mean part of the exact top k wanted, above 0 and at most 1.
        k: length of the list.
        rerank: candidates that :meth:`GradientIndex.search` will look at exactly; 0 for none.
        target: as for the search.
        seed: of the random projection; the index must be built with the same.

    Raises:
        ArgumentError: a recall out of range, or one that no dimension reaches.
        ModelError, DatasetError, TargetError, ReplayError: as :func:`kxexplain.explain`.

    >>> import tempfile, kxexplain as kx
    >>> data = kx.datasets.toy(n=60)
    >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> trajectory = kx.train(model, data.train, epochs=2, out=tempfile.mkdtemp(), progress=False)
    >>> dim_for_recall(trajectory, model, data.train, data.test[:5][0], rerank=100)
    64
    """
    if not 0 < recall <= 1:
        raise ArgumentError(f"got recall={recall!r}; expected a part above 0 and at most 1, such as 0.95")
    check_optimizer(trajectory)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnattributedWarning)
        exact = explain(trajectory, model, dataset, queries, target, kernel=False).contributions.cpu()
    dim, reached = SMALLEST, 0.0
    while dim <= LARGEST:
        projection = projection_for(trajectory, dim, seed=seed)
        features = update_features(trajectory, model, dataset, projection)
        assert features is not None
        sketches = Sketches.of(features, block_list(projection))
        asked = Asking(trajectory, model, projection).ask(queries, target)
        reached = recall_at(asked.features @ sketches.rows(slice(None)).T, exact.float(), k, max(k, rerank))
        if reached >= recall:
            return dim
        dim *= 2
    raise ArgumentError(
        f"even {LARGEST} dimensions find only {reached:.3f} of the exact top {k} among {max(k, rerank)} candidates; "
        "re-rank more of them, or be content with less"
    )
