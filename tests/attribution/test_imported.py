"""Bills from checkpoints without a step log: complete, and the recorded run's where a log has nothing to add."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.attribution.decompose import contributions_of
from kxexplain.errors import ArgumentError, DatasetError, UnattributedWarning
from kxexplain.gradients.discrete import DiscreteGradient
from kxexplain.trajectory.losses import resolve
from tests.attribution.test_optimizers import explained
from tests.cases import CASES, Problem
from tests.laws import (
    assert_close,
    assert_complete,
    assert_kernel_times_alpha,
    assert_model_untouched,
    assert_same_bill,
    assert_timeline_agrees,
    relative,
)
from tests.runs import run

slow = pytest.mark.slow
STEADY = ["mlp-relu", "cnn-max", "two-inputs"]
STEADY += [pytest.param(name, marks=slow) for name in ("mlp-tanh", "tied-embedding", "scalar", "lstm", "custom-numpy")]
"""Models that compute the same in training and evaluation mode."""

expected_warning = pytest.mark.filterwarnings("ignore::kxexplain.UnattributedWarning")


def imported(problem: Problem, recorded: kx.Trajectory, folder: Path, **options: Any) -> kx.Trajectory:
    """The states of a recorded run as somebody's checkpoints, imported."""
    (folder / "saved").mkdir(parents=True)
    for record in recorded.states:
        state = recorded.state(record.step)
        torch.save({**state.parameters, **state.buffers}, folder / "saved" / f"step_{record.step}.pt")
    out = folder / "imported"
    return kx.import_checkpoints(folder / "saved", problem.model, problem.data, problem.loss, out=out, **options)


def descent(problem: Problem, folder: Path, steps: int = 4, **options: Any) -> kx.Trajectory:
    """Full-data gradient descent, every state recorded."""
    everything = list(range(len(problem.data)))  # type: ignore[arg-type]
    return run(problem, folder / "recorded", 0.05, batches=[everything] * steps, keep="step", **options)


@pytest.mark.parametrize("name", STEADY)
def test_one_full_step_a_checkpoint_is_the_recorded_bill(name: str, tmp_path: Path) -> None:
    """The rate is found, nothing is left over, and so nothing is said: the warning would be an error."""
    problem = CASES[name].build()
    recorded = descent(problem, tmp_path)
    trajectory = imported(problem, recorded, tmp_path)
    assert [step.rates[0] for step in trajectory.steps] == pytest.approx([0.05] * 4, rel=1e-9)
    for stride in (None, 3):
        first, second = (explained(problem, t, stride=stride) for t in (recorded, trajectory))
        assert_same_bill(first, second, 1e-9)
        assert_close(second.kernel, first.kernel, 1e-9)
        assert_close(second.timeline.shares, first.timeline.shares, 1e-9)
        assert float(second.unattributed.abs().max()) < 1e-12
        assert_complete(second)
    assert_kernel_times_alpha(second, 1e-6)


@expected_warning
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("target", ["all", "label", "loss"])
@pytest.mark.parametrize("name", ["mlp-relu", *(pytest.param(n, marks=slow) for n in ("cnn-max", "encoder-masked"))])
def test_complete(name: str, target: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Minibatches, Adam: whatever the checkpoints cannot tell is unattributed."""
    problem = CASES[name].build(dtype)
    optimizer = torch.optim.Adam(problem.model.parameters(), lr=0.01)
    recorded = run(problem, tmp_path / "recorded", optimizer=optimizer, keep=2)
    trajectory = imported(problem, recorded, tmp_path)
    for stride in (None, 2):
        explanation = explained(problem, trajectory, target, stride=stride)
        assert_complete(explanation, 1e-10 if dtype == torch.float64 else 1e-5)
        assert_timeline_agrees(explanation, 1e-9 if dtype == torch.float64 else 1e-4)
    assert float(explanation.contributions.norm()) > 0


@expected_warning
def test_running_statistics(tmp_path: Path) -> None:
    """They are a line of their own, the same as of the recorded run: it takes nothing but the states."""
    problem = CASES["residual-batch-norm"].build()
    recorded = run(problem, tmp_path / "recorded", 0.1)
    first = explained(problem, recorded, kernel=False)
    second = explained(problem, imported(problem, recorded, tmp_path), kernel=False)
    assert_complete(second, 1e-10)
    assert float(second.buffers.abs().max()) > 1e-3
    assert_close(second.buffers, first.buffers, 1e-10)


@expected_warning
@pytest.mark.parametrize("rate", [None, 0.07])
def test_as_reckoned_by_hand(rate: float | None, tmp_path: Path) -> None:
    """One example at a time: −c ⟨D, ∇ℓ_i⟩/n at the chord's start, with the c of least squares or the one told."""
    problem = CASES["mlp-tanh"].build()
    recorded = run(problem, tmp_path / "recorded", 0.3, keep=2)
    told = {} if rate is None else {"rate": rate, "steps": 2}
    found = explained(problem, imported(problem, recorded, tmp_path, **told), kernel=False)
    model, (inputs, targets), loss = copy.deepcopy(problem.model).eval(), problem.examples, resolve(problem.loss)[1]
    names = [name for name, _ in model.named_parameters()]
    contributions, left = torch.zeros_like(found.contributions), torch.zeros_like(found.unattributed)
    states = [recorded.state(s.step).parameters for s in recorded.states]
    for start, end in pairwise(states):
        model.load_state_dict(start)
        each = []
        for i in range(len(targets)):
            value = loss(model(inputs[i : i + 1]), targets[i : i + 1])[0] / len(targets)
            each.append(dict(zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True)))
        secant = DiscreteGradient(model, names)(start, end, problem.queries.tensors[0], lambda f, rows: f)
        flat = lambda tensors: torch.cat([tensors[name].flatten() for name in names])  # noqa: E731
        change = {name: end[name] - start[name] for name in names}
        whole = {name: sum(g[name] for g in each) for name in names}
        best = torch.linalg.lstsq(flat(whole)[:, None], -flat(change)).solution[0]
        c = max(0.0, float(best)) if rate is None else 2 * rate
        contributions += torch.stack([-c * secant.along(g) for g in each], 1)
        left += secant.along({name: change[name] + c * whole[name] for name in names})
    assert_close(found.contributions, contributions, 1e-10)
    assert_close(found.unattributed, left, 1e-10)


def test_uphill_is_nobodys(tmp_path: Path) -> None:
    """Where the parameters went against the gradient there is no c ≥ 0 but 0, and all of it is unattributed."""
    problem = CASES["mlp-tanh"].build()
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.05, maximize=True)
    trajectory = imported(problem, descent(problem, tmp_path, optimizer=optimizer), tmp_path)
    assert [step.rates for step in trajectory.steps] == [(0.0,)] * 4
    with pytest.warns(UnattributedWarning, match=r"is 100 % of the change .*made of checkpoints"):
        explanation = explained(problem, trajectory)
    assert_complete(explanation)
    assert float(explanation.contributions.abs().max()) == 0
    assert bool(explanation.alpha.isnan().all())


def test_what_does_not_move_was_frozen(tmp_path: Path) -> None:
    """A layer that no checkpoint changes takes no part, whether or not the model given says so."""
    problem = CASES["mlp-tanh"].build()
    problem.model[0].requires_grad_(False)
    recorded = descent(problem, tmp_path)
    first = explained(problem, recorded)
    problem.model[0].requires_grad_(True)
    second = explained(problem, imported(problem, recorded, tmp_path))
    assert_same_bill(first, second, 1e-9)
    assert float(second.unattributed.abs().max()) < 1e-12


@expected_warning
def test_sums_and_means(tmp_path: Path) -> None:
    """The reduction is the scale of c and so of the path kernel, and changes no amount of the bill."""
    problem = CASES["mlp-tanh"].build()
    recorded = run(problem, tmp_path / "recorded", 0.3)
    mean, total = (imported(problem, recorded, tmp_path / way, reduction=way) for way in ("mean", "sum"))
    assert_same_bill(*(explained(problem, t) for t in (mean, total)), 1e-10)
    n = len(problem.data)  # type: ignore[arg-type]
    assert mean.steps[0].rates[0] == pytest.approx(n * total.steps[0].rates[0])
    assert mean.steps[0].loss == pytest.approx(total.steps[0].loss / n)


@pytest.mark.slow
@expected_warning
@pytest.mark.parametrize(
    ("make", "least", "most_left"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), 0.95, 0.2),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.02), 0.99, 0.25, marks=slow),
        pytest.param(lambda p: torch.optim.Adam(p, lr=1e-3), 0.85, 0.6, marks=slow),
    ],
    ids=["sgd", "sgd, small steps", "adam"],
)
def test_contributions_are_like_the_recorded_ones(make: Any, least: float, most_left: float, tmp_path: Path) -> None:
    """Digits, four epochs, a checkpoint an epoch. Measured correlations of the least alike query: 0.987, 0.999, 0.918;
    unattributed 8 %, 15 %, 49 % of the change."""
    digits = kx.datasets.digits()
    data = TensorDataset(digits.train.tensors[0].double(), digits.train.tensors[1])
    queries = TensorDataset(digits.test.tensors[0][:8].double(), digits.test.tensors[1][:8])
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()
    problem = Problem(model, data, queries, "cross_entropy")
    optimizer = make(model.parameters())
    recorded = kx.train(model, data, "cross_entropy", optimizer, epochs=4, out=tmp_path / "run", progress=False)
    first = explained(problem, recorded, "predicted", kernel=False)
    second = explained(problem, imported(problem, recorded, tmp_path), "predicted", kernel=False)
    assert_complete(second, 1e-10)
    for ours, theirs in zip(second.contributions, first.contributions, strict=True):
        assert float(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) > least
    change = second.prediction - second.baseline
    assert float(second.unattributed.norm() / change.norm()) < most_left


@pytest.mark.slow
@expected_warning
def test_all_that_takes_a_trajectory(tmp_path: Path) -> None:
    """Rules to compare with, saving, kernels, the index: all work; what needs the steps is refused."""
    problem = CASES["mlp-tanh"].build()
    recorded = run(problem, tmp_path / "recorded", 0.1, keep=2)
    trajectory = imported(problem, recorded, tmp_path)
    with assert_model_untouched(problem.model):
        explanation = explained(problem, trajectory, "label")
    again = kx.Explanation.load(explanation.save(tmp_path / "bill.safetensors"))
    assert torch.equal(again.contributions, explanation.contributions)
    assert again.facts["drift"] is None
    assert "unattributed" in explanation.bill(0)
    assert float(explained(problem, trajectory, "label", rule="start").remainder.abs().max()) > 1e-6
    assert_same_bill(explained(problem, trajectory, "label", memory=1000), explanation, 1e-10)

    inputs = problem.queries.tensors[0]
    gram = kx.path_kernel(trajectory, problem.model, inputs)
    assert float(torch.linalg.eigvalsh(gram)[0]) > 0

    few = torch.tensor([5, 0, 9])
    found = contributions_of(trajectory, problem.model, problem.data, problem.queries, "label", few)
    assert_close(found, explanation.contributions[:, few], 1e-10)
    index = kx.GradientIndex.build(trajectory, problem.model, problem.data, dim=1024)
    nearest = index.search(problem.queries, k=3, target="label").proponents
    assert torch.equal(nearest.ids, explanation.top(3).proponents)
    assert relative(nearest.contributions, explanation.top(3).proponent_values) < 1e-6

    with pytest.raises(ArgumentError, match="nobody knows its decay"):
        explained(problem, trajectory, decay="charged")
    with pytest.raises(DatasetError, match="not the dataset"):
        kx.explain(trajectory, problem.model, TensorDataset(*(t[:5] for t in problem.examples)), inputs)
