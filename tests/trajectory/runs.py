"""Small training problems, and the plain loops that recorded training must equal."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kxexplain.trajectory.losses import LOSSES


class Tied(nn.Module):
    """One weight used twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    return model


def sgd(**options: Any) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options})


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)


@dataclass(frozen=True)
class Case:
    """A model, an optimiser, a scheduler."""

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Any], torch.optim.Optimizer] = field(default_factory=sgd)
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    loss: str = "cross_entropy"


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1, 3], gamma=0.5)


def plateau(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.3, threshold=0.2)


def one_minus(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))


CASES = {
    "mlp": Case(),
    "mse": Case(loss="mse"),
    "dropout": Case(dropout),
    "batch norm": Case(batch_norm),
    "tied": Case(Tied),
    "frozen": Case(frozen),
    "weight decay": Case(optimizer=sgd(weight_decay=0.05)),
    "momentum": Case(optimizer=sgd(momentum=0.9, nesterov=True)),
    "adamw, dropout": Case(dropout, adamw),
    "steps": Case(dropout, scheduler=halving),
    "plateau": Case(batch_norm, sgd(momentum=0.5), plateau),
    "lambda": Case(Tied, adamw, one_minus),
}


def examples(n: int = 22, dtype: torch.dtype = torch.float32, loss: str = "cross_entropy") -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(n, 6, generator=generator, dtype=dtype)
    if loss == "mse":
        return TensorDataset(inputs, torch.randn(n, 3, generator=generator, dtype=dtype))
    return TensorDataset(inputs, torch.randint(0, 3, (n,), generator=generator))


def build(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """Model, optimiser and scheduler, the same each time."""
    torch.manual_seed(11)
    model = case.model().to(dtype)
    optimizer = case.optimizer(model.parameters())
    return model, optimizer, case.scheduler and case.scheduler(optimizer)


def order(n: int, seed: int, epoch: int) -> Tensor:
    """The order that ``kx.train`` documents: a function of (seed, epoch)."""
    mixed = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0]
    return torch.randperm(n, generator=torch.Generator().manual_seed(int(mixed)))


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    data: TensorDataset,
    *,
    loss: str = "cross_entropy",
    epochs: int = 3,
    batch_size: int = 4,
    seed: int = 3,
    after: Callable[[Tensor, Tensor, int], None] = lambda indices, loss, epoch: None,
) -> None:
    """Training written out by hand."""
    torch.manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        losses = []
        for indices in order(len(data), seed, epoch).split(batch_size):
            inputs, targets = data[indices]
            optimizer.zero_grad()
            value = LOSSES[loss](model(inputs), targets).mean()
            value.backward()
            optimizer.step()
            losses.append(value.item())
            after(indices, value, epoch)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(sum(losses) / len(losses))
        elif scheduler is not None:
            scheduler.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict(keep_vars=True).items()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bitwise equal, and of the same names."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def parameters_of(state: Any) -> dict[str, Tensor]:
    return {**state.parameters, **state.buffers}


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: t.detach().clone() for name, t in tensors.items()}


def unchecked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as users have it, without the type checks of the tests."""
    return inspect.unwrap(function)
