"""The additive guess: exact for one step of a linear model, and as wrong as it is elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError


def halves(make: type | object, loss: str, epochs: int, rate: float, out: Path, seeds: tuple[int, ...] = (0, 0, 0)):  # type: ignore[no-untyped-def]
    """Trainings on both halves and on everything, where a step's sum over examples counts alike."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(12, 3, generator=generator, dtype=torch.float64), torch.arange(12) % 2 * torch.ones(12).long()
    )
    runs = []
    for number, (rows, seed) in enumerate(zip((range(6), range(6, 12), range(12)), seeds, strict=True)):
        torch.manual_seed(seed)
        model = make()  # type: ignore[operator]
        part = Subset(data, rows)
        scale = len(rows) / 6  # a mean over twice as many examples, at twice the rate
        sgd = torch.optim.SGD(model.parameters(), lr=rate * scale)
        runs.append(
            kx.train(model, part, loss, sgd, epochs=epochs, batch_size=12, out=out / str(number), progress=False)
        )
    return runs, model, data


def test_one_step_from_anywhere_is_additive_for_a_linear_model(tmp_path: Path) -> None:
    runs, model, data = halves(lambda: nn.Linear(3, 2).double(), "cross_entropy", 1, 0.3, tmp_path)
    found = kx.additive_guess(*runs, model, data.tensors[0])
    torch.testing.assert_close(found.guess, found.whole)
    assert found.error < 1e-12
    assert found.agreement == 1


def test_more_steps_are_not(tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()  # noqa: E731
    runs, model, data = halves(make, "cross_entropy", 30, 0.3, tmp_path)
    found = kx.additive_guess(*runs, model, data.tensors[0])
    outputs = []
    for run, at in ((runs[0], 0), (runs[0], -1), (runs[1], -1), (runs[2], -1)):
        model.load_state_dict(dict(run.state(run.states[at].step).parameters))
        outputs.append(model(data.tensors[0]).detach())
    start, first, second, whole = outputs
    wrong = first + second - start - whole
    assert found.error == pytest.approx(float(wrong.norm() / (whole - start).norm()))
    assert 0.05 < found.scaled_error <= found.error
    assert set(found.summary(data.tensors[1])) >= {"guess_accuracy", "whole_accuracy"}


def test_other_beginnings_are_refused(tmp_path: Path) -> None:
    runs, model, data = halves(lambda: nn.Linear(3, 2).double(), "cross_entropy", 1, 0.3, tmp_path, (0, 1, 0))
    with pytest.raises(ArgumentError, match="same initial model"):
        kx.additive_guess(*runs, model, data.tensors[0])
