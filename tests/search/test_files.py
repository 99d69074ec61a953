"""An index on disk: it answers alike when loaded, and damaged or foreign files are told."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
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
    assert {f.name for f in folder.iterdir()} == {"manifest.json", "features.safetensors"} | (
        set() if factory == "Flat" else set(files.FAISS_FILES)
    )
    index.save(folder)
    found = (i.search(digits.queries, rerank=0) for i in (GradientIndex.load(folder, *digits[:3]), index))
    assert same(*found)
    assert len(list(folder.iterdir())) == 2


def _edit(change: Callable[[dict[str, Any]], Any], *, sign: bool = True) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / files.MANIFEST).read_text())
        change(manifest)
        if sign:
            manifest["checksum"] = files._own_sum(manifest)
        (folder / files.MANIFEST).write_text(json.dumps(manifest))

    return damage


def _put(name: str, data: bytes) -> Callable[[Path], None]:
    """Replace a file, checksum included: what a stranger could do."""

    def damage(folder: Path) -> None:
        (folder / name).write_bytes(data)
        entry = {"sha256": files._sum(data), "bytes": len(data)}
        _edit(lambda manifest: manifest["files"].update({name: entry}))(folder)

    return damage


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(bytes(data))

    return damage


def _features(tensor: Tensor, **others: Tensor) -> Callable[[Path], None]:
    return _put(files.FEATURES, safetensors.torch.save({"features": tensor, **others}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "missing"),
    "no features": (lambda f: (f / "features.safetensors").unlink(), "missing"),
    "truncated": (lambda f: (f / "nearest.faiss").write_bytes((f / "nearest.faiss").read_bytes()[:-9]), "truncated"),
    "flipped features": (_flip("features.safetensors"), "altered"),
    "flipped faiss": (_flip("influence.faiss"), "altered"),
    "manifest is no JSON": (lambda f: (f / "manifest.json").write_text("{"), "not valid JSON"),
    "manifest is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\xff"), "cannot be read"),
    "manifest is a list": (lambda f: (f / "manifest.json").write_text("[1]"), "does not describe"),
    "foreign format": (_edit(lambda m: m.update(format="other")), "does not describe"),
    "later version": (_edit(lambda m: m.update(format_version=2)), "format version 2"),
    "wrong type": (_edit(lambda m: m.update(dim="64")), "'dim'"),
    "altered seed": (_edit(lambda m: m.update(seed=9), sign=False), "altered"),
    "unknown file": (_edit(lambda m: m["files"].update({"../x": {}})), "names a file"),
    "features not listed": (_edit(lambda m: m["files"].pop("features.safetensors")), "names no"),
    "faiss not listed": (_edit(lambda m: m["files"].pop("nearest.faiss")), "FAISS files"),
    "other trajectory": (_edit(lambda m: m.update(trajectory="0" * 64)), "another trajectory"),
    "other dataset": (_edit(lambda m: m["dataset"].update(count=3)), "another dataset"),
    "no safetensors": (_put("features.safetensors", b"nothing"), "no safetensors"),
    "wrong shape": (_features(torch.zeros(420, 63)), "expected float32"),
    "wrong type of features": (_features(torch.zeros(420, 64, dtype=torch.float64)), "expected float32"),
    "no feature tensor": (_put("features.safetensors", safetensors.torch.save({})), "features are None"),
    "NaN": (_features(torch.full((420, 64), torch.nan)), "NaN"),
    "labels too short": (_features(torch.zeros(420, 64), labels=torch.zeros(3)), "labels"),
    "faiss of other rows": (_put("influence.faiss", Vectors(torch.eye(16), "HNSW16").to_bytes()), "16 vectors"),
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
    assert not list(digits.trajectory.path.glob("features*"))
