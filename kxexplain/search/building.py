"""Building an index on disk part by part: interrupted and gone on with, or shared out over workers and merged.

A part (:mod:`kxexplain.search.updates`) is finished when ``part-….json`` is there, which names its recipe (trajectory,
dataset, examples, dimension, seed) and its arrays' checksums; parts of another recipe are never used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kxexplain.errors import ArgumentError, IndexFileError
from kxexplain.gradients.projection import Projection
from kxexplain.kernels.budget import parse_bytes
from kxexplain.search import files
from kxexplain.search.features import example_labels
from kxexplain.search.looking import id_list
from kxexplain.search.sketches import CHUNK, block_list, dtype_of, split_lengths
from kxexplain.search.updates import Blocks, check_optimizer, parts_of, projection_for, update_features
from kxexplain.search.vectors import AUTO, FLAT, check_factory, choose_factory
from kxexplain.shapes import Examples
from kxexplain.trajectory import Trajectory

Shard = tuple[int, int]
"""(which, of how many)."""

HUGE = "the examples' updates are too large to index: features are not finite"


@dataclass(frozen=True)
class Parts:
    """The parts of an index in one or several folders.

    Attributes:
        folders: where they lie; new ones come into the first.
        projection: of gradients to features.
        ids: the examples, [n].
        recipe: what a part must have been made by.
    """

    folders: Sequence[Path]
    projection: Projection
    ids: Tensor
    recipe: dict[str, Any]

    @classmethod
    def of(cls, folders: Sequence[Path], trajectory: Trajectory, projection: Projection, ids: Tensor) -> Parts:
        """The parts of this trajectory's index."""
        return cls([folder / files.PARTS for folder in folders], projection, ids, recipe(trajectory, projection, ids))

    @property
    def count(self) -> int:
        """Number of parts that make the whole."""
        return len(parts_of(self.projection.segments))

    def done(self) -> dict[int, Path]:
        """The finished parts."""
        found: dict[int, Path] = {}
        for folder in self.folders:
            for number in range(self.count):
                if number not in found and self._is_ours(folder / f"part-{number:03}.json"):
                    found[number] = folder
        return found

    def _is_ours(self, path: Path) -> bool:
        try:
            note = json.loads(path.read_text("utf-8"))
            return bool(note["recipe"] == self.recipe) and isinstance(note["files"], dict)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def build(
        self, trajectory: Trajectory, model: nn.Module, dataset: Examples, *, shard: Shard = (0, 1), progress: bool
    ) -> None:
        """Make the parts of a shard that are not there yet.

        Raises:
            ArgumentError: there is no such shard.
        """
        which, of = shard
        if not (isinstance(which, int) and isinstance(of, int) and 0 <= which < of <= self.count):
            raise ArgumentError(
                f"got shard={shard!r}; expected (which, of how many), with at most {self.count} shards of these "
                "segments"
            )
        own = range(self.count * which // of, self.count * (which + 1) // of)
        missing = sorted(set(own) - self.done().keys())
        if missing:
            update_features(
                trajectory, model, dataset, self.projection, ids=self.ids, wanted=missing, sink=self.put,
                progress=progress,
            )  # fmt: skip

    def put(self, number: int, blocks: Blocks) -> None:
        """Write a part."""
        folder, names = self.folders[0], {}
        for block, values in blocks.items():
            name = f"part-{number:03}-{block:03}.npy"
            files.put_array(folder / name, values)
            names[name] = {"block": block, **files.measured(folder / name)}
        with files.storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
        note = {"recipe": self.recipe, "files": names}
        files.put_bytes(folder / f"part-{number:03}.json", json.dumps(note).encode())

    def arrays(self) -> list[tuple[slice, Tensor]]:
        """Every part's columns and values, memory-mapped, in the parts' order.

        Raises:
            IndexFileError: a part is missing or damaged.
        """
        done = self.done()
        missing = sorted(set(range(self.count)) - done.keys())
        if missing:
            raise IndexFileError(
                f"parts {missing} of {self.count} are missing in {', '.join(str(f) for f in self.folders)}; build "
                "the shards that hold them first"
            )
        found = []
        for number in range(self.count):
            note = json.loads((done[number] / f"part-{number:03}.json").read_text("utf-8"))
            for name, expected in note["files"].items():
                path, block = done[number] / Path(name).name, expected.pop("block")
                files.check_sum(path, expected)
                place = self.projection.block(block)
                shape = (len(self.ids), place.stop - place.start)
                found.append((place, files.open_array(path, shape, torch.float32)))
        return found

    def assemble(self, folder: Path, dtype: torch.dtype) -> None:
        """Add the parts up and write the features, some rows at a time."""
        arrays, blocks = self.arrays(), block_list(self.projection)
        n, dim = len(self.ids), self.projection.dim
        kind = str(dtype).removeprefix("torch.")
        with ExitStack() as stack:
            units_on_disk = stack.enter_context(files.new_array(folder / files.UNITS, (n, dim), kind))
            norms_on_disk = stack.enter_context(files.new_array(folder / files.NORMS, (n, len(blocks)), "float32"))
            for at in range(0, n, CHUNK):
                rows = slice(at, min(at + CHUNK, n))
                features = torch.zeros(rows.stop - at, dim)
                for place, values in arrays:
                    features[:, place] += values[rows]
                if not bool(features.isfinite().all()):
                    raise ArgumentError(HUGE)
                units, norms = split_lengths(features, blocks)
                units_on_disk[rows], norms_on_disk[rows] = units.to(dtype).numpy(), norms.numpy()

    def clear(self) -> None:
        """Remove the first folder's parts."""
        shutil.rmtree(self.folders[0], ignore_errors=True)


def recipe(trajectory: Trajectory, projection: Projection, ids: Tensor) -> dict[str, Any]:
    """What the features of an index are a function of."""
    return {
        "trajectory": files.identity(trajectory), "dataset": asdict(trajectory.manifest.dataset),
        "ids": files.digest(ids.contiguous().numpy().tobytes()), "dim": projection.dim, "seed": projection.seed,
        "segments": projection.segments,
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class Plan:
    """What an index is to be made of and how, checked before work starts."""

    trajectory: Trajectory
    model: nn.Module
    dataset: Examples
    projection: Projection
    ids: Tensor
    factory: str
    dtype: torch.dtype

    @classmethod
    def checked(
        cls,
        trajectory: Trajectory,
        model: nn.Module,
        dataset: Examples,
        *,
        dim: int,
        seed: int = 0,
        ids: Any = None,
        factory: str = FLAT,
        dtype: str = "float32",
        memory: str | int = "4GB",
    ) -> Plan:
        """The plan; raises what :meth:`GradientIndex.build` says."""
        Trajectory.required(trajectory).check_model(model)
        projection = projection_for(trajectory, dim, seed=seed)
        check_factory(factory, dim)
        check_optimizer(trajectory)
        kind, allowed = dtype_of(dtype), parse_bytes(memory)
        count = trajectory.manifest.dataset.count
        wanted = torch.arange(count) if ids is None else id_list(ids)
        if int(wanted.min()) < 0 or int(wanted.max()) >= count:
            raise ArgumentError(f"ids run from {int(wanted.min())} to {int(wanted.max())}; there are examples 0 to "
                                f"{count - 1}")  # fmt: skip
        if factory == AUTO:
            factory = choose_factory(len(wanted), dim, allowed)
        return cls(trajectory, model, dataset, projection, wanted, factory, kind)

    def labels(self) -> Tensor | None:
        """The examples' labels, [n], if they are single numbers."""
        found = example_labels(self.dataset, self.trajectory.manifest.dataset.count)
        return None if found is None else found[self.ids]

    def parts(self, folders: Sequence[Path]) -> Parts:
        """The parts of the index, in these folders; ``IndexFileError`` if the first holds something else."""
        files.check_free(folders[0])
        return Parts.of(folders, self.trajectory, self.projection, self.ids)
