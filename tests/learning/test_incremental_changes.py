"""Incremental models that change often: taken back, moved, failing half-way; the logistic rule's low-rank changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kxexplain as kx
from kxexplain.errors import ArgumentError
from kxexplain.learning.incremental.damping import chosen_logistic, left_out_logistic
from kxexplain.learning.incremental.encoding import probabilities
from kxexplain.learning.incremental.optimum import Curvature, hessian_root, losses, newton
from tests.learning.test_incremental import RULES, examples, network, relative


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("last", [False, True])  # 21 parameters: a system in their space
def test_learn_then_forget_returns_every_prediction_when_the_window_is_full(
    rule: Any, memory: bool, last: bool
) -> None:
    (x, y), (more, label), (past, _) = examples(14), examples(9, seed=1), examples(3, seed=2)
    learner = kx.IncrementalModel(
        network(),
        rule=rule,
        damping=0.3,
        remember=8,
        memory=past if memory else None,
        parameters=["2"] if last else None,
    )
    learner.learn(x, y)
    before = learner(more)
    names = learner.learn(more[:3], label[:3])
    assert relative(learner(more), before) > 1e-4
    for name in names:
        learner.forget(name)
    assert relative(learner(more), before) < 1e-6


@pytest.mark.parametrize("rule", ["ridge", "logistic"])
@pytest.mark.parametrize("last", [False, True])
def test_after_many_changes_it_is_the_model_of_what_is_left(rule: Any, last: bool, tmp_path: Path) -> None:
    (x, y), (more, _) = examples(24), examples(9, seed=1)
    options: dict[str, Any] = {"rule": rule, "damping": 0.05, "parameters": ["2"] if last else None}
    learner = kx.IncrementalModel(network(), **options)
    draw = torch.Generator().manual_seed(3)
    for i in range(24):
        learner.learn(x[i : i + 1], y[i : i + 1], ids=[i])
        if len(learner.ids) > 7:
            learner.forget(learner.ids[int(torch.randint(len(learner.ids), (1,), generator=draw))])
        if i == 10:
            learner.merge(more)
        if i == 16:
            learner = kx.IncrementalModel.load(learner.save(tmp_path / "state"), network())
    left = [int(i) for i in learner.ids]
    fresh = kx.IncrementalModel(network(), **options)
    fresh.learn(x[left], y[left])
    assert relative(learner(more) - network()(more).detach(), fresh(more) - network()(more).detach()) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_what_fails_half_way_changes_nothing(rule: Any, monkeypatch: Any) -> None:
    (x, y), (more, _) = examples(12), examples(9, seed=1)
    learner = kx.IncrementalModel(network(), rule=rule, damping=0.3, remember=5)
    learner.learn(x[:7], y[:7])
    before, names = learner(more), learner.ids
    solve, calls = type(learner.engine).learn, []

    def failing(self: Any, *given: Any) -> None:
        solve(self, *given)
        calls.append(len(given[0]))
        if len(calls) == (1 if rule == "gradient" else 2):  # the second part of more examples than there is room for
            raise KeyboardInterrupt

    monkeypatch.setattr(type(learner.engine), "learn", failing)
    with pytest.raises(KeyboardInterrupt):
        learner.learn(torch.cat([x[5:], x[5:]]), torch.full((14,), 3), new_classes=True)
    assert calls
    monkeypatch.undo()
    assert learner.ids == names
    assert torch.equal(learner(more), before)
    learner.learn(x[7:8], y[7:8], ids=["x"])
    learner.forget("x")
    assert relative(learner(more), before) < 1e-6


@pytest.mark.parametrize("rule", RULES)
def test_moving_takes_along_what_was_learnt(rule: Any) -> None:
    (x, y), (more, _) = examples(12), examples(9, seed=1)
    options: dict[str, Any] = {"rule": rule, "damping": 0.3, "remember": 9, "memory": more[:2]}
    learner, same = kx.IncrementalModel(network(), **options), kx.IncrementalModel(network(), **options)
    whole = nn.Sequential(learner, nn.Softmax(1))
    for one in (learner, same):
        one.learn(x[:10], y[:10])
        one.learn(x[10:11], torch.tensor([3]), new_classes=True)
    whole.float()
    assert learner(more.float()).dtype == torch.float32
    assert relative(learner(more.float()).double(), same(more)) < 1e-5
    assert learner.ids == same.ids
    learner.learn(x[11:].float(), y[11:])
    same.learn(x[11:], y[11:])
    assert learner.ids == same.ids
    assert relative(learner(more.float()).double(), same(more)) < 1e-5


def test_names_may_be_numpys() -> None:
    learner = kx.IncrementalModel(network())
    assert learner.learn(*examples(3), ids=np.arange(5, 8)) == [5, 6, 7]
    learner.forget(6)
    assert learner.ids == [5, 7]


# The logistic rule.


def system(n: int = 6, c: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(n * c, 40, dtype=torch.float64, generator=draw) / 4
    goal = torch.eye(max(2, c), dtype=torch.float64)[torch.randint(max(2, c), (n,), generator=draw)][:, :c]
    return rows @ rows.T, torch.randn(n, c, dtype=torch.float64, generator=draw), goal


@pytest.mark.parametrize("c", [1, 3])
def test_the_hessian_follows_its_examples(c: int) -> None:
    gram, base, gap = system(7, c)
    p = probabilities(base)
    w = torch.block_diag(*(root @ root.T for root in hessian_root(p)))

    def dense(keep: list[int]) -> Tensor:
        rows = [i * c + k for i in keep for k in range(c)]
        matrix = 0.4 * torch.eye(len(rows)).double() + w[rows][:, rows] @ gram[rows][:, rows]
        return torch.linalg.solve(matrix, gap[keep].flatten()).view(-1, c)

    first = Curvature.at(p[:4], gram[: 4 * c, : 4 * c], 0.4)
    torch.testing.assert_close(first.solve(gram[: 4 * c, : 4 * c], gap[:4]), dense([0, 1, 2, 3]))
    grown = first.joined(p[4:], gram[: 4 * c, 4 * c :], gram[4 * c :, 4 * c :])
    torch.testing.assert_close(grown.solve(gram, gap), dense(list(range(7))))
    keep = [i for i in range(7) if i != 2]
    rows = [i * c + k for i in keep for k in range(c)]
    torch.testing.assert_close(grown.without(2).solve(gram[rows][:, rows], gap[keep]), dense(keep))


def test_streaming_changes_factors_rather_than_making_them_anew(monkeypatch: Any) -> None:
    (x, y), made = examples(40), []
    monkeypatch.setattr(Curvature, "at", classmethod(lambda cls, *a, at=Curvature.at: made.append(len(a[0])) or at(*a)))
    learner = kx.IncrementalModel(network(), rule="logistic", damping=3.0, remember=15)
    learner.learn(x[:15], y[:15])
    assert made.count(15) >= 1  # Newton's method from nothing
    made.clear()
    for i in range(15, 40):
        learner.learn(x[i : i + 1], y[i : i + 1])
    assert made.count(15) <= 5  # of 25 examples that came, and 25 that went; of the one that comes there may be more


@pytest.mark.parametrize("c", [1, 3])
def test_left_out_outputs_of_logistic_regression_are_nearly_those_of_refits(c: int) -> None:
    gram, base, goal = system(8, c, seed=1)
    n = len(base)

    def refit(damping: float) -> tuple[Tensor, Tensor, Tensor]:
        start = torch.zeros_like(base)
        whole = base + (gram @ newton(gram, base, goal, damping, start)[0].flatten()).view_as(base)
        found = []
        for i in range(n):
            keep = [k for k in range(n) if k != i]
            rows = [k * c + d for k in keep for d in range(c)]
            a = newton(gram[rows][:, rows], base[keep], goal[keep], damping, start[keep])[0]
            found.append(base[i] + gram[i * c : (i + 1) * c][:, rows] @ a.flatten())
        return whole, torch.stack(found), left_out_logistic(gram, whole, goal, damping)

    errors = []
    for damping in (0.5, 5.0, 50.0):
        whole, exact, found = refit(damping)
        errors.append(relative(found - whole, exact - whole))
    assert errors[0] < 0.2
    assert errors[1] < 0.1 * 0.5
    assert errors[2] < errors[1] / 5  # what is left out is of second order in what an example changes
    best = chosen_logistic(gram, base, goal)
    left = lambda damping: float(losses(refit(damping)[1], goal).mean())  # noqa: E731
    assert left(best) <= 1.02 * min(left(best * 10**0.5), left(best / 10**0.5))


def test_tuning_the_logistic_rule_solves_with_what_it_chose() -> None:
    (x, y), (more, _) = examples(15), examples(9, seed=1)
    y = (x[:, 0] > 0).long()
    learner = kx.IncrementalModel(network(), rule="logistic", memory=more[:2])
    learner.learn(x, y)
    before = learner.chosen_damping
    rho = learner.tune()
    assert learner.chosen_damping == rho != before
    fresh = kx.IncrementalModel(network(), rule="logistic", damping=rho, memory=more[:2])
    fresh.learn(x, y)
    assert relative(learner(more), fresh(more)) < 1e-6


def test_a_singular_logistic_system_names_the_damping_that_mends_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    x, y = 30 * torch.randn(1, 64).double().repeat(12, 1), torch.arange(12) % 4
    learner = kx.IncrementalModel(model, rule="logistic", damping=1e-13)
    with pytest.raises(ArgumentError, match="singular") as error:
        learner.learn(x, y)
    assert not learner.ids
    mended = float(str(error.value).rpartition("damping=")[2].split()[0])
    learner = kx.IncrementalModel(model, rule="logistic", damping=mended)
    learner.learn(x, y)
    # One input with every label: the optimum is 1/4 each. At the edge of rounding, terms of 1e10 cancel.
    torch.testing.assert_close(learner(x[:1]).softmax(1), torch.full((1, 4), 0.25).double(), rtol=0, atol=0.02)
