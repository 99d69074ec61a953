"""Products of the examples' own inputs: which layers they are for, and that looking them up changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kxexplain.gradients import StepGradients, layout_of, trainable
from kxexplain.gradients.factors import Outer
from kxexplain.gradients.lookup import InputProducts
from kxexplain.gradients.products import inputs_met
from kxexplain.trajectory.forward import forward, gradients


def outer(a: Tensor, *, raw: int | None = 0) -> Outer:
    return Outer("weight", None, a[:, None], torch.zeros(len(a), 1, 1, 2), raw=raw)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many products were computed in each call."""
    calls: list[int] = []

    def count(f: Outer, h: Outer) -> Tensor:
        calls.append(len(f.a))
        return inputs_met(f, h)

    monkeypatch.setattr("kxexplain.gradients.lookup.inputs_met", count)
    return calls


def test_each_example_is_computed_once(counted: list[int]) -> None:
    examples, queries = torch.randn(9, 5), outer(torch.randn(3, 5))
    products = InputProducts(9, 10_000)
    for rows in ([0, 3, 3, 5], [5, 1, 0], [1, 5, 5], list(range(9)), list(range(9))):
        indices = torch.tensor(rows)
        found = products.of(indices, 0)(outer(examples[indices]), queries)
        torch.testing.assert_close(found, examples[indices] @ queries.a[:, 0].T)
        found.add_(1)  # what is done to the result does not reach the table
    assert counted == [4, 1, 5]


def test_queries_are_told_apart(counted: list[int]) -> None:
    """By portion, and by their values: another state's activations are no longer the same inputs."""
    examples, indices = torch.randn(4, 5), torch.arange(4)
    products = InputProducts(4, 10_000)
    for portion, values in ((0, torch.randn(3, 5)), (3, torch.randn(2, 5)), (0, torch.randn(3, 5))):
        found = products.of(indices, portion)(outer(examples), outer(values))
        torch.testing.assert_close(found, examples @ values.T)
    assert counted == [4, 4, 4]


def test_inputs_are_told_apart() -> None:
    """One layer applied to both inputs of an example, asked about a query whose two inputs are equal."""
    first, second, query = torch.randn(4, 5), torch.randn(4, 5), torch.randn(3, 5)
    products, indices = InputProducts(4, 10_000), torch.arange(4)
    for _ in range(2):
        for number, examples in enumerate((first, second)):
            found = products.of(indices, 0)(outer(examples, raw=number), outer(query.clone()))
            torch.testing.assert_close(found, examples @ query.T)


@pytest.mark.parametrize(("budget", "raw"), [(4 * 3 * 4 - 1, 0), (10_000, None)])
def test_what_is_not_kept(budget: int, raw: int | None, counted: list[int]) -> None:
    """Tables beyond the budget, and inputs that training may change."""
    products = InputProducts(4, budget)
    for _ in range(2):
        examples, queries = torch.randn(4, 5), torch.randn(3, 5)
        found = products.of(torch.arange(4), 0)(outer(examples, raw=raw), outer(queries))
        torch.testing.assert_close(found, examples @ queries.T)
    assert counted == [4, 4]


class Doubling(nn.Module):
    """Changes its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


FIRST = {
    "itself": (nn.Identity(), True),
    "flattened": (nn.Flatten(), True),
    "other rows": (nn.Unflatten(1, (2, 3)), False),
    "normalised": (nn.BatchNorm1d(6), False),
    "dropped": (nn.Dropout(0.5), False),
    "rectified": (nn.ReLU(), False),
    "in place": (Doubling(), False),
}


@pytest.mark.parametrize("name", list(FIRST))
def test_which_inputs_are_raw(name: str) -> None:
    first, raw = FIRST[name]
    last = nn.Flatten() if name == "other rows" else nn.Identity()
    width = 3 if name == "other rows" else 6
    model = nn.Sequential(first, nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, 2), last)
    inputs = torch.randn(5, 6)
    layout = layout_of(model, inputs.clone(), trainable(model))
    watch = StepGradients(layout, trainable(model), 5)
    result = forward(
        model, inputs, torch.zeros(5), loss=lambda f, _: f.square().sum(1), reduction="mean",
        around=watch.forward(inputs),
    )  # fmt: skip
    watch.collect(gradients(result.total, [], watch.edges(*result[:3]))[1])
    assert [f.weight for f in watch.factors if isinstance(f, Outer) and f.raw == 0] == (["1.weight"] if raw else [])
