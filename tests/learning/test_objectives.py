"""Flooding, alternating steps and penalties: Taylor's identities, plain loops, and bills that stay exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.trajectory import Replayer
from tests.laws import assert_complete
from tests.learning.test_trainer import Interrupting, assert_same_runs

EXAMPLES = 12
PENALISED = kx.Objective(parameter_penalty=0.02, input_penalty=0.03)
OBJECTIVES = {
    "flooding": kx.Objective(flooding=0.9),
    "alternating": kx.Objective(ascent=0.5),
    "parameter penalty": kx.Objective(parameter_penalty=0.05),
    "input penalty": kx.Objective(input_penalty=0.05),
    "all": kx.Objective(flooding=1.3, parameter_penalty=0.02, input_penalty=0.03),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.05),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def examples(n: int = EXAMPLES, kind: type[TensorDataset] = TensorDataset) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return kind(torch.randn(n, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (n,), generator=draw))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def slope(sizes: list[float], errors: list[float]) -> float:
    x, y = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


# Taylor


SIZES = [0.2 / 2**k for k in range(4)]


def full_batch(rate: float, epochs: int, **options: Any) -> Tensor:
    """Full-batch training from the same start; the parameters it comes to."""
    model = network()
    kx.fit(
        model, examples(), "cross_entropy", torch.optim.SGD(model.parameters(), lr=rate),
        epochs=epochs, batch_size=EXAMPLES, progress=False, **options,
    )  # fmt: skip
    return flat(model)


def test_down_then_up_is_one_step_on_the_squared_gradient() -> None:
    data, errors = examples(), []
    model = network()
    loss = cross_entropy(model(data.tensors[0]), data.tensors[1])
    penalty = kx.parameter_penalty(loss, list(model.parameters()))
    direction = torch.cat([g.flatten() for g in torch.autograd.grad(penalty, list(model.parameters()))])
    level = loss.item()
    for size in SIZES:  # at the level itself a step descends; below it, the next one ascends
        end = full_batch(size, 2, objective=kx.Objective(flooding=level))
        errors.append(float((end - (flat(model) - size**2 / 2 * direction)).norm()))
    assert 2.8 < slope(SIZES, errors) < 3.2
    assert errors[-1] < 0.02 * SIZES[-1] ** 2 / 2 * float(direction.norm())


@pytest.mark.parametrize(
    "ratio", [pytest.param(0.25, marks=pytest.mark.slow), 0.5, pytest.param(0.8, marks=pytest.mark.slow)]
)
def test_alternating_is_one_step_on_the_penalised_loss(ratio: float) -> None:
    errors = []
    for down in SIZES:
        up = ratio * down
        weight = down * up / (2 * (down - up))
        two = full_batch(down, 2, objective=kx.Objective(ascent=ratio))
        one = full_batch(down - up, 1, objective=kx.Objective(parameter_penalty=weight))
        errors.append(float((two - one).norm()))
    assert 2.8 < slope(SIZES, errors) < 3.2


# plain loops


def written_out(objective: kx.Objective, rate: float, steps: int) -> tuple[Tensor, list[int]]:
    """Full-batch training by hand, penalties by loops over examples and outputs."""
    model, (x, y) = network(), examples().tensors
    parameters, signs = list(model.parameters()), []
    for step in range(steps):
        inputs = x.clone().requires_grad_()
        losses = cross_entropy(model(inputs), y, reduction="none")
        penalties = []
        for i in range(len(x)):
            one = x[i : i + 1].clone().requires_grad_()
            outputs = model(one)[0]
            rows = [torch.autograd.grad(outputs[c], one, create_graph=True)[0] for c in range(3)]
            penalties.append(sum(row.square().sum() for row in rows))
        value = losses.mean() + objective.input_penalty * torch.stack(penalties).mean()  # type: ignore[arg-type]
        gradients = torch.autograd.grad(value, parameters, create_graph=True)
        value = value + objective.parameter_penalty * sum(g.square().sum() for g in gradients)
        sign, factor = objective.direction(step, value.item())
        signs.append(sign)
        for p, g in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
            p.data -= rate * sign * factor * g
    return flat(model), signs


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_is_the_loop_written_out(name: str, tmp_path: Path) -> None:
    objective, model = OBJECTIVES[name], network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    trajectory = kx.train(
        model, examples(), optimizer=optimizer, objective=objective,
        epochs=8, batch_size=EXAMPLES, out=tmp_path, progress=False,
    )  # fmt: skip
    expected, signs = written_out(objective, 0.3, 8)
    torch.testing.assert_close(flat(model), expected, rtol=1e-10, atol=1e-12)
    assert [step.sign for step in trajectory.steps] == signs
    if objective.directed:
        assert {1, -1} <= set(signs)
        assert {step.clip for step in trajectory.steps if step.sign < 0} == {objective.ascent or 1.0}


def test_flooded_is_the_loss_s_mirror_image() -> None:
    loss = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64, requires_grad=True)
    value = kx.flooded(loss, 0.3)
    torch.testing.assert_close(value, (loss - 0.3).abs() + 0.3)
    value.sum().backward()
    signs = [kx.Objective(flooding=0.3).direction(0, v)[0] for v in loss.tolist()]
    assert loss.grad.tolist() == signs == [1, -1, 1]


# bills


WHOLE = [(name, optimizer) for name in OBJECTIVES for optimizer in OPTIMIZERS]
QUICK = [*((name, "SGD") for name in OBJECTIVES), ("all", "Adam")]


@pytest.mark.parametrize(
    ("name", "optimizer"), [pytest.param(*one, marks=[] if one in QUICK else pytest.mark.slow) for one in WHOLE]
)
def test_the_bill_is_exact_under_every_objective(name: str, optimizer: str, tmp_path: Path) -> None:
    objective, model, data = OBJECTIVES[name], network(), examples()
    trajectory = kx.train(
        model, data, optimizer=OPTIMIZERS[optimizer], objective=objective,
        epochs=4, batch_size=5, clip_norm=0.5, out=tmp_path, progress=False,
    )  # fmt: skip
    found = kx.explain(trajectory, model, data, data.tensors[0][:4], target="all", stride=5, kernel=optimizer == "SGD")
    assert_complete(found, 1e-10)
    change = float((found.prediction - found.baseline).norm())
    assert float(found.unattributed.norm()) < 1e-10 * change
    if objective.parameter_penalty:
        assert float(found.penalty.norm()) > 1e-3 * change
        again = kx.Explanation.load(found.save(tmp_path / "saved"))
        assert torch.equal(again.penalty, found.penalty)
    else:
        assert float(found.penalty.norm()) == 0


def test_shares_are_those_of_a_linear_model_by_hand(tmp_path: Path) -> None:
    """There D = x at every step, so an example's share is a sum over steps of −η ⟨x, ∇_θ(its loss + penalty)⟩ / n."""
    torch.manual_seed(0)
    n, rate, lam_x, lam_p = 6, 0.1, 0.2, 0.3
    x = torch.randn(n, 3, dtype=torch.float64)
    y = torch.randn(n, dtype=torch.float64)
    data, model = TensorDataset(x, y), nn.Linear(3, 1, bias=False).double()
    w = model.weight.detach()[0].clone()
    objective = kx.Objective(parameter_penalty=lam_p, input_penalty=lam_x)
    trajectory = kx.train(
        model, data, "mse", torch.optim.SGD(model.parameters(), lr=rate), objective=objective,
        epochs=5, batch_size=n, out=tmp_path, progress=False,
    )  # fmt: skip
    query = torch.randn(2, 3, dtype=torch.float64)
    shares, penalty = torch.zeros(2, n, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    hessian = 2 * x.T @ x / n + 2 * lam_x * torch.eye(3, dtype=torch.float64)
    for _ in range(5):
        each = 2 * (x @ w - y)[:, None] * x + 2 * lam_x * w  # ∇ of (w·x − y)² + λ_x ‖w‖²
        own = 2 * lam_p * hessian @ each.mean(0)
        shares -= rate / n * query @ each.T
        penalty -= rate * query @ own
        w = w - rate * (each.mean(0) + own)
    found = kx.explain(trajectory, model, data, query, target=0)
    torch.testing.assert_close(found.contributions, shares, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.penalty, penalty, rtol=1e-10, atol=1e-12)


def test_ones_own_loop_is_replayed_and_itemised(tmp_path: Path) -> None:
    objective, model, data = OBJECTIVES["all"], network(), examples()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    with kx.record(model, optimizer, "cross_entropy", data, out=tmp_path, objective=objective) as recorder:
        for step in range(12):
            indices = torch.arange(EXAMPLES).roll(step)[:5]
            x, y = data[indices]
            x = x.clone().requires_grad_()
            outputs = model(x)
            loss = cross_entropy(outputs, y) + objective.input_penalty * kx.input_penalty(outputs, x).mean()
            loss = loss + objective.parameter_penalty * kx.parameter_penalty(loss, parameters)
            sign, factor = objective.direction(step, loss.item())
            optimizer.zero_grad()
            (sign * factor * loss).backward()
            optimizer.step()
            recorder.step(indices, loss, sign=sign, clip=factor)
    trajectory = recorder.trajectory
    assert {step.sign for step in trajectory.steps} == {1, -1}
    with Replayer(trajectory, model, data) as replayer:
        replayer.seek(0)
        while replayer.position < len(trajectory):
            replayer.advance()
    assert replayer.drift < 1e-12
    assert_complete(kx.explain(trajectory, model, data, data.tensors[0][:3]), 1e-10)


@pytest.mark.parametrize("name", ["alternating", "all"])
def test_interrupted_then_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    ends, data = [], examples(kind=Interrupting)
    options = {"epochs": 3, "batch_size": 4, "objective": OBJECTIVES[name], "progress": False}
    for part in ("whole", "parts"):
        model = network()
        if part == "parts":
            data.left = EXAMPLES * 2 + 4 + 18  # the checks before training serve some
            with pytest.raises(KeyboardInterrupt):
                kx.train(network(), data, out=tmp_path / part, **options)
            data.left = -1
            assert 0 < len(kx.Trajectory.open(tmp_path / part)) < 9
        ends.append(kx.train(model, data, out=tmp_path / part, resume=part == "parts", **options))
    assert_same_runs(ends[1], ends[0], states=False)
    with pytest.raises(kx.ArgumentError, match="another objective"):
        kx.train(network(), data, out=tmp_path / "parts", resume=True, **{**options, "objective": None})


# wrong input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flooding": math.nan}, "flooding must be a finite level"),
        ({"ascent": 1.0}, "ascent must be a ratio"),
        ({"ascent": -0.1}, "ascent must be a ratio"),
        ({"parameter_penalty": -1.0}, "parameter_penalty must be a finite number >= 0"),
        ({"input_penalty": math.inf}, "input_penalty must be a finite number >= 0"),
        ({"flooding": 0.1, "ascent": 0.5}, "give one of them"),
    ],
)
def test_impossible_objectives(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(kx.ArgumentError, match=message):
        kx.Objective(**arguments)


class Bags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.table(words).mean(1)


def test_whole_numbers_have_no_input_gradient(tmp_path: Path) -> None:
    data = TensorDataset(torch.randint(0, 5, (6, 3)), torch.randint(0, 2, (6,)))
    with pytest.raises(kx.ArgumentError, match="floating-point"):
        kx.train(Bags(), data, epochs=1, out=tmp_path, objective=kx.Objective(input_penalty=1.0))
    assert not any(tmp_path.iterdir())
    with pytest.raises(kx.ArgumentError, match="requires_grad_"):
        kx.input_penalty(Bags()(data.tensors[0]), data.tensors[0])


def test_a_loss_whose_gradient_is_constant_has_no_penalty_to_descend(tmp_path: Path) -> None:
    model, (x, _) = nn.Linear(4, 1).double(), examples().tensors
    data = TensorDataset(x, torch.full((EXAMPLES,), 100.0, dtype=torch.float64))
    absolute = lambda f, y: (f[:, 0] - y).abs()  # noqa: E731
    found = kx.train(
        model, data, absolute, epochs=2, out=tmp_path, objective=kx.Objective(parameter_penalty=1.0), progress=False
    )
    assert float(kx.explain(found, model, data, x[:2]).penalty.norm()) == 0
