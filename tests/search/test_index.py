"""The index: features against exact contributions, recall, nearest, files, and what bad input is answered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.attribution.queries import QuerySide
from kxexplain.errors import ArgumentError, DatasetError, IndexFileError, ModelError, TargetError
from kxexplain.kernels import quadrature
from kxexplain.search import GradientIndex, Neighbors, files
from kxexplain.search.features import directions, projection_for, query_features, update_features
from kxexplain.search.vectors import Vectors
from tests.cases import CASES

COPIES = 20


class Trained(NamedTuple):
    trajectory: kx.Trajectory
    model: nn.Module
    data: TensorDataset
    queries: TensorDataset


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small network on 420 digits, the last twenty being copies of the first."""
    split = kx.datasets.digits()
    inputs, labels = split.train[:400]
    data = TensorDataset(torch.cat([inputs, inputs[:COPIES]]), torch.cat([labels, labels[:COPIES]]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)
    folder = tmp_path_factory.mktemp("digits")
    trajectory = kx.train(model, data, optimizer=sgd, epochs=5, batch_size=30, out=folder, progress=False)
    return Trained(trajectory, model, data, TensorDataset(*split.test[:12]))


@pytest.fixture(scope="module")
def index(digits: Trained) -> GradientIndex:
    return GradientIndex.build(*digits[:3], dim=1024)


@pytest.fixture(scope="module")
def contributions(digits: Trained) -> Tensor:
    return kx.explain(*digits[:3], digits.queries, kernel=False).contributions


def same(one: Neighbors, other: Neighbors) -> bool:
    lists = [(getattr(one, n), getattr(other, n)) for n in ("proponents", "opponents", "nearest")]
    return all(torch.equal(a.ids, b.ids) and torch.equal(a.values, b.values) for a, b in lists)


@pytest.mark.parametrize(
    "name", ["mlp-relu", "residual-batch-norm", "tied-embedding", "custom-numpy", "branch", "scalar"]
)
def test_inner_products_approximate_contributions(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Also where running statistics move, a parameter is shared, or D carries a rank-one correction."""
    case = CASES[name]
    problem = case.build(dtype)
    sgd = torch.optim.SGD(problem.model.parameters(), lr=case.rate, weight_decay=0.01)
    trajectory = kx.train(
        problem.model, problem.data, case.loss, sgd, epochs=3, batch_size=5, out=tmp_path, progress=False
    )
    exact = kx.explain(trajectory, problem.model, problem.data, problem.queries, target=0, kernel=False).contributions
    projection = projection_for(trajectory, 1 << 15)
    side = QuerySide.prepare(trajectory, problem.model, problem.queries, 0, quadrature.rule("discrete"), 10**6)
    queries = query_features(trajectory, side, projection)
    examples = update_features(trajectory, problem.model, problem.data, projection)
    norms = queries.norm(dim=1)[:, None] * examples.norm(dim=1)
    assert (queries @ examples.T - exact.float()).abs().div(norms).max() < 6 * (3 / projection.dim) ** 0.5


def test_reranked_search_finds_the_exact_top(index: GradientIndex, digits: Trained, contributions: Tensor) -> None:
    found = index.search(digits.queries, k=10, rerank=100)
    for hits, largest in ((found.proponents, True), (found.opponents, False)):
        exact = contributions.topk(10, dim=1, largest=largest)
        hit = (exact.indices[:, :, None] == hits.ids[:, None]).any(2).float().mean()
        assert hit >= 0.9
        assert hits.contributions is not None
        torch.testing.assert_close(hits.contributions, contributions.gather(1, hits.ids), rtol=1e-4, atol=1e-5)
        assert torch.equal(hits.values.sort(1, descending=largest).values, hits.values)
        assert torch.equal(hits.labels, digits.data.tensors[1][hits.ids])


def test_reranking_all_is_the_exact_ranking(index: GradientIndex, digits: Trained) -> None:
    found = index.search(digits.queries, k=5, target="margin", rerank=10**6)
    ranking = kx.explain(*digits[:3], digits.queries, "margin", kernel=False).top(5)
    torch.testing.assert_close(found.proponents.contributions, ranking.proponent_values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.opponents.contributions, ranking.opponent_values, rtol=1e-4, atol=1e-5)


def test_without_reranking_scores_are_inner_products(index: GradientIndex, digits: Trained) -> None:
    found = index.search(digits.queries, k=7, target="label", rerank=0)
    assert found.proponents.contributions is None
    side = QuerySide.prepare(*digits[:2], digits.queries, "label", quadrature.rule("discrete"), 10**9)
    scores = query_features(digits.trajectory, side, index.projection) @ index.features.T
    torch.testing.assert_close(found.proponents.scores, scores.topk(7).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.opponents.scores, scores.topk(7, largest=False).values, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_the_other_queries(index: GradientIndex, digits: Trained) -> None:
    together = index.search(digits.queries, k=3, rerank=15)
    alone = index.search(Subset(digits.queries, [4]), k=3, rerank=15)
    for name in ("proponents", "opponents", "nearest"):
        assert torch.equal(getattr(together, name).ids[4:5], getattr(alone, name).ids)


def test_copies_are_each_others_nearest(index: GradientIndex) -> None:
    """Among training examples, whose updates are compared at different moments; and for a query that equals one."""
    unit = directions(index.features, index.projection)
    cosines = unit[:COPIES] @ unit.T
    cosines[torch.arange(COPIES), torch.arange(COPIES)] = -1
    assert (cosines.argmax(1) == torch.arange(COPIES) + 400).float().mean() >= 0.95
    queries = Subset(index.dataset, range(COPIES))
    found = index.search(queries, k=10, rerank=0).nearest
    twins = torch.stack([torch.arange(COPIES), torch.arange(COPIES) + 400], 1)
    assert (found.ids[:, :1] == twins).any(1).float().mean() >= 0.8
    assert (found.ids[:, :, None] == twins[:, None]).any(2).float().sum(1).mean() >= 1.7
    assert bool((found.scores <= 1 + 1e-5).all())


def test_nearest_uses_the_label_given_or_predicted(index: GradientIndex, digits: Trained) -> None:
    outputs = digits.model(digits.queries.tensors[0])
    given = index.search(TensorDataset(digits.queries.tensors[0], outputs.argmax(1)), k=5, rerank=0)
    predicted = index.search(digits.queries.tensors[0], k=5, rerank=0)
    assert torch.equal(given.nearest.ids, predicted.nearest.ids)
    assert (given.facts["nearest"], predicted.facts["nearest"]) == (
        "loss of the given label", "loss of the predicted label",
    )  # fmt: skip
    same_label = predicted.nearest.labels == outputs.argmax(1)[:, None]
    assert same_label.float().mean() > 0.9
    with pytest.raises(TargetError, match="do not fit the loss"):
        index.search(TensorDataset(digits.queries.tensors[0], torch.full((12,), 99)), rerank=0)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("loss", ["mse", "logistic", "hinge"])
def test_nearest_under_other_losses(loss: str, outputs: int, tmp_path: Path) -> None:
    inputs = torch.randn(12, 4)
    shape = (12,) if outputs == 1 or loss == "hinge" else (12, outputs)
    targets = torch.randint(outputs if loss == "hinge" and outputs > 1 else 2, shape)
    data = TensorDataset(inputs, targets if loss != "mse" else targets.float())
    model = nn.Linear(4, outputs)
    trajectory = kx.train(model, data, loss, epochs=2, batch_size=4, out=tmp_path, progress=False)
    index = GradientIndex.build(trajectory, model, data, dim=64)
    for queries in (inputs[:3], Subset(data, range(3))):
        found = index.search(queries, k=3, target=0, rerank=2)
        assert found.nearest.scores.isfinite().all()
        assert (found.proponents.labels is None) is (targets.dim() > 1)
    assert index.search(inputs[:3], target=0).facts["nearest"].startswith("target" if loss == "mse" else "loss")


def test_few_examples_and_large_k(tmp_path: Path) -> None:
    data = TensorDataset(torch.zeros(3, 4), torch.tensor([0, 1, 0]))  # no gradient but the bias'
    model = nn.Linear(4, 2)
    trajectory = kx.train(model, data, epochs=1, batch_size=3, out=tmp_path, progress=False)
    index = GradientIndex.build(trajectory, model, data, dim=16)
    found = index.search(torch.zeros(2, 4), k=50)
    assert found.proponents.ids.shape == found.nearest.ids.shape == (2, 3)
    assert {tuple(row.tolist()) for row in found.proponents.ids.sort(1).values} == {(0, 1, 2)}


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


def test_neither_model_nor_generators_change(digits: Trained, index: GradientIndex) -> None:
    before, generator = copy.deepcopy(digits.model.state_dict()), torch.get_rng_state()
    GradientIndex.build(*digits[:3], dim=16).search(digits.queries, rerank=5)
    assert all(torch.equal(before[name], value) for name, value in digits.model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


def test_printing_tells_what_was_found(index: GradientIndex, digits: Trained) -> None:
    found = index.search(digits.queries, k=2, rerank=10)
    text = str(found)
    label = int(found.proponents.labels[0, 0])
    assert f"{int(found.proponents.ids[0, 0])} (label {label})" in text
    assert "contribution" in text
    assert "9 more queries" in text
    assert "420 examples × 1024" in repr(index)
    assert "12 queries × 2" in repr(found)
    with pytest.raises(ArgumentError, match="there are 12"):
        found.table(12)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k": 0}, ArgumentError, "k=0"),
        ({"k": True}, ArgumentError, "k=True"),
        ({"rerank": -1}, ArgumentError, "rerank=-1"),
        ({"target": "all"}, ArgumentError, "one number per query"),
        ({"target": 10}, TargetError, "output 10"),
        ({"target": "nonsense"}, TargetError, "nonsense"),
        ({"queries": torch.zeros(0, 64)}, DatasetError, "no queries"),
        ({"queries": torch.full((1, 64), torch.nan)}, DatasetError, "NaN"),
        ({"target": lambda outputs: outputs[:, 0] * torch.inf}, ArgumentError, "not finite"),
    ],
    ids=str,
)
def test_bad_searches(
    index: GradientIndex, digits: Trained, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        index.search(**{"queries": digits.queries} | arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8}, "dim=8"),
        ({"seed": True}, "seed=True"),
        ({"factory": "Bogus"}, "FAISS cannot make"),
        ({"factory": "IVF512,Flat"}, "from 420 examples"),
    ],
    ids=str,
)
def test_bad_builds(digits: Trained, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        GradientIndex.build(*digits[:3], **{"dim": 16} | arguments)


def test_unknown_optimiser_and_huge_updates(digits: Trained, tmp_path: Path) -> None:
    model = copy.deepcopy(digits.model)
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trajectory = kx.train(
        model, digits.data, optimizer=momentum, epochs=1, batch_size=64, out=tmp_path / "a", progress=False
    )
    with pytest.raises(ArgumentError, match="not itemised"):
        GradientIndex.build(trajectory, model, digits.data)
    data = TensorDataset(torch.full((2, 1), 1e25, dtype=torch.float64), torch.full((2,), 1e20, dtype=torch.float64))
    wide = nn.Linear(1, 1).double()
    sgd = torch.optim.SGD(wide.parameters(), lr=1e-3)
    huge = kx.train(wide, data, "mse", sgd, epochs=1, batch_size=2, out=tmp_path / "b", progress=False)
    with pytest.raises(ArgumentError, match="features are not finite"):
        GradientIndex.build(huge, wide, data)


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


def test_vectors_scan_where_an_index_finds_too_few() -> None:
    rows = torch.randn(200, 8)
    vectors = Vectors(rows, "IVF32,Flat")  # visits one list of about six
    scores, ids = vectors.search(rows[:3], 50)
    exact = (rows[:3] @ rows.T).topk(50)
    assert torch.equal(ids, exact.indices)
    torch.testing.assert_close(scores, exact.values)
