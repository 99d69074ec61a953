"""The table of ways to take new examples in: each row against the same done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError, DatasetError


@pytest.fixture
def recorded(tmp_path: Path) -> Any:
    torch.manual_seed(0)
    data = kx.datasets.toy(60)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    run = kx.train(model, data.train, optimizer=sgd, epochs=3, batch_size=10, out=tmp_path / "run", progress=False)
    x, y = data.test.tensors
    return run, model, start, data.train, TensorDataset(x[:20] + 0.3, y[:20]), data.test, TensorDataset(x + 0.3, y)


def correct(outputs: Tensor, data: TensorDataset) -> float:
    return float((outputs.argmax(1) == data.tensors[1]).double().mean())


def test_rows_are_what_they_say(recorded: Any) -> None:
    run, model, start, old, new, old_test, new_test = recorded
    found = kx.compare_updates(run, model, old, new, old_test, new_test, memory=8, options={"damping": 0.2}, seed=3)
    assert found["no update"].new == correct(model(new_test.tensors[0]), new_test)
    kept = torch.randperm(60, generator=torch.Generator().manual_seed(3))[:8].tolist()
    for rule in ("gradient", "ridge", "logistic"):
        for memory, name in ((None, rule), (Subset(old, kept), f"{rule}, memory")):
            learner = kx.IncrementalModel(model, rule=rule, damping=0.2, rate=0.5, memory=memory)
            learner.learn(*new.tensors)
            assert found[name].new == correct(learner(new_test.tensors[0]), new_test)
            assert found[name].old == correct(learner(old_test.tensors[0]), old_test)
            moved = sum(float(v.square().sum()) for v in learner.vector().values()) ** 0.5
            size = sum(float(p.detach().double().square().sum()) for p in model.parameters()) ** 0.5
            assert found[name].moved == pytest.approx(moved / size, rel=1e-5)
    again = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
    again.load_state_dict(start)
    x, y = (torch.cat([a, b]) for a, b in zip(old.tensors, new.tensors, strict=True))
    draw, sgd = torch.Generator().manual_seed(3), torch.optim.SGD(again.parameters(), lr=0.5)
    for _ in range(3):
        for rows in torch.randperm(80, generator=draw).split(10):
            sgd.zero_grad()
            nn.functional.cross_entropy(again(x[rows]), y[rows]).backward()
            sgd.step()
    assert found["retraining"].new == correct(again(new_test.tensors[0]), new_test)
    assert found["retraining"].old == correct(again(old_test.tensors[0]), old_test)
    assert "fine-tuning" in str(found)
    assert [row["name"] for row in found.summary()][-1] == "retraining"


def test_what_cannot_be_compared(recorded: Any) -> None:
    run, model, _, old, new, old_test, new_test = recorded
    with pytest.raises(ArgumentError, match="expected some of"):
        kx.compare_updates(run, model, old, new, old_test, new_test, rows=["svm"])
    with pytest.raises(DatasetError):
        kx.compare_updates(run, model, new, new, old_test, new_test)
    numbers = TensorDataset(new.tensors[0], new.tensors[0])
    with pytest.raises(DatasetError, match="class numbers"):
        kx.compare_updates(run, model, old, numbers, old_test, new_test)
