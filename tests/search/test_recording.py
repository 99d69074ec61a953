"""Features collected while training are those of a replay, and training is what it was without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.errors import ArgumentError
from kxexplain.search import GradientIndex, delayed


def setting(dropout: float = 0.3) -> tuple[nn.Module, TensorDataset, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))
    data = TensorDataset(torch.randn(23, 5), torch.randint(3, (23,)))
    groups = [
        {"params": model[0].parameters(), "lr": 0.3},
        {"params": [*model[1].parameters(), *model[4].parameters()]},
    ]
    return model, data, torch.optim.SGD(groups, lr=0.1, weight_decay=0.01)


def trained(out: Path, **options: Any) -> tuple[kx.Trajectory, nn.Module, TensorDataset]:
    model, data, sgd = setting()
    options = {"epochs": 3, "batch_size": 4, "clip_norm": 1.0} | options
    return kx.train(model, data, optimizer=sgd, out=out, progress=False, **options), model, data


@pytest.mark.parametrize("keep", ["epoch", 4])
def test_as_replayed(keep: Any, tmp_path: Path) -> None:
    parts = trained(tmp_path / "a", features=600, keep=keep)
    without = trained(tmp_path / "b", keep=keep)
    for name, value in parts[1].state_dict().items():
        torch.testing.assert_close(value, without[1].state_dict()[name])
    loaded = GradientIndex.load(tmp_path / "a" / "index", *parts)
    built = GradientIndex.build(*parts, dim=600)
    torch.testing.assert_close(loaded.features, built.features, rtol=1e-3, atol=1e-6)
    assert torch.equal(loaded.labels, parts[2].tensors[1])
    assert float(built.features.norm()) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "adagrad_norm"},
        {"objective": kx.Objective(flooding=1.05)},
        {"objective": kx.Objective(parameter_penalty=0.01)},
        {"schedule": "warmup_decay", "objective": kx.Objective(ascent=0.5)},
    ],
    ids=lambda options: "-".join(options),
)
def test_under_schedules_and_objectives(options: dict[str, Any], tmp_path: Path) -> None:
    """The rate is known when the step is made, and what a step was multiplied by counts."""
    parts = trained(tmp_path, features=200, clip_norm=None, **options)
    loaded = GradientIndex.load(tmp_path / "index", *parts)
    torch.testing.assert_close(loaded.features, GradientIndex.build(*parts, dim=200).features, rtol=1e-3, atol=1e-6)


MOMENTS = {
    "momentum": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.1, weight_decay=0.01),
    "nesterov": lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.1, nesterov=True),
    "adam": lambda g: torch.optim.Adam(g, lr=0.01, betas=(0.1, 0.9)),
    "amsgrad": lambda g: torch.optim.AdamW(g, lr=0.01, betas=(0.1, 0.9), amsgrad=True),
    "rmsprop": lambda g: torch.optim.RMSprop(g, lr=0.01, momentum=0.1, centered=True),
    "adagrad": lambda g: torch.optim.Adagrad(g, lr=0.1),
}


@pytest.mark.parametrize(
    "name", [n if n in ("nesterov", "adam") else pytest.param(n, marks=pytest.mark.slow) for n in MOMENTS]
)
def test_under_optimisers_that_remember(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 steps, segments of four; a step waits for nine others: what it leaves of a gradient at 0.1 is then 1e-9."""
    handed: list[int] = []
    hand_on = delayed.Delayed._hand_on
    monkeypatch.setattr(
        delayed.Delayed, "_hand_on", lambda self, count: (handed.append(count), hand_on(self, count))
    )  # fmt: skip
    model, data, _ = setting()
    optimizer = MOMENTS[name](
        [{"params": model[0].parameters(), "lr": 0.02}, {"params": [*model[1].parameters(), *model[4].parameters()]}]
    )
    build = GradientIndex.build
    monkeypatch.setattr(GradientIndex, "build", None)  # a second pass would fail
    trajectory = kx.train(
        model, data, optimizer=optimizer, epochs=4, batch_size=4, keep=4, clip_norm=1.0, features=600, out=tmp_path,
        progress=False,
    )  # fmt: skip
    loaded = GradientIndex.load(tmp_path / "index", trajectory, model, data)
    built = build(trajectory, model, data, dim=600)
    assert handed == ([1] * 24 + [0] if name == "adagrad" else [10, 14])
    largest = float(built.features.abs().max())
    torch.testing.assert_close(loaded.features, built.features, rtol=1e-3, atol=1e-5 * largest)


def test_steps_that_take_too_much_memory_are_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed, "HELD", 10**5)
    model, data, _ = setting()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with pytest.warns(UserWarning, match=r"198 steps of SGD have to be held.* by a replay"):
        trajectory = kx.train(
            model, data, optimizer=sgd, epochs=2, batch_size=4, features=64, out=tmp_path, progress=False
        )
    loaded = GradientIndex.load(tmp_path / "index", trajectory, model, data)
    torch.testing.assert_close(loaded.features, GradientIndex.build(trajectory, model, data, dim=64).features)


def test_a_resumed_run_is_completed_by_replay(tmp_path: Path) -> None:
    trained(tmp_path, epochs=2)
    parts = trained(tmp_path, features=64, resume=True)
    loaded = GradientIndex.load(tmp_path / "index", *parts)
    torch.testing.assert_close(loaded.features, GradientIndex.build(*parts, dim=64).features, rtol=1e-3, atol=1e-6)
    again = trained(tmp_path, features=64, resume=True)
    assert len(GradientIndex.load(tmp_path / "index", *again)) == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.Rprop}, "Rprop are not divided"),
        ({"keep": "1MB"}, "thinned out"),
        ({"dim": 3}, "dim=3"),
        ({"objective": kx.Objective(input_penalty=0.1)}, "input penalty"),
    ],
    ids=str,
)
def test_refused_before_training(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, data, _ = setting()
    sgd = options.get("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1)
    with pytest.raises(ArgumentError, match=message):
        kx.train(
            model, data, optimizer=sgd, epochs=1, out=tmp_path / "run", keep=options.get("keep", "epoch"),
            features=options.get("dim", 64), objective=options.get("objective"),
        )  # fmt: skip
    assert not (tmp_path / "run").exists()
