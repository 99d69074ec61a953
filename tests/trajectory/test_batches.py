from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

from kxexplain.errors import ArgumentError, DatasetError, ModelError
from kxexplain.trajectory import fingerprints
from kxexplain.trajectory.batches import call, count, fetch, outputs_2d, take
from kxexplain.trajectory.fingerprints import fingerprint

X = torch.randn(11, 2, 3, generator=torch.Generator().manual_seed(0))
Y = torch.arange(11) % 3


class Listed(Dataset):
    """The same examples, served one by one and as arrays and numbers."""

    def __init__(self, x=X, y=Y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i].numpy(), int(self.y[i])


SAME = {
    "tensors": TensorDataset(X, Y),
    "listed": Listed(),
    "list": [(X[i], int(Y[i])) for i in range(11)],
    "subset": Subset(TensorDataset(X.flip(0), Y.flip(0)), list(range(10, -1, -1))),
    "array subset": Subset(TensorDataset(X.flip(0), Y.flip(0)), np.arange(10, -1, -1)),
    "nested": Subset(Subset(TensorDataset(X, Y), torch.arange(10, -1, -1)), list(range(10, -1, -1))),
    "listed subset": Subset(Listed(), range(11)),
}


@pytest.mark.parametrize("data", SAME.values(), ids=SAME.keys())
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_fetch_gives_the_rows_asked_for(data, kind):
    inputs, targets = fetch(data, kind([7, 0, 7]))
    assert torch.equal(inputs, X[[7, 0, 7]])
    assert torch.equal(targets, Y[[7, 0, 7]])


def test_fetch_moves_nested_inputs():
    data = [(({"a": X[i]}, X[i]), 1.0) for i in range(3)]
    (first, second), targets = fetch(data, [0, 2], device="meta")
    assert first["a"].device.type == second.device.type == targets.device.type == "meta"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (TensorDataset(X), "1 parts"),
        (TensorDataset(X, X, Y), "3 parts"),
        ([X[0]], "Tensor"),
        ([(X[0], "cat")], "targets"),
        ([(X[0], 1), (X[0, 0], 1)], "same shape"),
    ],
)
def test_what_is_no_pair_is_refused(data, words):
    with pytest.raises(DatasetError, match=words):
        fetch(data, range(len(data)))


def test_fetching_nothing_is_refused():
    with pytest.raises(ArgumentError, match="no indices"):
        fetch(TensorDataset(X, Y), [])


class Two(nn.Module):
    def forward(self, a, b):
        return a - b


def test_call_spreads_tuples_and_dicts():
    a, b = torch.rand(4, 2), torch.rand(4, 2)
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        assert torch.equal(call(Two(), inputs), a - b)


@pytest.mark.parametrize("wrong", [lambda x: (x,), lambda x: x.sum(), lambda x: {"logits": x}])
def test_call_refuses_other_outputs(wrong):
    model = nn.Identity()
    model.forward = wrong
    with pytest.raises(ModelError, match="one row per example"):
        call(model, torch.ones(2, 2))


def test_take_and_count_of_nested_inputs():
    inputs = ({"a": X}, [Y])
    assert count(inputs) == 11
    for rows in (slice(2, 4), torch.tensor([2, 3])):
        first, second = take(inputs, rows)
        assert torch.equal(first["a"], X[2:4])
        assert torch.equal(second[0], Y[2:4])
    with pytest.raises(DatasetError, match="agree"):
        count((X, Y[:3]))


@pytest.mark.parametrize(("shape", "expected"), [((4,), (4, 1)), ((4, 2), (4, 2)), ((4, 2, 3), (4, 6))])
def test_outputs_2d(shape, expected):
    assert outputs_2d(torch.zeros(shape)).shape == expected


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("data", SAME.values(), ids=SAME.keys())
def test_fingerprint_depends_on_the_examples_alone(data, chunk, monkeypatch):
    expected = fingerprint(SAME["tensors"])
    monkeypatch.setattr(fingerprints, "CHUNK_BYTES", chunk)
    assert fingerprint(data) == expected


def changed(**at):
    x = X.clone()
    x[at["row"], 0, 0] += at["by"]
    return TensorDataset(x, Y)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (TensorDataset(X[:-1], Y[:-1]), "10 examples instead of 11"),
        (TensorDataset(X.flip(0), Y.flip(0)), "another order"),
        (Subset(TensorDataset(X, Y), [1, 0, *range(2, 11)]), "another order"),
        (TensorDataset(-X, Y), "other contents"),
        (TensorDataset(X, Y.flip(0)), "other contents"),
        (TensorDataset(X.double(), Y), "other contents"),
        (TensorDataset(X.reshape(11, 6), Y), "other contents"),
        (changed(row=10, by=1e-6), "other contents"),
    ],
)
def test_fingerprint_says_what_differs(other, words):
    assert words in fingerprint(TensorDataset(X, Y)).difference(fingerprint(other))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.bool])
def test_negated_values_are_other_contents(dtype):
    x = torch.arange(1, 45).reshape(11, 4).to(dtype)
    negated = ~x if dtype == torch.bool else -x if dtype != torch.uint8 else 255 - x
    one, two = fingerprint(TensorDataset(x, Y)), fingerprint(TensorDataset(negated, Y))
    assert one.unordered != two.unordered
    assert one.ordered != two.ordered


def test_repeated_examples_count():
    one, two = Subset(TensorDataset(X, Y), [0, 0, 1]), Subset(TensorDataset(X, Y), [0, 1, 1])
    assert "other contents" in fingerprint(one).difference(fingerprint(two))


def test_nested_examples_and_odd_sizes():
    rows = [({"b": X[i, 0], "a": np.uint8(i)}, True) for i in range(5)]
    reordered = [({"a": np.uint8(i), "b": X[i, 0]}, True) for i in range(5)]
    assert fingerprint(rows) == fingerprint(reordered)
    assert fingerprint([(torch.zeros(0), i) for i in range(3)]).count == 3


class Noisy(Listed):
    """Draws noise for some of its examples: from torch's generator, or as told."""

    def __init__(self, draw=lambda: torch.rand(1), among=range(11)):
        super().__init__()
        self.draw, self.among = draw, among

    def __getitem__(self, i):
        return self.x[i] + (self.draw() if i in self.among else 0), int(self.y[i])


OWN = torch.Generator()
NOT_REPLAYABLE = {
    "numpy": lambda: float(np.random.rand()),  # noqa: NPY002
    "python": random.random,
    "a generator of its own": lambda: torch.rand(1, generator=OWN),
}


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("among", [range(11), [7]])
def test_fingerprint_of_a_random_dataset(among, chunk, monkeypatch):
    """The same from any state of the generator, which stays as it was, in any order and portions."""
    expected = fingerprint(Noisy(among=among))
    monkeypatch.setattr(fingerprints, "CHUNK_BYTES", chunk)
    state = torch.get_rng_state()
    assert fingerprint(Noisy(among=among)) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert expected.random
    assert not fingerprint(Listed()).random
    turned = Subset(Noisy(among=among), list(range(10, -1, -1)))
    assert expected.difference(fingerprint(turned)) == "the same examples in another order"
    assert "other contents" in expected.difference(fingerprint(Noisy(lambda: 2 * torch.rand(1), among)))
    for one, two, words in ((expected, fingerprint(Listed()), "always"), (fingerprint(Listed()), expected, "drawn")):
        assert one.difference(two).startswith(f"as many examples, but {words}")


class Endless(IterableDataset):
    def __iter__(self):
        yield X[0], 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        *((Noisy(draw), "random augmentation.*torch's global generator") for draw in NOT_REPLAYABLE.values()),
        (Endless(), "no length"),
        (TensorDataset(X[:0], Y[:0]), "empty"),
        ([], "empty"),
        (TensorDataset(X), "pair"),
        ([("text", 1)], "expected tensors"),
        ([(X[i], i) if i < 9 else (X[i].double(), i) for i in range(11)], "shape or type"),
    ],
)
def test_datasets_that_cannot_be_trained_on(data, words, monkeypatch):
    monkeypatch.setattr(fingerprints, "CHUNK_BYTES", 1)
    with pytest.raises(DatasetError, match=words):
        fingerprint(data)
