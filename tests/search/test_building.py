"""Building on disk: interrupted, shared out, in half precision; opened by others; filters, adding and removing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kxexplain as kx
from kxexplain.errors import ArgumentError, IndexFileError
from kxexplain.search import GradientIndex, building, files
from kxexplain.search.looking import look_up, pair_of
from kxexplain.search.sketches import Sketches, blocks_of
from kxexplain.search.vectors import choose_factory
from tests.cases import CASES
from tests.runs import order, run
from tests.search.conftest import Trained


def close(one: GradientIndex, other: GradientIndex) -> None:
    assert torch.equal(one.sketches.ids, other.sketches.ids)
    assert torch.equal(one.labels, other.labels)
    torch.testing.assert_close(one.features, other.features, rtol=1e-4, atol=1e-6)


def test_on_disk_as_in_memory_and_gone_on_with(
    digits: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build that is stopped after two of five parts does only the other three again."""
    whole, put, written = GradientIndex.build(*digits[:3], dim=600), building.Parts.put, []

    def stopping(self: building.Parts, number: int, blocks: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(number)
        put(self, number, blocks)

    def counted(self: building.Parts, number: int, blocks: Any) -> None:
        written.append(number)
        put(self, number, blocks)

    monkeypatch.setattr(building.Parts, "put", stopping)
    with pytest.raises(KeyboardInterrupt):
        GradientIndex.build(*digits[:3], dim=600, out=tmp_path / "index")
    monkeypatch.setattr(building.Parts, "put", counted)
    index = GradientIndex.build(*digits[:3], dim=600, out=tmp_path / "index")
    assert written == [0, 1, 2, 3, 4]
    close(index, whole)
    assert not (tmp_path / "index" / "parts").exists()
    close(GradientIndex.load(tmp_path / "index", *digits[:3]), whole)
    parts = GradientIndex.build_shard(*digits[:3], dim=64, out=tmp_path / "other", shard=(0, 1))
    assert len(list((parts / "parts").glob("*.json"))) == 5
    written.clear()
    GradientIndex.build(*digits[:3], dim=64, seed=1, out=parts)  # of another seed: nothing there is of use
    assert len(written) == 5


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_shards_of_several_workers(optimizer: str, tmp_path: Path) -> None:
    made = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1), "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    }[optimizer]  # fmt: skip
    problem = CASES["mlp-relu"].build(torch.float64)
    trajectory = run(
        problem, tmp_path / "run", optimizer=made(problem.model.parameters()), batches=order(epochs=2), keep=2
    )
    parts = (trajectory, problem.model, problem.data)
    folders = [GradientIndex.build_shard(*parts, 64, shard=(i, 2), out=tmp_path / str(i)) for i in range(2)]
    with pytest.raises(IndexFileError, match=r"parts \[.*\] of .* are missing"):
        GradientIndex.merge(folders[:1], *parts, 64, out=tmp_path / "merged")
    merged = GradientIndex.merge(folders, *parts, 64, out=tmp_path / "merged")
    close(merged, GradientIndex.build(*parts, 64))
    damaged = next((folders[1] / "parts").glob("*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    with pytest.raises(IndexFileError, match="altered"):
        GradientIndex.merge(folders, *parts, 64, out=tmp_path / "again")
    with pytest.raises(ArgumentError, match="shard="):
        GradientIndex.build_shard(*parts, 64, shard=(2, 2), out=tmp_path / "x")


def test_half_precision_halves_the_bytes(digits: Trained, index: GradientIndex, tmp_path: Path) -> None:
    half = GradientIndex.build(*digits[:3], dim=1024, dtype="float16", out=tmp_path / "half")
    assert half.sketches.units.nbytes * 2 == index.sketches.units.nbytes
    error = (half.features - index.features).norm(dim=1) / index.features.norm(dim=1)
    assert float(error.max()) < 1e-3
    one, other = (i.search(digits.queries, 10, rerank=50).proponents for i in (half, index))
    assert (one.ids[:, :, None] == other.ids[:, None]).any(2).float().mean() > 0.97
    loaded = GradientIndex.load(tmp_path / "half", *digits[:3], verify=False)
    assert loaded.sketches.units.dtype == torch.float16
    assert torch.equal(loaded.features, half.features)


@pytest.mark.parametrize("kind", [{"labels": [3, 5]}, {"labels": 7}, {"ids": range(100, 160)}])
def test_filters_are_a_smaller_search(kind: dict[str, Any], digits: Trained, index: GradientIndex) -> None:
    targets = digits.data.tensors[1]
    allowed = torch.isin(targets, torch.tensor(kind["labels"])) if "labels" in kind else torch.arange(420)[100:160]
    allowed = allowed.nonzero().squeeze(1) if allowed.dtype == torch.bool else allowed
    alone = GradientIndex.build(*digits[:3], dim=1024, ids=allowed)
    for rerank in (0, 30):
        found, wanted = (
            index.search(digits.queries, 5, rerank=rerank, **kind),
            alone.search(digits.queries, 5, rerank=rerank),
        )
        for name in ("proponents", "opponents", "nearest"):
            assert torch.isin(getattr(found, name).ids, allowed).all()
            torch.testing.assert_close(getattr(found, name).values, getattr(wanted, name).values, rtol=1e-3, atol=1e-4)


def test_added_and_removed(digits: Trained, index: GradientIndex) -> None:
    fewer = index.remove([5, 7, 419])
    assert len(fewer) == 417
    assert not bool(torch.isin(fewer.search(digits.queries, 417, rerank=0).nearest.ids, torch.tensor([5, 7])).any())
    again = fewer.add([7, 419, 5])
    assert again.sketches.ids[-3:].tolist() == [7, 419, 5]
    order_ = again.sketches.ids.argsort()
    torch.testing.assert_close(again.features[order_], index.features, rtol=1e-4, atol=1e-5)
    with pytest.raises(ArgumentError, match="in the index already"):
        index.add([3])
    with pytest.raises(ArgumentError, match="no examples"):
        fewer.remove([7])
    empty = index.remove(range(420))
    with pytest.raises(ArgumentError, match="empty"):
        empty.search(digits.queries)


def test_an_empty_index_is_kept(digits: Trained, index: GradientIndex, tmp_path: Path) -> None:
    folder = index.remove(range(420)).save(tmp_path / "empty")
    loaded = GradientIndex.load(folder, *digits[:3])
    assert len(loaded) == 0
    assert len(loaded.add([1, 2])) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 77}, "no example of the index is left"), ({"ids": [420]}, "no examples"), ({"ids": []}, "ids"),
        ({"ids": [1, 1]}, "twice"), ({"ids": torch.tensor([0.5])}, "expected a list"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_filters(digits: Trained, index: GradientIndex, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        index.search(digits.queries, rerank=0, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "int8"), ({"ids": [-1]}, "ids run from"), ({"memory": "lots"}, "memory"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_builds(digits: Trained, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GradientIndex.build(*digits[:3], dim=16, **arguments)


COMPLETE = ("PQ32x4fs", "SQ8")
"""Kinds that look at every code: a third of the rows, looked at exactly, hold the ten largest."""


@pytest.mark.parametrize("factory", ["PQ32x4fs", "HNSW16", "IVF16,Flat", "SQ8"])
def test_candidates_of_faiss_are_looked_at_exactly(factory: str) -> None:
    """Scores, and the scan's lists, as NumPy gives them, for lengths that differ by orders of magnitude."""
    rows = torch.randn(3000, 64) * torch.randn(3000, 1).mul(0.7).exp()
    queries, pushes, blocks = torch.randn(4, 64), torch.randn(4, 64), blocks_of(2, 64)
    sketches = Sketches.of(rows, blocks)
    x, q, p = (t.double().numpy() for t in (rows, queries, pushes))
    halves = [slice(0, 32), slice(32, 64)]
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    cosines = sum(unit(p[:, h]) @ unit(x[:, h]).T for h in halves) / 2
    wanted = [-np.sort(-(q @ x.T))[:, :10], np.sort(q @ x.T)[:, :10], -np.sort(-cosines)[:, :10]]
    for found, exact in zip(sketches.scan(queries, pushes, 10), wanted, strict=True):
        np.testing.assert_allclose(found.scores, exact, rtol=1e-4, atol=1e-5)
    everything = (q @ x.T, q @ x.T, cosines)
    found = look_up(sketches, pair_of(sketches, factory), queries, pushes, 10)
    for one, scores, exact in zip(found, everything, wanted, strict=True):
        own = np.take_along_axis(scores, one.rows.numpy(), 1)
        np.testing.assert_allclose(one.scores, own, rtol=1e-4, atol=1e-5)
        if factory in COMPLETE:
            np.testing.assert_allclose(one.scores, exact, rtol=1e-4, atol=1e-5)


def test_lists_that_faiss_leaves_short_are_scanned() -> None:
    rows = torch.randn(200, 16)
    sketches = Sketches.of(rows, blocks_of(1, 16))
    found = look_up(sketches, pair_of(sketches, "IVF64,Flat"), rows[:3], rows[:3], 150)
    assert torch.equal(found[0].rows, (rows[:3] @ rows.T).topk(150).indices)


@pytest.mark.parametrize(("n", "dim", "memory"), [(100, 64, 10**9), (10**6, 512, 10**9), (10**7, 510, 10**9)])
def test_the_automatic_choice_fits_the_memory(n: int, dim: int, memory: int) -> None:
    factory = choose_factory(n, dim, memory)
    codes = 0 if factory == "Flat" else int(factory[2:].split("x")[0])
    assert 2 * n * codes / 2 <= memory
    assert codes == 0 or dim % codes == 0


@pytest.mark.slow
def test_a_dimension_for_a_recall(digits: Trained) -> None:
    dim = kx.dim_for_recall(*digits[:3], digits.queries, 0.9, rerank=0)
    exact = kx.explain(*digits[:3], digits.queries, kernel=False).top(10).proponents
    found = GradientIndex.build(*digits[:3], dim=dim).search(digits.queries, 10, rerank=0).proponents.ids
    assert (exact[:, :, None] == found[:, None]).any(2).float().mean() >= 0.9
    assert 64 <= dim <= 8192
    with pytest.raises(ArgumentError, match="recall=0"):
        kx.dim_for_recall(*digits[:3], digits.queries, 0)


@pytest.mark.slow
def test_two_processes_read_one_index(digits: Trained, tmp_path: Path) -> None:
    """At the same time, from a folder that nobody may write to."""
    folder = GradientIndex.build(*digits[:3], dim=128, factory="HNSW16", out=tmp_path / "index").save(
        tmp_path / "index"
    )
    for file in folder.iterdir():
        file.chmod(0o444)
    folder.chmod(0o555)
    code = (
        "import json, sys, torch; from kxexplain.search import files; from kxexplain.search.looking import *\n"
        "manifest, kept, blobs = files.read(__import__('pathlib').Path(sys.argv[1]))\n"
        "pair = pair_of(kept, manifest['factory'], [blobs[n] for n in files.FAISS_FILES])\n"
        "q = kept.rows(torch.arange(5))\n"
        "print(json.dumps([f.rows.tolist() for f in look_up(kept, pair, q, q, 3)]))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
        )
        for _ in range(2)
    ]
    answers = [json.loads(process.communicate()[0]) for process in running]
    folder.chmod(0o755)
    assert answers[0] == answers[1]
    assert [row[0] for row in answers[0][2]] == list(range(5))
    assert not list(folder.glob("*.tmp"))
    assert files.read(folder)[0]["examples"] == 420
