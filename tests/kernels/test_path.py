"""The path kernel (flow measure) and quadrature rules."""

from __future__ import annotations

import itertools
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.kernels import flow_weights, gauss_legendre, rule
from tests import reference
from tests.cases import CASES, Problem
from tests.laws import assert_close, assert_model_untouched, assert_positive_semidefinite, assert_symmetric
from tests.runs import order, run


def test_weights_add_up_to_the_time_trained(tmp_path: Path) -> None:
    """Trapezoidal in τ = Σ η, also where states are unevenly spaced and rates change."""
    problem = CASES["mlp-tanh"].build()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)
    rates = [0.1, 0.3, 0.2, 0.05, 0.05, 0.4, 0.1]

    def before(step: int) -> None:
        optimizer.param_groups[0]["lr"] = rates[step]

    batches = [[0, 1, 2], [3, 4], [5], [6, 7], [8, 9], [1, 2], [4]]
    trajectory = run(problem, tmp_path, optimizer=optimizer, batches=batches, keep=3, before_step=before)
    assert [state.step for state in trajectory.states] == [0, 3, 6, 7]
    weights = flow_weights(trajectory)
    assert weights == pytest.approx([0.3, 0.3 + 0.25, 0.25 + 0.05, 0.05])
    assert sum(weights) == pytest.approx(sum(rates))


@pytest.mark.parametrize("name", ["mlp-relu", "cnn-average", "residual-batch-norm", "encoder", "tied-embedding"])
def test_is_the_weighted_sum_of_dense_kernels(name: str, tmp_path: Path) -> None:
    problem = CASES[name].build()
    trajectory = run(problem, tmp_path)
    expected = 0.0
    model = CASES[name].build().model.eval()
    for state, weight in zip(trajectory.states, flow_weights(trajectory), strict=True):
        held = trajectory.state(state.step)
        model.load_state_dict({**held.parameters, **held.buffers}, strict=False)
        jacobian = reference.jacobian(model, problem.inputs)
        expected = expected + weight * torch.einsum("ncp,mkp->nmck", jacobian, jacobian)
    with assert_model_untouched(problem.model):
        found = kx.path_kernel(trajectory, problem.model, problem.inputs, outputs="full")
    assert_close(found, expected, 1e-12)
    assert_symmetric(found, 1e-12)
    assert_positive_semidefinite(found, 1e-12)
    other = kx.path_kernel(trajectory, problem.model, problem.inputs, problem.inputs, batch=3)
    assert_close(other, torch.einsum("nmcc->nm", expected), 1e-12)
    assert_close(kx.path_kernel(trajectory, problem.model, problem.inputs, outputs=0), expected[:, :, 0, 0], 1e-12)


def test_a_linear_model_s_kernel_is_constant(tmp_path: Path) -> None:
    """K = Ση (x·x' + 1), three outputs' worth."""
    x = torch.randn(12, 6, dtype=torch.float64)
    data = TensorDataset(x, torch.randint(3, (12,)))
    problem = Problem(nn.Linear(6, 3, dtype=torch.float64), data, data, "cross_entropy")
    trajectory = run(problem, tmp_path, 0.2, batches=order(12, 4))
    expected = 0.2 * len(trajectory) * 3 * (x @ x.T + 1)
    assert_close(kx.path_kernel(trajectory, problem.model, x), expected, 1e-13)


def test_refuses_what_makes_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user meets it: while tests run, the check of annotated types would come before our own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path)
    with pytest.raises(kx.ModelError):
        kx.path_kernel(trajectory, nn.Linear(6, 3, dtype=torch.float64), problem.inputs)
    with pytest.raises(kx.KxError):
        kx.path_kernel(trajectory, problem.model, problem.inputs[:0])
    with pytest.raises(kx.DatasetError):
        kx.path_kernel(trajectory, problem.model, problem.inputs, problem.inputs[:0])
    with pytest.raises(kx.ArgumentError):
        kx.path_kernel(trajectory, problem.model, problem.inputs, outputs="diagonal")  # type: ignore[arg-type]


@pytest.mark.parametrize("nodes", [1, 2, 3, 8, 64])
def test_gauss_legendre_is_exact_to_its_degree(nodes: int) -> None:
    """∫₀¹ x^k = 1/(k+1) for k < 2·nodes, and no further."""
    points = gauss_legendre(nodes)
    for degree in range(min(2 * nodes, 24)):
        assert sum(w * x**degree for x, w in points) == pytest.approx(1 / (degree + 1), abs=1e-13)
    if nodes <= 3:
        assert abs(sum(w * x ** (2 * nodes) for x, w in points) - 1 / (2 * nodes + 1)) > 1e-4


def test_composite_rules_converge_at_their_order() -> None:
    """Error against the step's length, its slope by regression: 2 for midpoint, 2m for Gauss with m nodes."""
    exact = np.exp(1.0) - 1
    for name, declared in (("start", 1), ("midpoint", 2), ("gauss-2", 4), ("gauss-3", 6)):
        pieces = np.array([4, 8, 16]) if declared < 6 else np.array([2, 3, 4])
        errors = []
        for count in pieces:
            edges = np.linspace(0, 1, count + 1)
            total = sum(
                w * np.exp(a + x * (b - a)) * (b - a) for a, b in itertools.pairwise(edges) for x, w in rule(name).nodes
            )
            errors.append(abs(total - exact))
        slope = -np.polyfit(np.log(pieces), np.log(errors), 1)[0]
        assert slope == pytest.approx(declared, abs=0.15), name


def test_rules_by_name() -> None:
    assert rule("discrete").exact
    assert not rule("gauss-4").exact
    assert len(rule("gauss-12").nodes) == 12
    for wrong in ("gauss", "gauss-0", "gauss--1", "gauss-x", "Discrete", "", "start-2", "gauss-2.5"):
        with pytest.raises(kx.ArgumentError):
            rule(wrong)
