"""Every schedule against a plain NumPy evaluation of its formula; guards; PyTorch's conventions."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kxexplain as kx
from kxexplain.learning import rates
from kxexplain.learning.lagged import LaggedSum
from kxexplain.learning.rates import CAUSAL, HINDSIGHT, HUGE, PLAIN, NormSums
from kxexplain.learning.travelled import START, Travelled

NORMS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=80)
CLOSE = 1e-12


def floored(norms: np.ndarray, floor: float) -> np.ndarray:
    return np.maximum(norms, floor * np.maximum.accumulate(norms))


def naive(name: str, norms: Sequence[float], radius: float, floor: float = rates.FLOOR) -> np.ndarray:
    """The formulas as the module's docstring has them, by loops over t and k."""
    g, total = np.asarray(norms), len(norms)
    whole = np.maximum(g, floor * g.max())
    q = lambda values, t: np.sum(values[:t] ** -2.0)  # noqa: E731
    found = []
    for t in range(1, total + 1):
        now, f = g[:t], floored(g[:t], floor)
        v = sum(g[k - 1] ** 2 / max(1, t - k) for k in range(1, t + 1))
        weighed = f[-1] ** -2.0 / math.sqrt(q(f, t))
        extended = np.append(whole, whole[-1])
        found.append(
            {
                "adagrad_norm": 1 / math.sqrt(np.sum(now**2)),
                "inverse_square": weighed,
                "last_iterate": 1 / math.sqrt(total * v),
                "warmup_decay": weighed * (1 - t / (total + 1)),
                "refined": whole[t - 1] ** -2.0 * np.sum(extended[t:] ** -2.0) / q(extended, total + 1) ** 1.5,
                "constant_optimum": 1 / math.sqrt(np.sum(whole**2)),
                "inverse_square_optimum": whole[t - 1] ** -2.0 / math.sqrt(q(whole, total)),
            }[name]
        )
    return radius * np.array(found)


def drive(schedule: kx.Schedule, norms: Sequence[float], rate: float = 1.0) -> np.ndarray:
    """The rates that the scheduler gives an optimiser whose gradients have these norms."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=rate)
    scheduler = kx.GradientSchedule(optimizer, schedule, len(norms))
    found = []
    for norm in norms:
        parameter.grad = torch.full_like(parameter, norm)
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return np.array(found)


@pytest.mark.parametrize("name", [*CAUSAL, *HINDSIGHT])
@settings(max_examples=8, deadline=None)
@given(norms=NORMS, radius=st.floats(1e-3, 1e3))
def test_a_schedule_is_its_formula(name: str, norms: list[float], radius: float) -> None:
    schedule = kx.Schedule(name, radius=radius, earlier=norms if name in HINDSIGHT else None)
    np.testing.assert_allclose(drive(schedule, norms), naive(name, norms, radius), rtol=CLOSE)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.floats(-10, 10), min_size=3, max_size=3), min_size=1, max_size=30), st.floats(0.01, 10))
def test_adagrad_is_its_formula_coordinate_by_coordinate(gradients: list[list[float]], radius: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adagrad([parameter])
    kx.GradientSchedule(optimizer, kx.Schedule("adagrad", radius=radius))
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    g = np.array(gradients)
    moved = -np.sum(radius * g / (np.sqrt(np.cumsum(g**2, axis=0)) + 1e-10), axis=0)
    np.testing.assert_allclose(parameter.detach().numpy(), moved, rtol=CLOSE, atol=CLOSE * radius)


@given(steps=st.integers(1, 60))
@settings(max_examples=10, deadline=None)
def test_plain_schedules_are_torch_s(steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    makers = {
        "constant": lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0),
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 1e-30, steps),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps),
    }
    assert set(makers) == set(PLAIN)
    for name, make in makers.items():
        optimizer = torch.optim.SGD([parameter], lr=0.3)
        torchs = make(optimizer)
        expected = []
        for _ in range(steps):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            torchs.step()
        np.testing.assert_allclose(drive(kx.Schedule(name), [1.0] * steps, 0.3), expected, rtol=1e-9, atol=1e-14)


def test_for_equal_norms_warmup_decay_is_linear_decay_over_the_root_of_t_and_refined_linear_decay() -> None:
    norm, radius, steps = 7.0, 3.0, 40
    t = np.arange(1, steps + 1)
    linear = 1 - t / (steps + 1)
    found = drive(kx.Schedule("warmup_decay", radius), [norm] * steps)
    np.testing.assert_allclose(found, radius / norm / np.sqrt(t) * linear, rtol=CLOSE)
    found = drive(kx.Schedule("refined", radius, [norm] * steps), [norm] * steps)
    np.testing.assert_allclose(found, radius / norm / math.sqrt(steps + 1) * linear, rtol=CLOSE)
    np.testing.assert_allclose(found / found[0], drive(kx.Schedule("linear"), [norm] * steps), rtol=CLOSE)
    for name in ("constant_optimum", "inverse_square_optimum"):  # one rate, the best constant one
        found = drive(kx.Schedule(name, radius, [norm] * steps), [norm] * steps)
        np.testing.assert_allclose(found, radius / norm / math.sqrt(steps), rtol=CLOSE)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("factor", [1e-120, 1e-30, 1e30, 1e120])
def test_the_size_of_all_norms_together_only_divides(name: str, factor: float) -> None:
    norms = np.random.default_rng(0).uniform(0.5, 2, 20)
    sums, scaled = NormSums(history=LaggedSum()), NormSums(history=LaggedSum())
    for norm in norms:
        sums.add(norm)
        scaled.add(norm * factor)
        expected = rates.rate(name, sums, 20, radius=1.0)
        assert rates.rate(name, scaled, 20, radius=1.0) * factor == pytest.approx(expected, rel=1e-12)


# V_t


@pytest.mark.parametrize("kind", ["even", "wild", "one spike"])
def test_v_is_the_naive_sum(kind: str) -> None:
    steps, draw = 3000, np.random.default_rng(0)
    values = {
        "even": draw.random(steps),
        "wild": 10.0 ** draw.uniform(-12, 12, steps),
        "one spike": np.r_[1e12, np.full(steps - 1, 1e-6)],
    }[kind]
    sums = LaggedSum()
    found = [sums.add(value) for value in values]
    weight = 1 / np.maximum(1, np.arange(steps))
    naive_sums = [float(values[: t + 1] @ weight[t::-1]) for t in range(steps)]
    np.testing.assert_allclose(found, naive_sums, rtol=1e-13)


def test_v_is_exact_and_cheap_for_a_hundred_thousand_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    values, sums, transformed = np.random.default_rng(0).random(100_000), LaggedSum(), []
    spread = LaggedSum._spread
    monkeypatch.setattr(LaggedSum, "_spread", lambda self, block: (transformed.append(2 * block), spread(self, block)))
    found = [sums.add(value) for value in values]
    assert sum(transformed) < 2 * len(values) * math.log2(len(values))  # where a sum of its own each step takes T² / 2
    weight = 1 / np.maximum(1, np.arange(len(values)))
    for t in (0, 63, 64, 65_535, 65_536, 99_999):
        assert found[t] == pytest.approx(float(values[: t + 1] @ weight[t::-1]), rel=1e-13)


@given(st.lists(st.floats(0, 1e6), max_size=300), st.integers(0, 300))
@settings(max_examples=30, deadline=None)
def test_v_goes_on_from_its_values_to_the_last_bit(values: list[float], at: int) -> None:
    whole, first = LaggedSum(), LaggedSum()
    expected = [whole.add(value) for value in values]
    for value in values[:at]:
        first.add(value)
    again = LaggedSum(first.values)
    assert [again.add(value) for value in values[at:]] == expected[at:]


# guards


@pytest.mark.parametrize("name", CAUSAL)
def test_a_zero_gradient_has_no_rate_and_no_weight(name: str) -> None:
    assert (drive(kx.Schedule(name, 1.0), [0.0, 1e-200]) == 0).all()
    found = drive(kx.Schedule(name, 1.0), [0.0, 2.0, 0.0, 3.0])
    assert (found[[0, 2]] == 0).all()
    assert (found[[1, 3]] > 0).all()
    if name != "last_iterate":  # whose weights go by the lag
        horizon = {"warmup_decay": np.array([1 - 2 / 5, 1 - 4 / 5]) / np.array([1 - 1 / 3, 1 - 2 / 3])}
        without = drive(kx.Schedule(name, 1.0), [2.0, 3.0])
        np.testing.assert_allclose(found[[1, 3]], without * horizon.get(name, 1.0), rtol=CLOSE)


@pytest.mark.parametrize("name", ["inverse_square", "warmup_decay"])
def test_a_tiny_gradient_counts_as_the_floor(name: str) -> None:
    norms = [1.0, 1e-9, 1.0, 1.0]
    raised = [1.0, 1e-2, 1.0, 1.0]
    found = drive(kx.Schedule(name, 1.0, floor=1e-2), norms)
    np.testing.assert_allclose(found, drive(kx.Schedule(name, 1.0, floor=1e-2), raised), rtol=CLOSE)
    assert found[-1] < drive(kx.Schedule(name, 1.0, floor=0.5), norms)[-1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2 * HUGE])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_norm_that_is_not_finite_or_huge_stops_before_the_step(name: str, bad: float) -> None:
    parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = kx.GradientSchedule(optimizer, kx.Schedule(name, radius=1.0), 10)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before, known = parameter.item(), schedule.state_dict()
    parameter.grad = torch.full_like(parameter, bad)
    with pytest.raises(kx.TrainingError, match="norm of the gradient at step 1"):
        optimizer.step()
    assert parameter.item() == before
    assert schedule.state_dict() == known


@pytest.mark.parametrize("norms", [[], [0.0], [1.0, math.nan], [-1.0, 1.0]])
def test_unusable_norms_of_an_earlier_run(norms: list[float]) -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(kx.ArgumentError, match=r"norms up to|steps=|0 steps"):
        kx.GradientSchedule(torch.optim.SGD([parameter]), kx.Schedule("refined", 1.0, norms), max(1, len(norms)))


# the radius


def test_the_estimated_radius_is_the_largest_distance_so_far() -> None:
    draw = torch.Generator().manual_seed(0)
    walk = [torch.randn(2, 3, generator=draw, dtype=torch.float64) for _ in range(20)]
    travelled = Travelled([walk[0]])
    first, largest = START * (1 + walk[0].norm().item()), 0.0
    assert travelled.largest == pytest.approx(first)
    for point in walk:
        largest = max(largest, (point - walk[0]).norm().item())
        assert travelled.radius([point]) == pytest.approx(max(first, largest))
    coordinates = Travelled([walk[0]], coordinates=True)
    assert coordinates.radius([walk[1]]) == pytest.approx((walk[1] - walk[0]).square().mean().item() ** 0.5)


@pytest.mark.parametrize("name", ["adagrad_norm", "inverse_square", "warmup_decay"])
def test_an_estimated_radius_finds_a_far_optimum(name: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    goal = 30 * torch.ones(5, dtype=torch.float64)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    kx.GradientSchedule(optimizer, name, 400)
    for _ in range(400):
        optimizer.zero_grad()
        (parameter - goal).norm().backward()
        optimizer.step()
    assert (parameter - goal).norm().item() < 0.1 * goal.norm().item()


# PyTorch's conventions


def problem(rate: float = 1.0, groups: int = 1) -> tuple[torch.nn.Module, torch.optim.SGD]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2)).double()
    halves = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": rate / 4}]
    return model, torch.optim.SGD(model.parameters() if groups == 1 else halves, lr=rate)


def backward(model: torch.nn.Module, step: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(step)
    model.zero_grad()
    value = model(torch.randn(6, 4, generator=draw, dtype=torch.float64)).square().mean()
    value.backward()
    return value


@pytest.mark.parametrize("radius", [None, pytest.param(2.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*CAUSAL, "cosine"])
def test_state_dict_round_trip_to_the_last_bit(name: str, radius: float | None) -> None:
    schedule = kx.Schedule(name, None if name in PLAIN else radius)
    ends = []
    for interrupted in (False, True):
        model, optimizer = problem()
        scheduler = kx.GradientSchedule(optimizer, schedule, 80)
        for step in range(80):
            if interrupted and step == 70:
                file = io.BytesIO()
                torch.save([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
                file.seek(0)
                weights, moments, state = torch.load(file, weights_only=True)
                model, optimizer = problem(rate=0.5)
                model.load_state_dict(weights)
                scheduler = kx.GradientSchedule(optimizer, schedule, 80)
                optimizer.load_state_dict(moments)
                scheduler.load_state_dict(state)
            backward(model, step)
            optimizer.step()
            scheduler.step()
        ends.append((scheduler.get_last_lr(), [p.tolist() for p in model.parameters()]))
    assert ends[0] == ends[1]


def test_the_state_of_another_schedule_is_refused() -> None:
    _, optimizer = problem()
    state = kx.GradientSchedule(optimizer, "adagrad_norm").state_dict()
    for other in (kx.Schedule("inverse_square"), kx.Schedule("adagrad_norm", radius=1.0)):
        with pytest.raises(kx.ArgumentError, match="state of 'adagrad_norm'"):
            kx.GradientSchedule(optimizer, other).load_state_dict(state)


def test_groups_keep_their_proportions() -> None:
    model, optimizer = problem(rate=0.2, groups=2)
    scheduler = kx.GradientSchedule(optimizer, kx.Schedule("adagrad_norm", radius=3.0))
    backward(model, 0)
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None))
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([3.0 / norm, 0.75 / norm])
    assert scheduler.base_lrs == [0.2, 0.05]


def test_a_closure_is_evaluated_once_and_its_gradient_counts() -> None:
    model, optimizer = problem()
    other, plain = problem()
    kx.GradientSchedule(optimizer, kx.Schedule("adagrad_norm", radius=1.0))
    kx.GradientSchedule(plain, kx.Schedule("adagrad_norm", radius=1.0))
    calls = []

    def closure() -> torch.Tensor:
        calls.append(1)
        return backward(model, len(calls))

    for step in range(1, 4):
        with torch.no_grad():
            loss = optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
        value = backward(other, step)
        plain.step()
        assert loss.item() == value.item()
    assert len(calls) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_schedule_s_own_step_may_be_called_at_any_time_or_never() -> None:
    ends = []
    for times in (0, 1, 3):
        model, optimizer = problem()
        scheduler = kx.GradientSchedule(optimizer, "warmup_decay", 10)
        for step in range(10):
            backward(model, step)
            optimizer.step()
            for _ in range(times):
                scheduler.step()
        assert scheduler.last_epoch == 10
        ends.append([p.tolist() for p in model.parameters()])
    assert ends[0] == ends[1] == ends[2]


def test_a_later_schedule_takes_the_place_and_detach_lets_go() -> None:
    model, optimizer = problem()
    first = kx.GradientSchedule(optimizer, kx.Schedule("adagrad_norm", radius=1.0))
    second = kx.GradientSchedule(optimizer, "constant")
    backward(model, 0)
    optimizer.step()
    assert (first.last_epoch, second.last_epoch) == (0, 1)
    second.detach()
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.step()
    assert (second.last_epoch, optimizer.param_groups[0]["lr"]) == (1, 0.125)


def test_more_steps_than_were_planned_stop_before_the_step() -> None:
    model, optimizer = problem()
    kx.GradientSchedule(optimizer, "warmup_decay", 1)
    backward(model, 0)
    optimizer.step()
    before = [p.tolist() for p in model.parameters()]
    with pytest.raises(kx.TrainingError, match="made for 1 steps, and this is step 2"):
        optimizer.step()
    assert [p.tolist() for p in model.parameters()] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "adam"}, "unknown schedule 'adam'"),
        ({"name": "adagrad_norm", "radius": 0}, "radius must be a positive number"),
        ({"name": "adagrad_norm", "radius": math.inf}, "radius must be a positive number"),
        ({"name": "adagrad_norm", "floor": 2.0}, "floor is a part of the largest norm"),
        ({"name": "adagrad_norm", "earlier": [1.0]}, "leave out earlier="),
        ({"name": "refined"}, "give earlier="),
        ({"name": "cosine", "radius": 1.0}, "leave out radius="),
    ],
)
def test_wrong_descriptions(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(kx.ArgumentError, match=message):
        kx.Schedule(**arguments)  # type: ignore[arg-type]


def test_wrong_surroundings() -> None:
    model, optimizer = problem()
    with pytest.raises(kx.ArgumentError, match="needs steps="):
        kx.GradientSchedule(optimizer, "warmup_decay")
    with pytest.raises(kx.ArgumentError, match="integer >= 1; got 0"):
        kx.GradientSchedule(optimizer, "cosine", 0)
    with pytest.raises(kx.ArgumentError, match=r"give a torch\.optim\.Adagrad"):
        kx.GradientSchedule(optimizer, "adagrad")
    with pytest.raises(kx.ArgumentError, match="LBFGS"):
        kx.GradientSchedule(torch.optim.LBFGS(model.parameters()), "adagrad_norm")
    with pytest.raises(kx.ArgumentError, match="the earlier run has 2 steps, and this one 3"):
        kx.GradientSchedule(optimizer, kx.Schedule("refined", 1.0, [1.0, 1.0]), 3)
    with pytest.raises(kx.ArgumentError, match="norms alone do not tell the radius"):
        kx.GradientSchedule(optimizer, kx.Schedule("refined", earlier=[1.0, 1.0]), 2)
    with pytest.raises(kx.ArgumentError, match="at least one above zero"):
        kx.GradientSchedule(torch.optim.SGD(model.parameters(), lr=0.0), "adagrad_norm")
