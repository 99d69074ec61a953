"""Examples' own inputs stay in the batches that the dataset served: when they are joined, and that nobody can tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import kxexplain as kx
from kxexplain.attribution.decompose import contributions_of
from kxexplain.gradients import pile
from kxexplain.gradients.factors import Outer
from tests.laws import assert_same_bill

EXAMPLES, EPOCHS = 12, 4
PRODUCTS = 8 * EXAMPLES * 3
"""Bytes of all products of the examples' inputs with three queries'."""


class Augmented(Dataset[Any]):
    """Another input each time."""

    def __init__(self, plain: TensorDataset) -> None:
        self.plain = plain

    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = self.plain[index]
        return x + 0.1 * torch.randn_like(x), y


def trained(folder: Path, data: Any) -> tuple[kx.Trajectory, nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    trajectory = kx.train(
        model, data, optimizer=torch.optim.SGD(model.parameters(), lr=0.3), epochs=EPOCHS, batch_size=5, out=folder,
        progress=False,
    )  # fmt: skip
    return trajectory, model, torch.randn(3, 6, dtype=torch.float64)


def plain() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(EXAMPLES, 6, dtype=torch.float64), torch.arange(EXAMPLES) % 3)


@pytest.fixture
def joins(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many examples' inputs were joined, each time."""
    found: list[int] = []
    joining = pile._joining

    def counting(batches: list[tuple[Tensor, int]]) -> Any:
        def join() -> Tensor:
            found.append(sum(len(batch) for batch, _ in batches))
            return joining(batches)()

        return join

    monkeypatch.setattr(pile, "_joining", counting)
    return found


@pytest.mark.parametrize("target", ["predicted", "all"])
def test_joined_in_the_first_epoch_only(target: str, tmp_path: Path, joins: list[int]) -> None:
    data = plain()
    trajectory, model, queries = trained(tmp_path, data)
    explanation = kx.explain(trajectory, model, data, queries, target)
    assert joins == [EXAMPLES]
    assert explanation.remainder.abs().max() < 1e-12


@pytest.mark.parametrize(("memory", "epochs"), [(8 * PRODUCTS, 1), (8 * PRODUCTS - 1, EPOCHS), (1, EPOCHS)])
def test_little_memory(memory: int, epochs: int, tmp_path: Path, joins: list[int]) -> None:
    """Every step is handed over by itself; products that are not kept need the inputs in every epoch."""
    data = plain()
    trajectory, model, queries = trained(tmp_path, data)
    roomy = kx.explain(trajectory, model, data, queries)
    joins.clear()
    assert_same_bill(kx.explain(trajectory, model, data, queries, memory=memory), roomy, 1e-12)
    assert joins == [5, 5, 2] * epochs


def test_augmented_inputs_are_copied(tmp_path: Path, joins: list[int]) -> None:
    """They are others in every epoch: no product is looked up, and the bill adds up."""
    data = Augmented(plain())
    trajectory, model, queries = trained(tmp_path, data)
    assert trajectory.manifest.dataset.random
    explanation = kx.explain(trajectory, model, data, queries)
    assert joins == []
    assert explanation.remainder.abs().max() < 1e-12


def test_some_examples_only(tmp_path: Path) -> None:
    data = plain()
    trajectory, model, queries = trained(tmp_path, data)
    some = torch.tensor([7, 2, 11])
    found = contributions_of(trajectory, model, data, queries, "predicted", some)
    whole = kx.explain(trajectory, model, data, queries)
    torch.testing.assert_close(found, whole.contributions[:, some], rtol=1e-12, atol=1e-14)


def test_a_batch_that_is_overwritten_later_is_noticed() -> None:
    """By a model that keeps its last batch, say; silently, the products would be wrong."""
    batch = torch.randn(4, 6)
    made = Outer("w", "b", batch.unsqueeze(1), torch.randn(4, 1, 1, 3), raw=0)
    gathered = pile.Pile([made], 4, served=True)
    gathered.add([made], 4, 1.0)
    batch.zero_()
    (found,) = gathered.gathered()
    assert isinstance(found, Outer)
    with pytest.raises(kx.ModelError, match=r"changes a batch in place .* keep a copy"):
        _ = found.a
