"""The bill under every optimiser: complete, and what carrying each example's share forward by hand gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, UnattributedWarning
from kxexplain.gradients.discrete import DiscreteGradient
from kxexplain.trajectory.losses import resolve
from tests.cases import CASES, Problem
from tests.laws import assert_close, assert_complete, assert_timeline_agrees, relative
from tests.runs import order, run

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd maximised": lambda p: torch.optim.SGD(p, lr=0.05, maximize=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "dampened": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, l2": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, betas=(0.8, 0.9)),
    "amsgrad maximised": lambda p: torch.optim.Adam(p, lr=0.003, amsgrad=True, maximize=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01, weight_decay=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, weight_decay=0.01),
    "rmsprop, momentum": lambda p: torch.optim.RMSprop(p, lr=0.003, centered=True, momentum=0.5),
}
QUICK = ["mlp-relu", "cnn-max"]
MODELS = QUICK + [pytest.param(name, marks=pytest.mark.slow) for name in CASES if name not in QUICK]
TAKEN_AWAY = {"batch-norm-1d": "0.bias", "instance-norm-tracked": "conv.bias"}
"""Biases whose gradient is rounding, which adaptive optimisers turn into movement: nobody's."""

DTYPES = [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)]
KEPT = {torch.float64: 1e-10, torch.float32: 1e-5}


def explained(problem: Problem, trajectory: kx.Trajectory, target: Any = "all", **options: Any) -> kx.Explanation:
    return kx.explain(trajectory, problem.model, problem.data, problem.queries, target, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_complete(name: str, model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Every architecture under every optimiser; all but a few at one stride, in three steps over nine examples."""
    quick = model in QUICK
    problem = CASES[model].build(dtype) if quick else CASES[model].build(dtype, examples=9, queries=2)
    batches = order() if quick else order(9, 3, 1)
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()), batches=batches)
    for stride in (2, None) if quick and dtype == torch.float64 else (2,):
        with warnings.catch_warnings():
            if model in TAKEN_AWAY or dtype == torch.float32:  # some, of a key's bias before a softmax for one
                warnings.filterwarnings("ignore", "(?s).*nothing but rounding", UnattributedWarning)
            explanation = explained(problem, trajectory, stride=stride, kernel=False)
        assert_complete(explanation, KEPT[dtype])
        assert_timeline_agrees(explanation, 1e-9 if dtype == torch.float64 else 1e-4)
        change = float((explanation.prediction - explanation.baseline).norm())
        if model not in TAKEN_AWAY:
            assert float(explanation.unattributed.norm()) <= 100 * KEPT[dtype] * change
        assert float(explanation.contributions.norm()) > 0


def carried_forward(problem: Problem, optimizer: torch.optim.Optimizer, batches: list[list[int]]) -> tuple[Tensor, ...]:
    """Every example's share of the parameters' movement in every step, and the states passed, by hand.

    Every example has its own moment, which takes in its own gradient; only what a step adapts to is read from torch's
    optimiser.
    """
    model, (inputs, targets) = problem.model, problem.examples
    parameters, loss = list(model.parameters()), resolve(problem.loss)[1]
    n, size = len(targets), sum(p.numel() for p in parameters)
    flat = lambda tensors: torch.cat([t.detach().flatten() for t in tensors])  # noqa: E731
    options = optimizer.param_groups[0]
    moments, states, moved = torch.zeros(n, size, dtype=torch.float64), [flat(parameters)], []
    for step, batch in enumerate(batches):
        gradients = torch.zeros(n, size, dtype=torch.float64)
        for i in batch:
            value = loss(model(inputs[i : i + 1]), targets[i : i + 1])[0] / len(batch)
            gradients[i] += flat(torch.autograd.grad(value, parameters))
        if options.get("maximize"):
            gradients = -gradients
        optimizer.zero_grad()
        loss(model(inputs[batch]), targets[batch]).mean().backward()
        optimizer.step()
        read = lambda key: flat([optimizer.state[p][key] for p in parameters])  # noqa: E731
        rate, t = options["lr"], step + 1
        if "betas" in options:
            first, second = options["betas"]
            moments = first * moments + (1 - first) * gradients
            squares = read("max_exp_avg_sq" if options["amsgrad"] else "exp_avg_sq")
            moved.append(-rate * moments / (1 - first**t) / ((squares / (1 - second**t)).sqrt() + options["eps"]))
        elif "dampening" in options:
            moments = options["momentum"] * moments + (1 - options["dampening"] * (step > 0)) * gradients
            moved.append(-rate * (gradients + options["momentum"] * moments if options["nesterov"] else moments))
        elif "alpha" in options:
            squares = read("square_avg") - (read("grad_avg").square() if options["centered"] else 0)
            moments = options["momentum"] * moments + gradients / (squares.sqrt() + options["eps"])
            moved.append(-rate * moments)
        else:
            rate = rate / (1 + step * options["lr_decay"])
            moved.append(-rate * gradients / (read("sum").sqrt() + options["eps"]))
        states.append(flat(parameters))
    return torch.stack(moved), torch.stack(states)


@pytest.mark.parametrize("stride", [1, 3, None])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_as_carried_forward(name: str, stride: int | None, tmp_path: Path) -> None:
    problem, again = CASES["mlp-tanh"].build(), CASES["mlp-tanh"].build()
    batches = [list(map(int, batch)) for batch in order(len(problem.data))]
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()), batches=batches)
    moved, states = carried_forward(again, OPTIMIZERS[name](again.model.parameters()), batches)
    found = explained(again, trajectory, stride=stride, kernel=False)
    edges = [s.step for s in trajectory.states] if stride is None else [*range(0, len(batches), stride), len(batches)]
    edges = sorted({*edges, *(s.step for s in trajectory.states)})
    expected = torch.zeros_like(found.contributions)
    names = {k: p.shape for k, p in again.model.named_parameters()}
    split = lambda v: {  # noqa: E731
        k: part.reshape(shape)
        for (k, shape), part in zip(names.items(), v.split([s.numel() for s in names.values()]), strict=True)
    }
    gradient = DiscreteGradient(again.model.eval(), list(names))
    for first, last in pairwise(edges):
        secant = gradient(split(states[first]), split(states[last]), again.queries.tensors[0], lambda f, rows: f)
        for i in range(len(problem.data)):
            expected[:, i] += secant.along(split(moved[first:last, i].sum(0)))
    assert_close(found.contributions, expected, 1e-9)


@pytest.mark.parametrize(
    "name", ["adam, l2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("momentum", "nesterov"))]
)
def test_memory_changes_nothing(name: str, tmp_path: Path) -> None:
    """However little memory: more portions of queries, shorter pieces of the trajectory."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()))
    whole = explained(problem, trajectory)
    for memory in (30_000, 1000, 1):
        part = explained(problem, trajectory, memory=memory)
        for line in ("contributions", "regularizer", "kernel"):
            assert_close(getattr(part, line), getattr(whole, line), 1e-9)
        assert float(part.unattributed.abs().max()) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("model", list(TAKEN_AWAY))
@pytest.mark.parametrize("name", ["adam", "amsgrad maximised", "rmsprop, momentum"])
def test_movement_that_is_rounding_is_nobody_s(name: str, model: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """A bias before a norm: ⟨D, Δ⟩ of it is unattributed, and no example's amount is out of proportion."""
    problem, bias = CASES[model].build(dtype), TAKEN_AWAY[model]
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()))
    told = pytest.warns(UnattributedWarning, match="nothing but rounding")
    with told if dtype == torch.float32 else nullcontext():
        found = explained(problem, trajectory)
    assert_complete(found, KEPT[dtype])
    change = float((found.prediction - found.baseline).abs().max())
    assert float(found.contributions.abs().max()) < 20 * change
    if model != "batch-norm-1d":  # an instance norm takes it from each example: the rounding is the example's
        return
    states = [{**s.parameters, **s.buffers} for s in (trajectory.state(s.step) for s in trajectory.states)]
    states = [{k: t for k, t in state.items() if t.is_floating_point()} for state in states]
    gradient = DiscreteGradient(problem.model.eval(), list(states[0]))
    expected = torch.zeros_like(found.unattributed)
    for start, end in pairwise(states):
        secant = gradient(start, end, problem.queries.tensors[0], lambda f, rows: f)
        expected += secant.along({bias: end[bias] - start[bias]})
    assert float(expected.norm()) > 0
    torch.testing.assert_close(found.unattributed, expected, atol=1e3 * KEPT[dtype] ** 1.5 * change, rtol=1e-2)


@pytest.mark.parametrize("target", ["all", "label", "loss"])
def test_kernel_form(target: str, tmp_path: Path) -> None:
    """Contributions = K α under Adam, too."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS["adam"](problem.model.parameters()))
    explanation = explained(problem, trajectory, target)
    if target == "all":
        product = torch.einsum("qnck,qnk->qnc", explanation.kernel, explanation.alpha)
        known = ~explanation.alpha.isnan().any(-1)
    else:
        product = explanation.kernel * explanation.alpha
        known = ~explanation.alpha.isnan()
    assert bool(known.any())
    assert_close(product[known], explanation.contributions[known], 1e-6)


def test_what_an_optimiser_already_knew(tmp_path: Path) -> None:
    """A moment from before the recording is nobody's: unattributed, and the bill still adds up."""
    problem = CASES["mlp-tanh"].build()
    inputs, targets = problem.examples
    optimizer = OPTIMIZERS["momentum"](problem.model.parameters())
    nn.functional.cross_entropy(problem.model(inputs), targets).backward()
    optimizer.step()
    trajectory = run(problem, tmp_path, optimizer=optimizer)
    with pytest.warns(UnattributedWarning, match=r"SGD began with moments from before the recording"):
        explanation = explained(problem, trajectory, kernel=False)
    assert_complete(explanation)
    assert float(explanation.unattributed.abs().max()) > 1e-3


def test_groups_and_frozen_parameters(tmp_path: Path) -> None:
    """Two groups with rates of their own, one of them changing, and a frozen parameter."""
    problem = CASES["mlp-tanh"].build()
    first, *others = list(problem.model.children())[::2]
    first.bias.requires_grad_(False)
    groups = [{"params": first.parameters()}, {"params": [p for m in others for p in m.parameters()], "lr": 0.02}]
    optimizer = torch.optim.AdamW(groups, lr=0.005, weight_decay=0.3)

    def before(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.005 / (1 + step)

    trajectory = run(problem, tmp_path, optimizer=optimizer, before_step=before)
    for decay in ("line", "charged"):
        explanation = explained(problem, trajectory, decay=decay, kernel=False)
        assert_complete(explanation)
        assert float(explanation.unattributed.abs().max()) < 1e-10


@pytest.mark.parametrize("name", ["dampened", "nesterov", "adam, l2", "adamw", "adagrad"])
@pytest.mark.parametrize("stride", [1, 3, None])
def test_complete_with_decay_charged(name: str, stride: int | None, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS[name](problem.model.parameters()))
    charged, line = (explained(problem, trajectory, stride=stride, decay=d) for d in ("charged", "line"))
    assert_complete(charged, 1e-10)
    assert float(charged.unattributed.abs().max()) < 1e-9
    assert relative(charged.contributions, line.contributions) > 1e-4


def test_charged_decay_of_a_linear_model(tmp_path: Path) -> None:
    """A linear model's D is constant: an update of step t is worth Π_{s>t} (1 − η_s λ) of it, θ_0 the whole product."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64))
    model = nn.Linear(4, 1, bias=False).double()
    start = model.weight.detach().clone()
    problem = Problem(model, data, TensorDataset(*(t[:3] for t in data.tensors)), "mse")
    rate, decay, batches = 0.05, 0.4, order(12)
    trajectory = run(problem, tmp_path, optimizer=torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay))
    found = explained(problem, trajectory, 0, decay="charged")
    weight, inputs, targets = start.clone(), *data.tensors
    queries, expected = problem.queries.tensors[0], torch.zeros(3, 12, dtype=torch.float64)
    for step, batch in enumerate(batches):
        rows = torch.as_tensor(batch)
        pull = 2 * (inputs[rows] @ weight.T - targets[rows])[:, 0] / len(rows)
        left = (1 - rate * decay) ** (len(batches) - step - 1)
        expected[:, rows] -= rate * left * (queries @ inputs[rows].T) * pull
        weight = weight * (1 - rate * decay) - rate * (pull[:, None] * inputs[rows]).sum(0)
    assert_close(found.contributions, expected, 1e-12)
    eroded = (queries @ start.T)[:, 0] * ((1 - rate * decay) ** len(batches) - 1)
    torch.testing.assert_close(found.regularizer, eroded)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_short_pieces_of_a_model_that_keeps_what_it_computed(tmp_path: Path) -> None:
    """A model is copied in the middle of a replay, with a weight that a hook computed in the last call."""
    problem = CASES["mlp-tanh"].build()
    nn.utils.weight_norm(problem.model[0])
    trajectory = run(problem, tmp_path, optimizer=OPTIMIZERS["adam"](problem.model.parameters()))
    assert_complete(explained(problem, trajectory, memory=1, kernel=False))


def test_unknown_ways_of_decay(tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path)
    with pytest.raises(ArgumentError, match="charged"):
        explained(problem, trajectory, decay="ignored")
