"""What is explained: every target's value, and its contributions as the same function of all outputs' would be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kxexplain as kx
from tests.cases import CASES, Problem
from tests.laws import assert_close, assert_kernel_times_alpha
from tests.runs import run


@pytest.fixture
def trained(tmp_path: Path, dtype: torch.dtype) -> tuple[Problem, kx.Trajectory]:
    problem = CASES["mlp-gelu"].build(dtype)
    return problem, run(problem, tmp_path, 0.5)


def outputs(problem: Problem) -> tuple[Tensor, Tensor]:
    """The initial and the trained model's outputs for the queries."""
    initial = CASES["mlp-gelu"].build(problem.inputs.dtype).model.eval()
    with torch.no_grad():
        return initial(problem.inputs), problem.model.eval()(problem.inputs)


def test_values(trained: tuple[Problem, kx.Trajectory]) -> None:
    problem, trajectory = trained
    before, after = outputs(problem)
    labels, rows = problem.queries.tensors[1], torch.arange(4)
    rival = after.clone()
    rival[rows, labels] = -torch.inf
    rival = rival.argmax(1)
    expected = {
        0: lambda f: f[:, 0],
        -1: lambda f: f[:, 2],
        "predicted": lambda f: f[rows, after.argmax(1)],
        "label": lambda f: f[rows, labels],
        "margin": lambda f: f[rows, labels] - f[rows, rival],
        "loss": lambda f: F.cross_entropy(f, labels, reduction="none"),
        "all": lambda f: f,
    }
    for target, function in expected.items():
        found = kx.explain(trajectory, problem.model, problem.data, problem.queries, target, kernel=False)
        torch.testing.assert_close(found.baseline, function(before), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.prediction, function(after), rtol=1e-5, atol=1e-6)
        assert found.facts["target"] == str(target)
        assert found.all_outputs == (target == "all")
    assert torch.equal(found.labels, labels)


def test_linear_targets_are_linear_in_all_outputs(trained: tuple[Problem, kx.Trajectory]) -> None:
    problem, trajectory = trained
    everything = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", kernel=False)
    labels, rows = problem.queries.tensors[1], torch.arange(4)
    tolerance = 1e-11 if problem.inputs.dtype == torch.float64 else 1e-4
    explain = lambda target: kx.explain(  # noqa: E731
        trajectory, problem.model, problem.data, problem.queries, target, kernel=False
    )
    for column in range(3):
        assert_close(explain(column).contributions, everything.contributions[..., column], tolerance)
        assert_close(everything.of_output(column).contributions, everything.contributions[..., column], 1e-15)
        assert torch.equal(everything.of_output(column).prediction, everything.prediction[:, column])
    by_label = explain("label")
    assert_close(by_label.contributions, everything.contributions[rows, :, labels], tolerance)
    assert torch.equal(by_label.output, labels)
    margin = explain("margin")
    after = everything.prediction.clone()
    after[rows, labels] = -torch.inf
    difference = by_label.contributions - everything.contributions[rows, :, after.argmax(1)]
    assert_close(margin.contributions, difference, tolerance)
    own = lambda f: 2 * f[:, 0] - f[:, 1]  # noqa: E731
    combined = 2 * everything.contributions[..., 0] - everything.contributions[..., 1]
    assert_close(explain(own).contributions, combined, tolerance)


def test_queries_without_labels(trained: tuple[Problem, kx.Trajectory]) -> None:
    problem, trajectory = trained
    plain = kx.explain(trajectory, problem.model, problem.data, problem.inputs)
    assert plain.labels is None
    assert plain.facts["target"] == "predicted"
    margin = kx.explain(trajectory, problem.model, problem.data, problem.inputs, "margin", kernel=False)
    top = plain.prediction - problem.model.eval()(problem.inputs).topk(2, 1).values[:, 1].detach()
    torch.testing.assert_close(margin.prediction, top, rtol=1e-5, atol=1e-6)
    for target in ("label", "loss"):
        with pytest.raises(kx.TargetError, match="labels"):
            kx.explain(trajectory, problem.model, problem.data, problem.inputs, target)


@pytest.mark.parametrize("name", ["two-inputs", "named-inputs"])
def test_queries_of_several_tensors(name: str, tmp_path: Path) -> None:
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path)
    batch = problem.inputs
    from_batch = kx.explain(trajectory, problem.model, problem.data, batch, "all", kernel=False)
    from_data = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", kernel=False)
    assert_close(from_batch.contributions, from_data.contributions, 1e-14)


@pytest.mark.parametrize("stride", [1, None])
@pytest.mark.parametrize(
    "name", ["mlp-gelu", "tied-embedding", "cnn-max", "scalar", pytest.param("encoder", marks=pytest.mark.slow)]
)
def test_kernel_and_alpha(name: str, stride: int | None, tmp_path: Path) -> None:
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path, CASES[name].rate)
    for target in ("all", 0):
        found = kx.explain(trajectory, problem.model, problem.data, problem.queries, target, stride=stride)
        outputs = found.contributions.shape[2:]
        assert found.kernel.shape == (4, 14, *outputs, *outputs)
        assert_kernel_times_alpha(found, 1e-8)


def test_the_kernel_of_a_linear_model_in_closed_form(tmp_path: Path) -> None:
    """f = Wx + b, every example once: K = η/|B| (x·x_i + 1) I and α = −∂ℓ/∂f at the visit."""
    x, y = torch.randn(6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    data = torch.utils.data.TensorDataset(x, y)
    problem = Problem(torch.nn.Linear(6, 3, dtype=torch.float64), data, data, "cross_entropy")
    weight = problem.model.weight.detach().clone(), problem.model.bias.detach().clone()
    trajectory = run(problem, tmp_path, 0.3, batches=[[0, 1, 2], [3, 4, 5]])
    query = torch.randn(2, 6, dtype=torch.float64)
    found = kx.explain(trajectory, problem.model, data, query, "all")
    product = 0.1 * (query @ x.T + 1)
    assert_close(found.kernel, product[..., None, None] * torch.eye(3, dtype=torch.float64), 1e-12)
    pull = F.one_hot(y, 3) - (x @ weight[0].T + weight[1]).softmax(1)
    assert_close(found.alpha[:, :3], pull[:3].expand(2, 3, 3), 1e-10)
    one = kx.explain(trajectory, problem.model, data, query, 1)
    assert_close(one.contributions[:, :3], product[:, :3] * pull[:3, 1], 1e-10)
    assert_close(one.alpha[:, :3].abs(), pull[:3].norm(dim=1).expand(2, 3), 1e-10)
    assert_close(one.kernel[:, :3] * pull[:3].norm(dim=1), product[:, :3] * pull[:3, 1], 1e-10)


def test_alpha_is_nan_where_the_kernel_is_singular(tmp_path: Path) -> None:
    """An example that never pulled, and outputs that never move: contributions stay exact, α says nothing."""
    problem = CASES["mlp-relu"].build()
    trajectory = run(problem, tmp_path, batches=[[0, 1, 2], [3, 4]])
    for target in ("all", 0):
        found = kx.explain(trajectory, problem.model, problem.data, problem.queries, target)
        assert bool(found.alpha[:, 5:].isnan().all())
        assert not bool(found.defined[:, 5:].any())
        assert bool((found.contributions[:, 5:] == 0).all())
        assert bool((found.kernel[:, 5:] == 0).all())
        assert bool(found.contributions.isfinite().all())


def test_without_kernel(trained: tuple[Problem, kx.Trajectory]) -> None:
    problem, trajectory = trained
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, kernel=False)
    assert found.path_kernel is None
    for name in ("kernel", "alpha"):
        with pytest.raises(kx.ArgumentError, match="kernel=True"):
            getattr(found, name)
