"""What easily escapes notice: parameters frozen or freed on the way, and computation out of sight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import kxexplain as kx
from tests.laws import assert_complete

STEPS = 8
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.3, weight_decay=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
}


class Scaled(torch.autograd.Function):
    """x · w, with a derivative of its own, where the use of w cannot be seen."""

    @staticmethod
    def forward(context: Any, x: Tensor, w: Tensor) -> Tensor:
        context.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = context.saved_tensors
        return gradient * w, (gradient * x).sum(0)


class Net(nn.Module):
    """Two layers and a scale between them; ``between`` applies the first."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Linear(5, 4), nn.Parameter(torch.ones(4)), nn.Linear(4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        if self.between == "hidden":
            return self.last(torch.tanh(Scaled.apply(self.first(x), self.scale)))
        made = checkpoint(
            lambda z: torch.tanh(self.first(z) * self.scale), x, use_reentrant=self.between == "reentrant"
        )
        return self.last(made)


@pytest.fixture
def data() -> TensorDataset:
    return TensorDataset(torch.randn(24, 5, dtype=torch.float64), torch.randint(0, 3, (24,)))


def recorded(
    model: nn.Module, data: TensorDataset, name: str, out: Path, switch: Callable[[int], None], keep: int
) -> Any:
    optimizer, (inputs, targets) = OPTIMIZERS[name](model.parameters()), data.tensors
    with kx.record(model, optimizer, "cross_entropy", data, out=out, keep=keep) as recorder:
        for step in range(STEPS):
            switch(step)
            rows = torch.randperm(24)[:6]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[rows]), targets[rows]).backward()
            optimizer.step()
            recorder.step(rows)
    return recorder.trajectory


@pytest.mark.parametrize("keep", [STEPS, 3])
@pytest.mark.parametrize("freed", [True, False])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_frozen_or_freed_between_recorded_states(
    name: str, freed: bool, keep: int, data: TensorDataset, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    switch = lambda step: model[2].requires_grad_((step >= 4) == freed)  # noqa: E731
    trajectory = recorded(model, data, name, tmp_path, switch, keep)
    explanation = kx.explain(trajectory, model, data, data.tensors[0][:3], "all")
    assert_complete(explanation)
    assert float(explanation.unattributed.norm()) < 1e-10


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_hidden_parameter_that_began_frozen(name: str, data: TensorDataset, tmp_path: Path) -> None:
    model = Net("hidden").double()
    trajectory = recorded(model, data, name, tmp_path, lambda step: model.scale.requires_grad_(step >= 4), 4)
    assert_complete(kx.explain(trajectory, model, data, data.tensors[0][:3], "all"))


def test_checkpointing(data: TensorDataset, tmp_path: Path) -> None:
    """Part of the model is computed again, out of sight, while going backward."""
    model = Net("checkpointed").double()
    trajectory = recorded(model, data, "sgd", tmp_path, lambda step: None, STEPS)
    explanation = kx.explain(trajectory, model, data, data.tensors[0][:3], "all")
    assert_complete(explanation)
    assert float(explanation.contributions.norm()) > 0


def test_sparse_gradients(tmp_path: Path) -> None:
    """An embedding whose gradient has only the rows that were looked up."""
    data = TensorDataset(torch.randint(0, 10, (24, 4)), torch.randint(0, 3, (24,)))
    found = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(16, 3)).double()
        sgd = torch.optim.SGD(model.parameters(), lr=0.5)
        out = tmp_path / str(sparse)
        trajectory = kx.train(model, data, optimizer=sgd, epochs=3, batch_size=6, out=out, progress=False)
        found.append(kx.explain(trajectory, model, data, data.tensors[0][:3], "all"))
        assert_complete(found[-1])
    torch.testing.assert_close(found[0].contributions, found[1].contributions)
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.raises(kx.TrainingError, match="sparse"):
        kx.train(model, data, optimizer=momentum, epochs=1, out=tmp_path / "momentum", progress=False)
