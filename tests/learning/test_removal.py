"""Training examples taken out: subtraction against the bill's own sums, retraining against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@pytest.fixture
def data() -> TensorDataset:
    x = torch.randn(20, 4, dtype=torch.float64)
    return TensorDataset(x, (x[:, :3]).argmax(1))


def trained(model: nn.Module, data: Any, out: Path, **options: Any) -> kx.Trajectory:
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    return kx.train(model, data, optimizer=sgd, epochs=3, batch_size=5, out=out / "run", progress=False, **options)


def loop(run: kx.Trajectory, data: TensorDataset, without: set[int]) -> nn.Module:
    """The recorded batches, less some examples, in a training loop of one's own."""
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
    for t in range(len(run)):
        left = [i for i in run.steps[t].indices.tolist() if i not in without]
        if left:
            x, y = (tensor[left] for tensor in data.tensors)
            sgd.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            sgd.step()
    return model


@pytest.mark.parametrize("without", [[], [3], [0, 7, 19], list(range(12))])
def test_retraining_is_the_loop_without_them(data: TensorDataset, tmp_path: Path, without: list[int]) -> None:
    model = network()
    run = trained(model, data, tmp_path)
    found = kx.retrain(run, model, data, without)
    expected = loop(run, data, set(without))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    if not without:
        for ours, theirs in zip(found.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_subtraction_and_retraining_side_by_side(data: TensorDataset, tmp_path: Path) -> None:
    model, queries = network(), torch.randn(8, 4, dtype=torch.float64)
    run = trained(model, data, tmp_path)
    found = kx.compare_removal(run, model, data, [2, 5], queries)
    bill = kx.explain(run, model, data, queries)
    torch.testing.assert_close(found.subtracted, bill.prediction - bill.contributions[:, 2] - bill.contributions[:, 5])
    outputs: Tensor = loop(run, data, {2, 5})(queries).detach()
    torch.testing.assert_close(found.retrained, outputs.gather(1, model(queries).argmax(1)[:, None])[:, 0])
    changes = torch.stack([found.subtracted - found.prediction, found.retrained - found.prediction])
    assert found.correlation == pytest.approx(float(torch.corrcoef(changes)[0, 1]))
    slope = torch.linalg.lstsq(changes[:1].T, changes[1:].T).solution
    assert found.ratio == pytest.approx(float(slope))
    assert "correlation" in str(found)


def test_wrong_examples_and_runs(data: TensorDataset, tmp_path: Path) -> None:
    model = network()
    run = trained(model, data, tmp_path, clip_norm=0.01)
    bill = kx.explain(run, model, data, data.tensors[0][:2])
    for wrong, message in (
        ([20], "reach from 20"),
        ([1, 1], "twice"),
        ([-1], "reach from -1"),
        ([0.5], "whole numbers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            kx.subtract(bill, wrong)
        with pytest.raises(ArgumentError, match=message):
            kx.retrain(run, model, data, wrong)
    with pytest.raises(ArgumentError, match="clipped"):
        kx.retrain(run, model, data, [0])
    with pytest.raises(ArgumentError, match="target='loss'"):
        kx.compare_removal(run, model, data, [0], data.tensors[0][:2], "loss")
