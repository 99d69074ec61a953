"""An index on disk: it answers alike when loaded, and damaged or foreign files are told."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import DatasetError, IndexFileError, ModelError
from kxexplain.search import GradientIndex, Neighbors, files
from kxexplain.search.vectors import Vectors
from tests.search.conftest import Trained


def same(one: Neighbors, other: Neighbors) -> bool:
    lists = [(getattr(one, n), getattr(other, n)) for n in ("proponents", "opponents", "nearest")]
    return all(torch.equal(a.ids, b.ids) and torch.equal(a.values, b.values) for a, b in lists)


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat"])
def test_saved_and_loaded_it_answers_alike(factory: str, digits: Trained, index: GradientIndex, tmp_path: Path) -> None:
    made = GradientIndex.build(*digits[:3], dim=64, seed=5, factory=factory)
    folder = made.save(tmp_path / "a" / "index")
    again = GradientIndex.load(folder, *digits[:3])
    assert same(made.search(digits.queries, k=5, rerank=20), again.search(digits.queries, k=5, rerank=20))
    assert repr(again) == repr(made)
    assert {f.name for f in folder.iterdir()} == {"manifest.json", *files.ARRAYS} | (
        set() if factory == "Flat" else set(files.FAISS_FILES)
    )
    index.save(folder)
    found = (i.search(digits.queries, rerank=0) for i in (GradientIndex.load(folder, *digits[:3]), index))
    assert same(*found)
    assert len(list(folder.iterdir())) == 5


def _edit(change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / files.MANIFEST).read_text())
        change(manifest)
        if sign:
            manifest["checksum"] = files.own_sum(manifest)
        (folder / files.MANIFEST).write_text(json.dumps(manifest))

    return damage


def _put(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace a file, checksum included: what a stranger could do."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        entry = {"sha256": files.digest(data), "bytes": len(data)}
        _edit(lambda manifest: manifest["files"].update({name: entry}))(folder)

    return damage


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def _array(name: str, values: Any) -> Callable[[Path], None]:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values), allow_pickle=True)
    return _put(name, buffer.getvalue())


def _hnsw(rows: Tensor) -> bytes:
    return Vectors(lambda at: rows[at], *rows.shape, "HNSW16").to_bytes()


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "missing"),
    "no features": (lambda f: (f / "units.npy").unlink(), "missing"),
    "truncated": (lambda f: (f / "nearest.faiss").write_bytes((f / "nearest.faiss").read_bytes()[:-9]), "truncated"),
    "flipped features": (_flip("units.npy"), "altered"),
    "flipped norms": (_flip("norms.npy"), "altered"),
    "flipped faiss": (_flip("influence.faiss"), "altered"),
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
    "manifest is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\xff"), "cannot be read"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[1]"), "does not describe"),
    "foreign format": (_edit(lambda m: m.update(format="other")), "does not describe"),
    "earlier version": (_edit(lambda m: m.update(format_version=1)), "format version 1"),
    "wrong type": (_edit(lambda m: m.update(dim="64")), "'dim'"),
    "altered seed": (_edit(lambda m: m.update(seed=9), sign=False), "altered"),
    "unknown file": (_edit(lambda m: m["files"].update({"../x": {}})), "names a file"),
    "features not listed": (_edit(lambda m: m["files"].pop("units.npy")), "names no"),
    "faiss not listed": (_edit(lambda m: m["files"].pop("nearest.faiss")), "FAISS files"),
    "other trajectory": (_edit(lambda m: m.update(trajectory="0" * 64)), "another trajectory"),
    "other dataset": (_edit(lambda m: m["dataset"].update(seed=3)), "another dataset"),
    "no segments": (_edit(lambda m: m.update(segments=0)), "0 segments"),
    "other blocks": (_edit(lambda m: m.update(blocks=2)), "expected torch.float32"),
    "no blocks": (_edit(lambda m: m.update(blocks=0)), "0 blocks"),
    "unknown dtype": (_edit(lambda m: m.update(dtype="int8")), "int8"),
    "other dimension": (_edit(lambda m: m.update(dim=32)), "expected"),
    "no array": (_put("units.npy", b"nothing"), "no array"),
    "pickled": (_array("units.npy", np.array([{}], dtype=object)), "no array"),
    "wrong shape": (_array("units.npy", np.zeros((420, 63), np.float32)), "expected"),
    "wrong type of features": (_array("units.npy", np.zeros((420, 64))), "expected"),
    "NaN": (_array("units.npy", np.full((420, 64), np.nan, np.float32)), "NaN"),
    "NaN norms": (_array("norms.npy", np.full((420, 1), np.nan, np.float32)), "NaN"),
    "labels too short": (_array("labels.npy", np.zeros(3)), "labels"),
    "ids beyond the dataset": (_array("ids.npy", np.arange(420) + 1), "run from 1 to 420"),
    "faiss of other rows": (_put("influence.faiss", _hnsw(torch.eye(16))), "16 vectors"),
    "faiss of nothing": (_put("influence.faiss", b"IxFI" + bytes(9)), "cannot read"),
}


@pytest.fixture(scope="module")
def saved(digits: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = GradientIndex.build(*digits[:3], dim=64, factory="HNSW16").save(tmp_path_factory.mktemp("saved"))
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_and_foreign_files(name: str, saved: dict[str, bytes], digits: Trained, tmp_path: Path) -> None:
    for file, data in saved.items():
        (tmp_path / file).write_bytes(data)
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(IndexFileError, match=message):
        GradientIndex.load(tmp_path, *digits[:3])


def test_loading_beside_the_wrong_things(index: GradientIndex, digits: Trained, tmp_path: Path) -> None:
    trajectory, model, data, _ = digits
    folder = index.save(tmp_path / "index")
    with pytest.raises(DatasetError):
        GradientIndex.load(folder, trajectory, model, Subset(data, [1, 0, *range(2, 420)]))
    with pytest.raises(ModelError):
        GradientIndex.load(folder, trajectory, nn.Linear(64, 10), data)
    other = kx.train(copy.deepcopy(model), data, epochs=1, batch_size=64, out=tmp_path / "other", progress=False)
    with pytest.raises(IndexFileError, match="another trajectory"):
        GradientIndex.load(folder, other, model, data)
    with pytest.raises(IndexFileError, match="missing"):
        GradientIndex.load(tmp_path / "nowhere", trajectory, model, data)
    with pytest.raises(DatasetError):
        GradientIndex.build(trajectory, model, TensorDataset(data.tensors[0] + 1, data.tensors[1]))


def test_saving_where_something_else_lies(index: GradientIndex, digits: Trained, tmp_path: Path) -> None:
    for path in (digits.trajectory.path, tmp_path / "file", tmp_path / "file" / "below"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(IndexFileError):
            index.save(path)
    assert (tmp_path / "file").read_text() == "mine"
    assert not list(digits.trajectory.path.glob("units*"))
