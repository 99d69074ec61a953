"""The traps that existing libraries fell into (grouped convolutions that crash, NaN turned to 0 …), each a regression.

Those that other files hold are listed in :data:`ELSEWHERE`: trap → file::test. The others follow below, named.
"""

from __future__ import annotations

import copy
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import kxexplain as kx
from kxexplain.errors import DatasetError, ReplayError
from kxexplain.trajectory.batches import call
from tests import reference
from tests.cases import CASES, Case, vectors
from tests.laws import assert_close, assert_complete, assert_model_untouched
from tests.runs import order, run

ELSEWHERE = {
    "grouped convolutions crash": "gradients/test_products.py::test_products_equal_the_dense_loop",
    "dropout left on": "kernels/test_tangent.py::test_is_taken_in_evaluation_mode",
    "batch statistics changed by asking": "attribution/test_errors.py::test_nothing_of_the_caller_s_changes",
    "a layer applied twice gives a wrong Gram": "gradients/test_products.py::test_products_equal_the_dense_loop",
    "projections of layers not scaled alike": "gradients/test_projection.py::test_unbiased_over_200_seeds",
    "moments lost on resume": "learning/test_trainer.py::test_interrupted_then_resumed_is_uninterrupted",
    "moments lost between states": "trajectory/test_replay.py::test_states_hold_moments",
    "a second run inherits the first one's state": "learning/test_trainer.py::test_a_second_run_inherits_nothing",
    "NaN mapped to 0": "attribution/test_targets.py::test_alpha_is_nan_where_the_kernel_is_singular",
}


@pytest.mark.parametrize("trap", list(ELSEWHERE))
def test_the_table_names_tests_that_exist(trap: str) -> None:
    file, _, test = ELSEWHERE[trap].partition("::")
    assert re.search(rf"^def {test}\(", (Path(__file__).parent / file).read_text(encoding="utf-8"), re.MULTILINE)


def dense_kernel(model: nn.Module, inputs: Tensor) -> Tensor:
    jacobian = reference.jacobian(model, inputs)
    return torch.einsum("ncp,mcp->nm", jacobian, jacobian)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_grouped_convolutions(groups: int) -> None:
    """Up to depthwise, more outputs than inputs a group."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    model, x = model.double(), torch.randn(5, 4, 4, 4, dtype=torch.float64)
    assert_close(kx.tangent_kernel(model, x), dense_kernel(model, x), 1e-12)


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_norm_layers_have_gradients(which: str, tmp_path: Path) -> None:
    """A kernel, and a bill, of a model in which nothing but a layer norm's gain or shift is trained."""
    layers = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    problem = Case("norm", lambda: copy.deepcopy(layers), vectors).build()
    problem.model.double().requires_grad_(False)
    getattr(problem.model[1], which).requires_grad_(True)
    expected = dense_kernel(problem.model, problem.inputs)
    assert float(expected.norm()) > 0
    assert_close(kx.tangent_kernel(problem.model, problem.inputs), expected, 1e-12)
    optimizer = torch.optim.SGD([getattr(problem.model[1], which)], lr=0.3)
    trajectory = run(problem, tmp_path, optimizer=optimizer)
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all", kernel=False)
    assert_complete(found)
    assert float(found.contributions.norm()) > 0


def test_dropout_is_off_while_explaining(tmp_path: Path) -> None:
    """Though the model is handed over in training mode: two bills are one, and explain what the model predicts."""
    problem = CASES["dropout"].build()
    trajectory = run(problem, tmp_path)
    model = problem.model.train()
    first, second = (kx.explain(trajectory, model, problem.data, problem.queries, "all") for _ in range(2))
    assert model.training
    assert torch.equal(first.contributions, second.contributions)
    with torch.no_grad():
        assert_close(first.prediction, call(copy.deepcopy(model).eval(), problem.inputs), 1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_asking_changes_no_batch_statistics(training: bool, tmp_path: Path) -> None:
    """Nor mode, weights, ``requires_grad`` or generators, whatever is asked."""
    problem = CASES["batch-norm-1d"].build()
    trajectory = run(problem, tmp_path)
    model = problem.model.train(training)
    model[0].bias.requires_grad_(False)
    with assert_model_untouched(model):
        kx.tangent_kernel(model, problem.inputs)
    model[0].bias.requires_grad_(True)
    with assert_model_untouched(model):
        kx.explain(trajectory, model, problem.data, problem.queries, "all")
        kx.path_kernel(trajectory, model, problem.inputs)


def test_an_example_is_its_index_in_the_dataset(tmp_path: Path) -> None:
    """What a shuffled loader serves first is not example 0: only the examples that were trained on contribute."""
    problem = CASES["mlp-tanh"].build()
    batches = [[11, 3], [7, 3], [11, 5]]
    found = kx.explain(run(problem, tmp_path, batches=batches), problem.model, problem.data, problem.queries, "all")
    amounts = found.contributions.abs().sum((0, 2))
    assert amounts.nonzero().squeeze(1).tolist() == [3, 5, 7, 11]


def test_a_loader_is_no_dataset(tmp_path: Path) -> None:
    """A shuffling loader has no order to name examples by."""
    problem = CASES["mlp-tanh"].build()
    loader = DataLoader(problem.data, batch_size=4, shuffle=True)
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.1)
    with pytest.raises(DatasetError):
        kx.train(problem.model, loader, "cross_entropy", optimizer, epochs=1, out=tmp_path / "run")


def test_positions_in_a_loader_are_found_out(tmp_path: Path) -> None:
    """A loop that logs 0, 1, 2 … while its loader shuffles: replay does not arrive, and says what is wrong."""
    problem = CASES["mlp-tanh"].build()
    inputs, targets = problem.examples
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.3)
    with kx.record(problem.model, optimizer, "cross_entropy", problem.data, out=tmp_path / "run") as recorder:
        served = 0
        for indices in order():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(problem.model(inputs[indices]), targets[indices])
            loss.backward()
            optimizer.step()
            recorder.step([(served + i) % 14 for i in range(len(indices))], loss.item())
            served += len(indices)
    with pytest.raises(ReplayError, match="order"):
        kx.explain(recorder.trajectory, problem.model, problem.data, problem.queries, "all")


def test_states_held_together_are_different_states(tmp_path: Path) -> None:
    """Several checkpoints in one list: each keeps its own values, and they are those that training passed."""
    problem, passed = CASES["mlp-tanh"].build(), []
    note = lambda _: passed.append(reference.vector(problem.model).clone())  # noqa: E731
    trajectory = run(problem, tmp_path, 0.3, keep=1, before_step=note)
    passed.append(reference.vector(problem.model).clone())
    names = [name for name, _ in problem.model.named_parameters()]
    states = [trajectory.state(state.step) for state in trajectory.states]
    values = [torch.cat([state.parameters[name].flatten() for name in names]) for state in states]
    assert len(values) == len(passed) == len(order()) + 1
    assert all(torch.equal(found, expected) for found, expected in zip(values, passed, strict=True))
    assert not any(torch.equal(one, other) for one, other in combinations(values, 2))


class Root(nn.Module):
    """Not a number wherever the linear layer is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(self.layer(x))


def test_what_is_not_a_number_stays_so(tmp_path: Path) -> None:
    """In a kernel NaN is NaN; a bill of queries that hold it is refused."""
    model = Root().double()
    x = torch.linalg.pinv(model.layer.weight.detach()) @ (torch.tensor([4.0, 9.0, 16.0]).double() - model.layer.bias)
    inputs = torch.stack([x, -x, x / 2]).detach()
    kernel = kx.tangent_kernel(model, inputs)
    good = model(inputs).isfinite().all(1)
    assert good.tolist() == [True, False, True]
    assert kernel.isnan().tolist() == [[not (bool(a) and bool(b)) for b in good] for a in good]

    problem = CASES["mlp-tanh"].build()
    trajectory = run(problem, tmp_path)
    queries = problem.inputs.clone()
    queries[1, 2] = float("nan")
    with pytest.raises(DatasetError, match="NaN"):
        kx.explain(trajectory, problem.model, problem.data, queries, "all")


@pytest.mark.parametrize("wanted", [torch.float64, torch.float32])
def test_results_have_the_model_s_precision(wanted: torch.dtype, tmp_path: Path) -> None:
    """No buffer of half the digits unless asked for."""
    problem = CASES["mlp-tanh"].build(wanted)
    trajectory = run(problem, tmp_path)
    found = kx.explain(trajectory, problem.model, problem.data, problem.queries, "all")
    index = kx.GradientIndex.build(trajectory, problem.model, problem.data, dim=16)
    tensors = {"contributions": found.contributions, "kernel": found.kernel, "remainder": found.remainder}
    tensors |= {"tangent": kx.tangent_kernel(problem.model, problem.inputs)}
    tensors |= {"path": kx.path_kernel(trajectory, problem.model, problem.inputs)}
    tensors |= {f"state {name}": t for name, t in trajectory.state(0).parameters.items()}
    assert {name: t.dtype for name, t in tensors.items()} == dict.fromkeys(tensors, wanted)
    scores = torch.as_tensor(index.search(problem.queries, k=3).proponents.scores)
    assert scores.dtype in (torch.float32, wanted)
