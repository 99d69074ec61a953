"""The approximate rules: equal to the reference, in error by their order, and honest about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import kxexplain as kx
from tests import reference
from tests.cases import CASES
from tests.laws import assert_close, assert_complete, assert_unexplained_is_shown, incompleteness
from tests.runs import order, run

RULES = {
    "start": [(0.0, 1.0)],
    "midpoint": [(0.5, 1.0)],
    "gauss-2": reference.gauss_legendre(2),
    "gauss-5": reference.gauss_legendre(5),
}


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("name", ["mlp-relu", "mlp-tanh", "encoder", "tied-embedding", "scalar"])
def test_equal_the_reference(name: str, rule: str, stride: int, tmp_path: Path) -> None:
    case = CASES[name]
    problem = case.build(queries=2)
    batches = order(14, 5, 1)
    expected = reference.path_integral(
        problem.model, problem.data, problem.loss, batches, case.rate, problem.inputs, nodes=RULES[rule], stride=stride
    )
    trajectory = run(problem, tmp_path, case.rate, batches=batches)
    found = kx.explain(
        trajectory, problem.model, problem.data, problem.queries, "all", rule=rule, stride=stride, kernel=False
    )
    assert_close(found.contributions, expected, 1e-10)
    assert_unexplained_is_shown(found, 1e-12)
    assert found.facts["rule"] == rule


@pytest.mark.parametrize(("rule", "declared"), [("start", 2), ("midpoint", 3), ("gauss-2", 5)])
def test_one_step_s_error_falls_at_the_rule_s_order(rule: str, declared: int, tmp_path: Path) -> None:
    """A step of length h misses by O(h^{order + 1})."""
    rates = [0.4, 0.8, 1.6]
    errors = []
    for rate in rates:
        problem = CASES["mlp-tanh"].build()
        trajectory = run(problem, tmp_path / f"{rate}", rate, batches=[list(range(14))])
        found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", rule=rule, stride=1)
        errors.append(float(found.remainder.norm()))
    slope = np.polyfit(np.log(rates), np.log(errors), 1)[0]
    assert slope == pytest.approx(declared, abs=0.4)


def test_more_nodes_come_nearer_and_none_is_exact_but_discrete(tmp_path: Path) -> None:
    problem = CASES["mlp-gelu"].build()
    trajectory = run(problem, tmp_path, 2.0)
    missing = {
        rule: incompleteness(
            kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", rule=rule, stride=1)
        )
        for rule in ("start", "midpoint", "gauss-2", "gauss-4", "gauss-8", "discrete")
    }
    assert missing["start"] > missing["midpoint"] > missing["gauss-2"] > missing["gauss-4"] > missing["gauss-8"]
    assert missing["gauss-4"] > 1e-11 > missing["discrete"]


def test_gauss_converges_to_the_discrete_gradient_s_total(tmp_path: Path) -> None:
    problem = CASES["encoder"].build()
    trajectory = run(problem, tmp_path, 0.1)
    exact, fine = (
        kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", rule=rule, stride=1)
        for rule in ("discrete", "gauss-12")
    )
    assert_complete(exact)
    assert_close(fine.contributions.sum(1), exact.contributions.sum(1), 1e-8)


def test_start_and_kernel_agree_with_tracin(tmp_path: Path) -> None:
    """TracInCP's sum by its own formula: Σ_t η/|B| Σ ⟨∇f(θ_t), −∇ℓ_i(θ_t)⟩, checked with the loss for target."""
    problem = CASES["mlp-tanh"].build()
    model = CASES["mlp-tanh"].build().model
    batches = order(14, 5, 1)
    labels = problem.queries.tensors[1]
    expected = torch.zeros(4, 14, dtype=torch.float64)
    for indices in batches:
        inputs, targets = (t[indices] for t in problem.data.tensors)
        train = reference.loss_gradients(model, inputs, targets, "cross_entropy")
        query = reference.loss_gradients(model, problem.inputs, labels, "cross_entropy")
        expected[:, indices] -= 0.1 / len(indices) * query @ train.T
        reference.put(model, reference.vector(model) - 0.1 * train.mean(0))
    trajectory = run(problem, tmp_path, 0.1, batches=batches)
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "loss", rule="start", stride=1)
    assert_close(found.contributions, expected, 1e-11)
