"""The index: which training examples mattered most for a prediction, and which lie nearest, found quickly."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32
from torch import Tensor, nn

from kxexplain.attribution.decompose import contributions_of
from kxexplain.attribution.targets import TargetSpec
from kxexplain.errors import ArgumentError, IndexFileError
from kxexplain.gradients.projection import Projection
from kxexplain.search import files
from kxexplain.search.building import HUGE, Parts, Plan, Shard
from kxexplain.search.features import Asking
from kxexplain.search.looking import chosen_rows, id_list, look_up, pair_of, rows_of
from kxexplain.search.neighbors import Hits, Neighbors
from kxexplain.search.sketches import Found, Sketches, block_list
from kxexplain.search.updates import projection_for, update_features
from kxexplain.search.vectors import AUTO, FLAT, Vectors, check_factory
from kxexplain.shapes import Examples, Inputs
from kxexplain.trajectory import Trajectory


@dataclass(frozen=True, eq=False, repr=False)
class GradientIndex:
    """Features of the training examples' updates, searched with FAISS; made by :meth:`build` or :meth:`load`.

    The inner product of a query's feature and an example's approximates, without bias, the example's contribution to
    the query as :func:`kxexplain.explain` itemises it: C_i(x) = Σ_s ⟨D_s(x), P_{s,i}⟩, both sides projected.

    Attributes:
        trajectory: the recorded training.
        model: its architecture, for the queries' gradients.
        dataset: the training examples.
        projection: of gradients to features; its matrices are regenerated from the seed.
        sketches: the features, and whose they are.
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
    sketches: Sketches
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
        factory: str = AUTO,
        dtype: str = "float32",
        memory: str | int = "4GB",
        ids: Sequence[int] | Tensor | None = None,
        out: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> GradientIndex:
        """Replay the training once and index what every example put into the parameters.

        Args:
            trajectory: the recorded training, of any optimiser whose steps are itemised.
            model: a model of the recorded architecture; not changed.
            dataset: the training examples, as recorded.
            dim: numbers per example; the approximation's error falls as 1/√dim (:func:`kxexplain.dim_for_recall`
                finds what a recall takes).
            seed: of the random projection.
            factory: FAISS' description of the index: "Flat" scans all examples exactly, "HNSW32", "IVF64,Flat" or
                "IVF1024,PQ32" look at fewer; "auto" chooses by size (:func:`kxexplain.search.vectors.choose_factory`).
            dtype: "float32", or "float16" for half the bytes.
            memory: bytes that FAISS may take, where the factory is "auto".
            ids: dataset indices of the examples to index; all if ``None``.
            out: a folder to build in, part by part: what an interrupted build finished there is not done again, and
                features are never in memory as a whole. In memory if ``None``.
            progress: show a bar over the replayed steps.

        Raises:
            ModelError: not the recorded architecture.
            DatasetError: not the recorded examples.
            ArgumentError: dim below 16, an index FAISS cannot make, no steps, or an optimiser whose steps are not
                itemised.
            IndexFileError: ``out`` holds something else, or cannot be written.
            ReplayError: the log does not lead to the recorded states.
        """
        plan = Plan.checked(
            trajectory, model, dataset, dim=dim, seed=seed, ids=ids, factory=factory, dtype=dtype, memory=memory
        )
        if out is None:
            subset = None if ids is None else plan.ids
            features = update_features(trajectory, model, dataset, plan.projection, ids=subset, progress=progress)
            assert features is not None
            return cls.of(plan, features)
        parts = plan.parts([Path(out)])
        parts.build(trajectory, model, dataset, progress=progress)
        return cls._assembled(plan, parts, Path(out))

    @classmethod
    def build_shard(
        cls,
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        dim: int = 2048,
        *,
        shard: Shard,
        out: str | os.PathLike[str],
        seed: int = 0,
        ids: Sequence[int] | Tensor | None = None,
        progress: bool = False,
    ) -> Path:
        """Make one worker's share of an index in a folder; :meth:`merge` puts the shares together.

        A share is a stretch of the training's segments: without momentum only that stretch is replayed. Arguments and
        errors are those of :meth:`build`; ``shard`` is (which, of how many). Workers may share a folder.
        """
        plan = Plan.checked(trajectory, model, dataset, dim=dim, seed=seed, ids=ids)
        plan.parts([Path(out)]).build(trajectory, model, dataset, shard=shard, progress=progress)
        return Path(out)

    @classmethod
    def merge(
        cls,
        folders: Sequence[str | os.PathLike[str]],
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        dim: int = 2048,
        *,
        out: str | os.PathLike[str],
        seed: int = 0,
        factory: str = AUTO,
        dtype: str = "float32",
        memory: str | int = "4GB",
        ids: Sequence[int] | Tensor | None = None,
    ) -> GradientIndex:
        """Put the shares of :meth:`build_shard`, made with these arguments, together in the folder ``out``.

        Raises:
            IndexFileError: shares are missing, damaged or of something else.
            ArgumentError, ModelError, DatasetError: as for :meth:`build`.
        """
        plan = Plan.checked(
            trajectory, model, dataset, dim=dim, seed=seed, ids=ids, factory=factory, dtype=dtype, memory=memory
        )
        files.check_free(Path(out))
        return cls._assembled(plan, plan.parts([Path(out), *(Path(folder) for folder in folders)]), Path(out))

    @classmethod
    def of(cls, plan: Plan, features: Float32[Tensor, "n dim"]) -> GradientIndex:
        """An index in memory, of features that are there already."""
        if not bool(features.isfinite().all()):
            raise ArgumentError(HUGE)
        sketches = Sketches.of(features, block_list(plan.projection), plan.ids, plan.labels(), plan.dtype)
        index = cls(plan.trajectory, plan.model, plan.dataset, plan.projection, sketches, plan.factory)
        _ = index._vectors
        return index

    @classmethod
    def _assembled(cls, plan: Plan, parts: Parts, folder: Path) -> GradientIndex:
        """Parts on disk made into an index on disk, and opened."""
        parts.assemble(folder, plan.dtype)
        sketches = files.mapped(folder, plan.ids, plan.labels(), (plan.projection.dim, plan.projection.blocks))
        index = cls(plan.trajectory, plan.model, plan.dataset, plan.projection, sketches, plan.factory)
        files.close(folder, index._facts(), sketches.ids, sketches.labels, index._blobs())
        parts.clear()
        return index

    @property
    def features(self) -> Float32[Tensor, "n dim"]:
        """All features, as one tensor in memory."""
        return self.sketches.rows(slice(None))

    @property
    def labels(self) -> Tensor | None:
        """The examples' labels, [n], where they are single numbers."""
        return self.sketches.labels

    def search(
        self,
        queries: Tensor | Examples | Inputs,
        k: int = 10,
        target: TargetSpec = "predicted",
        *,
        rerank: int = 100,
        labels: int | Sequence[int] | Tensor | None = None,
        ids: Sequence[int] | Tensor | None = None,
    ) -> Neighbors:
        """The k largest positive and negative contributions to every query, and the k nearest examples.

        Args:
            queries: a tensor of inputs [q, …] (or a tuple or dict of them), or a dataset of (input, target).
            k: examples per list; at most as many as there are.
            target: what to ask about, as for :func:`kxexplain.explain`, but one number per query.
            rerank: so many candidates for either sign are ordered by their exact contributions, which takes a replay
                of the training for all queries together; 0 leaves the approximate order.
            labels: search only among examples with this label, or one of these; by an exact scan of them.
            ids: search only among these examples.

        Returns:
            Proponents, opponents and nearest examples. *Nearest* compares the way the query's loss would push the
            parameters (with its label if given, else with the predicted class) with the way each example did, by
            cosine, averaged over the training; where no label can be had, the target's gradient stands in.

        Raises:
            ArgumentError: k below 1, rerank below 0, all outputs at once, gradients that are not finite, an empty
                index, or a filter that leaves no example.
            TargetError: the target does not exist, or the queries' labels do not fit the loss.
            DatasetError: there are no queries, or (when re-ranking) the dataset has changed.
            ModelError: the model has changed its architecture.
        """
        _at_least(k, 1, "k")
        _at_least(rerank, 0, "rerank")
        if isinstance(target, str) and target == "all":
            raise ArgumentError("one number per query is searched for; give an output's number instead of 'all'")
        if not len(self):
            raise ArgumentError("the index is empty: there is nothing to find; add examples with index.add(ids)")
        rows = chosen_rows(self.sketches, labels, ids)
        count = len(self) if rows is None else len(rows)
        asked = self._asking.ask(queries, target)
        k = min(k, count)
        width = min(count, max(k, rerank))
        if rows is not None or self._vectors is None:
            found = self.sketches.scan(asked.features, asked.pushes, width, rows)
        else:
            found = look_up(self.sketches, self._vectors, asked.features, asked.pushes, width)
        if rerank:
            proponents, opponents = self._reranked(queries, asked.features, target, found=found, k=k)
        else:
            proponents, opponents = (self._hits(one.rows[:, :k], one.scores[:, :k]) for one in found[:2])
        nearest = self._hits(found[2].rows[:, :k], found[2].scores[:, :k])
        facts = {
            "target": asked.name, "rerank": rerank, "dim": self.projection.dim, "factory": self.factory,
            "nearest": asked.measure,
        }  # fmt: skip
        return Neighbors(
            proponents, opponents, nearest, asked.output, asked.labels, facts, self.dataset, asked.inputs
        )  # fmt: skip

    def add(self, ids: Sequence[int] | Tensor, *, progress: bool = False) -> GradientIndex:
        """An index of these training examples as well, from one replay for them alone; this one stays as it is.

        Raises:
            ArgumentError: an example is in the index already, or not in the dataset.
            ReplayError: the log does not lead to the recorded states.
        """
        new = id_list(ids)
        present = new[torch.isin(new, self.sketches.ids)].tolist()
        if present:
            raise ArgumentError(f"examples {present[:5]} are in the index already; add others")
        plan = Plan.checked(
            self.trajectory, self.model, self.dataset, dim=self.projection.dim, seed=self.projection.seed, ids=new
        )
        features = update_features(
            self.trajectory, self.model, self.dataset, self.projection, ids=new, progress=progress
        )
        assert features is not None
        more = Sketches.of(features, self.sketches.blocks, new, plan.labels(), self.sketches.units.dtype)
        return replace(self, sketches=self.sketches.joined(more), stored={})

    def remove(self, ids: Sequence[int] | Tensor) -> GradientIndex:
        """An index without these examples; this one stays as it is.

        Raises:
            ArgumentError: the index has no such example.
        """
        kept = torch.ones(len(self), dtype=torch.bool)
        kept[rows_of(self.sketches, id_list(ids))] = False
        return replace(self, sketches=self.sketches.take(kept.nonzero().squeeze(1)), stored={})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the index to a folder (not trajectory, model or dataset), over an older index if it holds one.

        Raises:
            IndexFileError: the folder cannot be written, or holds something that is no index.
        """
        files.write(Path(path), self._facts(), self.sketches, self._blobs())
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        *,
        verify: bool = True,
    ) -> GradientIndex:
        """Open a saved index, memory-mapped, and check that it belongs to this trajectory, model and dataset.

        Nothing is written: several processes may open one folder at the same time, and share the memory.

        Args:
            path: the folder.
            trajectory: the recorded training it was made from.
            model: of the recorded architecture.
            dataset: the training examples.
            verify: read all features once, to check them; without it a large index opens at once.

        Raises:
            IndexFileError: missing, damaged, of another format, or made from another trajectory.
            ModelError: not the recorded architecture.
            DatasetError: not the recorded examples.
            ArgumentError: FAISS no longer makes such an index.
        """
        manifest, sketches, blobs = files.read(Path(path), verify=verify)
        Trajectory.required(trajectory).check_model(model)
        if manifest["trajectory"] != files.identity(trajectory):
            raise IndexFileError(
                f"{path} was made from another trajectory than {trajectory.path}, or from fewer of its steps; "
                "build it again"
            )
        trajectory.check_dataset(dataset)
        if manifest["dataset"] != asdict(trajectory.manifest.dataset):
            raise IndexFileError(f"{path} was made from another dataset; build it again")
        wanted = set() if manifest["factory"] == FLAT or not len(sketches) else set(files.FAISS_FILES)
        if set(blobs) != wanted:
            raise IndexFileError(f"{path} has the FAISS files {sorted(blobs)}, expected {sorted(wanted)}")
        if manifest["segments"] < 1:
            raise IndexFileError(f"{path} has {manifest['segments']} segments; build it again")
        projection = projection_for(
            trajectory, manifest["dim"], seed=manifest["seed"], segments=manifest["segments"]
        )  # fmt: skip
        if projection.blocks != manifest["blocks"]:
            raise IndexFileError(f"{path} has other segments than {trajectory.path}; build it again")
        check_factory(manifest["factory"], projection.dim)
        index = cls(trajectory, model, dataset, projection, sketches, manifest["factory"], blobs)
        _ = index._vectors
        return index

    def __len__(self) -> int:
        return len(self.sketches)

    def __repr__(self) -> str:
        return (
            f"GradientIndex({len(self)} examples × {self.projection.dim}, {self.factory!r}, "
            f"{self.projection.segments} segments, {self.sketches.nbytes / 1e6:.1f} MB)"
        )

    @cached_property
    def _vectors(self) -> tuple[Vectors, Vectors] | None:
        """FAISS' indices of products and of cosines; ``None`` where the features are scanned."""
        if self.factory == FLAT or not len(self):
            return None
        stored = [self.stored.pop(name, None) for name in files.FAISS_FILES]
        return pair_of(self.sketches, self.factory, stored)

    @cached_property
    def _asking(self) -> Asking:
        return Asking(self.trajectory, self.model, self.projection)

    def _blobs(self) -> dict[str, bytes]:
        if self._vectors is None:
            return {}
        return {name: index.to_bytes() for name, index in zip(files.FAISS_FILES, self._vectors, strict=True)}

    def _facts(self) -> dict[str, Any]:
        projection = self.projection
        return {
            "trajectory": files.identity(self.trajectory), "dataset": asdict(self.trajectory.manifest.dataset),
            "examples": len(self), "dim": projection.dim, "segments": projection.segments,
            "blocks": projection.blocks, "seed": projection.seed,
            "dtype": str(self.sketches.units.dtype).removeprefix("torch."), "factory": self.factory,
        }  # fmt: skip

    def _reranked(
        self, queries: Any, features: Tensor, target: TargetSpec, *, found: tuple[Found, Found, Found], k: int
    ) -> tuple[Hits, Hits]:
        """Order each query's own candidates, of either sign, by their exact contributions."""
        own = torch.cat([found[0].rows, found[1].rows], 1)
        union = own.unique()
        exact = contributions_of(
            self.trajectory, self.model, self.dataset, queries, target, self.sketches.ids[union]
        ).cpu()  # fmt: skip
        scores = features @ self.sketches.rows(union).T
        foreign = torch.ones_like(exact, dtype=torch.bool).scatter_(1, torch.searchsorted(union, own), False)
        hits = []
        for largest, never in ((True, -torch.inf), (False, torch.inf)):
            best = exact.masked_fill(foreign, never).topk(k, dim=1, largest=largest)
            hits.append(self._hits(union[best.indices], scores.gather(1, best.indices), best.values))
        return hits[0], hits[1]

    def _hits(self, rows: Tensor, scores: Tensor, contributions: Tensor | None = None) -> Hits:
        labels = None if self.labels is None else self.labels[rows]
        return Hits(self.sketches.ids[rows], scores, contributions, labels)


def _at_least(value: int, least: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"got {name}={value!r}; expected a whole number of at least {least}")
