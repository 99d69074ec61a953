"""``kx.train`` under every schedule: exact bills, interrupted runs, runs that nobody records."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kxexplain as kx
from kxexplain.learning.rates import CAUSAL, HINDSIGHT, NAMES, PLAIN
from tests.laws import assert_complete
from tests.learning.test_objectives import network
from tests.learning.test_trainer import Interrupting, assert_same_runs

SETTINGS: dict[str, Any] = {"epochs": 3, "batch_size": 5, "progress": False}


def examples(kind: type[TensorDataset] = TensorDataset) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return kind(torch.randn(22, 4, generator=draw, dtype=torch.float64), torch.randint(0, 3, (22,), generator=draw))


def described(name: str, radius: float | None = 0.5) -> kx.Schedule:
    norms = np.random.default_rng(0).uniform(0.5, 1, 15).tolist()
    return kx.Schedule(name, None if name in PLAIN else radius, norms if name in HINDSIGHT else None)


def each(names: Iterable[str], *quick: str) -> Any:
    """A parametrisation by name, of which every run takes the quick ones."""
    marked = [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", marked)


@each(NAMES, "last_iterate", "warmup_decay", "adagrad", "refined")
def test_the_bill_is_exact_under_every_schedule(name: str, tmp_path: Path) -> None:
    model, data = network(), examples()
    radius = None if name in ("warmup_decay", "adagrad") else 0.5
    trajectory = kx.train(model, data, schedule=described(name, radius), out=tmp_path, **SETTINGS)
    assert (len({step.rates for step in trajectory.steps}) == 1) == ("constant" in name)
    found = kx.explain(trajectory, model, data, data.tensors[0][:3], kernel=False)
    assert_complete(found, 1e-10)
    assert float(found.unattributed.norm()) < 1e-10 * float((found.prediction - found.baseline).norm())


@each([*CAUSAL, "adagrad", "refined", "cosine"], "last_iterate", "warmup_decay", "refined")
def test_interrupted_then_resumed_is_uninterrupted(name: str, tmp_path: Path) -> None:
    schedule = described(name, 0.5 if name in HINDSIGHT else None)
    whole = kx.train(network(), examples(), schedule=schedule, out=tmp_path / "whole", **SETTINGS)
    data = examples(Interrupting)
    data.left = 22 * 2 + 7 + 22 + 11  # the checks before training serve some
    with pytest.raises(KeyboardInterrupt):
        kx.train(network(), data, schedule=schedule, out=tmp_path / "parts", **SETTINGS)
    data.left = -1
    assert 0 < len(kx.Trajectory.open(tmp_path / "parts")) < 15
    resumed = kx.train(network(), data, schedule=schedule, out=tmp_path / "parts", resume=True, **SETTINGS)
    assert_same_runs(resumed, whole, states=False)


def test_a_run_is_gone_on_with_by_the_same_schedule_only(tmp_path: Path) -> None:
    kx.train(network(), examples(), schedule="warmup_decay", out=tmp_path, **SETTINGS)
    for schedule, epochs in (
        (None, 3),
        ("adagrad_norm", 3),
        (kx.Schedule("warmup_decay", 1.0), 3),
        ("warmup_decay", 4),
    ):
        options = {**SETTINGS, "epochs": epochs}
        with pytest.raises(kx.ArgumentError, match="another schedule"):
            kx.train(network(), examples(), schedule=schedule, out=tmp_path, resume=True, **options)


def test_a_causal_schedule_may_go_on_for_longer(tmp_path: Path) -> None:
    whole = kx.train(network(), examples(), schedule="adagrad_norm", out=tmp_path / "a", **{**SETTINGS, "epochs": 5})
    kx.train(network(), examples(), schedule="adagrad_norm", out=tmp_path / "b", **SETTINGS)
    options = {**SETTINGS, "epochs": 5}
    longer = kx.train(network(), examples(), schedule="adagrad_norm", out=tmp_path / "b", resume=True, **options)
    assert_same_runs(longer, whole, states=False)


@pytest.mark.parametrize("options", [{}, {"schedule": "warmup_decay"}, {"objective": kx.Objective(flooding=1.0)}])
def test_fit_is_train_unrecorded(options: dict[str, Any], tmp_path: Path) -> None:
    recorded, bare = network(), network()
    trajectory = kx.train(recorded, examples(), out=tmp_path, **SETTINGS, **options)
    losses = kx.fit(bare, examples(), **SETTINGS, **options)
    assert losses == [step.loss for step in trajectory.steps]
    assert all(torch.equal(p, q) for p, q in zip(recorded.parameters(), bare.parameters(), strict=True))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fit_is_a_bare_loop_of_torch_s_to_the_last_bit(loss: str, dtype: torch.dtype) -> None:
    """On the short way of a plain run, and on the long one, which a limit that never clips asks for."""
    x, y = (tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in examples().tensors)
    targets = y if loss == "cross_entropy" else nn.functional.one_hot(y, 3).to(dtype)
    losses = {"cross_entropy": nn.functional.cross_entropy, "mse": nn.functional.mse_loss}
    model, ends = network().to(dtype), []
    for options in ({}, {"clip_norm": 1e9}):
        fitted = network().to(dtype)
        kx.fit(fitted, TensorDataset(x, targets), loss, **SETTINGS, **options)
        ends.append([p.tolist() for p in fitted.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(3):
        for rows in kx.learning.run.permutation(22, 0, epoch).split(5):
            optimizer.zero_grad()
            each = losses[loss](model(x[rows]), targets[rows], reduction="none")
            (each if each.dim() == 1 else each.mean(1)).mean().backward()
            optimizer.step()
    assert ends[0] == ends[1] == [p.tolist() for p in model.parameters()]


def test_fit_fails_in_words() -> None:
    calls = []

    def failing(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return nn.functional.cross_entropy(outputs, targets, reduction="none") / (len(calls) < 6)

    with pytest.raises(kx.TrainingError, match="the model holds the weights from before it"):
        kx.fit(network(), examples(), failing, **SETTINGS)
    with pytest.raises(kx.ArgumentError, match="epochs must be an integer"):
        kx.fit(network(), examples(), epochs=0)


def test_a_refined_run_takes_norms_and_radius_from_the_earlier_one(tmp_path: Path) -> None:
    earlier = kx.train(network(), examples(), schedule="adagrad_norm", out=tmp_path / "a", **SETTINGS)
    later = kx.train(
        network(), examples(), schedule=kx.Schedule("refined", earlier=earlier), out=tmp_path / "b", **SETTINGS
    )
    start, states = earlier.state(0).parameters, [earlier.state(s.step).parameters for s in earlier.states]
    distances = [sum((s[n] - start[n]).square().sum().item() for n in s) ** 0.5 for s in states]
    norms = np.array([step.gradient_norm for step in earlier.steps])
    expected = max(distances) * kx.learning.rates.refined(norms)
    np.testing.assert_allclose([step.rates[0] for step in later.steps], expected, rtol=1e-10)


def test_the_rates_of_ones_own_recorded_loop_are_logged(tmp_path: Path) -> None:
    """Also where the schedule comes after the recorder."""
    model, data = network(), examples()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with kx.record(model, optimizer, "cross_entropy", data, out=tmp_path, norms=True) as recorder:
        kx.GradientSchedule(optimizer, kx.Schedule("adagrad_norm", radius=0.5))
        for step in range(6):
            indices = torch.arange(step, step + 8)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.tensors[0][indices]), data.tensors[1][indices]).backward()
            optimizer.step()
            recorder.step(indices)
    norms = np.array([step.gradient_norm for step in recorder.trajectory.steps])
    rates = [step.rates[0] for step in recorder.trajectory.steps]
    np.testing.assert_allclose(rates, 0.5 / np.sqrt(np.cumsum(norms**2)), rtol=1e-12)
    assert_complete(kx.explain(recorder.trajectory, model, data, data.tensors[0][:2]), 1e-10)


def test_wrong_combinations_come_before_work(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for options, message in (
        ({"schedule": "adagrad_norm", "scheduler": steps, "optimizer": optimizer}, "exclude each other"),
        ({"schedule": "fast"}, "unknown schedule 'fast'"),
        ({"schedule": "refined"}, "give earlier="),
        ({"schedule": "adagrad", "optimizer": optimizer}, r"give a torch\.optim\.Adagrad"),
        ({"schedule": kx.Schedule("refined", 1.0, [1.0, 2.0])}, "the earlier run has 2 steps, and this one 15"),
    ):
        with pytest.raises(kx.ArgumentError, match=message):
            kx.train(model, examples(), out=tmp_path / "run", **SETTINGS, **options)
        assert not (tmp_path / "run").exists()
    model.zero_grad()
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1  # no hook was left behind


def test_what_the_manifest_notes_is_checked(tmp_path: Path) -> None:
    kx.train(network(), examples(), objective=kx.Objective(input_penalty=0.1), out=tmp_path, **SETTINGS)
    trajectory = kx.Trajectory.open(tmp_path)
    assert trajectory.manifest.settings["objective"] == {"input_penalty": 0.1}
    text = json.loads((tmp_path / "manifest.json").read_text())
    text["settings"]["objective"] = {"input_penalty": -1}
    manifest = type(trajectory.manifest).from_json(json.dumps(text))
    with pytest.raises(kx.TrajectoryError, match="objective is"):
        kx.Objective.noted(manifest.settings)
