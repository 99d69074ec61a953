"""A trained network and its index, shared by the tests of the search."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.search import GradientIndex

COPIES = 20


class Trained(NamedTuple):
    trajectory: kx.Trajectory
    model: nn.Module
    data: TensorDataset
    queries: TensorDataset


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small network on 420 digits, the last twenty being copies of the first."""
    split = kx.datasets.digits()
    inputs, labels = split.train[:400]
    data = TensorDataset(torch.cat([inputs, inputs[:COPIES]]), torch.cat([labels, labels[:COPIES]]))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    sgd = torch.optim.SGD(model.parameters(), lr=0.2)
    folder = tmp_path_factory.mktemp("digits")
    trajectory = kx.train(model, data, optimizer=sgd, epochs=5, batch_size=30, out=folder, progress=False)
    return Trained(trajectory, model, data, TensorDataset(*split.test[:12]))


@pytest.fixture(scope="session")
def index(digits: Trained) -> GradientIndex:
    return GradientIndex.build(*digits[:3], dim=1024)
