"""The index: which training examples mattered most for a prediction, and which lie nearest, found quickly."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from kxexplain.attribution.decompose import contributions_of
from kxexplain.attribution.queries import QuerySide
from kxexplain.attribution.targets import TargetSpec, resolve_target
from kxexplain.errors import ArgumentError, IndexFileError
from kxexplain.gradients.projection import Projection
from kxexplain.kernels import quadrature
from kxexplain.search import files
from kxexplain.search.features import (
    descent,
    directions,
    example_labels,
    projection_for,
    query_features,
    update_features,
)
from kxexplain.search.neighbors import Hits, Neighbors
from kxexplain.search.vectors import FLAT, Vectors, check_factory
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import Trajectory

MEMORY = 10**9
"""Bytes that the queries' gradients may take."""


@dataclass(frozen=True, eq=False, repr=False)
class GradientIndex:
    """Features of every training example's updates, searched with FAISS; made by :meth:`build` or :meth:`load`.

    The inner product of a query's feature and an example's approximates, without bias, the example's contribution to
    the query as :func:`kxexplain.explain` itemises it: C_i(x) = Σ_s ⟨D_s(x), P_{s,i}⟩, both sides projected.

    Attributes:
        trajectory: the recorded training.
        model: its architecture, for the queries' gradients.
        dataset: the training examples.
        projection: of gradients to features; its matrices are regenerated from the seed.
        features: [train, dim], on the CPU.
        labels: the examples' labels, [train], where they are single numbers.
        factory: FAISS' description of the index.
        stored: FAISS' own bytes from a saved index, used up when the index is opened.

    Source: projected gradient features for data attribution, Park et al. 2023 (TRAK), arXiv 2303.14186.

    >>> import tempfile, torch, kxexplain as kx
    >>> data = torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 1, 0, 1]))
    >>> model = torch.nn.Linear(4, 2, bias=False)  # such a model's inputs here meet only their own examples
    >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> trajectory = kx.train(
    ...     model, data, optimizer=sgd, epochs=5, batch_size=2, out=tempfile.mkdtemp(), progress=False
    ... )
    >>> index = GradientIndex.build(trajectory, model, data, dim=256)
    >>> index
    GradientIndex(4 examples × 256, 'Flat', 5 segments, 0.0 MB)
    >>> found = index.search(torch.eye(4)[2:3], k=1)
    >>> found.proponents.ids.tolist(), found.proponents.labels.tolist(), found.nearest.ids.tolist()
    ([[2]], [[0]], [[2]])
    >>> folder = index.save(tempfile.mkdtemp())
    >>> again = GradientIndex.load(folder, trajectory, model, data).search(torch.eye(4)[2:3], k=1)
    >>> torch.equal(again.proponents.contributions, found.proponents.contributions)
    True
    """

    trajectory: Trajectory
    model: nn.Module
    dataset: Examples
    projection: Projection
    features: Float32[Tensor, "train dim"]
    labels: Tensor | None
    factory: str = FLAT
    stored: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        dim: int = 2048,
        *,
        seed: int = 0,
        factory: str = FLAT,
        progress: bool = False,
    ) -> GradientIndex:
        """Replay the training once and index what every example put into the parameters.

        Args:
            trajectory: the recorded training.
            model: a model of the recorded architecture; not changed.
            dataset: the training examples, as recorded.
            dim: numbers per example (4 bytes each); the approximation's error falls as 1/√dim.
            seed: of the random projection.
            factory: FAISS' description of the index: "Flat" scans all examples exactly, "HNSW32" or "IVF64,Flat"
                search fewer. Two of them are made, one for inner products and one for cosines.
            progress: show a bar over the replayed steps.

        Raises:
            ModelError: not the recorded architecture.
            DatasetError: not the recorded examples.
            ArgumentError: dim below 16, an index FAISS cannot make, no steps, or an optimiser
                other than SGD without momentum.
            ReplayError: the log does not lead to the recorded states.
        """
        trajectory.check_model(model)
        projection = projection_for(trajectory, dim, seed=seed)
        check_factory(factory, dim)
        features = update_features(trajectory, model, dataset, projection, progress=progress)
        if not bool(features.isfinite().all()):
            raise ArgumentError("the examples' updates are too large to index: features are not finite")
        labels = example_labels(dataset, len(features))
        index = cls(trajectory, model, dataset, projection, features, labels, factory)
        _ = index._influence, index._nearest
        return index

    def search(
        self, queries: Tensor | Examples | Inputs, k: int = 10, target: TargetSpec = "predicted", *, rerank: int = 100
    ) -> Neighbors:
        """The k largest positive and negative contributions to every query, and the k nearest examples.

        Args:
            queries: a tensor of inputs [q, …] (or a tuple or dict of them), or a dataset of (input, target).
            k: examples per list; at most as many as there are.
            target: what to ask about, as for :func:`kxexplain.explain`, but one number per query.
            rerank: so many candidates for either sign are ordered by their exact contributions, which takes a replay
                of the training for all queries together; 0 leaves the approximate order.

        Returns:
            Proponents, opponents and nearest examples. *Nearest* compares the way the query's loss would push the
            parameters (with its label if given, else with the predicted class) with the way each example did, by
            cosine, averaged over the training; where no label can be had, the target's gradient stands in.

        Raises:
            ArgumentError: k below 1, rerank below 0, all outputs at once, or gradients that are not finite.
            TargetError: the target does not exist, or the queries' labels do not fit the loss.
            DatasetError: there are no queries, or (when re-ranking) the dataset has changed.
            ModelError: the model has changed its architecture.
        """
        _at_least(k, 1, "k")
        _at_least(rerank, 0, "rerank")
        if isinstance(target, str) and target == "all":
            raise ArgumentError("one number per query is searched for; give an output's number instead of 'all'")
        side = QuerySide.prepare(self.trajectory, self.model, queries, "all", quadrature.rule("discrete"), MEMORY)
        outputs, loss = side.prediction, self.trajectory.loss if target == "loss" else None
        asked = replace(side, target=resolve_target(target, outputs, side.labels, loss, side.shape))
        features = self._query_features(asked)
        k = min(k, len(self))
        if rerank:
            proponents, opponents = self._reranked(queries, features, target, k=k, candidates=max(rerank, k))
        else:
            proponents, opponents = self._approximate(features, k)
        losses, measure = descent(self.trajectory, side)
        pushes = features if losses is None else -self._query_features(losses)
        cosines, ids = self._nearest.search(directions(pushes, self.projection), k)
        facts = {
            "target": asked.target.name, "rerank": rerank, "dim": self.projection.dim, "factory": self.factory,
            "nearest": measure,
        }  # fmt: skip
        return Neighbors(
            proponents, opponents, self._hits(ids, cosines), asked.target.output, side.labels, facts,
            self.dataset, side.inputs,
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the index to a folder (not trajectory, model or dataset), over an older index if it holds one.

        Raises:
            IndexFileError: the folder cannot be written, or holds something that is no index.
        """
        folder, projection = Path(path), self.projection
        facts = {
            "trajectory": files.identity(self.trajectory), "dataset": asdict(self.trajectory.manifest.dataset),
            "examples": len(self), "dim": projection.dim, "seed": projection.seed, "factory": self.factory,
        }  # fmt: skip
        tensors = {"features": self.features} | ({} if self.labels is None else {"labels": self.labels})
        blobs = {}
        if self.factory != FLAT:
            indices = (self._influence, self._nearest)
            blobs = {name: index.to_bytes() for name, index in zip(files.FAISS_FILES, indices, strict=True)}
        files.write(folder, facts, {name: t.contiguous() for name, t in tensors.items()}, blobs)
        return folder

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], trajectory: Trajectory, model: nn.Module, dataset: Examples
    ) -> GradientIndex:
        """Open a saved index and check that it belongs to this trajectory, model and dataset.

        Raises:
            IndexFileError: missing, damaged, of another format, or made from another trajectory.
            ModelError: not the recorded architecture.
            DatasetError: not the recorded examples.
            ArgumentError: FAISS no longer makes such an index.
        """
        manifest, tensors, blobs = files.read(Path(path))
        trajectory.check_model(model)
        if manifest["trajectory"] != files.identity(trajectory):
            raise IndexFileError(
                f"{path} was made from another trajectory than {trajectory.path}, or from fewer of its steps; "
                "build it again"
            )
        trajectory.check_dataset(dataset)
        if manifest["dataset"] != asdict(trajectory.manifest.dataset):
            raise IndexFileError(f"{path} was made from another dataset; build it again")
        wanted = set() if manifest["factory"] == FLAT else set(files.FAISS_FILES)
        if set(blobs) != wanted:
            raise IndexFileError(f"{path} has the FAISS files {sorted(blobs)}, expected {sorted(wanted)}")
        projection = projection_for(trajectory, manifest["dim"], seed=manifest["seed"])
        check_factory(manifest["factory"], projection.dim)
        features, labels = tensors["features"], tensors.get("labels")
        index = cls(trajectory, model, dataset, projection, features, labels, manifest["factory"], blobs)
        _ = index._influence, index._nearest
        return index

    def __len__(self) -> int:
        return len(self.features)

    def __repr__(self) -> str:
        return (
            f"GradientIndex({len(self)} examples × {self.projection.dim}, {self.factory!r}, "
            f"{self.projection.segments} segments, {self.features.nbytes / 1e6:.1f} MB)"
        )

    @cached_property
    def _influence(self) -> Vectors:
        """Searched by inner product: contributions."""
        return Vectors(self.features, self.factory, stored=self.stored.pop(files.FAISS_FILES[0], None))

    @cached_property
    def _nearest(self) -> Vectors:
        """The same features, normalised block by block: cosines."""
        unit = directions(self.features, self.projection)
        return Vectors(unit, self.factory, stored=self.stored.pop(files.FAISS_FILES[1], None))

    def _query_features(self, side: QuerySide) -> Tensor:
        features = query_features(self.trajectory, side, self.projection)
        if not bool(features.isfinite().all()):
            raise ArgumentError("the queries' gradients are not finite; search for finite inputs and targets")
        return features

    def _approximate(self, features: Tensor, k: int) -> tuple[Hits, Hits]:
        most, up = self._influence.search(features, k)
        least, down = self._influence.search(-features, k)
        return self._hits(up, most), self._hits(down, -least)

    def _reranked(
        self, queries: Any, features: Tensor, target: TargetSpec, *, k: int, candidates: int
    ) -> tuple[Hits, Hits]:
        """Order each query's own candidates, of either sign, by their exact contributions."""
        candidates = min(candidates, len(self))
        own = torch.cat([self._influence.search(sign * features, candidates)[1] for sign in (1, -1)], 1)
        union = own.unique()
        exact = contributions_of(self.trajectory, self.model, self.dataset, queries, target, union)
        exact, scores = exact.cpu(), features @ self.features[union].T
        foreign = torch.ones_like(exact, dtype=torch.bool).scatter_(1, torch.searchsorted(union, own), False)
        hits = []
        for largest, never in ((True, -torch.inf), (False, torch.inf)):
            best = exact.masked_fill(foreign, never).topk(k, dim=1, largest=largest)
            hits.append(self._hits(union[best.indices], scores.gather(1, best.indices), best.values))
        return hits[0], hits[1]

    def _hits(self, ids: Tensor, scores: Tensor, contributions: Tensor | None = None) -> Hits:
        return Hits(ids, scores, contributions, None if self.labels is None else self.labels[ids])


def _at_least(value: int, least: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"got {name}={value!r}; expected a whole number of at least {least}")
