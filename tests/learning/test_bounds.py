"""Guarantees on convex problems: formulas against loops, measured gaps against bounds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning import bounds as theory
from kxexplain.learning.rates import CAUSAL, FLOOR, HINDSIGHT
from tests.learning.convex import PROBLEMS, Course, course, foreseen, problem, scheduled

SEEDS, STEPS = 20, 12
NAMES = (*CAUSAL, *HINDSIGHT, "constant", "linear", "cosine")


def assert_guaranteed(name: str, run: Course, radius: float) -> list[str]:
    """Every guarantee that covers the run; returns the names of those that were checked."""
    d, mean = float(run.distances[0]), float(np.average(run.gaps, weights=run.rates))
    checks = {
        "weighted": (mean, theory.weighted_mean_bound(run.rates, run.norms, d)),
        "last": (run.gaps[-1], theory.last_bound(run.rates, run.norms, d)),
    }
    if name == "adagrad_norm":
        farthest = float(run.distances.max())
        checks["own"] = (run.gaps.mean(), theory.adagrad_norm_bound(run.norms, radius, farthest))
        if farthest <= radius:  # the form on a bounded domain, which the run never left
            quoted = 3 * radius / (2 * len(run.norms)) * math.sqrt(np.sum(run.norms**2))
            checks["quoted"] = (run.gaps.mean(), quoted)
            assert checks["own"][1] <= quoted * (1 + 1e-12)
    if name == "inverse_square":
        checks["own"] = (mean, theory.inverse_square_bound(run.norms, radius, d, FLOOR))
    if name == "last_iterate" and (np.diff(run.rates) <= 0).all():
        checks["own"] = (run.gaps[-1], theory.last_iterate_bound(run.norms, radius, d))
    for what, (left, right) in checks.items():
        assert left <= right * (1 + 1e-9), f"{name}: {what} gap {left:.4g} is above its bound {right:.4g}"
    return list(checks)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n == "digits" else n for n in PROBLEMS])
def test_every_gap_is_below_its_bound(name: str) -> None:
    one, checked = problem(name, 150), dict.fromkeys(NAMES, 0)
    for seed in range(SEEDS):
        d = sum((p - q).square().sum().item() for p, q in zip(
            one.start(seed).parameters(), one.minimizer.parameters(), strict=True)) ** 0.5  # fmt: skip
        earlier = course(one, kx.Schedule("adagrad_norm", 2 * d), seed, STEPS)
        for schedule in NAMES:
            radius = 2 * d if schedule == "adagrad_norm" else d
            run = course(one, scheduled(schedule, radius, earlier.norms), seed, STEPS)
            checked[schedule] += len(assert_guaranteed(schedule, run, radius))
    assert all(count >= 2 * SEEDS for count in checked.values())
    assert checked["inverse_square"] == 3 * SEEDS
    assert checked["adagrad_norm"] > 3 * SEEDS  # some runs, at least, kept to their domain


def test_a_gap_above_a_wrong_bound_would_be_seen() -> None:
    one = problem("absolute values", 150)
    run = course(one, kx.Schedule("inverse_square", 1.0), 0, STEPS)
    with pytest.raises(AssertionError, match="above its bound"):
        assert_guaranteed("constant", Course(run.rates, run.norms, run.gaps, 0.1 * run.distances), 1.0)


# formulas


SERIES = st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3)), min_size=1, max_size=40)


@given(SERIES, st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_the_formulas_are_their_loops(series: list[tuple[float, float]], d: float) -> None:
    rates, norms = np.array(series).T.copy()
    total = len(rates)
    last = d**2 / (2 * sum(rates))
    for t in range(1, total + 1):
        last += 0.5 * rates[t - 1] ** 2 * norms[t - 1] ** 2 / sum(rates[min(t + 1, total) - 1 :])
    assert theory.last_bound(rates, norms, d) == pytest.approx(last, rel=1e-10)
    v = sum(norms[k - 1] ** 2 / max(1, total - k) for k in range(1, total + 1))
    expected = d / 2 * math.sqrt(v / total) * (3 + math.log(total))
    assert theory.last_iterate_bound(norms, d, d) == pytest.approx(expected, rel=1e-10)
    q = np.cumsum(norms**-2.0)
    expected = d / math.sqrt(q[-1]) * (1 + 0.5 * math.log(q[-1] / q[0]))
    assert theory.inverse_square_bound(norms, d, d, 1e-12) == pytest.approx(expected, rel=1e-10)
    expected = 3 * d / (2 * total) * math.sqrt(np.sum(norms**2))
    assert theory.adagrad_norm_bound(norms, d, d) == pytest.approx(expected, rel=1e-10)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=40), st.floats(0.1, 10), st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_no_rates_beat_the_optima_in_hindsight(norms: list[float], d: float, draw: Any) -> None:
    g = np.array(norms)
    constant = np.full(len(g), d / math.sqrt(np.sum(g**2)))
    best = d * g**-2.0 / math.sqrt(np.sum(g**-2.0))
    mean, weighted = theory.constant_optimum_bound(g, d), theory.inverse_square_optimum_bound(g, d)
    assert theory.weighted_mean_bound(constant, g, d) == pytest.approx(mean, rel=1e-10)
    assert theory.weighted_mean_bound(best, g, d) == pytest.approx(weighted, rel=1e-10)
    for _ in range(5):
        other = constant * draw.uniform(0.1, 3)
        assert theory.weighted_mean_bound(other, g, d) >= mean * (1 - 1e-10)
        other = best * np.array([draw.uniform(0.1, 3) for _ in norms])
        assert theory.weighted_mean_bound(other, g, d) >= weighted * (1 - 1e-10)


def test_the_refined_rate_comes_to_the_continuous_optimum() -> None:
    """In many small steps; at the horizon T itself its last rate would be 0, and the bound infinite."""
    ratios = []
    for total in (100, 1000, 10000):
        norms = 1 + 0.5 * np.sin(np.linspace(0, 6, total))
        run = kx.learning.rates.refined(norms)
        ratios.append(theory.last_bound(run, norms, 1.0) / theory.continuous_optimum(norms, 1.0))
    assert ratios[0] > ratios[1] > ratios[2] > 1
    assert ratios[2] < 1.001
    assert theory.last_bound(np.append(run[:-1], 0.0), norms, 1.0) == math.inf


@pytest.mark.parametrize("shape", ["even", "falling", "rising", "wavy"])
def test_for_given_norms_no_schedule_has_a_smaller_last_bound_than_the_refined(shape: str) -> None:
    t = np.linspace(0, 1, 500)
    norms = {"even": 1 + 0 * t, "falling": 2 - 1.5 * t, "rising": 0.5 + t, "wavy": 1 + 0.5 * np.sin(9 * t)}[shape]
    optimum = theory.continuous_optimum(norms, 3.0)
    ratios = {name: theory.last_bound(foreseen(name, norms, 3.0), norms, 3.0) / optimum for name in NAMES}
    assert min(ratios, key=ratios.__getitem__) == "refined", ratios
    assert 1 < ratios["refined"] < 1.02


# from a recorded trajectory


def recorded(out: Path, schedule: Any, **options: Any) -> tuple[kx.Trajectory, Any]:
    one = problem("breast cancer", 150)
    settings = {"epochs": 25, "batch_size": 150, "keep": "step", "progress": False, **options}
    return kx.train(one.start(3), one.data, one.loss, schedule=schedule, out=out, **settings), one


@pytest.mark.parametrize("name", ["adagrad_norm", "inverse_square", "last_iterate", "cosine"])
def test_bounds_of_a_recorded_run(name: str, tmp_path: Path) -> None:
    schedule = kx.Schedule(name, None if name == "cosine" else 9.0)
    trajectory, one = recorded(tmp_path, schedule)
    run = course(one, schedule, 3, 25)
    found = kx.bounds(trajectory, one.minimizer, one.minimum)
    np.testing.assert_allclose(found.rates, run.rates, rtol=1e-9)
    np.testing.assert_allclose(found.norms, run.norms, rtol=1e-9)
    np.testing.assert_allclose(found.gaps, run.gaps, rtol=1e-7, atol=1e-12)
    assert found.distance == pytest.approx(run.distances[0])
    assert found.full
    assert [one.holds for one in found.guarantees[:2]] == [True, True]
    own = {"adagrad_norm": "mean gap", "inverse_square": "weighted mean gap", "last_iterate": "last gap"}
    assert [(g.name, g.of) for g in found.guarantees[2:]] == [(key, of) for key, of in own.items() if key == name]
    assert all(g.holds or not g.applies for g in found.guarantees)
    assert found.guarantees[1].left == pytest.approx(run.gaps[-1])
    bare = kx.bounds(trajectory, distance=found.distance)
    assert [g.right for g in bare.guarantees[:2]] == [g.right for g in found.guarantees[:2]]
    assert {g.holds for g in bare.guarantees} == {None}
    again = kx.bounds(trajectory, one.minimizer, one.minimum, norms=found.norms.tolist())
    assert again.guarantees == found.guarantees
    with pytest.raises(kx.ArgumentError, match=f"got 3 norms, but .* has {len(found.norms)} steps"):
        kx.bounds(trajectory, distance=1.0, norms=[1.0] * 3)
    with pytest.raises(kx.ArgumentError, match="give a finite one for each"):
        kx.bounds(trajectory, distance=1.0, norms=[float("nan")] * len(found.norms))
    assert "continuous optimum" in str(found)
    assert found.plot(name="a run").axes


def test_clipping_counts_to_the_rate(tmp_path: Path) -> None:
    trajectory, one = recorded(tmp_path, None, clip_norm=0.05, norms=True)
    found = kx.bounds(trajectory, one.minimizer, one.minimum)
    np.testing.assert_allclose(found.rates * found.norms, 0.1 * 0.05, rtol=1e-4)
    assert [g.holds for g in found.guarantees] == [True, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)}, "plain SGD"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1)}, "plain SGD"),
        ({"optimizer": torch.optim.Adam}, "trained with Adam"),
        ({"objective": kx.Objective(ascent=0.5)}, "some that ascend"),
    ],
)
def test_runs_that_are_not_covered(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    trajectory, one = recorded(tmp_path, None, epochs=2, **options)
    with pytest.raises(kx.ArgumentError, match=message):
        kx.bounds(trajectory, one.minimizer)


def test_wrong_arguments(tmp_path: Path) -> None:
    trajectory, one = recorded(tmp_path / "without", None, epochs=2)
    with pytest.raises(kx.ArgumentError, match=r"without gradient norms; record with norms=True, or .*gradient_norms"):
        kx.bounds(trajectory, one.minimizer)
    trajectory, one = recorded(tmp_path / "with", None, epochs=2, norms=True)
    with pytest.raises(kx.ArgumentError, match="and not both"):
        kx.bounds(trajectory)
    with pytest.raises(kx.ArgumentError, match="and not both"):
        kx.bounds(trajectory, one.minimizer, distance=1.0)
    with pytest.raises(kx.ArgumentError, match="no parameter 'weight' of shape"):
        kx.bounds(trajectory, nn.Linear(3, 1))
    with pytest.raises(kx.ArgumentError, match="positive number"):
        kx.bounds(trajectory, distance=0.0)


@pytest.mark.parametrize("steps", [5, 2000])
def test_separable_classes_have_no_minimizer(steps: int) -> None:
    data = TensorDataset(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
    with pytest.raises(kx.TrainingError, match="separable"):
        kx.minimize(nn.Linear(1, 2), data, steps=steps)
