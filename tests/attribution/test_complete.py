"""Law 1: the bill adds up, for every architecture, stride, learning rate, target and precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from tests import cases
from tests.cases import CASES, Case, Problem
from tests.inputs import HOSTILE, SPLITS, hostile
from tests.laws import (
    COMPLETE,
    LINES,
    assert_complete,
    assert_each_complete,
    assert_stride_irrelevant_to_total,
    assert_timeline_agrees,
)
from tests.runs import largest_rate, order, run

DTYPES = [torch.float64, torch.float32]
STRIDES = [1, 2, 16, None]
"""Every step; not a divisor of an epoch's three; longer than the run; one segment per recorded state."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(CASES))
def test_every_case_at_every_stride(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = CASES[name].build(dtype)
    trajectory = run(problem, tmp_path, CASES[name].rate)
    found = []
    thorough = dtype == torch.float64 and "issue" in CASES[name].kind
    for stride in STRIDES if thorough else (1, None):
        explanation = kx.explain(
            trajectory, problem.model, problem.data, problem.queries, "all", stride=stride, kernel=False
        )
        assert_complete(explanation)
        found.append(explanation)
    assert float(found[0].contributions.norm()) > 0
    assert float(found[0].unattributed.norm()) <= 1e-5 * float((found[0].prediction - found[0].baseline).norm())
    if "batch-norm" in CASES[name].kind:
        assert float(found[0].buffers.norm()) > 0
    else:
        assert float(found[0].buffers.norm()) == 0
        totals = [e for e in found if e.contributions.dtype == torch.float64]
        if totals:
            assert_stride_irrelevant_to_total(totals, 1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.names(kind="issue"))
def test_from_the_smallest_rate_to_the_largest(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """From 0.01 to the largest rate, found by doubling, at which the loss never rises tenfold.

    Beyond it parameters pass through 1e20 and come back: no sum of floating-point numbers can account for that to a
    small part of where it ends. For the same reason float32 is granted the rounding of the amounts it adds up.
    """
    for rate in (0.01, largest_rate(CASES[name], dtype)):
        problem = CASES[name].build(dtype)
        trajectory = run(problem, tmp_path / f"{rate}", rate)
        for stride in (1, None) if rate > 0.01 else (None,):
            explanation = kx.explain(
                trajectory, problem.model, problem.data, problem.queries, "all", stride=stride, kernel=False
            )
            summed = explanation.contributions.abs().sum(1) + explanation.buffers.abs()
            change = float((explanation.prediction - explanation.baseline).norm())
            rounding = 4 * torch.finfo(dtype).eps * float(summed.norm())
            assert float(explanation.remainder.norm()) <= COMPLETE[dtype] * change + rounding


def entropy(outputs: Tensor) -> Tensor:
    return -(outputs.softmax(1) * outputs.log_softmax(1)).sum(1)


def second_best(outputs: Tensor) -> Tensor:
    return outputs.sort(1).values[:, -2]


def branching(outputs: Tensor) -> Tensor:
    return torch.stack([row[0] if bool(row.sum() > 0) else row[1] for row in outputs])


TARGETS: list[Any] = [0, 2, -1, "predicted", "label", "margin", "loss", "all", entropy, second_best]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["mlp-relu", "attention-causal", "residual-batch-norm", "custom-numpy", "argmax"])
def test_every_target(name: str, target: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = CASES[name].build(dtype)
    trajectory = run(problem, tmp_path, 0.3)
    for stride in (2, None):
        explanation = kx.explain(
            trajectory, problem.model, problem.data, problem.queries, target, stride=stride, kernel=False
        )
        assert_complete(explanation)
        assert_timeline_agrees(explanation, 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_target_that_branches_or_leaves_torch(tmp_path: Path) -> None:
    """No callable on outputs is refused."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, 2.0)

    def by_numpy(outputs: Tensor) -> Tensor:
        return torch.as_tensor(outputs.detach().numpy()[:, 0] * 2.0)

    for target in (branching, by_numpy):
        explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, target)
        assert_complete(explanation)


def test_a_constant_target(tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path)
    found = kx.explain(
        trajectory, problem.model, problem.data, problem.queries, lambda f: torch.ones_like(f[:, 0].detach())
    )
    assert float(found.contributions.abs().max()) == 0
    assert float(found.remainder.abs().max()) == 0


LOSSES = {
    "cross_entropy": ("cross_entropy", "class"), "cross_entropy of probabilities": ("cross_entropy", "soft"),
    "mse": ("mse", "soft"), "hinge": ("hinge", "class"), "logistic": ("logistic", "soft"),
    "smoothed": (lambda f, y: F.cross_entropy(f, y, reduction="none", label_smoothing=0.1), "class"),
    "divergence": (lambda f, y: F.kl_div(f.log_softmax(1), y, reduction="none").sum(1), "soft"),
    "huber": (lambda f, y: F.huber_loss(f, y, reduction="none").sum(1), "soft"),
    "binary": (lambda f, y: F.binary_cross_entropy(f.sigmoid(), y, reduction="none").sum(1), "soft"),
}  # fmt: skip


@pytest.mark.parametrize("target", ["loss", "all"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss(name: str, target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    loss, kind = LOSSES[name]
    problem = CASES["mlp-tanh"].build(dtype)
    inputs, labels = problem.examples
    if kind == "soft":
        labels = torch.softmax(torch.randn(14, 3, dtype=dtype), 1)
    data = TensorDataset(inputs, labels)
    problem = Problem(problem.model, data, TensorDataset(inputs[:4] + 0.1, labels[:4]), loss)
    trajectory = run(problem, tmp_path, 0.3)
    explanation = kx.explain(trajectory, problem.model, data, problem.queries, target, kernel=False)
    assert_complete(explanation)


def test_a_loss_of_outputs_without_output_axis(tmp_path: Path) -> None:
    """The loss sees outputs in the shape the model gives them, as in training."""
    problem = CASES["scalar"].build()
    problem.loss = lambda outputs, targets: (outputs - targets) ** 2
    trajectory = run(problem, tmp_path, 0.02)
    explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, "loss", kernel=False)
    assert_complete(explanation)
    inputs, targets = problem.queries.tensors
    expected = (problem.model.eval()(inputs) - targets) ** 2
    torch.testing.assert_close(explanation.prediction, expected.detach())


class Positional(nn.Module):
    """One prediction per position: outputs [n, class, position]."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.words(words))).transpose(1, 2)


@pytest.mark.parametrize("target", ["all", "loss", 4])
def test_outputs_with_positions(target: Any, tmp_path: Path) -> None:
    words, labels = torch.randint(7, (14, 5)), torch.randint(3, (14, 5))
    data = TensorDataset(words, labels)
    problem = Problem(Positional().double(), data, TensorDataset(words[:4], labels[:4]), "cross_entropy")
    trajectory = run(problem, tmp_path)
    explanation = kx.explain(trajectory, problem.model, data, problem.queries, target, kernel=False)
    assert_complete(explanation)


def mlp_problem(data: TensorDataset, dtype: torch.dtype) -> Problem:
    model = CASES["mlp-tanh"].build(dtype).model
    queries = TensorDataset(torch.randn(3, 6, dtype=dtype), torch.tensor([0, 1, 2]))
    return Problem(model, data, queries, "cross_entropy")


@pytest.mark.parametrize("split", list(SPLITS))
@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_data(name: str, split: str, dtype: torch.dtype, tmp_path: Path) -> None:
    data = hostile(name, dtype)
    problem = mlp_problem(data, dtype)
    batches = order(len(data), SPLITS[split][0], 1 if split == "one step" else 2)
    batches = batches[:1] if split == "one step" else batches
    trajectory = run(problem, tmp_path, 0.5, batches=batches)
    for queries in (problem.queries, data):
        explanation = kx.explain(trajectory, problem.model, data, queries, "all", kernel=False)
        assert bool(explanation.contributions.isfinite().all())
        assert_complete(explanation)


def test_an_example_several_times_in_one_batch(tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    trajectory = run(problem, tmp_path, batches=[[1, 1, 2], [0], [3, 3], [1, 5, 5, 5]])
    explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    assert_complete(explanation)
    assert float(explanation.contributions[:, 6:].abs().max()) == 0


def optimizer_of(problem: Problem, kind: str) -> torch.optim.Optimizer:
    named = dict(problem.model.named_parameters())
    biases = [p for name, p in named.items() if "bias" in name]
    others = [p for name, p in named.items() if "bias" not in name]
    if kind == "head only":
        return torch.optim.SGD(problem.model[4].parameters(), lr=0.3)
    if kind == "biases only":
        return torch.optim.SGD(biases, lr=0.3)
    if kind == "two rates":
        return torch.optim.SGD([{"params": biases, "lr": 0.4}, {"params": others, "weight_decay": 0.1}], lr=0.1)
    return torch.optim.SGD(named.values(), lr=0.3, weight_decay=0.05)


@pytest.mark.parametrize("stride", [1, 2, None])
@pytest.mark.parametrize("kind", ["head only", "biases only", "two rates", "weight decay"])
def test_what_the_optimizer_moves(kind: str, stride: int | None, tmp_path: Path) -> None:
    """Some parameters only, each with its own rate and decay."""
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, optimizer=optimizer_of(problem, kind))
    explanation = kx.explain(
        trajectory, problem.model, problem.data, problem.queries, "all", stride=stride, kernel=False
    )
    assert_complete(explanation)
    assert float(explanation.unattributed.abs().max()) < 1e-12
    decayed = kind in ("two rates", "weight decay")
    assert (float(explanation.regularizer.abs().max()) > 0) == decayed


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_frozen_parameters(what: str, tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    getattr(problem.model[2], what).requires_grad_(False)
    trajectory = run(problem, tmp_path, 0.3)
    assert_complete(kx.explain(trajectory, problem.model, problem.data, problem.queries, "all"))


@pytest.mark.parametrize("thaw", [True, False])
def test_a_layer_thawed_or_frozen_on_the_way(thaw: bool, tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    layer = problem.model[0]
    layer.requires_grad_(not thaw)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)

    def before(step: int) -> None:
        layer.requires_grad_((step >= 3) == thaw)

    trajectory = run(problem, tmp_path, optimizer=optimizer, before_step=before)
    for stride in (1, None):
        explanation = kx.explain(
            trajectory, problem.model, problem.data, problem.queries, "all", stride=stride, kernel=False
        )
        assert_complete(explanation)


def test_rates_that_change_and_vanish(tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    named = problem.model.named_parameters()
    biases, others = [], []
    for name, p in named:
        (biases if "bias" in name else others).append(p)
    optimizer = torch.optim.SGD([{"params": biases}, {"params": others}], lr=0.1)

    def before(step: int) -> None:
        optimizer.param_groups[0]["lr"] = 0.0 if step % 2 else 0.2
        optimizer.param_groups[1]["lr"] = 0.0 if step in (1, 2) else 0.2 + 0.1 * step

    trajectory = run(problem, tmp_path, optimizer=optimizer, before_step=before)
    for stride in (1, None):
        assert_complete(kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", stride=stride))


def test_flooding_and_clipping(tmp_path: Path) -> None:
    """Sign and clip factors of the step log."""
    problem = CASES["mlp-relu"].build()
    model, (inputs, targets) = problem.model, problem.examples
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    with kx.record(model, optimizer, "cross_entropy", problem.data, out=tmp_path) as recorder:
        for step, indices in enumerate(order()):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs[indices]), targets[indices])
            loss.backward()
            norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters()]))
            sign, clip = (-1 if step % 3 == 1 else 1), min(1.0, 0.2 / norm)
            for p in model.parameters():
                p.grad.mul_(sign * clip)
            optimizer.step()
            recorder.step(indices, loss.item(), sign=sign, clip=clip)
    for stride in (1, None):
        explanation = kx.explain(recorder.trajectory, model, problem.data, problem.queries, "all", stride=stride)
        assert_complete(explanation)
        assert float(explanation.unattributed.abs().max()) < 1e-12


def test_training_that_changes_nothing(tmp_path: Path) -> None:
    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path, 0.0)
    explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    for name in ("contributions", "remainder", *LINES):
        assert float(getattr(explanation, name).abs().max()) == 0


def test_as_many_queries_as_times(tmp_path: Path) -> None:
    """Axes of equal length at every size of portion."""
    for length in (2, 3, 4):
        case = Case("t", cases.TimeSort, lambda n, t=length: torch.randn(n, t, 6))
        for queries in (1, 2, 3, 4):
            problem = case.build(queries=queries)
            trajectory = run(problem, tmp_path / f"{length}{queries}", 0.5)
            explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
            assert_each_complete(explanation, 1e-11)


class Crossing(nn.Module):
    """Branches on the batch's own values, which cross the border in the middle of training."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = torch.tanh(h) if self.gate.abs() < 0.02 else torch.sin(h) * 1.5
        return self.second(h) * (1 + self.gate)


class Preallocated(nn.Module):
    """Writes results into a tensor made beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out = torch.zeros(len(x), 6, dtype=x.dtype)
        out[:, :3] = torch.tanh(h[:, :3])
        out[:, 3:] = h[:, 3:]
        return self.second(out)


class Views(nn.Module):
    """Changes views in place, which changes what they are views of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :3].mul_(2.0)
        tail = h[:, 3:]
        tail += 1
        h[:, 0] = torch.tanh(h[:, 1])
        return self.second(torch.tanh(h))


class Logarithms(nn.Module):
    """Small probabilities under a logarithm: float32's hard case."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.log(h.square() * 1e-8 + 1e-10) / 10)


def no_longer_recommended() -> nn.Module:
    layer = nn.utils.weight_norm(nn.Linear(6, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


def spectral() -> nn.Module:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3))


class Auxiliary(nn.Module):
    """A head used in training only, and a layer never used, under weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary, self.unused = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) + (self.auxiliary(x) if self.training else 0)


class Hidden(nn.Module):
    """A layer between others that uses parameters where no tracer sees it, or moves the examples about."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(6, 6), nn.Linear(6, 3), how
        self.extra = nn.Parameter(torch.randn(6))
        self.table = nn.Embedding(3, 6, padding_idx=0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "turned":
            return self.last(torch.tanh(self.first(x.flip(0))).flip(0))
        if self.how == "sorted":
            order = x[:, 0].argsort()
            return self.last(torch.tanh(self.first(x[order]))[order.argsort()])
        h = self.first(x) * 1.0
        if self.how == "own derivative":
            h = Scaled.apply(h, self.extra)
        if self.how == "written into a view":
            h[:, :4].add_(self.extra[:4])
        if self.how == "fixed look-up":
            h = h + self.table(torch.tensor([0])) + self.table(torch.tensor([1]))
        if self.how == "counter":
            self.calls += int(self.training)
            h = h / (1 + 0.1 * self.calls)
        if self.how == "checkpoint":
            return self.last(torch.utils.checkpoint.checkpoint(torch.tanh, h, use_reentrant=False))
        return self.last(torch.tanh(h))


class Scaled(torch.autograd.Function):
    """A product that brings its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: Tensor) -> Tensor:
        ctx.save_for_backward(x, by)
        return x * by

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, by = ctx.saved_tensors
        return gradient * by, (gradient * x).sum(0)


@pytest.mark.parametrize(
    "how",
    ["turned", "sorted", "own derivative", "written into a view", "fixed look-up", "counter", "checkpoint"],
)
def test_uses_out_of_sight(how: str, tmp_path: Path) -> None:
    problem = Case(how, lambda: Hidden(how), cases.vectors).build()
    trajectory = run(problem, tmp_path, 0.3)
    explanation = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    assert_complete(explanation)
    assert (float(explanation.buffers.norm()) > 0) == (how == "counter")


def test_the_kernel_of_a_model_that_turns_its_batch_round() -> None:
    model = Hidden("turned").double()
    plain = nn.Sequential(model.first, nn.Tanh(), model.last)
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(kx.tangent_kernel(model, x), kx.tangent_kernel(plain, x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "make", [Crossing, Preallocated, Views, Logarithms, no_longer_recommended, spectral, Auxiliary]
)
def test_awkward_models(make: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    problem = Case(make.__name__, make, cases.vectors).build(dtype)
    trajectory = run(problem, tmp_path, 0.3)
    for stride in (1, 2, None):
        explanation = kx.explain(
            trajectory, problem.model, problem.data, problem.queries, "all", stride=stride, kernel=False
        )
        assert_complete(explanation)
