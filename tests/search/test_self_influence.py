"""Self-influence against loops of autograd, and what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError
from kxexplain.trajectory.batches import take
from tests.cases import CASES
from tests.reference import loss_gradients, put, vector
from tests.runs import order, run


@pytest.mark.parametrize("name", ["mlp-relu", "cnn-max", "tied-embedding"])
def test_as_a_loop_of_autograd(name: str, tmp_path: Path) -> None:
    """S_i = Σ_t η/|B| ‖∇ℓ_i(θ_t)‖², redone by hand."""
    problem, again = CASES[name].build(torch.float64), CASES[name].build(torch.float64)
    batches, rate = order(len(problem.data)), 0.05
    trajectory = run(problem, tmp_path, rate, batches=batches)
    expected = torch.zeros(len(problem.data), dtype=torch.float64)
    inputs, targets = again.examples
    for batch in batches:
        rows = torch.tensor(batch)
        each = loss_gradients(again.model, take(inputs, rows), targets[rows], again.loss)
        expected.index_add_(0, rows, each.square().sum(1) * rate / len(batch))
        put(again.model, vector(again.model) - rate * each.mean(0))
    found = kx.self_influence(trajectory, problem.model, problem.data)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_rates_of_groups_and_clipping_count(tmp_path: Path) -> None:
    data = TensorDataset(torch.randn(6, 3, dtype=torch.float64), torch.randint(2, (6,)))
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    start = [p.detach().clone() for p in model.parameters()]
    groups = [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias], "lr": 0.7}]
    adam = torch.optim.Adam(groups)
    trajectory = kx.train(model, data, optimizer=adam, epochs=1, batch_size=6, clip_norm=0.01, out=tmp_path)
    clip = trajectory.steps[0].clip
    assert clip < 1
    found = kx.self_influence(trajectory, model, data)
    for i in range(6):
        weight, bias = (p.clone().requires_grad_() for p in start)
        loss = nn.functional.cross_entropy((data.tensors[0][i] @ weight.T + bias)[None], data.tensors[1][i : i + 1])
        of_weight, of_bias = torch.autograd.grad(loss, [weight, bias])
        expected = clip / 6 * (0.2 * of_weight.square().sum() + 0.7 * of_bias.square().sum())
        torch.testing.assert_close(found[i], expected)


def test_flipped_labels_come_first(tmp_path: Path) -> None:
    split = kx.datasets.digits()
    inputs, labels = split.train[:600]
    flipped = torch.randperm(600, generator=torch.Generator().manual_seed(1))[:60]
    labels = labels.clone()
    labels[flipped] = (labels[flipped] + 1 + torch.arange(60) % 9) % 10
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = TensorDataset(inputs, labels)
    trajectory = kx.train(model, data, epochs=15, out=tmp_path, progress=False)
    scores = kx.self_influence(trajectory, model, data)
    wrong = torch.zeros(600, dtype=torch.bool)
    wrong[flipped] = True
    above = (scores[wrong][:, None] > scores[~wrong]).float().mean()  # the area under the curve
    assert above >= 0.97


def test_checkpoints_have_no_steps(tmp_path: Path) -> None:
    data = TensorDataset(torch.eye(3), torch.tensor([0, 1, 0]))
    model = nn.Linear(3, 2)
    (tmp_path / "c").mkdir()
    for step in range(2):
        nn.init.constant_(model.weight, step)
        torch.save(model.state_dict(), tmp_path / "c" / f"{step}.pt")
    trajectory = kx.import_checkpoints(tmp_path / "c", model, data, "cross_entropy", out=tmp_path / "t")
    with pytest.raises(ArgumentError, match="no log of steps"):
        kx.self_influence(trajectory, model, data)
