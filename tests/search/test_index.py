"""The index: features against exact contributions, recall, nearest, and what bad input is answered with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.attribution.queries import Ends, QuerySide
from kxexplain.errors import ArgumentError, DatasetError, TargetError
from kxexplain.kernels import quadrature
from kxexplain.search import GradientIndex
from kxexplain.search.features import query_features, recorded_segments
from kxexplain.search.sketches import Sketches, block_list, blocks_of, directions
from kxexplain.search.updates import projection_for, update_features
from tests.cases import CASES
from tests.search.conftest import COPIES, Trained


@pytest.fixture(scope="module")
def contributions(digits: Trained) -> Tensor:
    return kx.explain(*digits[:3], digits.queries, kernel=False).contributions


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
    side = QuerySide.prepare(Ends.of(trajectory, problem.model), problem.queries, 0, quadrature.rule("discrete"), 10**6)
    queries = query_features(recorded_segments(trajectory, torch.device("cpu")), side, projection)
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
    side = QuerySide.prepare(Ends.of(*digits[:2]), digits.queries, "label", quadrature.rule("discrete"), 10**9)
    segments = recorded_segments(digits.trajectory, torch.device("cpu"))
    scores = query_features(segments, side, index.projection) @ index.features.T
    torch.testing.assert_close(found.proponents.scores, scores.topk(7).values, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.opponents.scores, scores.topk(7, largest=False).values, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_the_other_queries(index: GradientIndex, digits: Trained) -> None:
    together = index.search(digits.queries, k=3, rerank=15)
    alone = index.search(Subset(digits.queries, [4]), k=3, rerank=15)
    for name in ("proponents", "opponents", "nearest"):
        assert torch.equal(getattr(together, name).ids[4:5], getattr(alone, name).ids)


def test_copies_are_each_others_nearest(index: GradientIndex) -> None:
    """Among training examples, whose updates are compared at different moments; and for a query that equals one."""
    unit = directions(index.features, block_list(index.projection))
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
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "420 examples × 1024" in repr(index)
    assert "12 queries × 2" in repr(found)
    with pytest.raises(ArgumentError, match="there are 12"):
        found.table(12)
    assert found.plot(1).axes
    with pytest.raises(ArgumentError, match="there are 12"):
        found.plot(12)


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
    ids=lambda value: value if isinstance(value, str) else "",
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


def test_huge_updates(tmp_path: Path) -> None:
    data = TensorDataset(torch.full((2, 1), 1e25, dtype=torch.float64), torch.full((2,), 1e20, dtype=torch.float64))
    wide = nn.Linear(1, 1).double()
    sgd = torch.optim.SGD(wide.parameters(), lr=1e-3)
    huge = kx.train(wide, data, "mse", sgd, epochs=1, batch_size=2, out=tmp_path / "b", progress=False)
    with pytest.raises(ArgumentError, match="features are not finite"):
        GradientIndex.build(huge, wide, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_candidates_are_scored_as_their_rows_would_be(dtype: torch.dtype) -> None:
    blocks, generator = blocks_of(3, 50), torch.Generator().manual_seed(0)
    sketches = Sketches.of(torch.randn(40, 50, generator=generator), blocks, dtype=dtype)
    feature, at = torch.randn(50, generator=generator), torch.tensor([7, 3, 39, 3])
    torch.testing.assert_close(sketches.products(at, feature), sketches.rows(at) @ feature)
    torch.testing.assert_close(sketches.cosines(at, feature), sketches.directions(at) @ feature)
