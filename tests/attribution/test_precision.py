"""Bills computed in float64 though the model has another type: complete where float32 has not the digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, ModelError, UnattributedWarning
from kxexplain.gradients.discrete import DiscreteGradient
from kxexplain.trajectory.losses import resolve
from tests.cases import CASES, Problem
from tests.laws import assert_close, assert_complete, assert_kernel_times_alpha, incompleteness
from tests.runs import order, run

SINGLE = 1e-5
DOUBLE = 1e-10


def cancelling(out: Path) -> tuple[Problem, kx.Trajectory]:
    """Adam over few examples, whose amounts are thousands of times the change."""
    problem = CASES["conv-transposed-2d"].build(torch.float32, examples=9, queries=2)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    return problem, run(problem, out, optimizer=optimizer, batches=order(9, 3, 1))


def explained(problem: Problem, trajectory: kx.Trajectory, target: Any = "all", **options: Any) -> kx.Explanation:
    return kx.explain(trajectory, problem.model, problem.data, problem.queries, target, **options)


def amounts(found: kx.Explanation) -> float:
    """What the bill adds up, relative to the change."""
    turned_over = found.contributions.double().abs().sum(1).norm()
    return float(turned_over / (found.prediction - found.baseline).double().norm())


def test_again_where_rounding_shows(tmp_path: Path) -> None:
    problem, trajectory = cancelling(tmp_path)
    single = explained(problem, trajectory, kernel=False, precision="model")
    assert single.facts["precision"] == "float32"
    assert single.prediction.dtype == torch.float32
    assert incompleteness(single) > SINGLE  # else this case shows nothing
    assert amounts(single) > 100
    found = explained(problem, trajectory, kernel=False)
    assert found.facts["precision"] == "float64"
    assert {getattr(found, name).dtype for name in ("contributions", "prediction", "remainder")} == {torch.float64}
    assert_complete(found, DOUBLE)
    known = 64 * torch.finfo(torch.float32).eps * amounts(single)
    change = float((found.prediction - found.baseline).norm())
    assert float((found.contributions - single.contributions).norm()) < known * change
    assert torch.equal(
        found.contributions, explained(problem, trajectory, kernel=False, precision="double").contributions
    )
    assert kx.Explanation.load(found.save(tmp_path / "bill.safetensors")).prediction.dtype == torch.float64


def test_not_where_it_does_not(tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build(torch.float32)
    found = explained(problem, run(problem, tmp_path))
    assert found.facts["precision"] == "float32"
    assert found.contributions.dtype == torch.float32


WALKS: dict[str, Any] = {
    "forward": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01),
    "backward": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.filterwarnings("ignore:(?s).*nothing but rounding")
@pytest.mark.parametrize("model", ["mlp-gelu", "residual-batch-norm", pytest.param("encoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(WALKS))
def test_complete(name: str, model: str, tmp_path: Path) -> None:
    """Every line in float64, buffers and decay among them, of a run in float32; and the blocks of the kernel."""
    problem = CASES[model].build(torch.float32)
    trajectory = run(problem, tmp_path, optimizer=WALKS[name](problem.model.parameters()))
    for decay in ("line", "charged") if model == "mlp-gelu" else ("line",):
        found = explained(problem, trajectory, precision="double", stride=3, decay=decay)
        assert_complete(found, DOUBLE)
        assert_kernel_times_alpha(found, 1e-6)
        single = explained(problem, trajectory, precision="model", stride=3, decay=decay)
        assert_close(found.regularizer, single.regularizer.double(), 1e-4)
        assert_close(found.buffers, single.buffers.double(), 1e-4)


def by_hand(problem: Problem, batches: list[list[int]], rate: float) -> Tensor:
    """−η ⟨D_t, g_{t,i}⟩/|B_t| of every step of SGD in float32, one example at a time; D in float64."""
    model, (inputs, targets), loss = problem.model, problem.examples, resolve(problem.loss)[1]
    double = CASES["mlp-tanh"].build(torch.float64).model.eval()
    queries = problem.queries.tensors[0].double()
    names = [name for name, _ in model.named_parameters()]
    gradient = DiscreteGradient(double, names)
    wide = lambda: {name: p.detach().double() for name, p in model.named_parameters()}  # noqa: E731
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    found = torch.zeros(len(queries), len(targets), 3, dtype=torch.float64)
    for batch in batches:
        start, shares = wide(), {}
        for i in batch:
            value = loss(model(inputs[i : i + 1]), targets[i : i + 1])[0] / len(batch)
            shares[i] = [g.double() for g in torch.autograd.grad(value, list(model.parameters()))]
        optimizer.zero_grad()
        loss(model(inputs[batch]), targets[batch]).mean().backward()
        optimizer.step()
        secant = gradient(start, wide(), queries, lambda f, rows: f)
        for i, share in shares.items():
            found[:, i] -= rate * secant.along(dict(zip(names, share, strict=True)))
    return found


def test_as_reckoned_by_hand(tmp_path: Path) -> None:
    """What single examples are credited with, and not only what the bill adds up to; a step a segment."""
    problem, again = (CASES["mlp-tanh"].build(torch.float32) for _ in range(2))
    batches = [list(map(int, batch)) for batch in order(len(problem.data))]
    trajectory = run(problem, tmp_path, 0.1, batches=batches)
    found = explained(problem, trajectory, stride=1, kernel=False, precision="double")
    assert_close(found.contributions, by_hand(again, batches, 0.1), 1e-6)


def test_imported(tmp_path: Path) -> None:
    """Along chords, too, everything is in float64; what the checkpoints cannot tell is unattributed."""
    problem = CASES["mlp-tanh"].build(torch.float32)
    recorded = run(problem, tmp_path / "recorded", 0.1, keep=2)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for record in recorded.states:
        torch.save(recorded.state(record.step).parameters, folder / f"step_{record.step}.pt")
    trajectory = kx.import_checkpoints(folder, problem.model, problem.data, problem.loss, out=tmp_path / "imported")
    with pytest.warns(UnattributedWarning):
        found = explained(problem, trajectory, precision="double")
    assert_complete(found, DOUBLE)


def test_penalty(tmp_path: Path) -> None:
    problem = CASES["mlp-gelu"].build(torch.float32)
    options: dict[str, Any] = {"loss": problem.loss, "epochs": 2, "batch_size": 5, "progress": False, "seed": 0}
    for name, optimizer in WALKS.items():
        trajectory = kx.train(
            problem.model, problem.data, optimizer=optimizer(problem.model.parameters()), out=tmp_path / name,
            objective=kx.Objective(parameter_penalty=0.02), **options,
        )  # fmt: skip
        found = explained(problem, trajectory, precision="double", kernel=False)
        assert_complete(found, DOUBLE)
        assert float(found.penalty.abs().max()) > 0


class OwnFloats(nn.Module):
    """Makes values of a type of its own."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 3), last

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).float() if self.last else self.layer(x) @ torch.eye(3)


@pytest.mark.parametrize("last", [True, False])
def test_models_that_cannot(last: bool, tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    model = OwnFloats(last)
    trajectory = kx.train(model, data, epochs=1, batch_size=3, out=tmp_path, progress=False)
    assert kx.explain(trajectory, model, data, data).facts["precision"] == "float32"
    with pytest.raises(ModelError, match=r"cannot compute in float64.*follow its input's type"):
        kx.explain(trajectory, model, data, data, precision="double")


@pytest.mark.parametrize("wrong", ["float64", ""])
def test_unknown_precision(wrong: str, tmp_path: Path) -> None:
    problem = CASES["mlp-relu"].build()
    trajectory = run(problem, tmp_path)
    with pytest.raises(ArgumentError, match="expected one of 'auto', 'model', 'double'"):
        explained(problem, trajectory, precision=wrong)
