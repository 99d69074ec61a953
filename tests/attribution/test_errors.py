"""Bad input gets an error of our family before work starts; and explaining changes nothing of the caller's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from tests.cases import CASES, Case, Problem, vectors
from tests.laws import assert_complete, assert_model_untouched
from tests.runs import run


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Problem, kx.Trajectory]:
    problem = CASES["mlp-gelu"].build()
    return problem, run(problem, tmp_path)


def refused(error: type[Exception], trained: tuple[Problem, kx.Trajectory], **changes: Any) -> str:
    """The message of the error that explaining with something changed raises."""
    problem, trajectory = trained
    given: dict[str, Any] = {
        "model": problem.model, "dataset": problem.data, "queries": problem.queries, "target": "predicted", **changes,
    }  # fmt: skip
    with pytest.raises(error) as caught:
        kx.explain(
            trajectory, given.pop("model"), given.pop("dataset"), given.pop("queries"), given.pop("target"), **given
        )
    assert isinstance(caught.value, kx.KxError)
    return str(caught.value)


def test_wrong_model(trained) -> None:
    for model in (
        nn.Linear(6, 3).double(),
        CASES["mlp-gelu"].build(torch.float32).model,
        CASES["cnn-max"].build().model,
    ):
        refused(kx.ModelError, trained, model=model)


def test_wrong_dataset(trained) -> None:
    problem, _ = trained
    inputs, targets = problem.data.tensors
    changed = inputs.clone()
    changed[3, 2] += 1e-9
    relabelled = targets.clone()
    relabelled[0] = (relabelled[0] + 1) % 3
    assert "order" in refused(kx.DatasetError, trained, dataset=Subset(problem.data, [*range(1, 14), 0]))
    assert "14" in refused(kx.DatasetError, trained, dataset=Subset(problem.data, range(13)))
    for data in (
        TensorDataset(changed, targets),
        TensorDataset(inputs, relabelled),
        TensorDataset(inputs[:0], targets[:0]),
    ):
        refused(kx.DatasetError, trained, dataset=data)


def test_wrong_queries(trained) -> None:
    problem, _ = trained
    x = problem.inputs
    spoiled, endless = x.clone(), x.clone()
    spoiled[1, 1], endless[0, 0] = torch.nan, torch.inf
    labels = torch.zeros(4, dtype=torch.long)
    for queries in (
        x[:0], TensorDataset(x[:0], labels[:0]), [], (), {}, spoiled, endless, TensorDataset(spoiled, labels),
    ):  # fmt: skip
        refused(kx.DatasetError, trained, queries=queries)


@pytest.mark.parametrize("queries", [torch.zeros(2, 5).double(), torch.zeros(2, 6), torch.zeros(6).double()])
def test_queries_the_model_cannot_take(trained, queries: Tensor) -> None:
    """Another width, another precision, a batch axis forgotten."""
    refused(kx.KxError, trained, queries=queries)


def test_a_batch_axis_forgotten_where_the_model_does_not_mind(tmp_path: Path) -> None:
    """Six outputs for one input of width six look like six queries of one output."""
    problem = Case("square", lambda: nn.Linear(6, 6), vectors, outputs=6).build()
    trajectory = run(problem, tmp_path)
    assert "x[None]" in refused(kx.DatasetError, (problem, trajectory), queries=problem.inputs[0])


def test_a_model_that_needs_company(tmp_path: Path) -> None:
    """Batch norm without running statistics takes a query among others, but not alone: not one query's prediction."""
    data = TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    trajectory = kx.train(model, data, epochs=1, batch_size=4, out=tmp_path, progress=False)
    with pytest.raises(kx.DatasetError, match=r"not one alone.*track_running_stats"):
        kx.explain(trajectory, model, data, data.tensors[0][:2])


def test_queries_of_another_nesting(tmp_path: Path) -> None:
    for name in ("two-inputs", "named-inputs", "tied-embedding"):
        problem = CASES[name].build()
        trajectory = run(problem, tmp_path / name)
        refused(kx.DatasetError, (problem, trajectory), queries={"nothing": torch.zeros(2, 6).double()})
        refused(kx.DatasetError, (problem, trajectory), queries=torch.full((2, 5), 1000))


def test_wrong_targets(trained) -> None:
    problem, _ = trained
    for target in (3, -4, 1000, "predict", "", True):
        refused(kx.TargetError, trained, target=target)
    refused(kx.TargetError, trained, target=lambda outputs: outputs)
    refused(kx.TargetError, trained, target=lambda outputs: outputs.sum())
    refused(kx.TargetError, trained, target=lambda outputs: 1.0)
    refused(kx.TargetError, trained, target=lambda outputs: outputs[:, 3])
    outside = TensorDataset(problem.inputs, torch.tensor([0, 1, 2, 3]))
    refused(kx.TargetError, trained, target="label", queries=outside)
    refused(kx.TargetError, trained, target="loss", queries=outside)
    real = TensorDataset(problem.inputs, torch.rand(4))
    refused(kx.TargetError, trained, target="label", queries=real)


def test_wrong_options(trained) -> None:
    for rule in ("exact", "gauss", "gauss-0", "", "Start"):
        refused(kx.ArgumentError, trained, rule=rule)
    for stride in (0, -1, True):
        refused(kx.ArgumentError, trained, stride=stride)
    for memory in (0, -5, "0", "lots", "", "-1GB", "nan", "inf", "1 potato", True):
        refused(kx.ArgumentError, trained, memory=memory)


def test_memory_is_read_as_written() -> None:
    from kxexplain.kernels.budget import parse_bytes

    given = {"1GB": 10**9, "500mb": 500 * 10**6, " 2 kB ": 2000, "64": 64, "1.5M": 1_500_000, 7: 7, "1TB": 10**12}
    for text, expected in given.items():
        assert parse_bytes(text) == expected


def test_no_steps(tmp_path: Path) -> None:
    problem = CASES["mlp-gelu"].build()
    trajectory = run(problem, tmp_path, batches=[])
    refused(kx.ArgumentError, (problem, trajectory))


class Forgetful(nn.Module):
    """Dropout as a function, which evaluation mode does not turn off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.dropout(x, 0.5))


class Noisy(Forgetful):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("make", [Forgetful, Noisy])
def test_randomness_left_on(make: type[nn.Module], tmp_path: Path) -> None:
    problem = Case("random", make, vectors).build()
    message = refused(kx.ModelError, (problem, run(problem, tmp_path)))
    assert "self.training" in message


def test_dropout_that_belongs_to_training_is_fine(tmp_path: Path) -> None:
    case = Case("dropout", lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)), vectors)
    problem = case.build()
    assert_complete(kx.explain(run(problem, tmp_path), problem.model, problem.data, problem.queries, "all"))


@pytest.mark.parametrize("name", ["residual-batch-norm", "encoder", "custom-numpy", "lstm", "tied-embedding", "branch"])
@pytest.mark.parametrize("training", [True, False])
def test_nothing_of_the_caller_s_changes(name: str, training: bool, tmp_path: Path) -> None:
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path)
    model = problem.model.train(training)
    files = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    inputs = copy.deepcopy(problem.inputs)
    with assert_model_untouched(model):
        kx.explain(trajectory, model, problem.data, problem.queries, "all", stride=2)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == files
    torch.testing.assert_close(problem.inputs, inputs, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["mlp-gelu", "lstm", "argmax", "custom-numpy"])
def test_inside_no_grad(name: str, tmp_path: Path) -> None:
    """``torch.no_grad`` around the call changes nothing of the result."""
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path)
    expected = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    with torch.no_grad():
        found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    torch.testing.assert_close(found.contributions, expected.contributions)
    torch.testing.assert_close(found.kernel, expected.kernel)
    assert not found.contributions.requires_grad


class Doubling(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.layer = nn.Parameter(torch.zeros(6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x += self.shift
        return self.layer(torch.tanh(x.mul_(2.0)))


def test_a_model_that_changes_its_input_does_not_change_the_caller_s(tmp_path: Path) -> None:
    problem = Case("doubling", Doubling, vectors).build()
    trajectory = run(problem, tmp_path, 0.3)
    queries = problem.inputs
    before = queries.clone()
    for rule in ("start", "discrete"):
        explanation = kx.explain(trajectory, problem.model, problem.data, queries, "all", rule=rule)
        kx.tangent_kernel(problem.model, queries)
        assert torch.equal(queries, before)
    assert_complete(explanation)


def test_a_folder_in_place_of_a_trajectory(trained) -> None:
    """The annotations are checked while the tests run, so this asks what all functions ask."""
    trajectory = trained[1]
    assert kx.Trajectory.required(trajectory) is trajectory
    for value in (str(trajectory.path), None):
        with pytest.raises(kx.ArgumentError, match=r"kx\.Trajectory\.open"):
            kx.Trajectory.required(value)


def test_inference_mode_is_refused(trained) -> None:
    with torch.inference_mode():
        assert "inference_mode" in refused(kx.ModelError, trained)


@pytest.mark.parametrize("rule", ["gauss", "gauss-0", "gauss-100000"])
def test_rules_that_do_not_exist(trained, rule: Any) -> None:
    assert "gauss-2" in refused(kx.ArgumentError, trained, rule=rule)


def test_target_functions_that_fail(trained) -> None:
    assert "ZeroDivisionError" in refused(kx.TargetError, trained, target=lambda f: f[:, 0] * (1 // 0))
    assert "not finite" in refused(kx.TargetError, trained, target=lambda f: f[:, 0] * float("nan"))


def test_a_bill_that_does_not_add_up_is_said_to(trained, monkeypatch) -> None:
    """No such bill is known: here its pieces are tampered with."""
    problem, trajectory = trained
    credit = kx.attribution.ledger.Ledger.credit
    monkeypatch.setattr(
        kx.attribution.ledger.Ledger,
        "credit",
        lambda self, segment, rows, indices, found, *rest: credit(self, segment, rows, indices, found * 1.01, *rest),
    )
    with pytest.warns(kx.IncompleteWarning, match="does not add up"):
        kx.explain(trajectory, problem.model, problem.data, problem.queries)
